//! This host's GPU as the planner wants to know it.

use crate::{
    domain::{
        Machine,
        machine::{DeviceKind, Rates},
    },
    engine::{Result, backend::cuda::Cuda},
};

/// Device memory left free: what the driver takes beside our arena grows a little while kernels are loaded.
const MARGIN_BYTES: u64 = 512 << 20;
/// Speeds until a calibration has measured them, of a Hopper card: bf16 products and causal attention (forward and backward
/// by their shares), FLOP/s; device memory and the link to the host, bytes/s.
const GEMM_FLOPS: f64 = 700e12;
const ATTENTION_FLOPS: f64 = 525e12;
const MEMORY_BYTES: f64 = 3.6e12;
const LINK_BYTES: f64 = 50e9;

/// An open GPU of a `host` with nothing else on it.
pub fn machine(cuda: &Cuda, host: &Machine) -> Result<Machine> {
    let (free, _) = cuda.device.memory_bytes()?;
    Ok(Machine {
        device: DeviceKind::Cuda,
        device_name: cuda.device.name()?,
        n_devices: 1,
        device_bytes: free.saturating_sub(MARGIN_BYTES),
        host_bytes: host.device_bytes,
        disk_bytes: host.disk_bytes,
        rates: Rates {
            gemm_flops: GEMM_FLOPS,
            attention_flops: ATTENTION_FLOPS,
            memory_bytes: MEMORY_BYTES,
            link_bytes: LINK_BYTES,
            disk_bytes: host.rates.disk_bytes,
            source: "data sheet".into(),
        },
    })
}
