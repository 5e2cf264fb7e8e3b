//! `trait Backend`: the operations of a decoder's training step at the size of LLM operations, and the memory verbs.
//!
//! The doc comments here are the specification. `Cpu` is its definition in code; `Cuda` is its fast twin; the same test
//! bodies run on both. Conventions:
//! - Tensors are handles into the rank's arenas ([`Tensor`]); operations write into tensors the caller passes. Nothing
//!   here allocates except [`Backend::reserve`], which runs once before the first step.
//! - Two element types: the *storage* type of weights and activations ([`Backend::storage`]: f32, f64 or bf16) and the
//!   *wide* type of sums ([`Backend::wide`]: f32, or f64 under f64). Each operation says which it takes. Arithmetic inside
//!   an operation is wide, rounded once on the way out.
//! - Operations run on the compute stream in the order of the calls. Copies name their stream; events order streams.
//! - Outputs may not overlap inputs unless the operation says "in place".
//! - Element counts and indices are 64-bit.

pub mod arena;
pub mod cpu;
pub mod cuda;
mod resident;
pub mod tensor;

use std::{fs::File, ops::Range};

pub use tensor::{ALIGNMENT, DType, Space, Split, Tensor};

use super::error::Result;
pub use crate::domain::heads::Heads;

/// Queues of work that run beside each other. `Cpu` finishes everything inside the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// All operations.
    Compute,
    /// Copies from the device to the host.
    Down,
    /// Copies from the host to the device.
    Up,
    /// Collectives of ranks that share a sequence: exchanges of heads.
    Exchange,
    /// Collectives of all ranks: gathers of weights, sums of gradients.
    Gather,
}

/// Which queries an attention call computes and what they may see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window<'a> {
    /// Sequence positions of the query rows: row i of q is position `chunk.start + i`.
    pub chunk: Range<u64>,
    /// Bounds of every document that meets the chunk, in order, covering it without gaps. A query at position p of a
    /// document sees keys `document.start..=p`. Padding counts as the end of its document.
    pub documents: &'a [Range<u64>],
}

/// AdamW's numbers for one step (Loshchilov & Hutter 2019, with bias correction).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
    /// 1 for the first update.
    pub step: u64,
    /// Seeds the stochastic rounding of bf16 moments; element i of the tensor draws from (seed, step, `first_index` + i).
    pub seed: u64,
    pub first_index: u64,
}

/// One rank's device. Every method may fail with [`crate::engine::Error::Device`]; on `Cpu` none does.
pub trait Backend: Sized {
    /// Marks a point in a stream.
    type Event;

    /// Storage type of weights and activations.
    fn storage(&self) -> DType;
    /// Type of sums: gradients, log-sum-exps, losses, norms.
    fn wide(&self) -> DType;

    // ---- memory -------------------------------------------------------------------------------------------------

    /// Takes the arenas from the system, once. Content is undefined (tests poison it).
    fn reserve(&mut self, device_bytes: u64, host_bytes: u64) -> Result;
    /// Copies host bytes (little-endian elements) into a tensor. Blocks; for loading, not for the step.
    fn upload(&mut self, to: Tensor, bytes: &[u8]) -> Result;
    /// Queues the same on the compute stream, for the inputs of a step: the bytes are taken before it returns.
    fn queue_upload(&mut self, to: Tensor, bytes: &[u8]) -> Result;
    /// Copies a tensor out to host bytes. Blocks.
    fn download(&mut self, from: Tensor, bytes: &mut [u8]) -> Result;
    /// Queues `to = from` (same dtype and element count, either space) on a stream.
    fn copy(&mut self, stream: Stream, to: Tensor, from: Tensor) -> Result;
    /// Queues writing a tensor to a file at a byte offset.
    fn spill(&mut self, stream: Stream, file: &File, at: u64, from: Tensor) -> Result;
    /// Queues reading a tensor back from a file.
    fn unspill(&mut self, stream: Stream, file: &File, at: u64, to: Tensor) -> Result;
    /// A mark after everything queued on the stream so far.
    fn record(&mut self, stream: Stream) -> Result<Self::Event>;
    /// Lets a stream wait for a mark of another.
    fn wait(&mut self, stream: Stream, event: &Self::Event) -> Result;
    /// Waits on the host until everything queued is done; reports any error of the past. Once a step, to read the loss.
    fn synchronize(&mut self) -> Result;
    /// Peak bytes of the device (host memory for `Cpu`) by the operating system's or the driver's count, less what was in
    /// use before `reserve`.
    fn peak_bytes(&self) -> u64;
    /// Peak bytes of host memory of this process by the operating system's count, the host arena included. On `Cpu` the
    /// same as [`Backend::peak_bytes`].
    fn peak_host_bytes(&self) -> u64;
    /// Bytes of the device arena that the system has had to back with memory: what of the plan was really used.
    fn touched_bytes(&self) -> u64;
    /// Bytes of workspace that the attention calls need for a query chunk of `c` tokens against `kv` keys.
    fn attention_workspace(&self, heads: Heads, c: u64, kv: u64) -> u64;

