//! What this host has, as the planner wants to know it: memory a trainer may use, disk, cores, assumed or measured speeds.

use std::{fs, io, path::Path};

use crate::domain::{
    Invalid, Machine,
    machine::{DeviceKind, MachineFile, Rates},
};

/// Share of memory, and bytes at the least, left to the server, the database and the system.
const RESERVED_SHARE: f64 = 0.1;
const RESERVED_BYTES: u64 = 512 << 20;
/// Share of free disk that spilled tensors may take; checkpoints need the rest.
const SPILL_SHARE: f64 = 0.5;
/// Speeds of one core, until a calibration has measured them: f32 products and causal attention, FLOP/s.
const CORE_GEMM_FLOPS: f64 = 60e9;
const CORE_ATTENTION_FLOPS: f64 = 25e9;
/// Speeds of a host: memory and disk, bytes/s.
const MEMORY_BYTES: f64 = 20e9;
const DISK_BYTES: f64 = 500e6;

/// The host's cores as a device, with the `memory` that an operator has stated, or with what is free. `work_dir` is where a
/// trainer would spill; measured speeds are taken from `file`.
pub fn cpu(work_dir: &Path, memory: Option<u64>, file: &MachineFile) -> Machine {
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let mut machine = Machine {
        device: DeviceKind::Cpu,
        device_name: cpu_name(),
        n_devices: 1,
        network: None,
        device_bytes: memory.unwrap_or_else(usable_memory),
        host_bytes: 0,
        disk_bytes: (free_disk(work_dir) as f64 * SPILL_SHARE) as u64,
        rates: Rates {
            gemm_flops: CORE_GEMM_FLOPS * cores,
            attention_flops: CORE_ATTENTION_FLOPS * cores,
            memory_bytes: MEMORY_BYTES,
            link_bytes: MEMORY_BYTES,
            peer_bytes: MEMORY_BYTES,
            disk_bytes: DISK_BYTES,
            source: "assumed".into(),
        },
    };
    file.apply(&mut machine);
    machine
}

/// The measured speeds of this host; none where there is no such file.
pub fn machine_file(path: &Path) -> Result<MachineFile, Invalid> {
    let refuse = |why: String| {
        let message = format!(
            "{}: {why}; write it anew with longhaul calibrate, or remove it to go by data sheets",
            path.display()
        );
        Invalid::with_code("invalid_machine_file", "--machine-file", message)
    };
    match fs::read_to_string(path) {
        Ok(text) => MachineFile::parse(&text).map_err(refuse),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(MachineFile::default()),
        Err(error) => Err(refuse(error.to_string())),
    }
}

fn cpu_name() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| "CPU".to_owned(), |(_, name)| name.trim().to_owned())
}

/// Memory that is free now or would be on request, within the container's limit, less what is left to others.
fn usable_memory() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()).map(|kib| kib * 1024)
    };
    let total = field("MemTotal").unwrap_or(0).min(container_limit().unwrap_or(u64::MAX));
    let available = field("MemAvailable").unwrap_or(total).min(total);
    let reserved = ((total as f64 * RESERVED_SHARE) as u64).max(RESERVED_BYTES);
    available.saturating_sub(reserved)
}

/// The tightest limit of the control groups above this process (version 2, then version 1).
fn container_limit() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limit = |path: String| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let unified = groups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").to_owned();
    let mut limits = Vec::new();
    let mut group = Some(Path::new(&unified));
    while let Some(path) = group {
        let folder = path.display().to_string();
        limits.extend(limit(format!("/sys/fs/cgroup{}/memory.max", folder.trim_end_matches('/'))));
        group = path.parent();
    }
    limits.extend(limit("/sys/fs/cgroup/memory/memory.limit_in_bytes".to_owned()));
    limits.into_iter().min()
}

/// Bytes free to us on the file system of a folder, or of its nearest ancestor that exists.
fn free_disk(folder: &Path) -> u64 {
    let existing = folder.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    rustix::fs::statvfs(existing).map_or(0, |stat| stat.f_bavail * stat.f_frsize)
}
