//! Which devices this host has now: asked of a child process, since only a trainer's own program may open a GPU.
//!
//! A driver that hangs, a library that ends its process: each takes `longhaul machine` with it and not the executor. Nobody
//! looks while a GPU trains. It would take memory that the trainer's plan counts on, and find little of the memory free; a
//! GPU that fails then fails its trainer, and that is followed by a look.

use std::{ops::Range, process::Stdio, time::Duration};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::Command,
    time::{Instant, timeout},
};

use super::{Context, Settings};
use crate::{
    domain::{
        ExecutorId, Machine,
        machine::{DeviceKind, Found},
        run::{Place, Ranks},
    },
    store::queue::ANY_DEVICE,
};

/// Pause after a look: a GPU that came or went is noticed within it, and a child that failed is asked again sooner.
const LOOK_AGAIN: Duration = Duration::from_mins(1);
const FAILED_AGAIN: Duration = Duration::from_secs(10);
/// Longest answer that is read, and longest part of a child's complaint that is kept.
const MAX_ANSWER: u64 = 1 << 20;
const MAX_COMPLAINT: u64 = 2000;

/// What this host can train on.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Devices {
    pub cpu: Machine,
    /// By the driver's order.
    pub gpus: Vec<Machine>,
    /// The most GPUs that it had since the executor started. From then on jobs that take any device wait for them, also while
    /// they are away: on the CPU they would be refused for their length, or last for ever.
    pub had: Vec<Machine>,
}

/// What one attempt trains on.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Seat {
    /// All of its devices.
    pub machine: Machine,
    pub ranks: Ranks,
    /// Those of them that are on this host.
    pub here: Range<u64>,
    /// Their GPUs, in their order; none on the CPU.
    pub gpus: Vec<usize>,
    /// Which ranks other hosts are called for, and where and how all of them meet; where there are such.
    pub others: Vec<(ExecutorId, Range<u64>)>,
    pub place: Option<Place>,
}

impl Seat {
    /// A seat whose ranks are all on this host.
    pub(super) fn here(machine: Machine, ranks: Ranks, gpus: Vec<usize>) -> Self {
        Self { machine, ranks, here: 0..ranks.world(), gpus, others: Vec::new(), place: None }
    }
}

/// Devices that nobody trains on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Free {
    pub gpus: Vec<usize>,
    pub cpu: bool,
}

impl Devices {
    pub(super) fn without_gpus(cpu: Machine) -> Self {
        Self { cpu, gpus: Vec::new(), had: Vec::new() }
    }

    /// Every device, the GPUs first.
    pub(super) fn machines(&self) -> Vec<Machine> {
        self.gpus.iter().chain([&self.cpu]).cloned().collect()
    }

    /// The devices that are free beside trainings in these seats. Trainings on GPUs run beside each other. One on the CPU
    /// runs alone, since it is planned with all of the memory that those on GPUs share.
    pub(super) fn free<'a>(&self, taken: impl IntoIterator<Item = &'a Seat>) -> Free {
        let mut free = Free { gpus: (0..self.gpus.len()).collect(), cpu: true };
        for seat in taken {
            match seat.machine.device {
                DeviceKind::Cpu => return Free::default(),
                DeviceKind::Cuda => free.gpus.retain(|gpu| !seat.gpus.contains(gpu)),
            }
            free.cpu = false;
        }
        free
    }

    /// Places of free devices among [`Self::machines`].
    pub(super) fn places(&self, free: &Free) -> Vec<usize> {
        free.gpus.iter().copied().chain(free.cpu.then_some(self.gpus.len())).collect()
    }

    /// What these devices can do for jobs, as [`crate::store::queue::Claimant`] says it.
    pub(super) fn wishes(&self, free: &Free) -> Vec<String> {
        let has = |device: DeviceKind| match device {
            DeviceKind::Cpu => free.cpu,
            DeviceKind::Cuda => !free.gpus.is_empty(),
        };
        let mut wishes: Vec<String> =
            DeviceKind::WORDS.into_iter().filter(|(_, device)| has(*device)).map(|(word, _)| word.to_owned()).collect();
        wishes.extend(has(self.kind_for(None)).then(|| ANY_DEVICE.to_owned()));
        wishes
    }

    /// What a job trains on that wants this device, or any.
    pub(super) fn kind_for(&self, wanted: Option<DeviceKind>) -> DeviceKind {
        wanted.unwrap_or(if self.had.is_empty() { DeviceKind::Cpu } else { DeviceKind::Cuda })
    }
}

/// Looks for GPUs, and remembers what was said about them: nothing is logged twice in a row.
#[derive(Debug, Default)]
pub(super) struct Looker {
    next: Option<Instant>,
    said: String,
}

