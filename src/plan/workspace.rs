//! Scratch that a device's libraries need beside the arena's tensors, by formula.

use crate::domain::{ModelConfig, machine::DeviceKind};

/// Measured: the kernels of cuBLASLt and cuDNN that a step loads, and local memory for them.
const CUDA_MODULES_BYTES: u64 = 256 << 20;

/// Bytes of attention scratch for chunks of `chunk` queries against up to `tokens` keys.
pub fn attention(model: &ModelConfig, device: DeviceKind, chunk: u64, tokens: u64) -> u64 {
    let (chunk, group) = (chunk.min(tokens), model.n_heads / model.n_kv_heads);
    match device {
        DeviceKind::Cpu => 0,
        DeviceKind::Cuda => {
            // One kv head a call: bf16 dk and dv, f32 sums of dq, the library's dk and dv of every query head, and its slack.
            let align = |bytes: u64| bytes.next_multiple_of(256);
            let gradients = align(tokens * model.head_dim * 2);
            let dq_sums = align(group * chunk * model.head_dim * 4);
            let by_head = if group > 1 { 2 * group * tokens * model.head_dim * 2 } else { 0 };
            2 * gradients + dq_sums + by_head + (1 << 20)
        }
    }
}

/// Device bytes a trainer process needs outside the arena. CPU: GEMM packing buffers and thread stacks. CUDA: the scratch of
/// our own kernels and products (32 MiB), and what the driver takes to load the libraries' kernels.
pub fn process(device: DeviceKind) -> u64 {
    match device {
        DeviceKind::Cpu => 4 << 20,
        DeviceKind::Cuda => (32 << 20) + CUDA_MODULES_BYTES,
    }
}
