//! The two graphs of attention: queries of some kv heads' groups against keys, see [`super::shape`].
//!
//! The library knows these exact sequences of operations and runs each as one kernel (FlashAttention-2, arXiv 2307.08691);
//! another order of the same mathematics may be refused or slower. q, o and their gradients are columns of matrices with all
//! heads, k and v likewise.

use cudarc::cudnn::sys::{cudnnPointwiseMode_t as Pointwise, cudnnReduceTensorOp_t as Reduction};

use super::{
    Pass,
    descriptor::Reference,
    graph::{BF16, BOOL, Extent, F32, Graph, I32, I64, Layout},
    shape::{Mask, Shape},
};
use crate::engine::Result;

const Q: i64 = 1;
const K: i64 = 2;
const V: i64 = 3;
const O: i64 = 4;
/// Log-sum-exps `[heads, queries]` f32, rows `stats_stride` apart; in a packed call `[rows, heads]`, packed.
const STATS: i64 = 5;
const D_O: i64 = 6;
/// `[queries, kv_heads heads d]` bf16, packed.
const DQ: i64 = 7;
/// Gradients of k and v `[keys, kv_heads d]` bf16, packed.
const DK: i64 = 8;
const DV: i64 = 9;
/// Row sums of do * o, laid out as STATS.
const DELTA: i64 = 10;
/// f32 `[kv_heads, heads, queries, d]` that dq is summed in; in a packed call laid out as DQ.
const DQ_SUMS: i64 = 11;
/// Of a packed call: where the rows of q, o and do of each document start, those of k and v, of the log-sum-exps and deltas,
/// of dq, and of dk and dv. int64 `[documents + 1]`, in elements.
const Q_STARTS: i64 = 12;
const KV_STARTS: i64 = 13;
const STATS_STARTS: i64 = 14;
const DQ_STARTS: i64 = 15;
const DKV_STARTS: i64 = 16;
/// Queries and keys of each document: int32 `[documents]`.
const Q_LENGTHS: i64 = 17;
const KV_LENGTHS: i64 = 18;
/// Of a packed call whose groups have more than one head: `[keys, kv_heads heads d]` bf16, packed, gradients of k and v before
/// the sum over the heads of a group.
const DK_BY_HEAD: i64 = 19;
const DV_BY_HEAD: i64 = 20;

/// Tensors of a call, in order: of both passes, of backward, then the same of a packed call.
pub(super) fn tensors(pass: Pass, shape: Shape) -> Vec<i64> {
    let mut ids = vec![Q, K, V, O, STATS];
    if pass == Pass::Backward {
        ids.extend([D_O, DQ, DK, DV, DELTA, DQ_SUMS]);
    }
    if shape.documents.is_some() {
        ids.extend([Q_STARTS, KV_STARTS, STATS_STARTS, Q_LENGTHS, KV_LENGTHS]);
        if pass == Pass::Backward {
            ids.extend([DQ_STARTS, DKV_STARTS]);
            if shape.heads > 1 {
                ids.extend([DK_BY_HEAD, DV_BY_HEAD]);
            }
        }
    }
    ids
}

/// Queries and keys of each document, when they are not the shape's.
#[derive(Debug, Clone, Copy, Default)]
struct Lengths {
    queries: Option<Reference>,
    keys: Option<Reference>,
}

impl Lengths {
    fn of(g: &mut Graph, shape: Shape) -> Result<Self> {
        let Some(documents) = shape.documents else { return Ok(Self::default()) };
        let mut list = |id| g.tensor(id, Layout::list(I32, documents)).map(Some);
        Ok(Self { queries: list(Q_LENGTHS)?, keys: list(KV_LENGTHS)? })
    }

    /// Of a product `[queries, keys]`.
    fn scores(self) -> Extent {
        Extent { m: self.queries, n: self.keys, k: None }
    }

    /// Of a product over keys, `[queries, d]`.
    fn over_keys(self) -> Extent {
        Extent { m: self.queries, n: None, k: self.keys }
    }

    /// Of a product over queries, `[keys, d]`.
    fn over_queries(self) -> Extent {
        Extent { m: self.keys, n: None, k: self.queries }
    }
}

/// Where the documents of a packed call start, by a list of this id.
fn starts(g: &mut Graph, shape: Shape, id: i64) -> Result<Option<Reference>> {
    shape.documents.map(|documents| g.tensor(id, Layout::list(I64, documents + 1))).transpose()
}

impl Graph {
    /// `mode(x, b)` in f32 as a new intermediate of shape `layout`.
    fn apply(&mut self, mode: Pointwise, layout: Layout, x: Reference, b: Option<Reference>) -> Result<Reference> {
        let y = self.between(layout)?;
        self.pointwise(mode, y, x, b, F32)?;
        Ok(y)
    }

    /// `condition ? scores : -inf`.
    fn hidden_unless(&mut self, shape: Shape, condition: Reference, scores: Reference) -> Result<Reference> {
        let (masked, never) = (self.between(shape.scores())?, self.float(f32::NEG_INFINITY)?);
        self.select(masked, condition, scores, never)?;
        Ok(masked)
    }

