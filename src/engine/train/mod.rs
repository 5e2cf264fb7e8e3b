//! The step loop: data, forward, backward, update, checkpoint; the engine's door.

pub mod bind;
pub mod order;
pub mod session;

use crate::domain::{
    Event, RunSpec,
    progress::{DataSummary, Evaluation, StepMetrics, WrittenCheckpoint},
};

use super::error::Result;

/// Who listens to a run, and may ask it to stop.
pub trait Observer {
    fn event(&mut self, event: Event);
    fn data(&mut self, summary: &DataSummary);
    fn step(&mut self, metrics: &StepMetrics);
    fn evaluation(&mut self, evaluation: &Evaluation);
    /// The folder is complete: written aside, synced, renamed.
    fn checkpoint(&mut self, checkpoint: &WrittenCheckpoint);
    /// Asked between steps.
    fn stop_wanted(&self) -> Option<Stop>;
}

/// A wish to end a run early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stop {
    /// Write a checkpoint first.
    pub checkpoint: bool,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Every step was done; the last checkpoint reported is the result. After `inspect_only`: the data was read.
    Finished { trained_tokens: u64 },
    /// Ended early, as asked, after this step.
    Stopped { step: u64 },
}

/// Trains one job on this machine, from its data files to its last checkpoint.
pub fn train(run: &RunSpec, observer: &mut dyn Observer) -> Result<Outcome> {
    let _ = (run, observer);
    unimplemented!("lands with the model")
}
