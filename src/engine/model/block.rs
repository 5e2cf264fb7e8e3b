//! One layer, streamed chunk by chunk: no whole-sequence activation beyond its input/output (in place) and K, V.
//!
//! Forward walks the chunks in order. Backward rebuilds K and V once, then walks the chunks last to first: when chunk i's
//! own attention backward is done, every query that sees its keys has contributed, so its dK, dV are complete and its
//! rows of dy can become rows of dx. Exact, and no more arithmetic than recomputing the layer. A chunk goes through the steps of
//! [`pipeline`]; they write rows of their own chunk only, but for dK, dV, and share buffers only on the compute stream.

use std::{collections::VecDeque, ops::Range};

use super::pipeline::{self, Backward, Forward};
use crate::engine::{
    Result,
    alst::{
        checkpoint_offload::KeptLayer,
        tiled_mlp::{self, TiledMlp},
        ulysses::{Ulysses, UnderWay},
    },
    backend::{Backend, Heads, Stream, Tensor},
    comm::Comm,
    layers::{
        attention::{self, Activations, Chunk, KeysValues},
        mlp,
    },
    model::params::LayerParams,
};

/// Buffers that one layer at a time uses.
#[derive(Debug, Clone)]
pub struct Work {
    pub ulysses: Ulysses,
    /// Buffers of one chunk; the row count of `norm` is the rank's part of a chunk.
    pub attention: attention::Work,
    /// Chunk buffers for layers of which q, or o and lse, are not kept: `[c, hq d]` and `[hq, c]`. Where ranks exchange heads two of
    /// each, which chunks take by turns: the next chunk's queries come, and its output goes, while this one's are read.
    pub q: Option<Tensor>,
    pub attended: Option<(Tensor, Tensor)>,
    /// `[n, h]`: the chunk's residual stream between attention and feed-forward.
    pub h1: Tensor,
    /// `[T, nk d]`, for layers whose k, v are not kept.
    pub kv: Option<KeysValues>,
    /// `[T, nk d]` wide.
    pub dkv: KeysValues,
    pub mlp: TiledMlp,
}

/// The sequence a layer runs over.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'a> {
    /// Of all ranks, which have equally many.
    pub tokens: u64,
    pub n_ranks: u64,
    /// Bounds of all documents, covering `0..tokens`.
    pub documents: &'a [Range<u64>],
    /// Rotary angles of the rank's rows, in their order, wide.
    pub angles: Tensor,
    pub heads: Heads,
    pub eps: f64,
    /// First row that attends: 0, but in a memory proof.
    pub attends_from: u64,
}

/// Which forward this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// The first over this batch: fills what is kept.
    First,
    /// A later one that rebuilds the next layer's input: reads what is kept.
    Rerun,
}

impl<'a> Sequence<'a> {
    /// The documents that meet these rows.
    fn documents_of(&self, rows: &Range<u64>) -> &'a [Range<u64>] {
        let first = self.documents.partition_point(|d| d.end <= rows.start);
        let last = self.documents.partition_point(|d| d.start < rows.end);
        &self.documents[first..last]
    }

    fn chunk(&self, rows: Range<u64>) -> Chunk<'a> {
        let local = rows.start / self.n_ranks..rows.end / self.n_ranks;
        Chunk {
            documents: self.documents_of(&rows),
            angles: self.angles.rows(local.start, local.end),
            heads: self.heads,
            eps: self.eps,
            attends: rows.start >= self.attends_from,
            local,
            rows,
        }
    }

    /// Of a tensor with a row for each that the rank has of the longest sequence, those of this one.
    pub fn local(&self, rows: Tensor) -> Tensor {
        rows.rows(0, self.tokens / self.n_ranks)
    }

    /// Chunks of which a rank has up to `n` rows, in order.
    fn chunks(&self, n: u64) -> impl DoubleEndedIterator<Item = Chunk<'a>> + use<'a> {
        let (sequence, size) = (*self, n * self.n_ranks);
        (0..self.tokens.div_ceil(size)).map(move |i| sequence.chunk(i * size..sequence.tokens.min((i + 1) * size)))
    }
}

fn attention_weights(p: &LayerParams) -> attention::Weights {
    attention::Weights { norm: p.attention_norm, qkv: p.qkv, output: p.output }
}

fn mlp_weights(p: &LayerParams) -> mlp::Weights {
    mlp::Weights { norm: p.mlp_norm, gate_up: p.gate_up, down: p.down }
}

