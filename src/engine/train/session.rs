//! One rank's model on its device: takes sequences, gives numbers. Knows no files, no job, no schedule.

use std::{ops::Range, path::Path};

use super::bind::{Bound, bind};
use crate::{
    domain::ModelConfig,
    engine::{
        Error, Result,
        alst::optimizer_offload::OptimizerOffload,
        backend::{AdamW, Backend, DType, Split, Tensor},
        model::{Batch, MemoryProof, params::Named},
        optim,
    },
    plan::Plan,
};

/// A backend with a model and its optimizer state in its arena.
#[derive(Debug)]
pub struct Session<B> {
    pub backend: B,
    bound: Bound,
}

/// What one optimizer step, or an evaluation, came to.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Totals {
    /// Sum of cross entropies, nats, over the valid labels.
    pub loss: f64,
    /// Valid labels that the model ranks first.
    pub correct: f64,
    pub valid_labels: u64,
    /// Global gradient norm before clipping; 0 for an evaluation.
    pub grad_norm: f64,
}

impl Totals {
    /// The one division: mean loss over all valid labels.
    pub fn mean_loss(&self) -> f64 {
        self.loss / self.valid_labels.max(1) as f64
    }

    /// Share of valid labels that the model ranks first.
    pub fn accuracy(&self) -> f64 {
        self.correct / self.valid_labels.max(1) as f64
    }
}

/// Labels that a loss counts.
fn valid_labels(batch: &Batch) -> u64 {
    batch.labels.iter().filter(|label| **label >= 0).count() as u64
}

impl<B: Backend> Session<B> {
    /// Takes the arenas that the plan describes and lays the model over them. Weights are whatever the memory held; moments
    /// are zero.
    pub fn new(mut backend: B, plan: &Plan, config: &ModelConfig, spill: &Path) -> Result<Self> {
        backend.reserve(plan.layout.bytes, plan.layout.host_bytes)?;
        let bound = bind(&backend, plan, config, spill)?;
        for moment in [bound.optimizer.m, bound.optimizer.v] {
            backend.fill(moment.host, 0.0)?;
            backend.fill(moment.device, 0.0)?;
        }
        Ok(Self { backend, bound })
    }

    /// The model's config.
    pub fn config(&self) -> &ModelConfig {
        &self.bound.model.config
    }

    /// Every weight under its Hugging Face name.
    pub fn weights(&self) -> Vec<Named> {
        self.bound.model.weights.named(&self.bound.model.config)
    }

    /// Every gradient under its parameter's name, as the last backward left them (before the update, unscaled).
    pub fn grads(&self) -> Vec<Named> {
        self.bound.model.grads.kept.named(&self.bound.model.config)
    }

    /// From here on steps prove only that they fit.
    pub fn prove_memory(&mut self, proof: MemoryProof) {
        self.bound.model.memory_proof = Some(proof);
    }

    /// All weights, a row a parameter.
    pub fn flat_weights(&self) -> Split {
        self.bound.weights
    }

    /// Moments and low halves, a row a parameter: with the weights what a resumed run needs back, bit for bit.
    pub fn optimizer(&self) -> &OptimizerOffload {
        &self.bound.optimizer
    }

    /// Makes the backend ready for sequences with documents like these, so that no step waits for it.
    pub fn prepare(&mut self, documents: &[Range<u64>]) -> Result {
        self.bound.model.prepare(&mut self.backend, documents)
    }

    /// One optimizer step over these sequences: gradients of all of them, clipping, AdamW.
    pub fn step(&mut self, batches: &[Batch], hyper: &AdamW, max_norm: f64) -> Result<Totals> {
        self.gradients(batches)?;
        let Bound { weights, grads, optimizer, groups, scalars, .. } = &self.bound;
        optim::clip(&mut self.backend, *grads, *scalars, max_norm)?;
        optimizer.update(&mut self.backend, (*weights, *grads), groups, scalars.scale, hyper)?;
        let sum_squares = self.read(self.bound.scalars.sum_squares)?;
        let totals = self.totals(batches)?;
        Ok(Totals { grad_norm: sum_squares[0].sqrt(), ..totals })
    }

    /// Gradients of the mean loss over all valid labels of these sequences, left in [`Self::grads`].
    pub fn gradients(&mut self, batches: &[Batch]) -> Result {
        // Counted over the whole step before the first sequence: every label weighs the same, whichever sequence has it.
        let valid: u64 = batches.iter().map(valid_labels).sum();
        if self.bound.model.grads.sums.is_none() {
            self.backend.fill(self.bound.grads, 0.0)?;
        } else {
            assert!(batches.len() < 2, "gradients of several sequences add up in the wide type");
        }
        self.backend.fill(self.bound.model.sums, 0.0)?;
        for batch in batches {
            self.bound.model.forward_backward(&mut self.backend, *batch, 1.0 / valid.max(1) as f64)?;
        }
        Ok(())
    }

    /// Loss over these sequences, without gradients.
    pub fn evaluate<'a>(&mut self, batches: impl IntoIterator<Item = Batch<'a>>) -> Result<Totals> {
        self.backend.fill(self.bound.model.sums, 0.0)?;
        let mut valid = 0;
        for batch in batches {
            valid += valid_labels(&batch);
            self.bound.model.evaluate(&mut self.backend, batch)?;
        }
        let sums = self.read(self.bound.model.sums)?;
        Ok(Totals { loss: sums[0], correct: sums[1], valid_labels: valid, grad_norm: 0.0 })
    }

    /// Sums of the last [`Self::gradients`] or [`Self::step`].
    pub fn totals(&mut self, batches: &[Batch]) -> Result<Totals> {
        let sums = self.read(self.bound.model.sums)?;
        let valid_labels = batches.iter().map(valid_labels).sum();
        Ok(Totals { loss: sums[0], correct: sums[1], valid_labels, grad_norm: 0.0 })
    }

    /// A small wide tensor's values on the host; waits for the device.
    fn read(&mut self, from: Tensor) -> Result<Vec<f64>> {
        self.backend.synchronize()?;
        let mut bytes = vec![0; from.bytes() as usize];
        self.backend.download(from, &mut bytes)?;
        match from.dtype {
            DType::F32 => {
                Ok(bytemuck::allocation::pod_collect_to_vec::<u8, f32>(&bytes).into_iter().map(f64::from).collect())
            }
            DType::F64 => Ok(bytemuck::allocation::pod_collect_to_vec(&bytes)),
            other => Err(Error::Missing(format!("sums are kept in f32 or f64, not {other:?}"))),
        }
    }
}
