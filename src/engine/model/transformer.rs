//! The whole decoder: embedding, the layer loop with its segments, head and loss; forward, backward, evaluation.

use std::ops::Range;

use super::{
    block::{self, Pass},
    gradients::{Gradients, Leaving},
    params::{LayerParams, Params},
    pieces,
};
use crate::{
    domain::ModelConfig,
    engine::{
        Result,
        alst::{
            checkpoint_offload::CheckpointOffload,
            tiled_loss::TiledLoss,
            zero3::{Walk, Zero3},
        },
        backend::{Backend, Heads, Stream, Tensor},
        comm::{Comm, Groups},
        layers::loss,
    },
};

/// A decoder laid over planned memory. Holds places, not values: the backend has those.
#[derive(Debug)]
pub struct Transformer {
    pub config: ModelConfig,
    /// Where operations find those outside the layers, and the layers' shapes. `zero3` brings all of them.
    pub weights: Params,
    pub zero3: Zero3,
    /// Added to by every backward.
    pub grads: Gradients,
    /// First layers of the segments whose inputs are kept, ascending from 0.
    pub segment_starts: Vec<u64>,
    /// Layers in the order in which a step comes to them.
    pub order: Vec<u64>,
    pub checkpoints: CheckpointOffload,
    pub block: block::Work,
    pub loss: TiledLoss,
    /// Residual stream and its gradient, the rank's rows `[T / P, h]`.
    pub x: Tensor,
    pub dy: Tensor,
    /// Sum of losses and number of right guesses, `[1, 2]` wide; added to.
    pub sums: Tensor,
    /// Token ids, labels, positions `[T / P, 1]`, rotary angles `[T / P, d]` of these: room for the longest sequence.
    pub ids: Tensor,
    pub labels: Tensor,
    pub positions: Tensor,
    pub angles: Tensor,
    /// Leaves out most of attention; the result is worthless.
    pub memory_proof: Option<MemoryProof>,
}

/// A step that allocates, plans and copies as a real one, and computes everything but attention, of which only that of the
/// last rows of the first layers, where the prefix is longest. It shows that a step fits, not how long it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryProof {
    pub layers: u64,
    pub rows: u64,
}

/// One sequence as the model sees it. All three lists are equally long; labels are already shifted, -100 counts nothing.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    pub ids: &'a [i32],
    pub labels: &'a [i32],
    pub positions: &'a [i32],
    /// Bounds of the documents, covering the sequence without gaps.
    pub documents: &'a [Range<u64>],
}

impl Transformer {
    /// Forward and backward over one sequence: adds to `sums` and to `grads`. `scale` is one over the number of valid
    /// labels of the whole optimizer step.
    pub fn forward_backward<B: Backend, C: Comm<B>>(
        &mut self,
        (b, comm): (&mut B, &mut Groups<C>),
        batch: Batch,
        scale: f64,
    ) -> Result {
        let at = self.load(b, batch)?;
        let (x, dy, ids) = (at.local(self.x), at.local(self.dy), at.local(self.ids));
        self.zero3.gather_embedding((b, &mut comm.world))?;
        b.embedding(x, ids, self.weights.embedding)?;
        let mut coming = Coming { weights: self.zero3.walk(self.order.clone()), input: None, sums: Vec::new() };
        for layer in 0..self.config.n_layers {
            let keep = self.segment_starts.contains(&layer);
            self.layer_forward((b, comm), (layer, keep), at, Pass::First, &mut coming.weights)?;
        }
        self.zero3.gather_head((b, &mut comm.world))?;
        let dw = self.grads.begin_loss(b)?;
        let gradient = loss::Gradient { dx: dy, dw, scale };
        self.loss.forward_backward(b, self.sums, (x, at.local(self.labels)), &self.head(), Some(gradient))?;
        self.grads.end_loss((b, &mut comm.world), &mut coming.sums)?;
        for segment in (0..self.segment_starts.len()).rev() {
            self.segment_backward((b, comm), segment, at, &mut coming)?;
        }
        let embedding = self.grads.begin_embedding(b, &mut coming.sums)?;
        b.embedding_backward(embedding, ids, dy)?;
        self.grads.end_embedding((b, &mut comm.world))
    }