impl Work {
    /// Attention buffers cut to the rows of a chunk.
    fn chunk(&self, at: &Chunk) -> attention::Work {
        let (a, n, c) = (&self.attention, at.n_local(), at.rows.end - at.rows.start);
        attention::Work {
            norm: a.norm.rows(0, n),
            qkv: a.qkv.rows(0, n),
            d_o: a.d_o.rows(0, c),
            dq: a.dq.rows(0, c),
            delta: a.delta.shaped(a.delta.rows, c),
            scratch: a.scratch,
        }
    }

    /// Which of two buffers a chunk takes.
    fn turn(&self, at: &Chunk) -> usize {
        if self.ulysses.exchanges() { (at.local.start / self.attention.norm.rows % 2) as usize } else { 0 }
    }

    /// Rows of what is kept, or chunk buffers.
    fn activations(&self, kept: &KeptLayer, at: &Chunk) -> Activations {
        let Range { start, end } = at.rows;
        let (n, first) = (end - start, self.turn(at) as u64 * self.attention.d_o.rows);
        let q = match (kept.qkv, self.q) {
            (Some((q, ..)), _) => q.rows(start, end),
            (None, Some(q)) => q.rows(first, first + n),
            (None, None) => unreachable!("the plan keeps q or has a buffer for it"),
        };
        let (o, lse) = match (kept.attention, self.attended) {
            (Some((o, lse)), _) => (o.rows(start, end), lse.rows(start, end).shaped(lse.cols, n)),
            (None, Some((o, lse))) => {
                let (first_head, n_heads) =
                    (self.turn(at) as u64 * self.attention.delta.rows, self.attention.delta.rows);
                (o.rows(first, first + n), lse.rows(first_head, first_head + n_heads).shaped(n_heads, n))
            }
            (None, None) => unreachable!("the plan keeps o or has a buffer for it"),
        };
        Activations { q, o, lse }
    }

    fn kv(&self, kept: &KeptLayer) -> KeysValues {
        match (kept.qkv, self.kv) {
            (Some((_, k, v)), _) => KeysValues { k, v },
            (None, Some(kv)) => kv,
            (None, None) => unreachable!("the plan keeps k and v or has buffers for them"),
        }
    }

    /// Makes the backend ready for the attention of every chunk.
    pub fn prepare<B: Backend>(&self, b: &mut B, sequence: Sequence) -> Result {
        sequence.chunks(self.attention.norm.rows).try_for_each(|at| self.ulysses.prepare(b, &at))
    }

    /// Forward over the whole sequence: `x`, the rank's rows `[T / P, h]`, becomes the layer's output. `put` sees each chunk's input rows before
    /// they are overwritten, which waits for the event that it answers.
    pub fn forward<B: Backend, C: Comm<B>>(
        &self,
        (b, comm): (&mut B, &mut C),
        x: Tensor,
        (weights, kept): (&LayerParams, &KeptLayer),
        sequence: Sequence,
        pass: Pass,
        mut put: impl FnMut(&mut B, &Range<u64>, Tensor) -> Result<Option<B::Event>>,
    ) -> Result {
        let (attention_w, mlp_w) = (attention_weights(weights), mlp_weights(weights));
        let (kv, filled) = (self.kv(kept), pass == Pass::Rerun);
        let chunks: Vec<Chunk> = sequence.chunks(self.attention.norm.rows).collect();
        let (mut under_way, mut kept_inputs) = (UnderWay::default(), VecDeque::new());
        pipeline::walk(&chunks, pipeline::forward(self.ulysses.exchanges()), |step, at| {
            let rows = x.rows(at.local.start, at.local.end);
            let (work, act, turn) = (self.chunk(at), self.activations(kept, at), self.turn(at));
            let attends = !(filled && kept.attention.is_some());
            match step {
                Forward::Project => {
                    kept_inputs.push_back(put(b, &at.local, rows)?);
                    if attends && !(filled && kept.qkv.is_some()) {
                        let wanted = (Some(act.q), Some(kv));
                        self.ulysses.project((b, comm, &mut under_way), rows, &attention_w, &work, wanted, at)?;
                    }
                    Ok(())
                }
                Forward::Attend => {
                    self.ulysses.projected(b, &mut under_way)?;
                    if attends {
                        self.ulysses.attend(b, &act, kv, &work, at)?;
                    }
                    self.ulysses.send_outputs((b, comm, &mut under_way), act.o, turn, at)
                }
                Forward::Finish => {
                    let o = self.ulysses.outputs((b, &mut under_way), act.o, turn, at)?;
                    if let Some(gone) = kept_inputs.pop_front().flatten() {
                        b.wait(Stream::Compute, &gone)?;
                    }
                    attention::project_output(b, rows, o, &attention_w)?;
                    self.mlp.forward(b, rows, &mlp_w, kept_gate_up(kept, at, filled))
                }
            }
        })
    }

