//! The step loop: data, forward, backward, update, checkpoint; the engine's door.

pub mod bind;
mod gather;
mod job;
pub mod order;
mod prepare;
mod ranks;
pub mod saved;
pub mod session;

pub use job::Progress;

use super::{backend::cuda::Cuda, checkpoint::huggingface, comm::Groups, error::Result};
use crate::domain::{
    Event, Invalid, ModelConfig, RunSpec,
    machine::DeviceKind,
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
    config.check_on(run.machine.device)?;
    run.training.check_ranks(&config, run.machine.device)?;
    let (data, plan) = prepare::data_and_plan(run, &config, observer)?;
    observer.data(&prepare::summary(&data));
    if run.inspect_only {
        return Ok(Outcome::Finished { trained_tokens: 0 });
    }
    match (run.machine.device, plan.precision) {
        (DeviceKind::Cpu, Precision::F32) => ranks::train::<f32>(run, &config, &plan, &data, observer),
        (DeviceKind::Cpu, Precision::Bf16) => ranks::train::<half::bf16>(run, &config, &plan, &data, observer),
        (DeviceKind::Cuda, Precision::Bf16) => {
            let gpu = Cuda::open(run.gpu, &run.libraries)?;
            job::train(gpu, Groups::alone(), run, &config, &plan, &data, observer)
        }
        (DeviceKind::Cuda, Precision::F32) => {
            let message = "a GPU trains in bf16: leave training.precision out, or set training.device to cpu";
            Err(Invalid::new("training.precision", message).into())
        }
    }
}
