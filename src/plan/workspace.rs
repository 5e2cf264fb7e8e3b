//! Scratch that a device's libraries need beside the arena's tensors, by formula.

use super::{Ranks, shards};
use crate::domain::{ModelConfig, heads::HeadRun, machine::DeviceKind};

/// Measured: the kernels of cuBLASLt and cuDNN that a step loads, and local memory for them.
const CUDA_MODULES_BYTES: u64 = 256 << 20;

/// Keys of a block, query heads times keys of a call, and keys of a tile, as `backend/cuda` cuts them.
const CUDA_BLOCK_KEYS: u64 = 1 << 16;
const CUDA_HEAD_KEYS: u64 = 1 << 19;
const CUDA_TILE_KEYS: u64 = 128;
/// Measured: resident bytes of a process that has the driver, cuBLASLt and cuDNN loaded.
const CUDA_HOST_BYTES: u64 = 544 << 20;

/// Bytes of attention scratch for chunks of `chunk` queries against up to `tokens` keys, on the rank that needs most.
pub fn attention(model: &ModelConfig, device: DeviceKind, ranks: Ranks, chunk: u64, tokens: u64) -> u64 {
    let runs = shards::heads(model, ranks).into_iter().flatten();
    runs.map(|run| attention_of(&run, model.head_dim, device, chunk.min(tokens), tokens)).max().unwrap_or(0)
}

fn attention_of(run: &HeadRun, head_dim: u64, device: DeviceKind, chunk: u64, tokens: u64) -> u64 {
    let (n_heads, group) = (run.n_heads(), run.n_heads() / run.n_kv_heads());
    match device {
        DeviceKind::Cpu => 0,
        DeviceKind::Cuda => {
            // Backward, by block of keys: sums of dq twice over and a call's dq, its dk and dv and those of every query head,
            // and the library's slack.
            let align = |bytes: u64| bytes.next_multiple_of(256);
            let block = tokens.min(CUDA_BLOCK_KEYS.max(chunk + CUDA_TILE_KEYS));
            let head_keys = (n_heads * block).min(CUDA_HEAD_KEYS.max(group * block));
            let gradients = align(head_keys.div_ceil(group) * head_dim * 2);
            let queries = chunk * n_heads * head_dim;
            let by_head = if group > 1 { 2 * align(head_keys * head_dim * 2) } else { 0 };
            2 * align(queries * 4) + align(queries * 2) + 2 * gradients + by_head + (1 << 20)
        }
    }
}

/// Bytes that a trainer process needs beside its arenas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pub device: u64,
    /// 0 on the CPU, where the device is the host.
    pub host: u64,
}

/// Measured on two cards: what NCCL takes of a device and of a process's memory for two groups of ranks.
const NCCL_DEVICE_BYTES: u64 = 672 << 20;
const NCCL_HOST_BYTES: u64 = 340 << 20;

/// CPU: GEMM packing buffers and thread stacks. CUDA: the scratch of our own kernels and products (32 MiB), and what the
/// driver takes to load the libraries' kernels; on the host, the libraries themselves.
pub fn process(device: DeviceKind, ranks: Ranks) -> Process {
    let (nccl, nccl_host) = if ranks.world() > 1 { (NCCL_DEVICE_BYTES, NCCL_HOST_BYTES) } else { (0, 0) };
    match device {
        DeviceKind::Cpu => Process { device: 4 << 20, host: 0 },
        DeviceKind::Cuda => {
            Process { device: (32 << 20) + CUDA_MODULES_BYTES + nccl, host: CUDA_HOST_BYTES + nccl_host }
        }
    }
}
