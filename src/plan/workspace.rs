//! Scratch that a device's libraries need beside the arena's tensors, by formula.

use crate::domain::{ModelConfig, machine::DeviceKind};

/// Bytes of attention scratch for chunks of `chunk` queries against up to `tokens` keys.
pub fn attention(model: &ModelConfig, device: DeviceKind, chunk: u64, tokens: u64) -> u64 {
    let _ = (model, device, chunk, tokens);
    0
}

/// Bytes a trainer process needs outside the arena: GEMM packing buffers and thread stacks.
pub fn process(device: DeviceKind) -> u64 {
    match device {
        DeviceKind::Cpu => 4 << 20,
        DeviceKind::Cuda => 0,
    }
}