    /// Backward over the whole sequence: `dy` `[T / P, h]`, the gradient of the layer's output, becomes that of its input `x`;
    /// those of the weights are added where `begin` says, which is asked once keys and values are there again. `done` is told
    /// the rank's rows of each chunk when nothing will read them in `x` any more, last rows first.
    pub fn backward<B: Backend, C: Comm<B>>(
        &self,
        (b, comm): (&mut B, &mut C),
        (dy, x): (Tensor, Tensor),
        (weights, kept): (&LayerParams, &KeptLayer),
        begin: impl FnOnce(&mut B) -> Result<LayerParams>,
        sequence: Sequence,
        mut done: impl FnMut(&mut B, &Range<u64>) -> Result,
    ) -> Result {
        let (attention_w, mlp_w) = (attention_weights(weights), mlp_weights(weights));
        let (kv, exchanges) = (self.kv(kept), self.ulysses.exchanges());
        let mut under_way = UnderWay::default();
        let mut chunks: Vec<Chunk> = sequence.chunks(self.attention.norm.rows).collect();
        if kept.qkv.is_none() {
            for at in &chunks {
                let (rows, work) = (x.rows(at.local.start, at.local.end), self.chunk(at));
                let wanted = (None, Some(kv));
                self.ulysses.project((b, comm, &mut under_way), rows, &attention_w, &work, wanted, at)?;
            }
            self.ulysses.all_projected(b, &mut under_way)?;
        }
        b.fill(self.dkv.k, 0.0)?;
        b.fill(self.dkv.v, 0.0)?;
        chunks.reverse();
        let grads = begin(b)?;
        let (attention_dw, mlp_dw) = (attention_weights(&grads), mlp_weights(&grads));
        pipeline::walk(&chunks, pipeline::backward(exchanges), |step, at| {
            let (dy, x) = (dy.rows(at.local.start, at.local.end), x.rows(at.local.start, at.local.end));
            let (work, act) = (self.chunk(at), self.activations(kept, at));
            match step {
                Backward::Project if kept.qkv.is_some() => Ok(()),
                Backward::Project => {
                    let wanted = (Some(act.q), None);
                    self.ulysses.project((b, comm, &mut under_way), x, &attention_w, &work, wanted, at)
                }
                Backward::Attend => {
                    self.ulysses.projected(b, &mut under_way)?;
                    if kept.attention.is_none() {
                        self.ulysses.attend(b, &act, kv, &work, at)?;
                    }
                    self.ulysses.send_outputs((b, comm, &mut under_way), act.o, 0, at)
                }
                Backward::Feed => {
                    let o = self.ulysses.outputs((b, &mut under_way), act.o, 0, at)?;
                    let h1 = self.h1.rows(0, x.rows);
                    b.copy(Stream::Compute, h1, x)?;
                    attention::project_output(b, h1, o, &attention_w)?;
                    self.mlp.backward(b, dy, h1, &mlp_w, &mlp_dw, kept_gate_up(kept, at, true))?;
                    let weights = (&attention_w, &attention_dw);
                    self.ulysses.backward_output((b, comm, &mut under_way), (dy, o), weights, &work, at)
                }
                Backward::Back => {
                    self.ulysses.backward_attend((b, comm, &mut under_way), (&act, kv), self.dkv, &work, at)
                }
                Backward::Finish => {
                    // The projection leaves the normed input, but where other chunks come between.
                    if kept.qkv.is_some() || exchanges {
                        b.rmsnorm(work.norm, x, attention_w.norm, at.eps)?;
                    }
                    let (under_way, dw) = ((&mut *b, &mut under_way), &attention_dw);
                    self.ulysses.backward_projection(under_way, dy, (x, &attention_w), self.dkv, dw, &work, at)?;
                    done(b, &at.local)
                }
            }
        })
    }
}

fn kept_gate_up(kept: &KeptLayer, at: &Chunk, filled: bool) -> Option<tiled_mlp::Kept> {
    kept.gate_up.map(|all| tiled_mlp::Kept { gate_up: all.rows(at.local.start, at.local.end), filled })
}