    /// Row or column (axis 2, 3) of each score.
    fn place(&mut self, shape: Shape, scores: Reference, axis: i64) -> Result<Reference> {
        let place = self.between(shape.scores().of(I32))?;
        self.index(place, scores, axis)?;
        Ok(place)
    }

    /// Scores with -inf past the ends of each document.
    fn within(&mut self, shape: Shape, scores: Reference, lengths: Lengths) -> Result<Reference> {
        let (Some(queries), Some(keys)) = (lengths.queries, lengths.keys) else { return Ok(scores) };
        let flags = shape.scores().of(BOOL);
        let (row, column) = (self.place(shape, scores, 2)?, self.place(shape, scores, 3)?);
        let row = self.apply(Pointwise::CUDNN_POINTWISE_CMP_LT, flags, row, Some(queries))?;
        let column = self.apply(Pointwise::CUDNN_POINTWISE_CMP_LT, flags, column, Some(keys))?;
        let both = self.apply(Pointwise::CUDNN_POINTWISE_LOGICAL_AND, flags, row, Some(column))?;
        self.hidden_unless(shape, both, scores)
    }

    /// Scores with -inf where a key lies behind its query: column > row, or column > row + keys - queries.
    fn masked(&mut self, shape: Shape, scores: Reference, lengths: Lengths) -> Result<Reference> {
        if shape.mask == Mask::None {
            return Ok(scores);
        }
        let mut row = self.place(shape, scores, 2)?;
        if shape.mask == Mask::CausalFromEnd {
            for (mode, count, counts) in [
                (Pointwise::CUDNN_POINTWISE_ADD, shape.keys, lengths.keys),
                (Pointwise::CUDNN_POINTWISE_SUB, shape.queries, lengths.queries),
            ] {
                let moved = self.between(shape.scores().of(I32))?;
                let count = counts.map_or_else(|| self.integer(count as i32), Ok)?;
                self.pointwise(mode, moved, row, Some(count), I32)?;
                row = moved;
            }
        }
        let column = self.place(shape, scores, 3)?;
        let seen = self.apply(Pointwise::CUDNN_POINTWISE_CMP_GE, shape.scores().of(BOOL), row, Some(column))?;
        self.hidden_unless(shape, seen, scores)
    }

    /// `q k^T scale`, and the scalar that holds the scale.
    fn scaled_scores(
        &mut self,
        shape: Shape,
        (q, k_transposed): (Reference, Reference),
        lengths: Lengths,
    ) -> Result<(Reference, Reference)> {
        let (products, scale) = (self.between(shape.scores())?, self.float(shape.scale())?);
        self.matmul(products, q, k_transposed, lengths.scores())?;
        Ok((self.apply(Pointwise::CUDNN_POINTWISE_MUL, shape.scores(), products, Some(scale))?, scale))
    }

    /// `out = sum over heads of left right`: with one head no sum is written, for the library expects none. What each head
    /// adds is memory of the library's own, or of a packed call's caller.
    fn product_over_heads(
        &mut self,
        shape: Shape,
        (out, by_head, id): (Reference, Layout, i64),
        (left, right): (Reference, Reference),
        lengths: Lengths,
    ) -> Result {
        if shape.heads == 1 {
            return self.matmul(out, left, right, lengths.over_queries());
        }
        let by_head = if shape.documents.is_some() { self.tensor(id, by_head) } else { self.between(by_head) }?;
        self.matmul(by_head, left, right, lengths.over_queries())?;
        self.reduce(Reduction::CUDNN_REDUCE_TENSOR_ADD, out, by_head)
    }
}

/// `o = softmax(mask(q k^T scale)) v` and its log-sum-exps.
pub(super) fn forward(shape: Shape) -> Result<Graph> {
    let mut g = Graph::default();
    let scores = shape.scores();
    let lengths = Lengths::of(&mut g, shape)?;
    let query_starts = starts(&mut g, shape, Q_STARTS)?;
    let key_starts = starts(&mut g, shape, KV_STARTS)?;
    let stats_starts = starts(&mut g, shape, STATS_STARTS)?;
    let q = g.tensor(Q, shape.query_rows().starting(query_starts))?;
    let k = g.tensor(K, shape.key_rows().transposed().starting(key_starts))?;
    let v = g.tensor(V, shape.key_rows().starting(key_starts))?;
    let o = g.tensor(O, shape.query_rows().starting(query_starts))?;
    let stats = g.tensor(STATS, shape.statistics().starting(stats_starts))?;

    let (scaled, _) = g.scaled_scores(shape, (q, k), lengths)?;
    let within = g.within(shape, scaled, lengths)?;
    let masked = g.masked(shape, within, lengths)?;
    let max = g.between(shape.row())?;
    g.reduce(Reduction::CUDNN_REDUCE_TENSOR_MAX, max, masked)?;
    let below = g.apply(Pointwise::CUDNN_POINTWISE_SUB, scores, masked, Some(max))?;
    let exp = g.apply(Pointwise::CUDNN_POINTWISE_EXP, scores, below, None)?;
    let sum = g.between(shape.row())?;
    g.reduce(Reduction::CUDNN_REDUCE_TENSOR_ADD, sum, exp)?;
    let log = g.apply(Pointwise::CUDNN_POINTWISE_LOG, shape.row(), sum, None)?;
    g.pointwise(Pointwise::CUDNN_POINTWISE_ADD, stats, max, Some(log), F32)?;
    let p = g.apply(Pointwise::CUDNN_POINTWISE_DIV, scores.of(BF16), exp, Some(sum))?;
    g.matmul(o, p, v, lengths.over_keys())?;
    Ok(g)
}

