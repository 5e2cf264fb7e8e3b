//! Tokens per second, and model FLOPs utilization counted causally.

use crate::domain::{ModelConfig, machine::DeviceKind};

/// Speed of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speed {
    pub tokens_per_second: f64,
    /// Model FLOPs (6 N per token and causal attention, nothing recomputed) over seconds.
    pub model_flops: f64,
    /// `model_flops` over the device's dense peak, where that is known.
    pub causal_mfu: Option<f64>,
}

/// Dense bf16 peak of a device by its name, FLOP/s, from the vendor's data sheets.
pub fn peak_flops(device: DeviceKind, name: &str) -> Option<f64> {
    let known = [("H200", 989e12), ("H100", 989e12), ("A100", 312e12), ("B200", 2250e12)];
    match device {
        DeviceKind::Cpu => None,
        DeviceKind::Cuda => known.into_iter().find(|(part, _)| name.contains(part)).map(|(_, peak)| peak),
    }
}

/// Speed of a step over documents of these lengths that took `seconds`; `peak` over all devices used.
pub fn speed(config: &ModelConfig, document_lengths: &[u64], seconds: f64, peak: Option<f64>) -> Speed {
    let tokens: u64 = document_lengths.iter().sum();
    let model_flops = config.step_flops(document_lengths) / seconds;
    Speed { tokens_per_second: tokens as f64 / seconds, model_flops, causal_mfu: peak.map(|peak| model_flops / peak) }
}
