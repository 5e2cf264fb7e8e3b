//! Which job trains next, and on which of the free devices. Pure: no clock, no I/O.
//!
//! Jobs go in their order. One that waits for GPUs on which others train holds back those behind it, or small jobs would pass a
//! large one for ever; one for which this host has not the devices holds back nobody. A job gets as many GPUs of a kind as it
//! asks for, or as it needs; and more than it needs only while nobody else waits for them and the planner says that they pay.

#[cfg(test)]
mod tests;

use super::devices::{Devices, Free, Seat};
use crate::{
    domain::{
        BaseModel, ExecutorId, Machine, ModelConfig,
        machine::{DeviceKind, alike},
        run::Ranks,
    },
    plan::{
        Plan, Request,
        devices::{self, Across},
        longest_ranks,
    },
    store::queue::Queued,
};

/// Tokens that a job is planned for whose data decides, where nobody has looked at it yet.
const SHORT: u64 = 128;

/// What there is to choose from.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Situation {
    pub devices: Devices,
    pub free: Free,
    /// GPUs that are left alone for a while: neither free nor waited for.
    pub resting: Vec<usize>,
    pub models: Vec<BaseModel>,
    /// Other hosts that are alive.
    pub hosts: Vec<Other>,
}

/// Another host.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Other {
    pub executor: ExecutorId,
    pub machines: Vec<Machine>,
    /// Places among these of what is free.
    pub free: Vec<usize>,
    pub models: Vec<BaseModel>,
}

/// Devices of a kind of this host, together, and which GPUs they are.
type Own = (Machine, Vec<usize>);

/// What a job may hope for.
#[derive(Debug)]
enum Chance {
    Now(Box<Seat>),
    /// Once others have ended.
    Later,
    NotHere,
}

/// The first of the queued jobs that can train now, by its place in the queue, and where.
pub(super) fn next(situation: &Situation, queued: &[Queued]) -> Option<(usize, Seat)> {
    let mut free = situation.free.gpus.clone();
    for (place, job) in queued.iter().enumerate() {
        match situation.kind_of(job) {
            DeviceKind::Cpu if situation.free.cpu => {
                if let Chance::Now(seat) = situation.on_cpu(job) {
                    return Some((place, *seat));
                }
            }
            DeviceKind::Cpu => {}
            DeviceKind::Cuda => {
                let wants_gpus =
                    |(other, job): (usize, &Queued)| other != place && situation.kind_of(job) == DeviceKind::Cuda;
                let alone = !queued.iter().enumerate().any(wants_gpus);
                match situation.on_gpus(job, &free, alone) {
                    Chance::Now(seat) => return Some((place, *seat)),
                    Chance::Later => free.clear(),
                    Chance::NotHere => {}
                }
            }
        }
    }
    None
}

impl Situation {
    fn kind_of(&self, job: &Queued) -> DeviceKind {
        self.devices.kind_for(job.training.wanted_device())
    }

    /// On the CPU, with the ranks that are asked for; also where it does not carry them, if no hosts do together: whoever trains
    /// the job refuses it with the numbers.
    fn on_cpu(&self, job: &Queued) -> Chance {
        let (cpu, asked) = (&self.devices.cpu, |size: Option<u32>| u64::from(size.unwrap_or(1)));
        let (sequence, data) = (job.training.sequence_parallel_size, job.training.data_parallel_size);
        let ranks = Ranks { sequence: asked(sequence), data: asked(data) };
        let several = (ranks != Ranks::ONE).then(|| config(&self.models, &job.model)).flatten();
        let elsewhere = several.filter(|config| carried(job, config, cpu).is_none()).and_then(|config| {
            let own = [(cpu.clone(), Vec::new())];
            self.across(job, config, &own, &own)
        });
        elsewhere.unwrap_or_else(|| Chance::Now(Seat::here(cpu.clone(), ranks, Vec::new()).into()))
    }