    /// Forward alone over one sequence: adds to `sums`.
    pub fn evaluate<B: Backend, C: Comm<B>>(&mut self, (b, comm): (&mut B, &mut Groups<C>), batch: Batch) -> Result {
        let at = self.load(b, batch)?;
        let x = at.local(self.x);
        self.zero3.gather_embedding((b, &mut comm.world))?;
        b.embedding(x, at.local(self.ids), self.weights.embedding)?;
        let mut weights = self.zero3.walk((0..self.config.n_layers).collect());
        for layer in 0..self.config.n_layers {
            self.layer_forward((b, comm), (layer, false), at, Pass::First, &mut weights)?;
        }
        self.zero3.gather_head((b, &mut comm.world))?;
        self.loss.forward_backward(b, self.sums, (x, at.local(self.labels)), &self.head(), None)
    }

    /// Makes the backend ready for sequences with documents like these, so that no step waits for it.
    pub fn prepare<B: Backend>(&self, b: &mut B, documents: &[Range<u64>]) -> Result {
        let tokens = documents.last().map_or(0, |document| document.end);
        self.block.prepare(b, self.sequence(tokens, documents))
    }

    fn head(&self) -> loss::Weights {
        loss::Weights { norm: self.weights.norm, head: self.weights.head }
    }

