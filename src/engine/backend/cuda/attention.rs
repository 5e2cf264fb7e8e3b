//! Attention of `trait Backend` on CUDA: a call for each document fragment and kv head, gradients added up in f32.

use super::{
    super::{AttentionGrads, AttentionSaved, DType, Heads, Tensor, Window},
    Cuda,
    cudnn::{Pass, Shape},
    kernels::{
        Argument::{Count, Pointer},
        Grid,
    },
};
use crate::engine::Result;

/// (heads of a call) x (keys) x (head size) stays at or below this: past it cuDNN 9.19 writes wrong gradients and says nothing.
const MOST_ELEMENTS: u64 = 1 << 31;
/// What cuDNN's workspace for a backward call may need beyond the bf16 gradients of every query head.
const LIBRARY_SLACK_BYTES: u64 = 1 << 20;
/// Elements that one thread of attention_accumulate adds, and threads of its block.
const ACCUMULATED: (u64, u32) = (8, 256);

/// One call: query heads that share a kv head, rows of the chunk, keys of one document.
#[derive(Debug, Clone, Copy)]
struct Call {
    shape: Shape,
    /// First query head and the kv head they share.
    head: u64,
    kv_head: u64,
    /// First row of the chunk, first key of the sequence.
    row: u64,
    key: u64,
}

/// The calls of a window, fragment by fragment.
fn calls(heads: Heads, window: &Window) -> Vec<Call> {
    let chunk = &window.chunk;
    let group = heads.n_heads / heads.n_kv_heads;
    let mut calls = Vec::new();
    for document in window.documents {
        let (start, end) = (document.start.max(chunk.start), document.end.min(chunk.end));
        if start >= end {
            continue;
        }
        let keys = end - document.start;
        let together = (1..=group)
            .rev()
            .find(|n| group.is_multiple_of(*n) && n * keys * heads.head_dim <= MOST_ELEMENTS)
            .unwrap_or(1);
        for head in (0..heads.n_heads).step_by(together as usize) {
            let shape = Shape {
                heads: together as i64,
                head_dim: heads.head_dim as i64,
                queries: (end - start) as i64,
                keys: keys as i64,
                q_stride: (heads.n_heads * heads.head_dim) as i64,
                kv_stride: (heads.n_kv_heads * heads.head_dim) as i64,
                stats_stride: (chunk.end - chunk.start) as i64,
            };
            calls.push(Call { shape, head, kv_head: head / group, row: start - chunk.start, key: document.start });
        }
    }
    calls
}

/// Regions of the workspace of a backward call: bytes from its start.
#[derive(Debug, Clone, Copy)]
struct Regions {
    dv: u64,
    dq_sums: u64,
    library: u64,
    end: u64,
}

impl Regions {
    /// For so many heads in a call. dk comes first.
    fn of(heads: u64, head_dim: u64, queries: u64, keys: u64) -> Self {
        let gradients = (keys * head_dim * 2).next_multiple_of(256);
        let dq_sums = 2 * gradients;
        let library = dq_sums + (heads * queries * head_dim * 4).next_multiple_of(256);
        // Of every query head a dk and a dv, when there is more than one.
        let by_head = if heads > 1 { 2 * heads * keys * head_dim * 2 } else { 0 };
        Self { dv: gradients, dq_sums, library, end: library + by_head + LIBRARY_SLACK_BYTES }
    }
}

/// `Backend::attention_workspace`: bf16 gradients of one kv head's keys, f32 sums of dq, and cuDNN's own.
pub fn workspace_bytes(heads: Heads, c: u64, kv: u64) -> u64 {
    Regions::of(heads.n_heads / heads.n_kv_heads, heads.head_dim, c, kv).end
}

impl Cuda {
    /// Address of an element of a bf16 or f32 matrix.
    fn element(&self, tensor: Tensor, row: u64, column: u64) -> u64 {
        self.device.address(tensor) + (row * tensor.cols + column) * tensor.dtype.bytes()
    }

    /// Addresses of q, k, v, o and the log-sum-exps of a call.
    fn operands(
        &self,
        call: Call,
        heads: Heads,
        (q, k, v, o, lse): (Tensor, Tensor, Tensor, Tensor, Tensor),
    ) -> [u64; 5] {
        let (column, kv_column) = (call.head * heads.head_dim, call.kv_head * heads.head_dim);
        [
            self.element(q, call.row, column),
            self.element(k, call.key, kv_column),
            self.element(v, call.key, kv_column),
            self.element(o, call.row, column),
            self.element(lse, call.head, call.row),
        ]
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
        for call in calls(heads, window) {
            let tensors = self.operands(call, heads, (q, k, v, o, lse));
            let bytes = self.attention.workspace_bytes(Pass::Forward, call.shape)?;
            assert!(bytes <= workspace.bytes(), "cuDNN wants {bytes} bytes of workspace for {:?}", call.shape);
            self.attention.run(Pass::Forward, call.shape, &tensors, self.device.address(workspace))?;
        }
        Ok(())
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
        let AttentionSaved { d_o, o, lse, q, k, v } = saved;
        let d = heads.head_dim;
        let start = self.device.address(workspace);
        for call in calls(heads, window) {
            let shape = call.shape;
            let regions = Regions::of(shape.heads as u64, d, shape.queries as u64, shape.keys as u64);
            let bytes = regions.library + self.attention.workspace_bytes(Pass::Backward, shape)?;
            assert!(bytes <= workspace.bytes(), "cuDNN wants {bytes} bytes of workspace for {shape:?}");
            let (dk_part, dv_part) = (start, start + regions.dv);
            let mut tensors = self.operands(call, heads, (q, k, v, o, lse)).to_vec();
            tensors.extend([
                self.element(d_o, call.row, call.head * d),
                self.element(dq, call.row, call.head * d),
                dk_part,
                dv_part,
                self.element(delta, call.head, call.row),
                start + regions.dq_sums,
            ]);
            self.attention.run(Pass::Backward, shape, &tensors, start + regions.library)?;
            for (to, part) in [(dk, dk_part), (dv, dv_part)] {
                self.accumulate_keys(to, part, call, d)?;
            }
        }
        Ok(())
    }

    /// Adds a call's gradient of k or v (bf16, packed, at `part`) to its kv head's columns of `to` (f32).
    fn accumulate_keys(&self, to: Tensor, part: u64, call: Call, d: u64) -> Result {
        assert_eq!(to.dtype, DType::F32, "gradients of k and v are wide");
        let keys = call.shape.keys as u64;
        let (each, threads) = ACCUMULATED;
        let grid = Grid { blocks: (keys * d).div_ceil(each * u64::from(threads)), threads, shared_bytes: 0 };
        let to_address = self.element(to, call.key, call.kv_head * d);
        let counts = [Count(keys as i64), Count(d as i64), Count(to.cols as i64)];
        let arguments = [Pointer(to_address), Pointer(part), counts[0], counts[1], counts[2]];
        self.kernels.launch(&self.device, "attention_accumulate", grid, &arguments)
    }
}
