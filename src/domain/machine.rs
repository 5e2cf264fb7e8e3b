//! What a host has: published by its executor in the table `hosts`, read by the planner.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::fields::meant;

/// Where a trainer computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// The host's cores; device memory and host memory are the same memory.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

impl DeviceKind {
    /// Every device by the word that requests and flags use.
    pub const WORDS: [(&str, Self); 2] = [("cpu", Self::Cpu), ("cuda", Self::Cuda)];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

impl FromStr for DeviceKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        meant(&Self::WORDS, text).ok_or_else(|| format!("device is cpu or cuda, not {text}"))
    }
}

/// One device of a host and what the planner needs to know of it. Bytes are what a trainer may use, not what is built in.
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
    /// What one device sends to the others, bytes/s; 0 is not known, and planned for as the host link.
    #[serde(default)]
    pub peer_bytes: f64,
    /// Local disk, bytes/s.
    pub disk_bytes: f64,
    /// `calibrated`, `data sheet` or `assumed`.
    pub source: String,
}

/// What a look at a host found; `longhaul machine` prints it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Found {
    /// One for each GPU, in the driver's order, then one for the CPU.
    pub machines: Vec<Machine>,
    /// Why there is no GPU among them, or fewer than the driver shows.
    pub without_cuda: Option<String>,
}

/// Machines of a host that a job may take, given the device it wants: where it names none, the GPUs if there are any. The
/// API plans for these and executors train on these.
pub fn usable(machines: &[Machine], wanted: Option<DeviceKind>) -> impl Iterator<Item = &Machine> {
    let best = || machines.iter().map(|machine| machine.device).find(|device| *device == DeviceKind::Cuda);
    let device = wanted.or_else(best).unwrap_or(DeviceKind::Cpu);
    machines.iter().filter(move |machine| machine.device == device)
}

/// Measured speeds of this host's devices, in a file of its own: `longhaul calibrate` writes it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineFile {
    pub calibrations: Vec<Calibration>,
}

/// Measured speeds of one device. They hold for devices of this name only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    pub device: DeviceKind,
    pub device_name: String,
    pub rates: Rates,
}

impl MachineFile {
    /// Reads the file's text, or says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let file: Self = serde_json::from_str(text).map_err(|error| error.to_string())?;
        for Calibration { device_name, rates, .. } in &file.calibrations {
            for (name, rate) in [
                ("gemm_flops", rates.gemm_flops),
                ("attention_flops", rates.attention_flops),
                ("memory_bytes", rates.memory_bytes),
                ("link_bytes", rates.link_bytes),
                ("disk_bytes", rates.disk_bytes),
            ] {
                if !(rate.is_finite() && rate > 0.0) {
                    return Err(format!("{name} of {device_name} must be above 0, not {rate}"));
                }
            }
        }
        Ok(file)
    }

    /// Measured speeds instead of the machine's, where there are some of a device of its name.
    pub fn apply(&self, machine: &mut Machine) {
        let its = |c: &&Calibration| c.device == machine.device && c.device_name == machine.device_name;
        if let Some(calibration) = self.calibrations.iter().find(its) {
            machine.rates = calibration.rates.clone();
        }
    }

    /// Takes a measurement in, in place of an older one of the same device.
    pub fn put(&mut self, new: Calibration) {
        self.calibrations.retain(|old| (old.device, &old.device_name) != (new.device, &new.device_name));
        self.calibrations.push(new);
    }
}