    fn on_gpus(&self, job: &Queued, free: &[usize], alone: bool) -> Chance {
        let kinds = self.kinds();
        let Some(config) = config(&self.models, &job.model) else {
            // Whoever opens the model says what is wrong with it.
            return free.first().map_or(Chance::Later, |gpu| Chance::Now(self.seat(vec![*gpu], Ranks::ONE).into()));
        };
        let mut fits = false;
        for kind in &kinds {
            let machine = self.together(kind);
            let Some(fewest) = carried(job, config, &machine) else { continue };
            fits = true;
            let here: Vec<usize> = kind.iter().copied().filter(|gpu| free.contains(gpu)).collect();
            if (here.len() as u64) < fewest.choice.ranks.world() {
                continue;
            }
            let machine = self.together(&here);
            let plan = if alone { devices::worthwhile(&request(job, config, &machine), fewest) } else { fewest };
            let ranks = plan.choice.ranks;
            return Chance::Now(self.seat(here[..ranks.world() as usize].to_vec(), ranks).into());
        }
        if fits {
            return Chance::Later;
        }
        let with_machine = |gpus: Vec<usize>| (self.together(&gpus), gpus);
        let all: Vec<Own> = kinds.iter().cloned().map(with_machine).collect();
        let of_kind = |kind: &Vec<usize>| kind.iter().copied().filter(|gpu| free.contains(gpu)).collect::<Vec<usize>>();
        let now: Vec<Own> = kinds.iter().map(of_kind).filter(|gpus| !gpus.is_empty()).map(with_machine).collect();
        if let Some(chance) = self.across(job, config, &now, &all) {
            return chance;
        }
        if self.is_for_others(job, config) {
            return Chance::NotHere;
        }
        self.as_it_is(job, config, &kinds, free)
    }

    /// True for a job that other hosts carry, or this one with GPUs that are away; and for one that asks for more than there are.
    fn is_for_others(&self, job: &Queued, own: &ModelConfig) -> bool {
        let wanted = job.training.wanted_device();
        let others = |host: &Other| {
            config(&host.models, &job.model).is_some_and(|config| carry(&host.machines, wanted, job, config))
        };
        job.training.asked_devices() > self.kinds().iter().map(Vec::len).max().unwrap_or(0) as u64
            || carry(&self.devices.had, Some(DeviceKind::Cuda), job, own)
            || self.hosts.iter().any(others)
    }

    /// Together with other hosts, where none carries the job alone: with what is free, `now`. Where that is not enough but `all` of
    /// them would be, the job waits and holds back nobody.
    fn across(&self, job: &Queued, config: &ModelConfig, now: &[Own], all: &[Own]) -> Option<Chance> {
        let first = |own: &[Own], free| own.iter().find_map(|own| self.together_with(job, config, own, free));
        first(now, true).map(|seat| Chance::Now(seat.into())).or_else(|| first(all, false).map(|_| Chance::NotHere))
    }

    /// A seat on these devices and those of other hosts that have the model: only free ones, or all.
    fn together_with(&self, job: &Queued, config: &ModelConfig, (own, gpus): &Own, free: bool) -> Option<Seat> {
        let mut others: Vec<(&ExecutorId, Machine)> =
            self.hosts.iter().filter_map(|host| Some((&host.executor, host.like(own, &job.model, free)?))).collect();
        others.sort_by_key(|(_, machine)| std::cmp::Reverse(machine.all_devices()));
        let hosts: Vec<Machine> = [own].into_iter().chain(others.iter().map(|(_, machine)| machine)).cloned().collect();
        let Across { n_hosts, each, machine, plan } = devices::across(config, &job.training, &hosts, tokens(job))?;
        let ranks = plan.choice.ranks;
        let part = |host: u64| host * each..((host + 1) * each).min(ranks.world());
        let others =
            others.into_iter().zip(1..n_hosts as u64).map(|((executor, _), host)| (executor.clone(), part(host)));
        Some(Seat {
            gpus: gpus.iter().copied().take(each as usize).collect(),
            machine,
            ranks,
            here: part(0),
            others: others.filter(|(_, ranks)| !ranks.is_empty()).collect(),
            place: None,
        })
    }

