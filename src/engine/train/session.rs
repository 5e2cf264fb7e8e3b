//! One rank's model on its device: takes sequences, gives numbers. Knows no files, no job, no schedule.

use std::{ops::Range, path::Path};

use super::bind::{Bound, bind};
use crate::{
    domain::ModelConfig,
    engine::{
        Error, Result,
        alst::optimizer_offload::OptimizerOffload,
        backend::{AdamW, Backend, DType, Split, Tensor},
        comm::{Alone, Comm, Groups, in_turn},
        model::{Batch, MemoryProof, Params, params::Named, share::Part},
        optim,
    },
    plan::{Plan, Ranks},
};

/// A rank: a backend with its part of a model and of the optimizer's state in its arenas, and the groups it trains in.
#[derive(Debug)]
pub struct Session<B, C = Alone> {
    pub backend: B,
    pub groups: Groups<C>,
    bound: Bound,
    /// Ranks that share a sequence.
    n_sequence_ranks: u64,
    /// Labels that the last step or evaluation counted, over all ranks.
    valid_labels: u64,
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
    /// Takes the arenas that the plan for one rank describes and lays the model over them. Weights are whatever the memory held;
    /// moments are zero.
    pub fn new(backend: B, plan: &Plan, config: &ModelConfig, spill: &Path) -> Result<Self> {
        Self::among(backend, Groups::alone(), plan, config, spill)
    }

    /// Every weight under its Hugging Face name.
    pub fn weights(&self) -> Vec<Named> {
        let whole = |parameter: &Named| {
            let mut places = self.owned(parameter, self.bound.weights).into_iter();
            let (_, place) = places.next().expect("the only rank owns every parameter");
            let (rows, cols) = (parameter.tensor.rows, parameter.tensor.cols);
            Named { tensor: place.shaped(rows, cols), ..parameter.clone() }
        };
        self.bound.named.iter().map(whole).collect()
    }

    /// Every gradient under its parameter's name, as the last backward left them (before the update, unscaled).
    pub fn grads(&self) -> Vec<Named> {
        Params::over(self.config(), self.bound.grads).named(self.config())
    }
}

impl<B: Backend, C: Comm<B>> Session<B, C> {
    /// Takes the arenas that the plan describes for each rank and lays this rank's part of the model over them. Weights are
    /// whatever the memory held; moments are zero.
    ///
    /// # Panics
    /// When there are not as many ranks as the plan has.
    pub fn among(mut backend: B, groups: Groups<C>, plan: &Plan, config: &ModelConfig, spill: &Path) -> Result<Self> {
        let Ranks { sequence, .. } = plan.choice.ranks;
        let (rank, n_ranks) = (groups.world.rank() as u64, groups.world.n_ranks() as u64);
        assert_eq!(n_ranks, plan.choice.ranks.world(), "ranks of the plan");
        let mut lay_out = || {
            backend.reserve(plan.layout.bytes, plan.layout.host_bytes)?;
            let bound = bind(&backend, plan, rank, config, spill)?;
            for moment in [bound.optimizer.m, bound.optimizer.v] {
                backend.fill(moment.host, 0.0)?;
                backend.fill(moment.device, 0.0)?;
            }
            Ok(bound)
        };
        let bound = lay_out().inspect_err(|error| groups.give_up(error))?;
        Ok(Self { backend, groups, bound, n_sequence_ranks: sequence, valid_labels: 0 })
    }

    /// The model's config.
    pub fn config(&self) -> &ModelConfig {
        &self.bound.model.config
    }

    /// Every parameter of the model; its tensor is not where it lives.
    pub fn parameters(&self) -> &[Named] {
        &self.bound.named
    }

    /// What this rank owns of a parameter, in `flat`, which is the rank's weights or a part of its state: the first element's
    /// index in the parameter, and a column of elements, piece by piece.
    pub fn owned(&self, parameter: &Named, flat: Split) -> Vec<(u64, Tensor)> {
        let own = self.owners(parameter).filter(|(rank, _)| *rank == self.groups.world.rank());
        let pieces = own.flat_map(|(_, part)| {
            let mut first = part.first - parameter.first;
            flat.rows(part.at, part.at + part.n).map(move |place| {
                first += place.rows;
                (first - place.rows, place)
            })
        });
        pieces.collect()
    }

    /// Which rank owns what of a parameter, in the order of its elements.
    pub fn owners(&self, parameter: &Named) -> impl Iterator<Item = (usize, Part)> {
        let range = parameter.first..parameter.first + parameter.elements();
        let shares = self.bound.shares.iter().enumerate();
        shares.flat_map(move |(rank, share)| share.of(range.clone()).map(move |part| (rank, part)))
    }

