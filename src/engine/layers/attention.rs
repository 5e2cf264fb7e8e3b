//! Self-attention of one chunk of queries against everything before it: `x += output(attend(rope(qkv(norm(x)))))`.
//!
//! Keys and values of the whole sequence live outside; a chunk appends its own rows and attends. The pieces are separate
//! functions because backward needs them one by one: keys and values first for the whole sequence, then chunk by chunk
//! queries and outputs, then the gradients; and because ranks that share a sequence exchange heads between them.

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

/// Buffers for a chunk of c rows, of which the rank has n, with its hq of the nq query heads.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// `[n, h]`: normed input, and its gradient at the end.
    pub norm: Tensor,
    /// `[n, (nq + 2 nk) d]`: the fused projection, or its gradient.
    pub qkv: Tensor,
    /// `[c, hq d]`
    pub d_o: Tensor,
    /// `[c, hq d]`
    pub dq: Tensor,
    /// `[hq, c]` wide
    pub delta: Tensor,
    /// Bytes.
    pub scratch: Tensor,
}

/// Queries, output and log-sum-exp of one chunk: work buffers, or rows of what is kept.
#[derive(Debug, Clone, Copy)]
pub struct Activations {
    /// `[c, hq d]`
    pub q: Tensor,
    /// `[c, hq d]`
    pub o: Tensor,
    /// `[hq, c]` wide
    pub lse: Tensor,
}

/// Keys and values `[T, nk d]` of a layer.
#[derive(Debug, Clone, Copy)]
pub struct KeysValues {
    pub k: Tensor,
    pub v: Tensor,
}

impl KeysValues {
    /// Some rows of both.
    #[must_use]
    pub fn rows(&self, rows: &Range<u64>) -> Self {
        Self { k: self.k.rows(rows.start, rows.end), v: self.v.rows(rows.start, rows.end) }
    }
}

/// What every step of one chunk shares.
#[derive(Debug, Clone)]
pub struct Chunk<'a> {
    /// Rows of the sequence.
    pub rows: Range<u64>,
    /// Where those of them that this rank has lie among its own rows: all of them with one rank, n in general.
    pub local: Range<u64>,
    /// Documents that meet the chunk.
    pub documents: &'a [Range<u64>],
    /// Rotary angles of the rank's rows, `[n, d]` wide.
    pub angles: Tensor,
    /// Of the model.
    pub heads: Heads,
    pub eps: f64,
    /// False in a memory proof: attention's place is filled with zeros and its gradient left out.
    pub attends: bool,
}

impl Chunk<'_> {
    fn window(&self) -> Window<'_> {
        Window { chunk: self.rows.clone(), documents: self.documents }
    }

    /// Rows that this rank has.
    pub fn n_local(&self) -> u64 {
        self.local.end - self.local.start
    }
}

/// Projects and rotates the rank's rows of a chunk: queries `[n, nq d]`, keys and values `[n, nk d]`, each if wanted. Leaves the
/// normed input in `work.norm`.
///
/// # Panics
/// When nothing is wanted.
pub fn project<B: Backend>(
    b: &mut B,
    x: Tensor,
    w: &Weights,
    work: &Work,
    (q, kv): (Option<Tensor>, Option<KeysValues>),
    at: &Chunk,
) -> Result {
    let q_size = at.heads.n_heads * at.heads.head_dim;
    let wanted = match (q, kv) {
        (Some(_), Some(_)) => 0..w.qkv.rows,
        (Some(_), None) => 0..q_size,
        (None, Some(_)) => q_size..w.qkv.rows,
        (None, None) => panic!("a projection of nothing"),
    };
    let projection = w.qkv.rows(wanted.start, wanted.end);
    let qkv = work.qkv.shaped(x.rows, projection.rows);
    b.rmsnorm(work.norm, x, w.norm, at.eps)?;
    b.matmul(qkv, work.norm, projection, 0.0)?;
    b.rope_split(q, kv.map(|kv| (kv.k, kv.v)), qkv, at.angles, at.heads)
}

/// Makes the backend ready for the chunk's attention with these heads, forward and backward.
pub fn prepare<B: Backend>(b: &mut B, heads: Heads, at: &Chunk) -> Result {
    b.prepare_attention(heads, &at.window())
}

/// Attends the chunk's queries to all keys up to the chunk's end.
pub fn attend<B: Backend>(
    b: &mut B,
    act: &Activations,
    kv: KeysValues,
    work: &Work,
    heads: Heads,
    at: &Chunk,
) -> Result {
    if at.attends {
        return b.attention(act.o, act.lse, act.q, kv.k, kv.v, work.scratch, heads, &at.window());
    }
    prepare(b, heads, at)?;
    b.fill(act.o, 0.0)?;
    b.fill(act.lse, 0.0)
}

/// `y += output(o)`.
pub fn project_output<B: Backend>(b: &mut B, y: Tensor, o: Tensor, w: &Weights) -> Result {
    b.matmul(y, o, w.output, 1.0)
}

/// Backward of `project_output`: the output's gradient.
pub fn backward_output<B: Backend>(b: &mut B, d_o: Tensor, dy: Tensor, w: &Weights) -> Result {
    b.matmul_dx(d_o, dy, w.output, 0.0)
}

/// The weights' gradient.
pub fn backward_output_weights<B: Backend>(b: &mut B, dw: &Weights, dy: Tensor, o: Tensor) -> Result {
    b.matmul_dw(dw.output, dy, o)
}

/// Backward of `attend`.
pub fn backward_attend<B: Backend>(
    b: &mut B,
    grads: AttentionGrads,
    saved: AttentionSaved,
    work: &Work,
    heads: Heads,
    at: &Chunk,
) -> Result {
    if !at.attends {
        return b.fill(grads.dq, 0.0);
    }
    b.attention_backward(grads, saved, work.scratch, heads, &at.window())
}

/// Backward of `project` for the rank's rows: adds the gradient of `x` to `dy` `[n, h]`. `work.norm` holds the normed input;
/// `dq` storage, `dkv` wide.
pub fn backward_projection<B: Backend>(
    b: &mut B,
    dy: Tensor,
    (x, w): (Tensor, &Weights),
    (dq, dkv): (Tensor, KeysValues),
    dw: &Weights,
    work: &Work,
    at: &Chunk,
) -> Result {
    b.rope_merge_backward(work.qkv, dq, dkv.k, dkv.v, at.angles, at.heads)?;
    b.matmul_dw(dw.qkv, work.qkv, work.norm)?;
    b.matmul_dx(work.norm, work.qkv, w.qkv, 0.0)?;
    b.rmsnorm_backward(dy, dw.norm, work.norm, x, w.norm, at.eps)
}
