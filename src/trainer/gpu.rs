//! This host's GPUs as the planner wants to know them.

use std::path::PathBuf;

use crate::{
    domain::{
        Invalid, Machine,
        machine::{DeviceKind, Found, MachineFile, Rates},
    },
    engine::{
        Result,
        backend::cuda::Cuda,
        gpus::{self, Gpu},
    },
};

/// Device memory left free: what the driver takes beside our arena grows a little while kernels are loaded.
const MARGIN_BYTES: u64 = 512 << 20;

/// A kind of card and its speeds until a calibration has measured them: bf16 products and causal attention (forward and
/// backward by their shares), FLOP/s; device memory, the link to the host, and what one card sends to others of its host,
/// bytes/s. The vendor's data sheets less what kernels usually leave of them.
struct Card {
    /// Part of the name that the driver gives.
    name: &'static str,
    memory_bytes: u64,
    rates: [f64; 5],
}

/// Cards by name; the first that fits counts.
const CARDS: [Card; 5] = [
    Card { name: "H200", memory_bytes: 141_000_000_000, rates: [730e12, 530e12, 3.6e12, 50e9, 275e9] },
    Card { name: "H100 PCIe", memory_bytes: 80_000_000_000, rates: [450e12, 340e12, 1.7e12, 50e9, 50e9] },
    Card { name: "H100", memory_bytes: 80_000_000_000, rates: [700e12, 525e12, 2.9e12, 50e9, 275e9] },
    Card { name: "A100-SXM4-40GB", memory_bytes: 40_000_000_000, rates: [240e12, 165e12, 1.3e12, 22e9, 200e9] },
    Card { name: "A100", memory_bytes: 80_000_000_000, rates: [240e12, 165e12, 1.7e12, 22e9, 200e9] },
];
/// Speeds of a card that is not among them.
const OTHER_CARD: [f64; 5] = [60e12, 40e12, 0.6e12, 20e9, 20e9];

/// What an operator says about a host's GPUs.
#[derive(Debug, Clone, Copy)]
pub struct Stated<'a> {
    /// Folders to look for NVIDIA's libraries in.
    pub libraries: &'a [PathBuf],
    /// Bytes of a GPU's memory that may be used; what is free otherwise.
    pub device_memory: Option<u64>,
    /// Measured speeds.
    pub file: &'a MachineFile,
}

/// Every device of this host. A host whose GPUs cannot be used is one with a CPU, and the reason is told beside it.
pub fn found(host: &Machine, stated: &Stated) -> Result<Found> {
    let (gpus, error) = gpus::found(stated.libraries);
    let machines = gpus.iter().map(|gpu| machine_of(gpu, gpus.len() as u64, host, stated));
    let mut machines = machines.collect::<Result<Vec<Machine>>>()?;
    machines.push(host.clone());
    Ok(Found { machines, without_cuda: error.map(|error| error.to_string()) })
}

/// An open GPU of a `host` with nothing else on it.
pub fn machine(cuda: &Cuda, host: &Machine, stated: &Stated) -> Result<Machine> {
    machine_of(&Gpu::of(cuda)?, 1, host, stated)
}

/// A GPU that need not be there, to plan for.
pub fn imagined(name: &str, host: &Machine, stated: &Stated) -> Result<Machine> {
    let bytes = card(name).map(|card| card.memory_bytes).or(stated.device_memory).ok_or_else(|| {
        let known = CARDS.map(|card| card.name).join(", ");
        Invalid::new(
            "--gpu",
            format!("the memory of a {name} is not known: add --device-memory BYTES, or take {known}"),
        )
    })?;
    let gpu =
        Gpu { name: name.to_owned(), free_bytes: bytes, total_bytes: bytes.max(stated.device_memory.unwrap_or(0)) };
    machine_of(&gpu, 1, host, stated)
}

fn machine_of(gpu: &Gpu, n_gpus: u64, host: &Machine, stated: &Stated) -> Result<Machine> {
    let device_bytes = match stated.device_memory {
        Some(bytes) if bytes > gpu.total_bytes => {
            let message = format!("--device-memory {bytes} is more than the {} bytes of {}", gpu.total_bytes, gpu.name);
            return Err(Invalid::new("--device-memory", message).into());
        }
        Some(bytes) => bytes,
        None => gpu.free_bytes.saturating_sub(MARGIN_BYTES),
    };
    let [gemm_flops, attention_flops, memory_bytes, link_bytes, peer_bytes] =
        card(&gpu.name).map_or(OTHER_CARD, |card| card.rates);
    let mut machine = Machine {
        device: DeviceKind::Cuda,
        device_name: gpu.name.clone(),
        n_devices: 1,
        network: None,
        device_bytes,
        // Each GPU may train a job of its own at the same time.
        host_bytes: host.device_bytes / n_gpus,
        disk_bytes: host.disk_bytes / n_gpus,
        rates: Rates {
            gemm_flops,
            attention_flops,
            memory_bytes,
            link_bytes,
            peer_bytes,
            disk_bytes: host.rates.disk_bytes,
            source: "data sheet".into(),
        },
    };
    stated.file.apply(&mut machine);
    Ok(machine)
}

fn card(name: &str) -> Option<&'static Card> {
    CARDS.iter().find(|card| name.contains(card.name))
}