    /// On all GPUs of the kind that has most: nothing that is alive carries the length that was settled, so whoever trains the job
    /// cuts its documents shorter, or refuses it with the numbers.
    fn as_it_is(&self, job: &Queued, config: &ModelConfig, kinds: &[Vec<usize>], free: &[usize]) -> Chance {
        let Some(kind) = kinds.iter().max_by_key(|kind| kind.len()) else { return Chance::NotHere };
        let ranks = longest_ranks(&request(job, config, &self.together(kind)));
        let here: Vec<usize> =
            kind.iter().copied().filter(|gpu| free.contains(gpu)).take(ranks.world() as usize).collect();
        if (here.len() as u64) < ranks.world() { Chance::Later } else { Chance::Now(self.seat(here, ranks).into()) }
    }

    /// GPUs that are not resting, those of a kind together.
    fn kinds(&self) -> Vec<Vec<usize>> {
        let name = |gpu: usize| &self.devices.gpus[gpu].device_name;
        let mut kinds: Vec<Vec<usize>> = Vec::new();
        for gpu in (0..self.devices.gpus.len()).filter(|gpu| !self.resting.contains(gpu)) {
            match kinds.iter_mut().find(|kind| name(kind[0]) == name(gpu)) {
                Some(kind) => kind.push(gpu),
                None => kinds.push(vec![gpu]),
            }
        }
        kinds
    }

    fn seat(&self, gpus: Vec<usize>, ranks: Ranks) -> Seat {
        Seat::here(self.together(&gpus), ranks, gpus)
    }

    /// # Panics
    /// Without GPUs.
    fn together(&self, gpus: &[usize]) -> Machine {
        let machines: Vec<Machine> = gpus.iter().map(|gpu| self.devices.gpus[*gpu].clone()).collect();
        Machine::together(&machines).expect("a kind has a GPU, and so has a seat")
    }
}

impl Other {
    /// The host's devices of this kind together, if it has some and the model.
    fn like(&self, own: &Machine, model: &str, free: bool) -> Option<Machine> {
        config(&self.models, model)?;
        let there = self.machines.iter().enumerate().filter(|(place, _)| !free || self.free.contains(place));
        let machines: Vec<Machine> = there.map(|(_, machine)| machine.clone()).collect();
        alike(&machines, Some(own.device))
            .into_iter()
            .find(|machine| own.device == DeviceKind::Cpu || machine.device_name == own.device_name)
    }
}

/// Where the data of a job is inspected: for the devices that could train it, of this host or, where these do not carry it, of
/// several. None is opened for that. `None` without such a device.
pub(super) fn desk(situation: &Situation, job: &Queued) -> Option<Seat> {
    let machines = match situation.kind_of(job) {
        DeviceKind::Cpu => vec![situation.devices.cpu.clone()],
        DeviceKind::Cuda => alike(&situation.devices.gpus, Some(DeviceKind::Cuda)),
    };
    let most = machines.into_iter().max_by_key(|machine| machine.device_bytes * machine.all_devices())?;
    let config = config(&situation.models, &job.model).filter(|config| carried(job, config, &most).is_none());
    let across = config.and_then(|config| situation.together_with(job, config, &(most.clone(), Vec::new()), false));
    Some(Seat::here(across.map_or(most, |seat| seat.machine), Ranks::ONE, Vec::new()))
}

fn config<'a>(models: &'a [BaseModel], name: &str) -> Option<&'a ModelConfig> {
    models.iter().find(|model| model.name == name)?.config.as_ref()
}

/// True when the devices of some kind among these carry the job.
fn carry(machines: &[Machine], wanted: Option<DeviceKind>, job: &Queued, config: &ModelConfig) -> bool {
    alike(machines, wanted).iter().any(|machine| carried(job, config, machine).is_some())
}

/// The plan on the fewest of these devices that carry the job, if any do.
fn carried(job: &Queued, config: &ModelConfig, machine: &Machine) -> Option<Plan> {
    let there = job.training.check_devices(config, machine).is_ok();
    there.then(|| devices::fewest(&request(job, config, machine))).flatten()
}

fn tokens(job: &Queued) -> u64 {
    job.training.sequence_length.or(job.sequence_length).unwrap_or(SHORT)
}

fn request<'a>(job: &Queued, config: &'a ModelConfig, machine: &'a Machine) -> Request<'a> {
    Request::of(config, &job.training, machine, tokens(job))
}
