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

use std::{num::NonZero, thread};

use super::{
    backend::{
        Backend,
        cpu::{Cpu, element::Storage},
        cuda::Cuda,
    },
    checkpoint::huggingface,
    comm::nccl::Nccl,
    error::Result,
};
use crate::domain::{
    Event, Invalid, ModelConfig, RunSpec,
    machine::DeviceKind,
    progress::{DataSummary, Evaluation, StepMetrics, WrittenCheckpoint},
    training::Precision,
};

/// Who listens to a run, and may ask it to stop.
pub trait Observer {
    /// Rank 0 of several listens for the others here, as `host:port`.
    fn meeting(&mut self, _address: &str) {}
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

/// Trains a run as one of its ranks, from its data files to its last checkpoint; or reads its data only. The outcome is the same
/// on every rank, and what the others tell their observers is nothing that rank 0 does not tell.
pub fn train(run: &RunSpec, observer: &mut dyn Observer) -> Result<Outcome> {
    job::prepare(&run.work_dir)?;
    let config = ModelConfig::from_config_text(&huggingface::config_text(&run.model)?)?;
    config.check_on(run.machine.device)?;
    run.training.check_ranks(&config)?;
    if run.inspect_only {
        let (data, _) = prepare::settle(run, &config, observer)?;
        observer.data(&prepare::summary(&data));
        return Ok(Outcome::Finished { trained_tokens: 0 });
    }
    match (run.machine.device, run.training.precision_on(run.machine.device)) {
        (DeviceKind::Cpu, Precision::F32) => on_cpu::<f32>(run, &config, observer),
        (DeviceKind::Cpu, Precision::Bf16) => on_cpu::<half::bf16>(run, &config, observer),
        (DeviceKind::Cuda, Precision::Bf16) => {
            let open = || Cuda::open(run.gpu, &run.libraries);
            ranks::train(run, &config, observer, open, |cuda, comm| Nccl::new(cuda, comm, &run.libraries))
        }
        (DeviceKind::Cuda, Precision::F32) => {
            let message = "a GPU trains in bf16: leave training.precision out, or set training.device to cpu";
            Err(Invalid::new("training.precision", message).into())
        }
    }
}

/// The ranks of a host share its cores.
fn on_cpu<S: Storage>(run: &RunSpec, config: &ModelConfig, observer: &mut dyn Observer) -> Result<Outcome>
where
    Cpu<S>: Backend,
{
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let sharing = run.machine.ranks_on_host(run.ranks.world()) as usize;
    let open = || Cpu::<S>::new((cores / sharing).max(1));
    ranks::train(run, config, observer, open, |_, comm| Ok(comm))
}
