//! How many devices a job gets: as many as it needs, and more while they pay.

use super::{Plan, Ranks, Refusal, Request, ranks, search};
use crate::domain::{Machine, ModelConfig, TrainingSpec, machine::DeviceKind};

/// How much faster twice as many devices must make a step: 0.7 of twice. Below that they serve other jobs better.
const WORTH: f64 = 2.0 * 0.7;

/// The plan on the fewest of the machine's devices that carry the request, if any do.
pub fn fewest(request: &Request) -> Option<Plan> {
    (1..=most(request)).find_map(|n| on(request, n))
}

/// As [`fewest`], or why there is none.
pub fn fewest_or_why(request: &Request) -> Result<Plan, Refusal> {
    fewest(request).ok_or_else(|| search::refusal(request))
}

/// The plan on so many more of the machine's devices as each pay: beginning with a plan on the fewest, and with every doubling a
/// step of at most 1 / 1.4 of the time.
pub fn worthwhile(request: &Request, fewest: Plan) -> Plan {
    let first = fewest.choice.ranks.world() + 1;
    (first..=most(request)).filter_map(|n| on(request, n)).fold(fewest, |best, more| {
        let doublings = (world(&more) / world(&best)).log2();
        let faster = best.optimizer_step_seconds / more.optimizer_step_seconds;
        if faster >= WORTH.powf(doublings) { more } else { best }
    })
}

/// Devices on several hosts that carry a job.
#[derive(Debug)]
pub struct Across {
    /// Hosts, the first of those that were given.
    pub n_hosts: usize,
    /// Ranks go host after host, so many to each; the last may have fewer.
    pub each: u64,
    pub machine: Machine,
    pub plan: Plan,
}

/// The plan on the fewest of these hosts that carry the job together, and there on the fewest devices. Of each host are given its
/// devices of one kind, together; as many of each are taken as the smallest has.
pub fn across(model: &ModelConfig, job: &TrainingSpec, hosts: &[Machine], tokens: u64) -> Option<Across> {
    (2..=hosts.len()).find_map(|n_hosts| {
        let hosts = &hosts[..n_hosts];
        let smallest = hosts.iter().map(Machine::all_devices).min()?;
        let each = match hosts[0].device {
            DeviceKind::Cpu => job.asked_devices().div_ceil(n_hosts as u64),
            DeviceKind::Cuda => smallest,
        };
        let machine = Machine::across(hosts, each.try_into().ok()?)?;
        job.check_devices(model, &machine).ok()?;
        let request = Request::of(model, job, &machine, tokens);
        // Fewer devices were tried on fewer hosts.
        let plan = ((n_hosts as u64 - 1) * each + 1..=most(&request)).find_map(|n| on(&request, n))?;
        Some(Across { n_hosts, each, machine, plan })
    })
}

fn world(plan: &Plan) -> f64 {
    plan.choice.ranks.world() as f64
}

/// Devices that there are; on the CPU ranks share the cores, as many as are asked for.
fn most(request: &Request) -> u64 {
    let asked = request.forced.ranks.map_or(1, Ranks::world);
    match request.machine.device {
        DeviceKind::Cpu => {
            asked.max(request.forced.sequence_ranks.unwrap_or(1)).max(request.forced.replicas.map_or(1, u64::from))
        }
        DeviceKind::Cuda => request.machine.all_devices(),
    }
}

/// The fastest plan on exactly so many devices, each with its part of the host.
fn on(request: &Request, n: u64) -> Option<Plan> {
    let machine = request.machine.some(n);
    let request = Request { machine: &machine, ..request.clone() };
    let asked = |ranks: &Ranks| request.forced.sequence_ranks.is_none_or(|wish| wish == ranks.sequence);
    let arrangements = ranks::arrangements(&request).into_iter().filter(|ranks| ranks.world() == n && asked(ranks));
    search::fastest_among(&request, arrangements)
}
