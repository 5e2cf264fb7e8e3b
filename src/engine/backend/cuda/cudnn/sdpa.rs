//! The two graphs of attention: queries of some kv heads' groups against keys. A kv head is a batch entry to the library, so
//! that all of them, one, or a part of one's group make one call.
//!
//! In a causal call query i of `queries` is position `keys - queries + i`, so the mask starts at the bottom right. The library
//! knows these exact sequences of operations and runs each as one kernel (FlashAttention-2, arXiv 2307.08691); another order
//! of the same mathematics may be refused or slower. q, o and their gradients are columns of matrices with all heads, k and v
//! likewise.

use cudarc::cudnn::sys::{cudnnPointwiseMode_t as Pointwise, cudnnReduceTensorOp_t as Reduction};

use super::{
    descriptor::Reference,
    graph::{BF16, BOOL, F32, Graph, I32, Layout},
};
use crate::engine::Result;

const Q: i64 = 1;
const K: i64 = 2;
const V: i64 = 3;
const O: i64 = 4;
/// Log-sum-exps `[heads, queries]` f32, rows `stats_stride` apart.
const STATS: i64 = 5;
const D_O: i64 = 6;
/// `[queries, kv_heads heads d]` bf16, packed.
const DQ: i64 = 7;
/// Gradients of k and v `[keys, kv_heads d]` bf16, packed.
const DK: i64 = 8;
const DV: i64 = 9;
/// Row sums of do * o, laid out as STATS.
const DELTA: i64 = 10;
/// f32 `[kv_heads, heads, queries, d]` that dq is summed in.
const DQ_SUMS: i64 = 11;

/// Tensors of a forward call, in order.
pub(crate) const FORWARD: [i64; 5] = [Q, K, V, O, STATS];
/// Tensors of a backward call, in order.
pub(crate) const BACKWARD: [i64; 11] = [Q, K, V, O, STATS, D_O, DQ, DK, DV, DELTA, DQ_SUMS];

/// Sizes of a call, strides in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    /// Keys end where the queries do, and a query sees none after itself; otherwise every query sees every key.
    pub(crate) causal: bool,
    /// Each kv head's rows lie behind those of the last, gradients likewise; otherwise rows hold all heads side by side.
    pub(crate) staged: bool,
    /// Of all documents of the call.
    pub(crate) kv_heads: i64,
    /// Query heads of each kv head of the call.
    pub(crate) heads: i64,
    pub(crate) head_dim: i64,
    pub(crate) queries: i64,
    pub(crate) keys: i64,
    /// Between rows of q, o and do.
    pub(crate) q_stride: i64,
    /// Between rows of k and v.
    pub(crate) kv_stride: i64,
    /// Between heads of the log-sum-exps and deltas.
    pub(crate) stats_stride: i64,
}

impl Shape {
    fn scale(&self) -> f32 {
        (1.0 / (self.head_dim as f64).sqrt()) as f32
    }

    fn query_rows(&self) -> Layout {
        let Self { kv_heads, heads, head_dim: d, queries, q_stride, .. } = *self;
        let apart = if self.staged { queries * q_stride } else { heads * d };
        Layout { dtype: BF16, dims: [kv_heads, heads, queries, d], strides: [apart, d, q_stride, 1] }
    }

    fn query_gradients(&self) -> Layout {
        let q_stride = if self.staged { self.q_stride } else { self.kv_heads * self.heads * self.head_dim };
        Self { q_stride, ..*self }.query_rows()
    }

    fn key_rows(&self) -> Layout {
        let Self { kv_heads, head_dim: d, keys, kv_stride, .. } = *self;
        let apart = if self.staged { keys * kv_stride } else { d };
        Layout { dtype: BF16, dims: [kv_heads, 1, keys, d], strides: [apart, d, kv_stride, 1] }
    }

    fn key_gradients(&self) -> Layout {
        let kv_stride = if self.staged { self.kv_stride } else { self.kv_heads * self.head_dim };
        Self { kv_stride, ..*self }.key_rows()
    }

