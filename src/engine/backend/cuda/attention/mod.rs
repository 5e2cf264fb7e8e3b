//! Attention of `trait Backend` on CUDA: library calls for documents or parts of them and some kv heads, gradients added up in
//! f32.
//!
//! Forward is one causal call a fragment of a document. Backward takes the keys before the fragment's own in blocks, which all
//! its queries see, and then its own, causally: the library's causal backward computes every pair of a rectangle, also those
//! behind the mask, and is best at squares. So neither the shapes that need a plan nor the workspace grow with the sequence.
//! Blocks are whole tiles of the library's kernel: without a mask it takes what lies past the last key for scores of 0, whose
//! exponential overflows where log-sum-exps are far below.
//!
//! A document that is alone has plans for its very lengths ([`single`]). Where several are packed into a sequence every
//! fragment would need one of its own: those that begin in the chunk go in one call, and what belongs to a document that began
//! earlier in calls with plans for any length ([`packed`]).

mod packed;
mod pieces;
mod shapes;
mod single;
#[cfg(test)]
mod tests;
mod workspace;

use self::pieces::{Calls, Piece, backward_pieces, forward_pieces};
pub use self::workspace::workspace_bytes;
use super::{
    super::{AttentionGrads, AttentionSaved, DType, Heads, Tensor, Window},
    Cuda,
    cudnn::Pass,
    kernels::{
        Argument::{Count, Pointer},
        Grid,
    },
};
use crate::engine::Result;

/// (query heads) x (keys) that one call of forward or backward takes, as long as it takes one kv head's group at least: fewer
/// leave multiprocessors idle at the end of a call, more save nothing.
const FORWARD_HEAD_KEYS: u64 = 1 << 20;
const BACKWARD_HEAD_KEYS: u64 = 1 << 19;
/// Elements that one thread of attention_accumulate adds, and threads of a block of each kernel.
const ACCUMULATED: u64 = 8;
const THREADS: u32 = 256;

/// What both passes read or write, as `Backend::attention` has it.
#[derive(Debug, Clone, Copy)]
struct Operands {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
}

impl Operands {
    fn of(AttentionSaved { q, k, v, o, lse, .. }: AttentionSaved) -> Self {
        Self { q, k, v, o, lse }
    }
}

/// f32 sums of gradients: dq of the chunk's rows, dk and dv of the sequence's.
#[derive(Debug, Clone, Copy)]
struct Sums {
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
}

impl Cuda {
    /// Address of an element of a bf16 or f32 matrix.
    fn element(&self, tensor: Tensor, row: u64, column: u64) -> u64 {
        self.device.address(tensor) + (row * tensor.cols + column) * tensor.dtype.bytes()
    }

    fn calls(&self, heads: Heads, window: &Window, pieces: Vec<Piece>) -> Calls {
        if self.attention.packs() { Calls::of(heads, window, pieces) } else { Calls::all_single(pieces) }
    }

    /// `Backend::prepare_attention`. Where documents are packed, for any documents in this place: no step waits for a plan.
    pub fn prepare_attention(&mut self, heads: Heads, window: &Window) -> Result {
        let forward = self.calls(heads, window, forward_pieces(window));
        let backward = self.calls(heads, window, backward_pieces(window));
        let alone = forward.packed.is_empty() && backward.packed.is_empty();
        let mut shapes = if alone { Vec::new() } else { shapes::shapes(heads, window) };
        let single = |pass, pieces: &[_], head_keys| {
            single::calls(heads, &window.chunk, pieces, head_keys).into_iter().map(move |call| (pass, call.shape))
        };
        shapes.extend(single(Pass::Forward, &forward.single, FORWARD_HEAD_KEYS));
        shapes.extend(single(Pass::Backward, &backward.single, BACKWARD_HEAD_KEYS));
        for (pass, shape) in shapes {
            self.attention.workspace_bytes(pass, shape)?;
        }
        Ok(())
    }

    /// `Backend::attention`.
    ///
    /// # Panics
    /// When the workspace is smaller than [`workspace_bytes`].
    pub fn attention(
        &mut self,
        o: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        workspace: Tensor,
        heads: Heads,
        window: &Window,
    ) -> Result {
        let operands = Operands { q, k, v, o, lse };
        let calls = self.calls(heads, window, forward_pieces(window));
        self.single_forward(operands, workspace, heads, window, &calls.single)?;
        calls.packed.iter().try_for_each(|pieces| self.packed_forward(operands, workspace, heads, window, pieces))
    }

    /// `Backend::attention_backward`. The spread of dq, dk and dv between runs is that of cuDNN's atomic additions.
    ///
    /// # Panics
    /// When the workspace is smaller than [`workspace_bytes`].
    pub fn attention_backward(
        &mut self,
        grads: AttentionGrads,
        saved: AttentionSaved,
        workspace: Tensor,
        heads: Heads,
        window: &Window,
    ) -> Result {
        let AttentionGrads { dq, dk, dv, delta } = grads;
        let dq_wide = Tensor { offset: workspace.offset, dtype: DType::F32, ..dq };
        let sums = Sums { dq: dq_wide, dk, dv };
        self.device.fill_bytes(dq_wide, 0)?;
        let calls = self.calls(heads, window, backward_pieces(window));
        self.single_backward(sums, (saved, delta), workspace, heads, window, &calls.single)?;
        for pieces in &calls.packed {
            self.packed_backward(sums, saved, workspace, heads, window, pieces)?;
        }
        self.cast(dq, dq_wide)
    }

    /// Adds a call's gradient (bf16 `[rows, columns]`, packed, at `part`) to `to` (f32) from this row and column on.
    fn add_part(&self, (to, row, column): (Tensor, u64, u64), part: u64, rows: u64, columns: u64) -> Result {
        assert_eq!(to.dtype, DType::F32, "gradients are added up wide");
        let blocks = (rows * columns).div_ceil(ACCUMULATED * u64::from(THREADS));
        let grid = Grid { blocks, threads: THREADS, shared_bytes: 0 };
        let counts = [rows, columns, to.cols].map(|count| Count(count as i64));
        let arguments = [Pointer(self.element(to, row, column)), Pointer(part), counts[0], counts[1], counts[2]];
        self.kernels.launch(&self.device, "attention_accumulate", grid, &arguments)
    }
}
