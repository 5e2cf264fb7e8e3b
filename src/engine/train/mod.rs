//! The step loop: data, forward, backward, update, checkpoint; the engine's door.

pub mod bind;
mod job;
pub mod order;
mod prepare;
pub mod saved;
pub mod session;

pub use job::Progress;

use super::{backend::cpu::Cpu, checkpoint::huggingface, error::Result};
use crate::domain::{
    Event, ModelConfig, RunSpec,
    progress::{DataSummary, Evaluation, StepMetrics, WrittenCheckpoint},
    training::Precision,
};

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
    job::prepare(&run.work_dir)?;
    let config = ModelConfig::from_config_text(&huggingface::config_text(&run.model)?)?;
    let (data, plan) = prepare::data_and_plan(run, &config, observer)?;
    observer.data(&prepare::summary(&data));
    if run.inspect_only {
        return Ok(Outcome::Finished { trained_tokens: 0 });
    }
    prepare::announce(&plan, &config, run, observer);
    let threads = std::thread::available_parallelism().map_or(1, Into::into);
    match run.training.precision {
        Precision::F32 => job::train(Cpu::<f32>::new(threads)?, run, &config, &plan, &data, observer),
        Precision::Bf16 => job::train(Cpu::<half::bf16>::new(threads)?, run, &config, &plan, &data, observer),
    }
}