impl Looker {
    /// Whether it is time to look again.
    pub(super) fn is_due(&self) -> bool {
        self.next.is_none_or(|next| Instant::now() >= next)
    }

    /// Makes the next look due now: a device may have failed.
    pub(super) fn doubt(&mut self) {
        self.next = None;
    }

    /// Asks the child, and publishes what is known then. Without an answer that is the CPU alone: a trainer would open the
    /// GPU no better than the child did.
    pub(super) async fn look(&mut self, context: &Context) {
        let memory = context.devices.borrow().cpu.device_bytes;
        let Some(found) = context.stop.run_until_cancelled(ask(&context.settings, memory)).await else { return };
        let failed = found.is_err();
        let (gpus, without) = match found {
            Ok(found) => (found.machines, found.without_cuda),
            Err(why) => (Vec::new(), Some(why)),
        };
        let gpus: Vec<Machine> = gpus.into_iter().filter(|machine| machine.device == DeviceKind::Cuda).collect();
        let mut had = context.devices.borrow().had.clone();
        if gpus.len() >= had.len() {
            had.clone_from(&gpus);
        }
        self.say(&gpus, without.as_deref(), failed, !had.is_empty());
        context.devices.send_if_modified(|devices| {
            let new = Devices { cpu: devices.cpu.clone(), gpus, had };
            let modified = *devices != new;
            *devices = new;
            modified
        });
        self.next = Some(Instant::now() + if failed { FAILED_AGAIN } else { LOOK_AGAIN });
    }

    fn say(&mut self, gpus: &[Machine], without: Option<&str>, failed: bool, had_gpus: bool) {
        let names: Vec<&str> = gpus.iter().map(|gpu| gpu.device_name.as_str()).collect();
        let said = format!("{names:?} {without:?}");
        if std::mem::replace(&mut self.said, said.clone()) == said {
            return;
        }
        let why = without.unwrap_or_default();
        match (gpus, failed) {
            ([], _) if had_gpus => tracing::warn!(why, "the GPUs are gone; jobs that take any device wait for them"),
            ([], true) => tracing::warn!(why, "the look for GPUs failed; jobs train on the CPU until it succeeds"),
            ([], false) => tracing::info!(why, "no GPU is used; jobs train on the CPU"),
            _ => tracing::info!(gpus = names.join(", "), why, "GPUs found"),
        }
    }
}

/// What `longhaul machine` answers in time, or one line about why it did not. The host's `memory` is what it was when the
/// executor started: a training on the CPU may have taken it by now.
async fn ask(settings: &Settings, memory: u64) -> Result<Found, String> {
    let mut command = Command::new(&settings.program);
    command.arg("machine").arg("--data").arg(&settings.work_folder).arg("--machine-file").arg(&settings.machine_file);
    command.arg("--memory").arg(memory.to_string());
    for folder in &settings.libraries {
        command.arg("--libraries").arg(folder);
    }
    if let Some(bytes) = settings.device_memory {
        command.arg("--device-memory").arg(bytes.to_string());
    }
    let child = command
        .current_dir(&settings.work_folder)
        .env_remove("DATABASE_URL")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn();
    let mut child = child.map_err(|error| format!("longhaul machine could not be started: {error}"))?;
    let mut group = Group(child.id().and_then(|id| Pid::from_raw(id as i32)));
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let all = async { tokio::join!(text(stdout, MAX_ANSWER), text(stderr, MAX_COMPLAINT), child.wait()) };
    let Ok((answer, complaint, status)) = timeout(settings.look, all).await else {
        return Err(format!("longhaul machine did not answer within {} s and was ended", settings.look.as_secs()));
    };
    group.0 = None;
    let status = status.map_err(|error| format!("longhaul machine: {error}"))?;
    if !status.success() {
        let complaint = complaint.split_whitespace().collect::<Vec<_>>().join(" ");
        return Err(format!("longhaul machine ended with {status}: {complaint}"));
    }
    serde_json::from_str(&answer).map_err(|error| format!("longhaul machine gave an answer that is none: {error}"))
}

/// The first bytes of what a child writes, at most so many; the rest is read and forgotten.
async fn text(from: Option<impl AsyncRead + Unpin>, most: u64) -> String {
    let mut bytes = Vec::new();
    if let Some(mut from) = from {
        // What could be read counts; a cut is seen in the text.
        let _ = (&mut from).take(most).read_to_end(&mut bytes).await;
        let _ = tokio::io::copy(&mut from, &mut tokio::io::sink()).await;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A child that leads a group of processes. Whatever it has started ends with it when this is dropped before its end.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // One that is gone already is what was wanted.
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}
