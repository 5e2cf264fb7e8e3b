//! Calls of one piece each, with a plan for its very lengths.

use std::ops::Range;

use super::{
    super::{
        super::{AttentionSaved, Heads, Tensor, Window},
        Cuda,
        cudnn::{Pass, Shape},
    },
    BACKWARD_HEAD_KEYS, FORWARD_HEAD_KEYS, Operands, Sums,
    pieces::Piece,
    workspace::Regions,
};
use crate::engine::Result;

/// (heads of a call) x (keys) x (head size) stays at or below this: past it cuDNN 9.19 writes wrong gradients and says nothing.
const MOST_ELEMENTS: u64 = 1 << 31;

/// One call: whole groups of some kv heads or a part of one group, rows of the chunk, keys of one document.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub(super) shape: Shape,
    /// First query head and first kv head.
    pub(super) head: u64,
    pub(super) kv_head: u64,
    /// First row of the chunk, first key of the sequence.
    pub(super) row: u64,
    pub(super) key: u64,
}

/// How many kv heads a call takes, and how many query heads of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Together {
    pub(super) kv_heads: u64,
    pub(super) heads: u64,
}

impl Together {
    /// As many as `head_keys` allows against so many keys.
    pub(super) fn of(heads: Heads, keys: u64, head_keys: u64) -> Self {
        let Heads { n_heads, n_kv_heads, head_dim } = heads;
        let group = n_heads / n_kv_heads;
        let most = |of: u64, fits: &dyn Fn(u64) -> bool| (1..=of).rev().find(|n| of.is_multiple_of(*n) && fits(*n));
        let in_group = most(group, &|n| n * keys * head_dim <= MOST_ELEMENTS).unwrap_or(1);
        let kv_heads = most(n_kv_heads, &|n| in_group == group && n * group * keys <= head_keys).unwrap_or(1);
        Self { kv_heads, heads: in_group }
    }

    /// First query head and first kv head of each call.
    pub(super) fn calls(self, heads: Heads) -> impl Iterator<Item = (u64, u64)> {
        let group = heads.n_heads / heads.n_kv_heads;
        (0..heads.n_heads).step_by((self.kv_heads * self.heads) as usize).map(move |head| (head, head / group))
    }
}

/// The calls of these pieces.
pub(super) fn calls(heads: Heads, chunk: &Range<u64>, pieces: &[Piece], head_keys: u64) -> Vec<Call> {
    let mut calls = Vec::new();
    for piece in pieces {
        let together = Together::of(heads, piece.n_keys(), head_keys);
        let shape = Shape {
            mask: piece.mask(),
            documents: None,
            kv_heads: together.kv_heads as i64,
            heads: together.heads as i64,
            head_dim: heads.head_dim as i64,
            queries: piece.n_queries() as i64,
            keys: piece.n_keys() as i64,
            q_stride: (heads.n_heads * heads.head_dim) as i64,
            kv_stride: (heads.n_kv_heads * heads.head_dim) as i64,
            stats_stride: (chunk.end - chunk.start) as i64,
        };
        let (row, key) = (piece.queries.start - chunk.start, piece.keys.start);
        calls.extend(together.calls(heads).map(|(head, kv_head)| Call { shape, head, kv_head, row, key }));
    }
    calls
}

impl Cuda {
    /// Addresses of q, k, v, o and the log-sum-exps of a call.
    fn single_operands(&self, call: Call, heads: Heads, operands: Operands) -> [u64; 5] {
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

    /// Forward of these pieces.
    pub(super) fn single_forward(
        &mut self,
        operands: Operands,
        workspace: Tensor,
        heads: Heads,
        window: &Window,
        pieces: &[Piece],
    ) -> Result {
        for call in calls(heads, &window.chunk, pieces, FORWARD_HEAD_KEYS) {
            let tensors = self.single_operands(call, heads, operands);
            let bytes = self.attention.workspace_bytes(Pass::Forward, call.shape)?;
            assert!(bytes <= workspace.bytes(), "cuDNN wants {bytes} bytes of workspace for {:?}", call.shape);
            self.attention.run(Pass::Forward, call.shape, &tensors, self.device.address(workspace))?;
        }
        Ok(())
    }

    /// Backward of these pieces; adds to `sums`.
    pub(super) fn single_backward(
        &mut self,
        sums: Sums,
        (saved, delta): (AttentionSaved, Tensor),
        workspace: Tensor,
        heads: Heads,
        window: &Window,
        pieces: &[Piece],
    ) -> Result {
        let (operands, d) = (Operands::of(saved), heads.head_dim);
        let regions = Regions::of(heads, saved.q.rows, saved.k.rows);
        let start = self.device.address(workspace);
        for call in calls(heads, &window.chunk, pieces, BACKWARD_HEAD_KEYS) {
            let Call { shape, head, kv_head, row, key } = call;
            let bytes = regions.dk_by_head + self.attention.workspace_bytes(Pass::Backward, shape)?;
            assert!(bytes <= workspace.bytes(), "cuDNN wants {bytes} bytes of workspace for {shape:?}");
            let mut tensors = self.single_operands(call, heads, operands).to_vec();
            tensors.extend([
                self.element(saved.d_o, row, head * d),
                start + regions.dq,
                start + regions.dk,
                start + regions.dv,
                self.element(delta, head, row),
                start + regions.dq_sums,
            ]);
            self.attention.run(Pass::Backward, shape, &tensors, start + regions.dk_by_head)?;
            let (keys, columns) = (shape.keys as u64, shape.kv_heads as u64 * d);
            self.add_part((sums.dk, key, kv_head * d), start + regions.dk, keys, columns)?;
            self.add_part((sums.dv, key, kv_head * d), start + regions.dv, keys, columns)?;
            let columns = columns * shape.heads as u64;
            self.add_part((sums.dq, row, head * d), start + regions.dq, shape.queries as u64, columns)?;
        }
        Ok(())
    }
}
