//! Calls on rows where they are, with a plan for their very lengths.

use std::ops::Range;

use super::{
    super::{
        super::{AttentionSaved, Heads, Tensor, Window},
        Cuda,
        cudnn::{Pass, Shape},
    },
    FORWARD_HEAD_KEYS, Operands, Sums, Together,
    pieces::{Piece, backward_pieces, fragments},
};
use crate::{
    domain::attention_workspace::{BACKWARD_HEAD_KEYS, Regions},
    engine::Result,
};

/// (heads of a call) x (keys) x (head size) stays at or below this: past it cuDNN 9.19 writes wrong gradients and says nothing.
const MOST_ELEMENTS: u64 = 1 << 31;

/// One call: whole groups of some kv heads or a part of one group, rows of the chunk, keys of one document.
#[derive(Debug, Clone, Copy)]
struct Call {
    shape: Shape,
    /// First query head and first kv head.
    head: u64,
    kv_head: u64,
    /// First row of the chunk, first key of the sequence.
    row: u64,
    key: u64,
}

/// The calls of these pieces.
fn calls(heads: Heads, chunk: &Range<u64>, pieces: &[Piece], head_keys: u64) -> Vec<Call> {
    let group = heads.n_heads / heads.n_kv_heads;
    let mut calls = Vec::new();
    for piece in pieces {
        let keys = piece.n_keys();
        let in_group = |n: u64| n * keys * heads.head_dim <= MOST_ELEMENTS;
        let together = Together::most(heads, in_group, |n| n * group * keys <= head_keys);
        let shape = Shape {
            causal: piece.causal,
            staged: false,
            kv_heads: together.kv_heads as i64,
            heads: together.heads as i64,
            head_dim: heads.head_dim as i64,
            queries: piece.n_queries() as i64,
            keys: keys as i64,
            q_stride: (heads.n_heads * heads.head_dim) as i64,
            kv_stride: (heads.n_kv_heads * heads.head_dim) as i64,
            stats_stride: (chunk.end - chunk.start) as i64,
        };
        let (row, key) = (piece.queries.start - chunk.start, piece.keys.start);
        calls.extend(together.calls(heads).map(|(head, kv_head)| Call { shape, head, kv_head, row, key }));
    }
    calls
}

fn forward_calls(heads: Heads, window: &Window) -> Vec<Call> {
    calls(heads, &window.chunk, &fragments(window), FORWARD_HEAD_KEYS)
}

fn backward_calls(heads: Heads, window: &Window) -> Vec<Call> {
    calls(heads, &window.chunk, &backward_pieces(window), BACKWARD_HEAD_KEYS)
}

/// The shape of every call of a window.
pub(super) fn shapes(heads: Heads, window: &Window) -> Vec<(Pass, Shape)> {
    let forward = forward_calls(heads, window).into_iter().map(|call| (Pass::Forward, call.shape));
    forward.chain(backward_calls(heads, window).into_iter().map(|call| (Pass::Backward, call.shape))).collect()
}

impl Cuda {
    /// Addresses of q, k, v, o and the log-sum-exps of a call.
    fn operands(&self, call: Call, heads: Heads, operands: Operands) -> [u64; 5] {
        let Operands { q, k, v, o, lse } = operands;
        let (column, kv_column) = (call.head * heads.head_dim, call.kv_head * heads.head_dim);
        [
            self.element(q, call.row, column),
            self.element(k, call.key, kv_column),
            self.element(v, call.key, kv_column),
            self.element(o, call.row, column),
            self.element(lse, call.head, call.row),
        ]
    }

    pub(super) fn single_forward(
        &mut self,
        operands: Operands,
        workspace: Tensor,
        heads: Heads,
        window: &Window,
    ) -> Result {
        for call in forward_calls(heads, window) {
            let tensors = self.operands(call, heads, operands);
            self.run(Pass::Forward, call.shape, &tensors, (workspace, 0))?;
        }
        Ok(())
    }

    /// Adds to `sums`.
    pub(super) fn single_backward(
        &mut self,
        sums: Sums,
        (saved, delta): (AttentionSaved, Tensor),
        workspace: Tensor,
        heads: Heads,
        window: &Window,
    ) -> Result {
        let d = heads.head_dim;
        let regions = Regions::of(heads, saved.q.rows, saved.k.rows);
        let start = self.device.address(workspace);
        for call in backward_calls(heads, window) {
            let Call { shape, head, kv_head, row, key } = call;
            let mut tensors = self.operands(call, heads, Operands::of(saved)).to_vec();
            tensors.extend([
                self.element(saved.d_o, row, head * d),
                start + regions.dq,
                start + regions.dk,
                start + regions.dv,
                self.element(delta, head, row),
                start + regions.dq_sums,
            ]);
            self.run(Pass::Backward, shape, &tensors, (workspace, regions.library))?;
            let (keys, columns) = (shape.keys as u64, shape.kv_heads as u64 * d);
            self.add_part((sums.dk, key, kv_head * d), start + regions.dk, keys, columns)?;
            self.add_part((sums.dv, key, kv_head * d), start + regions.dv, keys, columns)?;
            let columns = columns * shape.heads as u64;
            self.add_part((sums.dq, row, head * d), start + regions.dq, shape.queries as u64, columns)?;
        }
        Ok(())
    }
}