    /// Makes ready what the two attention calls of this window need beyond memory (plans of a library), and computes nothing.
    fn prepare_attention(&mut self, heads: Heads, window: &Window) -> Result;

    // ---- elementwise and reductions -----------------------------------------------------------------------------

    /// `x = value`, any dtype, either space.
    fn fill(&mut self, x: Tensor, value: f64) -> Result;
    /// `to = from`, converting between storage and wide (rounding to nearest even).
    fn cast(&mut self, to: Tensor, from: Tensor) -> Result;
    /// `to += from`; `to` wide or storage, `from` either.
    fn accumulate(&mut self, to: Tensor, from: Tensor) -> Result;
    /// `to[i, to.1 + j] = from[i, from.1 + j]` for `j < columns` in every row: a block of columns of one matrix into another
    /// with as many rows and the same dtype.
    fn copy_columns(&mut self, to: (Tensor, u64), from: (Tensor, u64), columns: u64) -> Result;
    /// The same with `+=`; both wide.
    fn add_columns(&mut self, to: (Tensor, u64), from: (Tensor, u64), columns: u64) -> Result;
    /// `sum[0] += sum of squares of x`; sum is wide `[1, 1]`, x any float dtype. Summed in a fixed order.
    fn sum_squares(&mut self, sum: Tensor, x: Tensor) -> Result;
    /// `scale[0] = min(1, max_norm / (sqrt(sum[0]) + 1e-6))`, or 1 when `max_norm` is 0; both wide `[1, 1]`. The formula of
    /// PyTorch's `clip_grad_norm_`.
    fn clip_scale(&mut self, scale: Tensor, sum: Tensor, max_norm: f64) -> Result;

    // ---- matrix products: w is [n, k] as Hugging Face stores it --------------------------------------------------

    /// `y [m, n] = x [m, k] w^T + beta y`, all storage. beta is 0 or 1; with 1 the old y is added in wide before rounding
    /// (a residual connection).
    fn matmul(&mut self, y: Tensor, x: Tensor, w: Tensor, beta: f64) -> Result;
    /// `dx [m, k] = dy [m, n] w + beta dx`, all storage.
    fn matmul_dx(&mut self, dx: Tensor, dy: Tensor, w: Tensor, beta: f64) -> Result;
    /// `dw [n, k] += dy [m, n]^T x [m, k]`; dw wide, the rest storage.
    fn matmul_dw(&mut self, dw: Tensor, dy: Tensor, x: Tensor) -> Result;

    // ---- layers ---------------------------------------------------------------------------------------------------

    /// `x [n, h] = table[ids]`; ids I32 `[n, 1]`, each in `0..V`.
    fn embedding(&mut self, x: Tensor, ids: Tensor, table: Tensor) -> Result;
    /// `dtable[ids[i]] += dx[i]` for i in order (deterministic); dtable wide `[V, h]`, dx storage.
    fn embedding_backward(&mut self, dtable: Tensor, ids: Tensor, dx: Tensor) -> Result;

    /// `y = x / sqrt(mean(x^2) + eps) * w` by row; x, y `[n, h]`, w `[1, h]`, storage (Zhang & Sennrich 2019).
    fn rmsnorm(&mut self, y: Tensor, x: Tensor, w: Tensor, eps: f64) -> Result;
    /// Backward of `rmsnorm`, recomputing the row statistics from x: `dx += its gradient` (dx already holds the residual
    /// branch's), `dw += its gradient`. dw wide `[1, h]`, the rest storage. dx may be the same tensor as nothing else.
    fn rmsnorm_backward(&mut self, dx: Tensor, dw: Tensor, dy: Tensor, x: Tensor, w: Tensor, eps: f64) -> Result;