/// With p = exp(mask(q k^T scale) - stats) and ds = p (do v^T - delta) scale: `dv = p^T do`, `dk = ds^T q`, `dq = ds k`,
/// summed over the heads of the call for dk and dv.
pub(super) fn backward(shape: Shape) -> Result<Graph> {
    let mut g = Graph::default();
    let scores = shape.scores();
    let transposed = Layout { strides: scores.transposed().strides, ..scores.transposed() }.of(BF16);
    let lengths = Lengths::of(&mut g, shape)?;
    let query_starts = starts(&mut g, shape, Q_STARTS)?;
    let key_starts = starts(&mut g, shape, KV_STARTS)?;
    let stats_starts = starts(&mut g, shape, STATS_STARTS)?;
    let dq_starts = starts(&mut g, shape, DQ_STARTS)?;
    let dkv_starts = starts(&mut g, shape, DKV_STARTS)?;
    let q = g.tensor(Q, shape.query_rows().starting(query_starts))?;
    let k = g.tensor(K, shape.key_rows().transposed().starting(key_starts))?;
    let v = g.tensor(V, shape.key_rows().transposed().starting(key_starts))?;
    let o = g.tensor(O, shape.query_rows().starting(query_starts))?;
    let stats = g.tensor(STATS, shape.statistics().starting(stats_starts))?;
    let d_o = g.tensor(D_O, shape.query_rows().starting(query_starts))?;
    let dq = g.tensor(DQ, shape.query_gradients().starting(dq_starts))?;
    let dk = g.tensor(DK, shape.key_gradients().starting(dkv_starts))?;
    let dv = g.tensor(DV, shape.key_gradients().starting(dkv_starts))?;
    let delta = g.tensor(DELTA, shape.statistics().starting(stats_starts))?;
    let dq_sums = g.tensor(DQ_SUMS, shape.dq_sums().starting(dq_starts))?;

    let products = g.apply(Pointwise::CUDNN_POINTWISE_MUL, shape.query_rows().of(F32), d_o, Some(o))?;
    let sums = g.between(shape.row())?;
    g.reduce(Reduction::CUDNN_REDUCE_TENSOR_ADD, sums, products)?;
    let one = g.float(1.0)?;
    g.pointwise(Pointwise::CUDNN_POINTWISE_MUL, delta, sums, Some(one), F32)?;

    let (scaled, scale) = g.scaled_scores(shape, (q, k), lengths)?;
    let within = g.within(shape, scaled, lengths)?;
    let normalized = g.apply(Pointwise::CUDNN_POINTWISE_SUB, scores, within, Some(stats))?;
    let masked = g.masked(shape, normalized, lengths)?;
    let p = g.apply(Pointwise::CUDNN_POINTWISE_EXP, scores, masked, None)?;
    let p_transposed = g.between(transposed)?;
    g.reshape(p_transposed, p)?;
    let by_head = shape.by_head().starting(dkv_starts);
    g.product_over_heads(shape, (dv, by_head, DV_BY_HEAD), (p_transposed, d_o), lengths)?;

    let dp = g.between(scores)?;
    g.matmul(dp, d_o, v, lengths.scores())?;
    let centred = g.apply(Pointwise::CUDNN_POINTWISE_SUB, scores, dp, Some(delta))?;
    let weighted = g.apply(Pointwise::CUDNN_POINTWISE_MUL, scores, centred, Some(p))?;
    let ds = g.apply(Pointwise::CUDNN_POINTWISE_MUL, scores, weighted, Some(scale))?;
    let ds_transposed = g.between(transposed)?;
    g.reshape(ds_transposed, ds)?;
    g.product_over_heads(shape, (dk, by_head, DK_BY_HEAD), (ds_transposed, q), lengths)?;

    let k_rows = g.between(shape.key_rows().of(F32).starting(key_starts))?;
    g.reshape(k_rows, k)?;
    g.matmul(dq_sums, ds, k_rows, lengths.over_keys())?;
    g.pointwise(Pointwise::CUDNN_POINTWISE_IDENTITY, dq, dq_sums, None, F32)?;
    Ok(g)
}
