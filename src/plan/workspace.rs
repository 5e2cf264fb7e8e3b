//! Scratch that a device's libraries need beside the arena's tensors, by formula.

use super::{Ranks, shards};
use crate::domain::{
    ModelConfig, attention_workspace,
    heads::{HeadRun, Heads},
    machine::DeviceKind,
};

/// Measured: the kernels of cuBLASLt and cuDNN that a step loads, and local memory for them.
const CUDA_MODULES_BYTES: u64 = 256 << 20;

/// Measured: resident bytes of a process that has the driver, cuBLASLt and cuDNN loaded, and 16 MiB for a step's inputs.
const CUDA_HOST_BYTES: u64 = (544 + 16) << 20;
/// Measured: what a process that drives a GPU holds of each token of a sequence: ids, labels and positions, as they are read and
/// as they are handed on.
const CUDA_HOST_TOKEN_BYTES: u64 = 64;
/// Measured: attention plans of packed documents, of which there are more the more kinds of documents there are, take about a
/// megabyte each.
const CUDA_HOST_SPARE_BYTES: u64 = 512 << 20;

/// Bytes of attention scratch for chunks of `chunk` queries against up to `tokens` keys, on the rank that needs most.
pub fn attention(model: &ModelConfig, device: DeviceKind, ranks: Ranks, chunk: u64, tokens: u64) -> u64 {
    let of_run = |run: HeadRun| {
        let heads = Heads { n_heads: run.n_heads(), n_kv_heads: run.n_kv_heads(), head_dim: model.head_dim };
        attention_workspace::bytes(heads, chunk.min(tokens), tokens)
    };
    match device {
        DeviceKind::Cpu => 0,
        DeviceKind::Cuda => shards::heads(model, ranks).into_iter().flatten().map(of_run).max().unwrap_or(0),
    }
}

/// Bytes that a trainer process needs beside its arenas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pub device: u64,
    /// Device memory that is left free: it is taken for moments only.
    pub spare: u64,
    /// 0 on the CPU, where the device is the host.
    pub host: u64,
    /// Host memory that is left free: it is taken when data turn out to need it.
    pub host_spare: u64,
}

/// Measured on two cards: what NCCL takes of a device and of a process's memory for two groups of ranks.
const NCCL_DEVICE_BYTES: u64 = 672 << 20;
const NCCL_HOST_BYTES: u64 = 340 << 20;
/// With 0.5 GiB free behind a step's peak NCCL ran out of memory in its first exchange; with 1.2 it did not.
const NCCL_SPARE_BYTES: u64 = 768 << 20;

/// CPU: GEMM packing buffers and thread stacks. CUDA: the scratch of our own kernels and products (32 MiB), and what the
/// driver takes to load the libraries' kernels; on the host, the libraries themselves.
pub fn process(device: DeviceKind, ranks: Ranks, tokens: u64) -> Process {
    let alone = ranks.world() == 1;
    let [nccl, spare, nccl_host] = if alone { [0; 3] } else { [NCCL_DEVICE_BYTES, NCCL_SPARE_BYTES, NCCL_HOST_BYTES] };
    match device {
        DeviceKind::Cpu => Process { device: 4 << 20, spare: 0, host: 0, host_spare: 0 },
        DeviceKind::Cuda => Process {
            device: (32 << 20) + CUDA_MODULES_BYTES + nccl,
            spare,
            host: CUDA_HOST_BYTES + CUDA_HOST_TOKEN_BYTES * tokens + nccl_host,
            host_spare: CUDA_HOST_SPARE_BYTES,
        },
    }
}
