//! What a host has: published by its executor in the table `hosts`, read by the planner.

use serde::{Deserialize, Serialize};

/// Where a trainer computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// The host's cores; device memory and host memory are the same memory.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// One kind of device of a host and what the planner needs to know of it. Bytes are what a trainer may use, not what is built in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Where ranks compute.
    pub device: DeviceKind,
    /// The device's own name, for people (`NVIDIA H200`, `AMD EPYC`).
    pub device_name: String,
    /// How many devices there are (1 for the CPU).
    pub n_devices: u32,
    /// Bytes usable on one device. For the CPU: the host memory a trainer may use.
    pub device_bytes: u64,
    /// Bytes of host memory usable beside the devices, over all ranks. 0 for the CPU, where it is `device_bytes` already.
    pub host_bytes: u64,
    /// Bytes usable on local disk for spilled tensors.
    pub disk_bytes: u64,
    /// Measured or assumed speeds.
    pub rates: Rates,
}

/// Speeds of one device, per second. From a calibration, else from the data sheet or a guess that says so in `source`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Dense matrix products, FLOP/s, in the precision that will be used.
    pub gemm_flops: f64,
    /// Causal attention, FLOP/s, counted causally.
    pub attention_flops: f64,
    /// Device memory, bytes/s, read plus written.
    pub memory_bytes: f64,
    /// Host link, bytes/s each way.
    pub link_bytes: f64,
    /// Local disk, bytes/s.
    pub disk_bytes: f64,
    /// `calibrated`, `data sheet` or `assumed`.
    pub source: String,
}
