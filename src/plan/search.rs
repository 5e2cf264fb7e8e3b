//! The search: some thousand candidates, each laid out and priced; the fastest that fits wins.

use super::{
    Choice, Forced, Plan, Ranks, Refusal, Request, choices,
    cost::{disk_bytes, step_seconds, traffic_seconds, update_seconds},
    layout::{Arena, lay_out},
    ranks,
    traffic::Traffic,
    workspace,
};
use crate::domain::{machine::DeviceKind, training::MAX_SEQUENCE_LENGTH};

/// Sequence lengths reported as the longest are multiples of this.
const LENGTH_STEP: u64 = 128;

/// The fastest plan that fits, if any does; of equals the one with most ranks.
pub fn fastest(request: &Request) -> Option<Plan> {
    fastest_among(request, ranks::arrangements(request))
}

/// The fastest plan with one of these arrangements.
pub(super) fn fastest_among(request: &Request, arrangements: impl IntoIterator<Item = Ranks>) -> Option<Plan> {
    let plans = arrangements.into_iter().filter_map(|ranks| fastest_of(&arranged(request, ranks)));
    plans.min_by(|a, b| a.optimizer_step_seconds.total_cmp(&b.optimizer_step_seconds))
}

/// The longest sequence with a plan, in tokens, and the ranks that carry it.
pub fn longest(request: &Request) -> (u64, Ranks) {
    let mut longest = (0, Ranks::ONE);
    for (i, ranks) in ranks::arrangements(request).into_iter().enumerate() {
        let longer = longest_of(request, ranks, longest.0);
        if longer > longest.0 || i == 0 {
            longest = (longer, ranks);
        }
    }
    longest
}

/// Why nothing fits: measured on the ranks that carry most, there on the candidate that comes nearest.
pub fn refusal(request: &Request) -> Refusal {
    let (longest_tokens, ranks) = longest(request);
    let arranged = arranged(request, ranks);
    let all = choices::bare(&arranged).into_iter().flat_map(|bare| placed(&arranged, &bare));
    let walls = all.map(|choice| Needs::of(&arranged, &choice).walls(&arranged));
    let excess = |(_, needed, available): &(&str, u64, u64)| needed.saturating_sub(*available);
    let nearest = walls.min_by_key(|walls| walls.iter().map(excess).sum::<u64>());
    let wall = nearest.and_then(|walls| walls.into_iter().max_by_key(excess));
    let (wall, needed_bytes, available_bytes) =
        wall.unwrap_or(("device memory", u64::MAX, request.machine.device_bytes));
    Refusal { tokens: request.tokens, longest_tokens, wall: wall.into(), needed_bytes, available_bytes }
}

/// The request for these ranks: tokens that they divide.
fn arranged<'a>(request: &Request<'a>, ranks: Ranks) -> Request<'a> {
    let multiple = ranks::multiple(request.machine.device, ranks.sequence);
    let forced = Forced { ranks: Some(ranks), ..request.forced };
    Request { tokens: request.tokens.next_multiple_of(multiple), forced, ..request.clone() }
}

/// The fastest plan for the request's ranks.
fn fastest_of(request: &Request) -> Option<Plan> {
    let seconds =
        |choice: &Choice| step_seconds(request.model, request.machine, request.widths(), request.tokens, choice);
    candidates(request)
        .into_iter()
        .filter(|choice| Needs::of(request, choice).fit(request))
        .map(|choice| (seconds(&choice), choice))
        .min_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(seconds, choice)| planned(request, choice, seconds))
}