    fn scores(&self) -> Layout {
        Layout::packed(F32, [self.kv_heads, self.heads, self.queries, self.keys])
    }

    fn statistics(&self) -> Layout {
        let Self { kv_heads, heads, queries, stats_stride, .. } = *self;
        Layout { dtype: F32, dims: [kv_heads, heads, queries, 1], strides: [heads * stats_stride, stats_stride, 1, 1] }
    }

    /// A row statistic that never reaches memory.
    fn row(&self) -> Layout {
        Layout::packed(F32, [self.kv_heads, self.heads, self.queries, 1])
    }

    fn dq_sums(&self) -> Layout {
        Layout::packed(F32, [self.kv_heads, self.heads, self.queries, self.head_dim])
    }

    /// Gradients of k or v before the sum over the heads of a group.
    fn by_head(&self) -> Layout {
        Layout::packed(BF16, [self.kv_heads, self.heads, self.keys, self.head_dim])
    }
}

impl Graph {
    /// `mode(x, b)` in f32 as a new intermediate of shape `layout`.
    fn apply(&mut self, mode: Pointwise, layout: Layout, x: Reference, b: Option<Reference>) -> Result<Reference> {
        let y = self.between(layout)?;
        self.pointwise(mode, y, x, b, F32)?;
        Ok(y)
    }

    /// Scores with -inf where a key lies after its query: column > row + keys - queries.
    fn masked(&mut self, shape: Shape, scores: Reference) -> Result<Reference> {
        if !shape.causal {
            return Ok(scores);
        }
        let (numbers, flags) = (shape.scores().of(I32), shape.scores().of(BOOL));
        let mut row = self.between(numbers)?;
        self.index(row, scores, 2)?;
        if shape.keys != shape.queries {
            let steps = [(Pointwise::CUDNN_POINTWISE_ADD, shape.keys), (Pointwise::CUDNN_POINTWISE_SUB, shape.queries)];
            for (mode, count) in steps {
                let (moved, count) = (self.between(numbers)?, self.integer(count as i32)?);
                self.pointwise(mode, moved, row, Some(count), I32)?;
                row = moved;
            }
        }
        let column = self.between(numbers)?;
        self.index(column, scores, 3)?;
        let seen = self.apply(Pointwise::CUDNN_POINTWISE_CMP_GE, flags, row, Some(column))?;
        let (masked, never) = (self.between(shape.scores())?, self.float(f32::NEG_INFINITY)?);
        self.select(masked, seen, scores, never)?;
        Ok(masked)
    }

    /// `q k^T scale`, and the scalar that holds the scale.
    fn scaled_scores(&mut self, shape: Shape, q: Reference, k_transposed: Reference) -> Result<(Reference, Reference)> {
        let (products, scale) = (self.between(shape.scores())?, self.float(shape.scale())?);
        self.matmul(products, q, k_transposed)?;
        Ok((self.apply(Pointwise::CUDNN_POINTWISE_MUL, shape.scores(), products, Some(scale))?, scale))
    }
}

/// `o = softmax(mask(q k^T scale)) v` and its log-sum-exps.
pub(super) fn forward(shape: Shape) -> Result<Graph> {
    let mut g = Graph::default();
    let scores = shape.scores();
    let q = g.tensor(Q, shape.query_rows())?;
    let k = g.tensor(K, shape.key_rows().transposed())?;
    let v = g.tensor(V, shape.key_rows())?;
    let o = g.tensor(O, shape.query_rows())?;
    let stats = g.tensor(STATS, shape.statistics())?;

    let (scaled, _) = g.scaled_scores(shape, q, k)?;
    let masked = g.masked(shape, scaled)?;
    let max = g.between(shape.row())?;
    g.reduce(Reduction::CUDNN_REDUCE_TENSOR_MAX, max, masked)?;
    let below = g.apply(Pointwise::CUDNN_POINTWISE_SUB, scores, masked, Some(max))?;
    let exp = g.apply(Pointwise::CUDNN_POINTWISE_EXP, scores, below, None)?;
    let sum = g.between(shape.row())?;
    g.reduce(Reduction::CUDNN_REDUCE_TENSOR_ADD, sum, exp)?;
    let log = g.apply(Pointwise::CUDNN_POINTWISE_LOG, shape.row(), sum, None)?;
    g.pointwise(Pointwise::CUDNN_POINTWISE_ADD, stats, max, Some(log), F32)?;
    let p = g.apply(Pointwise::CUDNN_POINTWISE_DIV, scores.of(BF16), exp, Some(sum))?;
    g.matmul(o, p, v)?;
    Ok(g)
}

