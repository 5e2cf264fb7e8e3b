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

/// Devices alike and what the planner needs to know of them. Bytes are what a trainer may use, not what is built in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Where ranks compute.
    pub device: DeviceKind,
    /// The device's own name, for people (`NVIDIA H200`, `AMD EPYC`).
    pub device_name: String,
    /// How many devices of a host one plan may take. 1 for the CPU, whose cores any number of ranks share.
    pub n_devices: u32,
    /// Several such hosts that train together; `None` is one.
    #[serde(default)]
    pub network: Option<Network>,
    /// Bytes usable on one device. For the CPU: the host memory a trainer may use.
    pub device_bytes: u64,
    /// Bytes of a host's memory usable beside its devices, over all of them. 0 for the CPU, where it is `device_bytes` already.
    pub host_bytes: u64,
    /// Bytes usable on a host's disk for spilled tensors, over all its devices.
    pub disk_bytes: u64,
    /// Measured or assumed speeds.
    pub rates: Rates,
}

/// Hosts alike that train together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    pub n_hosts: u32,
    /// What one device sends to those of other hosts while all of its host do, bytes/s.
    pub link_bytes: f64,
}

/// What a device sends to other hosts where nobody has measured it: 10 Gbit/s.
const NETWORK_BYTES: f64 = 1.25e9;

impl Machine {
    /// Devices of all hosts.
    pub fn all_devices(&self) -> u64 {
        u64::from(self.n_devices) * self.network.map_or(1, |network| u64::from(network.n_hosts))
    }

    /// Ranks on the fullest host when there are `n_ranks`, a device each, host after host; ranks of a CPU are all on one.
    pub fn ranks_on_host(&self, n_ranks: u64) -> u64 {
        if self.network.is_some() { n_ranks.min(self.n_devices.into()) } else { n_ranks }
    }

    /// So many of these devices, with their part of the host's memory and disk. A CPU stays whole, however many ranks share it.
    #[must_use]
    pub fn some(&self, n: u64) -> Self {
        if self.device == DeviceKind::Cpu || self.network.is_some() {
            return self.clone();
        }
        let part = |bytes: u64| bytes / u64::from(self.n_devices.max(1)) * n;
        Self {
            n_devices: n.try_into().unwrap_or(u32::MAX),
            host_bytes: part(self.host_bytes),
            disk_bytes: part(self.disk_bytes),
            ..self.clone()
        }
    }

    /// Devices of a kind on several hosts, `each` of every host: as much memory a device as the smallest has, and beside it as
    /// much of a host. `None` without hosts.
    pub fn across(hosts: &[Self], each: u32) -> Option<Self> {
        let hosts: Vec<Self> = hosts.iter().map(|host| host.some(each.into())).collect();
        let least = |of: fn(&Self) -> u64| hosts.iter().map(of).min();
        Some(Self {
            n_devices: each,
            network: Some(Network { n_hosts: hosts.len() as u32, link_bytes: NETWORK_BYTES }),
            device_bytes: least(|host| host.device_bytes)?,
            host_bytes: least(|host| host.host_bytes)?,
            disk_bytes: least(|host| host.disk_bytes)?,
            ..hosts.first()?.clone()
        })
    }

    /// Devices of one host that one plan may take together: as much memory a device as the smallest has, and of the host's
    /// memory and disk their shares together. `None` without devices.
    pub fn together(devices: &[Self]) -> Option<Self> {
        let least = |of: fn(&Self) -> u64| devices.iter().map(of).min();
        Some(Self {
            n_devices: devices.iter().map(|machine| machine.n_devices).sum(),
            device_bytes: least(|machine| machine.device_bytes)?,
            host_bytes: devices.iter().map(|machine| machine.host_bytes).sum(),
            disk_bytes: devices.iter().map(|machine| machine.disk_bytes).sum(),
            ..devices.first()?.clone()
        })
    }
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
    /// What one device sends to the others of its host, bytes/s; 0 is not known, and planned for as the host link.
    #[serde(default)]
    pub peer_bytes: f64,
    /// Local disk, bytes/s; all devices of a host share it.
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

/// The [`usable`] machines of a host as plans take them: those of a kind together, since the ranks of a job wait for each other.
pub fn alike(machines: &[Machine], wanted: Option<DeviceKind>) -> Vec<Machine> {
    let mut kinds: Vec<Vec<Machine>> = Vec::new();
    for machine in usable(machines, wanted) {
        match kinds.iter_mut().find(|kind| kind[0].device_name == machine.device_name) {
            Some(kind) => kind.push(machine.clone()),
            None => kinds.push(vec![machine.clone()]),
        }
    }
    kinds.iter().filter_map(|kind| Machine::together(kind)).collect()
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