/// The longest sequence that these ranks carry, if it is longer than `known`; else `known`.
fn longest_of(request: &Request, ranks: Ranks, known: u64) -> u64 {
    let possible = |steps: u64| {
        let request = arranged(&Request { tokens: steps * LENGTH_STEP, ..request.clone() }, ranks);
        choices::bare(&request)
            .into_iter()
            .any(|bare| placed(&request, &bare).iter().any(|choice| carried(&request, choice)))
    };
    let (mut low, mut high) = (known / LENGTH_STEP, MAX_SEQUENCE_LENGTH / LENGTH_STEP);
    if low > 0 && !possible(low + 1) {
        return known;
    }
    while low < high {
        let middle = (low + high).div_ceil(2);
        if possible(middle) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    low * LENGTH_STEP
}

/// Whether a choice fits as it is, or once state has come back to the device, where that has room and the host has not.
fn carried(request: &Request, choice: &Choice) -> bool {
    let needs = Needs::of(request, choice);
    let relieved = || Needs::of(request, &with_extras(request, choice.clone())).fit(request);
    needs.fit(request) || (needs.device <= request.machine.device_bytes && relieved())
}

/// Bytes at the peak.
struct Needs {
    device: u64,
    host: u64,
    disk: u64,
}

impl Needs {
    fn of(request: &Request, choice: &Choice) -> Self {
        let layout = lay_out(request.model, request.widths(), request.tokens, choice);
        let process = workspace::process(request.machine.device, choice.ranks, request.tokens);
        // Each rank has a GPU of its own; a host's memory and disk are those of all ranks on it.
        let here = request.machine.ranks_on_host(choice.ranks.world());
        let on_device = match request.machine.device {
            DeviceKind::Cpu => here,
            DeviceKind::Cuda => 1,
        };
        Self {
            device: on_device * (layout.bytes + process.device + process.spare),
            host: here * (layout.host_bytes + process.host + process.host_spare),
            disk: here * disk_bytes(request.model, request.widths(), request.tokens, choice),
        }
    }

    fn fit(&self, request: &Request) -> bool {
        self.walls(request).iter().all(|(_, needed, available)| needed <= available)
    }

    /// Name, need and size of each memory.
    fn walls(&self, request: &Request) -> [(&'static str, u64, u64); 3] {
        let machine = request.machine;
        let disk = ("disk", self.disk, machine.disk_bytes);
        match machine.device {
            DeviceKind::Cpu => [("host memory", self.device + self.host, machine.device_bytes), disk, disk],
            DeviceKind::Cuda => [
                ("device memory", self.device, machine.device_bytes),
                ("host memory", self.host, machine.host_bytes),
                disk,
            ],
        }
    }
}

/// Every combination worth pricing, each with the extras that still fit.
fn candidates(request: &Request) -> Vec<Choice> {
    let all = choices::bare(request).into_iter().flat_map(|bare| placed(request, &bare));
    all.map(|choice| with_extras(request, choice)).collect()
}

/// A choice with its kept inputs in every place worth pricing.
fn placed(request: &Request, bare: &Choice) -> Vec<Choice> {
    let fits = |choice: &Choice| Needs::of(request, choice).device <= request.machine.device_bytes;
    let rows = choices::checkpoint_host_rows(request, bare, fits);
    rows.into_iter().map(|rows| Choice { checkpoint_host_rows: rows, ..bare.clone() }).collect()
}

/// What the device's free memory may hold.
#[derive(Debug, Clone, Copy)]
enum Extra {
    /// By layer.
    Attention,
    Qkv,
    GateUp,
    /// Weights that were to be in host memory, by layer.
    Weights,
    /// Optimizer's state that was to be in host memory, by parts of it.
    Optimizer,
}

/// Parts in which the optimizer's state comes back to the device.
const OPTIMIZER_PARTS: u64 = 64;

impl Extra {
    /// How much there is at most, the choice given.
    fn most(self, request: &Request, choice: &Choice) -> u64 {
        match self {
            Self::Optimizer if choice.optimizer_host_elements == 0 => 0,
            Self::Optimizer => OPTIMIZER_PARTS,
            Self::Weights => choice.weights_host_layers,
            _ => request.model.n_layers,
        }
    }

    fn forced(self, forced: &Forced) -> Option<u64> {
        match self {
            Self::Attention => forced.kept_attention_layers,
            Self::Qkv => forced.kept_qkv_layers,
            Self::GateUp => forced.kept_gate_up_layers,
            // What is forced was chosen already.
            Self::Optimizer => forced.optimizer_host_elements.map(|_| 0),
            Self::Weights => forced.weights_host_layers.map(|_| 0),
        }
    }

    /// The choice with `n` of it on the device.
    fn kept(self, request: &Request, choice: &Choice, n: u64) -> Choice {
        let mut choice = choice.clone();
        match self {
            Self::Attention => choice.kept_attention_layers = n,
            Self::Qkv => choice.kept_qkv_layers = n,
            Self::GateUp => choice.kept_gate_up_layers = n,
            Self::Weights => choice.weights_host_layers -= n,
            Self::Optimizer if n == 0 => {}
            Self::Optimizer => {
                let rest = choice.optimizer_host_elements * (OPTIMIZER_PARTS - n) / OPTIMIZER_PARTS;
                let least = choices::least_hosted(request, choice.weights_host_layers);
                choice.optimizer_host_elements = choices::whole_vectors(rest).max(least);
                choice.staged_elements = choice.staged_elements.min(choice.optimizer_host_elements);
            }
        }
        choice
    }
}

/// Fills free memory, best saving per byte first: a byte of kept attention output saves 2 T FLOPs, a byte of a kept projection
/// 2 h, a byte of state its way over the link and back, which takes as long as 4 h FLOPs or so. A byte of weights crosses more
/// often, but beside the work of other layers, and must be on the device before its state may be.
fn with_extras(request: &Request, mut choice: Choice) -> Choice {
    let h = request.model.hidden_size;
    let order = match request.tokens {
        tokens if tokens >= 2 * h => [Extra::Attention, Extra::Weights, Extra::Optimizer, Extra::Qkv, Extra::GateUp],
        tokens if tokens >= h => [Extra::Weights, Extra::Optimizer, Extra::Attention, Extra::Qkv, Extra::GateUp],
        _ => [Extra::Weights, Extra::Optimizer, Extra::Qkv, Extra::GateUp, Extra::Attention],
    };
    for extra in order {
        let most = extra.most(request, &choice);
        if let Some(n) = extra.forced(&request.forced) {
            choice = extra.kept(request, &choice, n.min(most));
            continue;
        }
        // Bytes grow with what is kept, so the most that fits is found by bisection.
        let (mut low, mut high) = (0, most);
        while low < high {
            let middle = (low + high).div_ceil(2);
            if Needs::of(request, &extra.kept(request, &choice, middle)).fit(request) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        choice = extra.kept(request, &choice, low);
    }
    choice
}

fn planned(request: &Request, choice: Choice, step_seconds: f64) -> Plan {
    let needs = Needs::of(request, &choice);
    let process = workspace::process(request.machine.device, choice.ranks, request.tokens);
    let (model, machine, widths, n) = (request.model, request.machine, request.widths(), request.sequences());
    let layout = lay_out(model, widths, request.tokens, &choice);
    // Only one update, whatever the number of sequences.
    let others = (n - 1) as f64 * (step_seconds - update_seconds(model, machine, widths, &choice));
    Plan {
        device: request.machine.device,
        precision: request.precision,
        tokens: request.tokens,
        ledger: layout.ledger(Arena::Device),
        host_ledger: layout.ledger(Arena::Host),
        // Only with GPUs, each for itself, is anything spared.
        predicted_peak_bytes: needs.device - process.spare,
        predicted_host_peak_bytes: layout.host_bytes + process.host,
        disk_bytes: disk_bytes(model, widths, request.tokens, &choice),
        step_seconds,
        sequences: n,
        optimizer_step_seconds: step_seconds + others,
        traffic: Traffic::of(model, widths, request.tokens, &choice).times(n),
        traffic_seconds: traffic_seconds(model, machine, widths, request.tokens, &choice).times(n),
        choice,
        layout,
    }
}