/// With p = exp(mask(q k^T scale) - stats) and ds = p (do v^T - delta) scale: `dv = p^T do`, `dk = ds^T q`, `dq = ds k`,
/// summed over the heads of the call for dk and dv.
pub(super) fn backward(shape: Shape) -> Result<Graph> {
    let mut g = Graph::default();
    let scores = shape.scores();
    let transposed = Layout { strides: scores.transposed().strides, ..scores.transposed() }.of(BF16);
    let q = g.tensor(Q, shape.query_rows())?;
    let k = g.tensor(K, shape.key_rows().transposed())?;
    let v = g.tensor(V, shape.key_rows().transposed())?;
    let o = g.tensor(O, shape.query_rows())?;
    let stats = g.tensor(STATS, shape.statistics())?;
    let d_o = g.tensor(D_O, shape.query_rows())?;
    let dq = g.tensor(DQ, shape.query_gradients())?;
    let dk = g.tensor(DK, shape.key_gradients())?;
    let dv = g.tensor(DV, shape.key_gradients())?;
    let delta = g.tensor(DELTA, shape.statistics())?;
    let dq_sums = g.tensor(DQ_SUMS, shape.dq_sums())?;

    let products = g.apply(Pointwise::CUDNN_POINTWISE_MUL, shape.query_rows().of(F32), d_o, Some(o))?;
    let sums = g.between(shape.row())?;
    g.reduce(Reduction::CUDNN_REDUCE_TENSOR_ADD, sums, products)?;
    let one = g.float(1.0)?;
    g.pointwise(Pointwise::CUDNN_POINTWISE_MUL, delta, sums, Some(one), F32)?;

    let (scaled, scale) = g.scaled_scores(shape, q, k)?;
    let normalized = g.apply(Pointwise::CUDNN_POINTWISE_SUB, scores, scaled, Some(stats))?;
    let masked = g.masked(shape, normalized)?;
    let p = g.apply(Pointwise::CUDNN_POINTWISE_EXP, scores, masked, None)?;
    let p_transposed = g.between(transposed)?;
    g.reshape(p_transposed, p)?;
    product_over_heads(&mut g, shape, dv, p_transposed, d_o)?;

    let dp = g.between(scores)?;
    g.matmul(dp, d_o, v)?;
    let centred = g.apply(Pointwise::CUDNN_POINTWISE_SUB, scores, dp, Some(delta))?;
    let weighted = g.apply(Pointwise::CUDNN_POINTWISE_MUL, scores, centred, Some(p))?;
    let ds = g.apply(Pointwise::CUDNN_POINTWISE_MUL, scores, weighted, Some(scale))?;
    let ds_transposed = g.between(transposed)?;
    g.reshape(ds_transposed, ds)?;
    product_over_heads(&mut g, shape, dk, ds_transposed, q)?;

    let k_rows = g.between(shape.key_rows().of(F32))?;
    g.reshape(k_rows, k)?;
    g.matmul(dq_sums, ds, k_rows)?;
    g.pointwise(Pointwise::CUDNN_POINTWISE_IDENTITY, dq, dq_sums, None, F32)?;
    Ok(g)
}

/// `out = sum over heads of left right`: with one head no sum is written, for the library expects none.
fn product_over_heads(g: &mut Graph, shape: Shape, out: Reference, left: Reference, right: Reference) -> Result {
    if shape.heads == 1 {
        return g.matmul(out, left, right);
    }
    let by_head = g.between(shape.by_head())?;
    g.matmul(by_head, left, right)?;
    g.reduce(Reduction::CUDNN_REDUCE_TENSOR_ADD, out, by_head)
}