    /// Room on the device for a gathered embedding, which holds nothing between steps. None with one rank.
    pub fn free_between_steps(&self) -> Option<Tensor> {
        self.bound.model.zero3.outside.map(|outside| outside.embedding.whole)
    }

    /// From here on steps prove only that they fit.
    pub fn prove_memory(&mut self, proof: MemoryProof) {
        self.bound.model.memory_proof = Some(proof);
    }

    /// The rank's weights, a row a parameter.
    pub fn flat_weights(&self) -> Split {
        self.bound.weights
    }

    /// The rank's gradients, likewise.
    pub fn flat_grads(&self) -> Split {
        let grads = self.bound.grads;
        Split::resident(grads.shaped(grads.elements(), 1))
    }

    /// Moments and low halves, a row a parameter: with the weights what a resumed run needs back, bit for bit.
    pub fn optimizer(&self) -> &OptimizerOffload {
        &self.bound.optimizer
    }

    /// Makes the backend ready for sequences with documents like these, so that no step waits for it.
    pub fn prepare(&mut self, documents: &[Range<u64>]) -> Result {
        self.bound.model.prepare(&mut self.backend, documents)
    }

    /// One optimizer step over these sequences, and those of other replicas: gradients of all of them, clipping, AdamW.
    pub fn step(&mut self, batches: &[Batch], hyper: &AdamW, max_norm: f64) -> Result<Totals> {
        self.gradients(batches)?;
        let scalars = self.bound.scalars;
        optim::sum_squares(&mut self.backend, self.bound.grads, scalars)?;
        self.sum_over_ranks(scalars.sum_squares)?;
        optim::clip(&mut self.backend, scalars, max_norm)?;
        let Bound { weights, grads, optimizer, groups, .. } = &self.bound;
        optimizer.update(&mut self.backend, (*weights, *grads), groups, scalars.scale, hyper)?;
        let sum_squares = self.read(scalars.sum_squares)?;
        let totals = self.totals()?;
        Ok(Totals { grad_norm: sum_squares[0].sqrt(), ..totals })
    }

    /// Gradients of the mean loss over all valid labels of these sequences and those of other replicas, which must be as many.
    pub fn gradients(&mut self, batches: &[Batch]) -> Result {
        // Counted over the whole step before the first sequence: every label weighs the same, whichever sequence has it.
        self.count(batches.iter().map(valid_labels).sum())?;
        if self.bound.grads.dtype == self.backend.wide() {
            self.backend.fill(self.bound.grads, 0.0)?;
        } else {
            assert!(batches.len() < 2, "gradients of several sequences add up in the wide type");
        }
        self.backend.fill(self.bound.model.sums, 0.0)?;
        let scale = 1.0 / self.valid_labels.max(1) as f64;
        for batch in batches {
            self.bound.model.forward_backward((&mut self.backend, &mut self.groups), *batch, scale)?;
        }
        self.sum_over_ranks(self.bound.model.sums)
    }

    /// Loss over these sequences and those of other replicas, which must be as many, without gradients.
    pub fn evaluate<'a>(&mut self, batches: impl IntoIterator<Item = Batch<'a>>) -> Result<Totals> {
        self.backend.fill(self.bound.model.sums, 0.0)?;
        let mut valid = 0;
        for batch in batches {
            valid += valid_labels(&batch);
            self.bound.model.evaluate((&mut self.backend, &mut self.groups), batch)?;
        }
        self.count(valid)?;
        self.sum_over_ranks(self.bound.model.sums)?;
        self.totals()
    }

    /// Sums of the last [`Self::gradients`], [`Self::step`] or [`Self::evaluate`].
    pub fn totals(&mut self) -> Result<Totals> {
        let sums = self.read(self.bound.model.sums)?;
        Ok(Totals { loss: sums[0], correct: sums[1], valid_labels: self.valid_labels, grad_norm: 0.0 })
    }

    /// Adds this replica's valid labels to those of the others.
    fn count(&mut self, valid: u64) -> Result {
        let mut counts = [valid];
        self.groups.world.all_reduce_counts(&mut counts)?;
        // All ranks of a sequence counted the same labels.
        self.valid_labels = counts[0] / self.n_sequence_ranks;
        Ok(())
    }

    fn sum_over_ranks(&mut self, sums: Tensor) -> Result {
        in_turn((&mut self.backend, &mut self.groups.world), |b, world| world.all_reduce(b, sums))
    }

    /// A small wide tensor's values on the host; waits for the device.
    fn read(&mut self, from: Tensor) -> Result<Vec<f64>> {
        self.backend.synchronize()?;
        self.groups.world.check()?;
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
