//! Self-attention of one chunk of queries against everything before it: `x += output(attend(rope(qkv(norm(x)))))`.
//!
//! Keys and values of the whole sequence live outside; a chunk appends its own rows and attends. The pieces are separate
//! functions because backward needs them one by one: keys and values first for the whole sequence, then chunk by chunk
//! queries and outputs, then the gradients.

use std::ops::Range;

use crate::engine::{
    Result,
    backend::{AttentionGrads, AttentionSaved, Backend, Heads, Tensor, Window},
};

/// Weights, or where their gradients go.
#[derive(Debug, Clone, Copy)]
pub struct Weights {
    /// `[1, h]`
    pub norm: Tensor,
    /// `[(nq + 2 nk) d, h]`
    pub qkv: Tensor,
    /// `[h, nq d]`
    pub output: Tensor,
}

/// Buffers for c rows.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// `[c, h]`: normed input, and its gradient at the end.
    pub norm: Tensor,
    /// `[c, (nq + 2 nk) d]`: the fused projection, or its gradient.
    pub qkv: Tensor,
    /// `[c, nq d]`
    pub d_o: Tensor,
    /// `[c, nq d]`
    pub dq: Tensor,
    /// `[nq, c]` wide
    pub delta: Tensor,
    /// Bytes.
    pub scratch: Tensor,
}

/// Queries, output and log-sum-exp of one chunk: work buffers, or rows of what is kept.
#[derive(Debug, Clone, Copy)]
pub struct Activations {
    /// `[c, nq d]`
    pub q: Tensor,
    /// `[c, nq d]`
    pub o: Tensor,
    /// `[nq, c]` wide
    pub lse: Tensor,
}

/// Keys and values `[T, nk d]` of a layer.
#[derive(Debug, Clone, Copy)]
pub struct KeysValues {
    pub k: Tensor,
    pub v: Tensor,
}

/// What every step of one chunk shares.
#[derive(Debug, Clone)]
pub struct Chunk<'a> {
    /// Rows of the sequence.
    pub rows: Range<u64>,
    /// Documents that meet them.
    pub documents: &'a [Range<u64>],
    /// Rotary angles of the rows, `[c, d]` wide.
    pub angles: Tensor,
    pub heads: Heads,
    pub eps: f64,
    /// False in a memory proof: attention's place is filled with zeros and its gradient left out.
    pub attends: bool,
}

impl Chunk<'_> {
    fn window(&self) -> Window<'_> {
        Window { chunk: self.rows.clone(), documents: self.documents }
    }

    fn rows_of(&self, kv: KeysValues) -> (Tensor, Tensor) {
        let Range { start, end } = self.rows;
        (kv.k.rows(start, end), kv.v.rows(start, end))
    }

    fn q_size(&self) -> u64 {
        self.heads.n_heads * self.heads.head_dim
    }

    fn n_rows(&self) -> u64 {
        self.rows.end - self.rows.start
    }
}

/// Projects and rotates the chunk's rows: queries, and its rows of keys and values.
pub fn project<B: Backend>(
    b: &mut B,
    x: Tensor,
    w: &Weights,
    work: &Work,
    q: Tensor,
    kv: KeysValues,
    at: &Chunk,
) -> Result {
    b.rmsnorm(work.norm, x, w.norm, at.eps)?;
    b.matmul(work.qkv, work.norm, w.qkv, 0.0)?;
    b.rope_split(Some(q), Some(at.rows_of(kv)), work.qkv, at.angles, at.heads)
}

/// Projects and rotates only the chunk's rows of keys and values.
pub fn project_kv<B: Backend>(b: &mut B, x: Tensor, w: &Weights, work: &Work, kv: KeysValues, at: &Chunk) -> Result {
    let projection = w.qkv.rows(at.q_size(), w.qkv.rows);
    let kv_only = work.qkv.shaped(at.n_rows(), projection.rows);
    b.rmsnorm(work.norm, x, w.norm, at.eps)?;
    b.matmul(kv_only, work.norm, projection, 0.0)?;
    b.rope_split(None, Some(at.rows_of(kv)), kv_only, at.angles, at.heads)
}

/// Projects and rotates only the chunk's queries; leaves the normed input in `work.norm`.
pub fn project_q<B: Backend>(b: &mut B, x: Tensor, w: &Weights, work: &Work, q: Tensor, at: &Chunk) -> Result {
    let q_only = work.qkv.shaped(at.n_rows(), at.q_size());
    b.rmsnorm(work.norm, x, w.norm, at.eps)?;
    b.matmul(q_only, work.norm, w.qkv.rows(0, at.q_size()), 0.0)?;
    b.rope_split(Some(q), None, q_only, at.angles, at.heads)
}

/// Makes the backend ready for the chunk's attention, forward and backward.
pub fn prepare<B: Backend>(b: &mut B, at: &Chunk) -> Result {
    b.prepare_attention(at.heads, &at.window())
}

/// Attends the chunk's queries to all keys up to the chunk's end.
pub fn attend<B: Backend>(b: &mut B, act: &Activations, kv: KeysValues, work: &Work, at: &Chunk) -> Result {
    if at.attends {
        return b.attention(act.o, act.lse, act.q, kv.k, kv.v, work.scratch, at.heads, &at.window());
    }
    prepare(b, at)?;
    b.fill(act.o, 0.0)?;
    b.fill(act.lse, 0.0)
}

/// `y += output(o)`.
pub fn project_output<B: Backend>(b: &mut B, y: Tensor, o: Tensor, w: &Weights) -> Result {
    b.matmul(y, o, w.output, 1.0)
}

/// What backward of a chunk reads: its input rows, weights, activations, and the layer's keys and values.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    pub x: Tensor,
    pub w: &'a Weights,
    pub act: Activations,
    pub kv: KeysValues,
}

/// Backward of a chunk: `dy` `[c, h]`, the gradient of `x + output(o)`, becomes that of `x`. `work.norm` holds the normed
/// input. `dkv` (wide) is added to; the chunk's own rows of it are complete after this, because only queries of this and
/// later chunks see them and those went before.
pub fn backward<B: Backend>(
    b: &mut B,
    dy: Tensor,
    saved: Saved,
    dkv: KeysValues,
    dw: &Weights,
    work: &Work,
    at: &Chunk,
) -> Result {
    let Saved { x, w, act, kv } = saved;
    b.matmul_dw(dw.output, dy, act.o)?;
    b.matmul_dx(work.d_o, dy, w.output, 0.0)?;
    let grads = AttentionGrads { dq: work.dq, dk: dkv.k, dv: dkv.v, delta: work.delta };
    let attended = AttentionSaved { d_o: work.d_o, o: act.o, lse: act.lse, q: act.q, k: kv.k, v: kv.v };
    if at.attends {
        b.attention_backward(grads, attended, work.scratch, at.heads, &at.window())?;
    } else {
        b.fill(work.dq, 0.0)?;
    }
    let (dk, dv) = at.rows_of(dkv);
    b.rope_merge_backward(work.qkv, work.dq, dk, dv, at.angles, at.heads)?;
    b.matmul_dw(dw.qkv, work.qkv, work.norm)?;
    b.matmul_dx(work.norm, work.qkv, w.qkv, 0.0)?;
    b.rmsnorm_backward(dy, dw.norm, work.norm, x, w.norm, at.eps)
}