    /// Brings the rank's rows of a sequence to the device and computes their rotary angles.
    ///
    /// # Panics
    /// When the ranks that share the sequence do not divide it.
    fn load<'a, B: Backend>(&mut self, b: &mut B, batch: Batch<'a>) -> Result<block::Sequence<'a>> {
        let at = self.sequence(batch.ids.len() as u64, batch.documents);
        assert!(at.tokens.is_multiple_of(at.n_ranks), "{} tokens for {} ranks", at.tokens, at.n_ranks);
        let chunk = self.block.attention.norm.rows * at.n_ranks;
        let rows = pieces::of_rank(at.tokens, chunk, at.n_ranks, self.block.ulysses.rank as u64);
        for (to, all) in [(self.ids, batch.ids), (self.labels, batch.labels), (self.positions, batch.positions)] {
            b.queue_upload(at.local(to), bytemuck::cast_slice(&pieces::taken(all, &rows)))?;
        }
        b.rope_table(at.local(self.angles), at.local(self.positions), &self.config.inverse_frequencies())?;
        Ok(at)
    }

    fn sequence<'a>(&self, tokens: u64, documents: &'a [Range<u64>]) -> block::Sequence<'a> {
        let heads =
            Heads { n_heads: self.config.n_heads, n_kv_heads: self.config.n_kv_heads, head_dim: self.config.head_dim };
        let (angles, eps, n_ranks) = (self.angles, self.config.rms_norm_eps, self.block.ulysses.heads.len() as u64);
        block::Sequence { tokens, n_ranks, documents, angles, heads, eps, attends_from: 0 }
    }

    /// Layers `start..end` of a segment.
    fn segment(&self, segment: usize) -> Range<u64> {
        self.segment_starts[segment]..self.segment_starts.get(segment + 1).copied().unwrap_or(self.config.n_layers)
    }

    /// The sequence as a layer sees it.
    fn of_layer<'a>(&self, layer: u64, at: block::Sequence<'a>) -> block::Sequence<'a> {
        let attends_from = self
            .memory_proof
            .map_or(0, |proof| if layer < proof.layers { at.tokens.saturating_sub(proof.rows) } else { at.tokens });
        block::Sequence { attends_from, ..at }
    }

    fn layer_forward<B: Backend, C: Comm<B>>(
        &mut self,
        (b, comm): (&mut B, &mut Groups<C>),
        (layer, keep_input): (u64, bool),
        at: block::Sequence,
        pass: Pass,
        coming: &mut Walk<B::Event>,
    ) -> Result {
        let (kept, at) = (self.checkpoints.layer(layer), self.of_layer(layer, at));
        let weights = self.enter((b, &mut comm.world), coming, layer)?;
        let checkpoints = &mut self.checkpoints;
        let x = at.local(self.x);
        self.block.forward((b, &mut comm.sequence), x, (&weights, &kept), at, pass, |b, rows, x| {
            if keep_input { checkpoints.put(b, layer, rows, x) } else { Ok(None) }
        })
    }

    /// A layer's parameters where operations may use them now.
    fn enter<B: Backend, C: Comm<B>>(
        &self,
        (b, world): (&mut B, &mut C),
        coming: &mut Walk<B::Event>,
        layer: u64,
    ) -> Result<LayerParams> {
        let flat = self.zero3.enter((b, world), coming, layer)?;
        Ok(self.weights.layers[layer as usize].over(flat))
    }

    /// Backward of one segment: rebuilds the inputs of its layers from its start, then walks them last to first. While a
    /// layer is walked the input that is needed next comes into the rows that the walk is done with; `coming` hands that of
    /// the previous segment's start over.
    fn segment_backward<B: Backend, C: Comm<B>>(
        &mut self,
        (b, comm): (&mut B, &mut Groups<C>),
        segment: usize,
        at: block::Sequence,
        coming: &mut Coming<B::Event>,
    ) -> Result {
        let Range { start, end } = self.segment(segment);
        let (x, dy) = (at.local(self.x), at.local(self.dy));
        if end - start > 1 {
            self.input(b, start, x, &mut coming.input)?;
            for layer in start..end - 1 {
                self.layer_forward((b, comm), (layer, layer > start), at, Pass::Rerun, &mut coming.weights)?;
            }
        }
        for layer in (start..end).rev() {
            // The last layer's input is what the re-run left in x.
            if self.checkpoints.holds(layer) {
                self.input(b, layer, x, &mut coming.input)?;
                self.checkpoints.release(layer);
            }
            let next =
                if layer > start { Some(layer - 1) } else { segment.checked_sub(1).map(|s| self.segment_starts[s]) };
            let (kept, of_layer) = (self.checkpoints.layer(layer), self.of_layer(layer, at));
            let weights = self.enter((b, &mut comm.world), &mut coming.weights, layer)?;
            let (checkpoints, sums) = (&self.checkpoints, &mut coming.sums);
            let begin = |b: &mut B| self.grads.begin_layer(b, layer, sums);
            let mut last = None;
            self.block.backward((b, &mut comm.sequence), (dy, x), (&weights, &kept), begin, of_layer, |b, rows| {
                let Some(next) = next else { return Ok(()) };
                let here = checkpoints.fetch(b, next, rows, x.rows(rows.start, rows.end))?;
                last = here.or(last.take());
                Ok(())
            })?;
            coming.input = next.map(|layer| Arriving { layer, last });
            self.grads.end_layer((b, &mut comm.world), layer, &mut coming.sums)?;
        }
        Ok(())
    }

    /// A layer's kept input in `x`: on its way already, or fetched whole.
    fn input<B: Backend>(&self, b: &mut B, layer: u64, x: Tensor, arriving: &mut Option<Arriving<B::Event>>) -> Result {
        let last = match arriving.take() {
            Some(on_its_way) if on_its_way.layer == layer => on_its_way.last,
            _ => self.checkpoints.fetch(b, layer, &(0..x.rows), x)?,
        };
        last.map_or(Ok(()), |event| b.wait(Stream::Compute, &event))
    }
}

/// What is on its way while other layers are worked on.
struct Coming<E> {
    weights: Walk<E>,
    input: Option<Arriving<E>>,
    sums: Vec<Leaving<E>>,
}

/// A layer's input on its way into the residual stream's rows.
struct Arriving<E> {
    layer: u64,
    /// Its last copy, when another stream does the copying.
    last: Option<E>,
}