    /// Angles of rotary positions: `table [c, d]` wide holds cos in columns `0..d/2` and sin in `d/2..d` of
    /// `positions[i] * frequencies[j]`, product, reduction and trigonometry in f64. positions I32 `[c, 1]`.
    fn rope_table(&mut self, table: Tensor, positions: Tensor, frequencies: &[f64]) -> Result;
    /// Splits `qkv [c, (nq + 2 nk) d]` into rotated q `[c, nq d]`, rotated k `[c, nk d]` and plain v `[c, nk d]`, pairing
    /// element j with j + d/2 of each head (the half-split form of Hugging Face's Llama). With `q` absent, `qkv` is
    /// `[c, 2 nk d]` and holds k and v only. With `k` and `v` absent, it is `[c, nq d]` and holds q only.
    fn rope_split(
        &mut self,
        q: Option<Tensor>,
        kv: Option<(Tensor, Tensor)>,
        qkv: Tensor,
        table: Tensor,
        heads: Heads,
    ) -> Result;
    /// Backward of `rope_split`: `dqkv` storage from dq storage `[c, nq d]` and the wide sums dk, dv `[c, nk d]`; rotates
    /// back by the same angles and rounds once.
    fn rope_merge_backward(
        &mut self,
        dqkv: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        table: Tensor,
        heads: Heads,
    ) -> Result;

    /// Causal attention of a query chunk, softmax scale `1/sqrt(d)`: `o [c, nq d]` storage and `lse [nq, c]` wide (natural
    /// log of the sum of exponentials of scaled scores), from q `[c, nq d]` and the whole-sequence k, v `[T, nk d]`, of
    /// which rows of documents that meet the chunk are read up to the chunk's end. Query head i uses kv head
    /// `i / (nq / nk)`. `workspace` is at least [`Backend::attention_workspace`] bytes.
    fn attention(
        &mut self,
        o: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        workspace: Tensor,
        heads: Heads,
        window: &Window,
    ) -> Result;
    /// Backward of `attention`: `dq` storage is written; dk, dv wide `[T, nk d]` are added to. `delta [nq, c]` wide is
    /// scratch for the row sums of do * o (FlashAttention-2, algorithm 2).
    fn attention_backward(
        &mut self,
        grads: AttentionGrads,
        saved: AttentionSaved,
        workspace: Tensor,
        heads: Heads,
        window: &Window,
    ) -> Result;

    /// `act [n, f] = silu(gate) * up` with `gate_up [n, 2f]` holding gate in columns `0..f` and up in `f..2f`; storage.
    fn swiglu(&mut self, act: Tensor, gate_up: Tensor) -> Result;
    /// Backward in place: `gate_up` is read and overwritten by its gradient, given `dact [n, f]`.
    fn swiglu_backward(&mut self, gate_up: Tensor, dact: Tensor) -> Result;

    /// Cross entropy over a tile of logits `[t, V]` (storage), labels I32 `[t, 1]`, -100 counting nothing:
    /// `sums[0] += sum of (lse - logit of the label)`, `sums[1] += number of rows whose largest logit is the label's`
    /// (first of equals); sums wide `[1, 2]`. With `gradient` given, logits are overwritten by `(softmax - onehot) *
    /// gradient`, and by 0 in rows that count nothing.
    fn cross_entropy(&mut self, sums: Tensor, logits: Tensor, labels: Tensor, gradient: Option<f64>) -> Result;

    /// One AdamW update of `n` parameters. With g' = g * scale[0]: `m = b1 m + (1-b1) g'`, `v = b2 v + (1-b2) g'^2`,
    /// `p = p (1 - lr wd) - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)`, in wide.
    /// g storage or wide; m, v wide or bf16 (then rounded stochastically); `scale` wide `[1, 1]`.
    /// With `low` (U16), w is bf16 and the f32 master is `((w - (low >> 15)) << 16) | low` on bit patterns; it is written
    /// back as `w = (bits + 0x8000) >> 16` and the low 16 bits. Without it, w is wide itself.
    fn adamw(&mut self, state: OptimizerState, g: Tensor, scale: Tensor, hyper: &AdamW) -> Result;
}

/// What the backward of attention writes.
#[derive(Debug, Clone, Copy)]
pub struct AttentionGrads {
    pub dq: Tensor,
    pub dk: Tensor,
    pub dv: Tensor,
    pub delta: Tensor,
}

/// What the backward of attention reads.
#[derive(Debug, Clone, Copy)]
pub struct AttentionSaved {
    /// Gradient of o.
    pub d_o: Tensor,
    pub o: Tensor,
    pub lse: Tensor,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
}

/// A slice of parameters and their AdamW state, equally long.
#[derive(Debug, Clone, Copy)]
pub struct OptimizerState {
    pub w: Tensor,
    /// Low halves of the master weights; only with bf16 weights.
    pub low: Option<Tensor>,
    pub m: Tensor,
    pub v: Tensor,
}
