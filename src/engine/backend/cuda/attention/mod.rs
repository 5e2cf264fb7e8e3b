//! Attention of `trait Backend` on CUDA: library calls for documents or parts of them and some kv heads, gradients added up in
//! f32.
//!
//! A document that is alone in its sequence has calls on its rows where they are ([`single`]), with a plan for their very
//! lengths. Forward is one causal call. Backward takes the keys before the chunk in blocks, which all its queries see, and then
//! the chunk's own, causally: the library's causal backward computes every pair of a rectangle, also those behind the mask, and
//! is best at squares. So neither the shapes that need a plan nor the workspace grow with the sequence. Blocks are whole tiles
//! of the library's kernel: without a mask it takes what lies past the last key for scores of 0, whose exponential overflows
//! where log-sum-exps are far below.
//!
//! Packed documents would need plans for lengths that never come again, at 0.04 s each. Their rows are copied to calls of a
//! few sizes, several short documents to one ([`packed`]).

mod packed;
mod pieces;
mod single;
mod staged;
#[cfg(test)]
mod tests;

use self::pieces::is_one_document;
pub(crate) use self::staged::Staged;
use super::{
    super::{AttentionGrads, AttentionSaved, DType, Heads, Tensor, Window},
    Cuda,
    cudnn::{Pass, Shape},
    kernels::{
        Argument::{self, Count, Pointer},
        Grid,
    },
};
use crate::engine::Result;

/// (query heads) x (keys) that one call of forward takes, as long as it takes one kv head's group at least: fewer leave
/// multiprocessors idle at the end of a call, more save nothing.
const FORWARD_HEAD_KEYS: u64 = 1 << 20;
/// Elements that one thread of attention.cu moves where it moves several, and threads of its blocks.
const ELEMENTS: u64 = 8;
const THREADS: u32 = 256;

/// How many kv heads a call takes, and how many query heads of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Together {
    kv_heads: u64,
    heads: u64,
}

impl Together {
    /// The most query heads of a group that fit, and where that is the whole group the most kv heads that do.
    fn most(heads: Heads, in_group: impl Fn(u64) -> bool, kv_heads: impl Fn(u64) -> bool) -> Self {
        let group = heads.n_heads / heads.n_kv_heads;
        let most = |of: u64, fits: &dyn Fn(u64) -> bool| (1..=of).rev().find(|n| of.is_multiple_of(*n) && fits(*n));
        let in_group = most(group, &in_group).unwrap_or(1);
        let kv_heads = most(heads.n_kv_heads, &|n| in_group == group && kv_heads(n)).unwrap_or(1);
        Self { kv_heads, heads: in_group }
    }

    /// First query head and first kv head of each call.
    fn calls(self, heads: Heads) -> impl Iterator<Item = (u64, u64)> {
        let group = heads.n_heads / heads.n_kv_heads;
        (0..heads.n_heads).step_by((self.kv_heads * self.heads) as usize).map(move |head| (head, head / group))
    }
}

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
    /// Plans of attention calls that are kept.
    pub fn attention_plans(&self) -> usize {
        self.attention.n_plans()
    }

    /// `Backend::prepare_attention`.
    pub fn prepare_attention(&mut self, heads: Heads, window: &Window) -> Result {
        let shapes = if is_one_document(window) { single::shapes } else { packed::shapes };
        for (pass, shape) in shapes(heads, window) {
            self.attention.workspace_bytes(pass, shape)?;
        }
        Ok(())
    }

    /// `Backend::attention`.
    ///
    /// # Panics
    /// When the workspace is smaller than `Backend::attention_workspace`.
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
        if is_one_document(window) {
            return self.single_forward(operands, workspace, heads, window);
        }
        let sums = Tensor { offset: workspace.offset, dtype: DType::F32, ..o };
        self.packed_forward(operands, sums, workspace, heads, window)?;
        self.cast(o, sums)
    }

    /// `Backend::attention_backward`. The spread of dq, dk and dv between runs is that of cuDNN's atomic additions.
    ///
    /// # Panics
    /// When the workspace is smaller than `Backend::attention_workspace`.
    pub fn attention_backward(
        &mut self,
        grads: AttentionGrads,
        saved: AttentionSaved,
        workspace: Tensor,
        heads: Heads,
        window: &Window,
    ) -> Result {
        let AttentionGrads { dq, dk, dv, delta } = grads;
        let sums = Sums { dq: Tensor { offset: workspace.offset, dtype: DType::F32, ..dq }, dk, dv };
        self.device.fill_bytes(sums.dq, 0)?;
        if is_one_document(window) {
            self.single_backward(sums, (saved, delta), workspace, heads, window)?;
        } else {
            self.packed_backward(sums, saved, workspace, heads, window)?;
        }
        self.cast(dq, sums.dq)
    }

    /// Queues a call, whose own workspace begins `offset` bytes after the start of `workspace`.
    fn run(&mut self, pass: Pass, shape: Shape, tensors: &[u64], (workspace, offset): (Tensor, u64)) -> Result {
        let bytes = offset + self.attention.workspace_bytes(pass, shape)?;
        assert!(bytes <= workspace.bytes(), "cuDNN wants {bytes} bytes of workspace for {shape:?}");
        self.attention.run(pass, shape, tensors, self.device.address(workspace) + offset)
    }

    /// Address of an element of a bf16 or f32 matrix.
    fn element(&self, tensor: Tensor, row: u64, column: u64) -> u64 {
        self.device.address(tensor) + (row * tensor.cols + column) * tensor.dtype.bytes()
    }

    /// Adds a call's gradient (bf16 `[rows, columns]`, packed, at `part`) to `to` (f32) from this row and column on.
    pub(crate) fn add_part(&self, (to, row, column): (Tensor, u64, u64), part: u64, rows: u64, columns: u64) -> Result {
        assert_eq!(to.dtype, DType::F32, "gradients are added up wide");
        let vectors = rows * columns / ELEMENTS;
        let [to_address, from] = [self.element(to, row, column), part].map(Pointer);
        let counts = [vectors, columns / ELEMENTS].map(Argument::small);
        let arguments = [to_address, from, counts[0], counts[1], Count(to.cols as i64)];
        self.kernels.launch(&self.device, "attention_accumulate", grid(vectors), &arguments)
    }
}

/// Blocks for so many threads.
fn grid(threads: u64) -> Grid {
    Grid { blocks: threads.div_ceil(u64::from(THREADS)), threads: THREADS, shared_bytes: 0 }
}
