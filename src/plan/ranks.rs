//! How the devices that a plan may take are arranged: ranks that share a sequence, and replicas of such groups.
//!
//! A group's size divides the query heads. A step's sequences (`Request::micro_batches`) are the same whatever the number of
//! devices: replicas take equal shares of them, so their number divides that of the sequences, and a step of one sequence has
//! one replica. Devices beyond that stand idle: more sequences a step, or more heads, would use them.

use super::{Ranks, Request};
use crate::domain::{Invalid, Machine, ModelConfig, attention_workspace::TILE_KEYS, heads, machine::DeviceKind};

/// Every arrangement, those of most ranks first, and of these the largest groups first.
pub(super) fn arrangements(request: &Request) -> Vec<Ranks> {
    if let Some(ranks) = request.forced.ranks {
        return vec![ranks];
    }
    let least = request.forced.replicas.map_or(1, u64::from);
    let devices = devices(request.machine, request.forced.sequence_ranks.map_or(least, |wish| wish * least));
    let mut sizes = group_sizes(request.model, devices / least);
    if let Some(wish) = request.forced.sequence_ranks {
        let nearest = sizes.iter().copied().filter(|size| *size <= wish).max().unwrap_or(1);
        sizes = vec![nearest];
    }
    let replicas = |sequence: u64| {
        let most = (devices / sequence).min(request.micro_batches).max(1);
        let numbers = request.forced.replicas.map_or(1..=most, |wish| wish.into()..=wish.into());
        numbers.filter(move |data| request.micro_batches.is_multiple_of(*data))
    };
    let of_size = |sequence: u64| replicas(sequence).map(move |data| Ranks { sequence, data });
    let mut all: Vec<Ranks> = sizes.into_iter().flat_map(of_size).collect();
    all.sort_by_key(|ranks| std::cmp::Reverse((ranks.world(), ranks.sequence)));
    all
}

/// Refuses a wish for so many ranks to a sequence that the model's heads or the machine's devices do not allow. A plan takes
/// the next smaller size in its place.
pub fn check(param: &str, wish: u64, model: &ModelConfig, machine: &Machine) -> Result<(), Invalid> {
    let devices = devices(machine, wish);
    let sizes = group_sizes(model, devices);
    if sizes.contains(&wish) {
        return Ok(());
    }
    let known: Vec<String> = sizes.iter().map(u64::to_string).collect();
    let message = format!(
        "{param} {wish}: the model has {} query heads, which are dealt evenly to the ranks of a sequence, and there are \
         {devices} devices; take one of {}",
        model.n_heads,
        known.join(", ")
    );
    Err(Invalid::new(param, message))
}

/// What the tokens of sequences and of chunks are multiples of when so many ranks share them: each has equally many.
pub fn multiple(device: DeviceKind, sequence: u64) -> u64 {
    match (device, sequence) {
        (_, 1) => 1,
        (DeviceKind::Cpu, ranks) => ranks,
        (DeviceKind::Cuda, ranks) => ranks / common(ranks, TILE_KEYS) * TILE_KEYS,
    }
}

/// Greatest common divisor.
pub(super) fn common(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { common(b, a % b) }
}

fn group_sizes(model: &ModelConfig, devices: u64) -> Vec<u64> {
    heads::group_sizes(model.n_heads).into_iter().filter(|size| *size <= devices.max(1)).collect()
}

/// Devices that a plan may take. On the CPU ranks share the cores, as many as are wished for.
fn devices(machine: &Machine, wish: u64) -> u64 {
    match machine.device {
        DeviceKind::Cpu => machine.all_devices().max(wish),
        DeviceKind::Cuda => machine.all_devices(),
    }
}
