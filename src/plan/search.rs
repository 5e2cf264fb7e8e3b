//! The search: a few hundred candidates, each priced and laid out; the fastest that fits wins.

use super::{
    Choice, Forced, Gradients, Place, Plan, Refusal, Request,
    cost::{disk_bytes, step_seconds},
    layout::{Layout, lay_out},
    segments, workspace,
};
use crate::domain::{machine::DeviceKind, training::MAX_SEQUENCE_LENGTH};

/// Sizes that a kind of device is tried with: enough rows for full GEMM speed, no more memory than that takes.
struct Sizes {
    /// Tokens of a chunk, largest first.
    chunks: &'static [u64],
    /// Rows of a feed-forward tile, largest first; never more than a chunk.
    mlp_tiles: &'static [u64],
    /// Bytes of one tile of logits.
    logits_tile_bytes: u64,
}

impl Sizes {
    fn of(device: DeviceKind) -> Self {
        match device {
            DeviceKind::Cpu => {
                Self { chunks: &[8192, 4096, 2048, 1024, 512, 256], mlp_tiles: &[1024], logits_tile_bytes: 32 << 20 }
            }
            DeviceKind::Cuda => Self {
                chunks: &[32_768, 16_384, 8192, 4096, 2048],
                mlp_tiles: &[16_384, 4096],
                logits_tile_bytes: 1 << 30,
            },
        }
    }
}
/// Sequence lengths reported as the longest are multiples of this.
const LENGTH_STEP: u64 = 128;

/// The fastest plan that fits, if any does.
pub fn fastest(request: &Request) -> Option<Plan> {
    candidates(request)
        .into_iter()
        .filter(|plan| fits(request, plan))
        .min_by(|a, b| a.step_seconds.total_cmp(&b.step_seconds))
}

/// The longest sequence with a plan, in tokens.
pub fn longest(request: &Request) -> u64 {
    let possible = |tokens: u64| {
        let request = Request { tokens, ..request.clone() };
        bare_choices(&request).into_iter().any(|choice| fits(&request, &priced(&request, choice)))
    };
    let (mut low, mut high) = (0, MAX_SEQUENCE_LENGTH / LENGTH_STEP);
    while low < high {
        let middle = (low + high).div_ceil(2);
        if possible(middle * LENGTH_STEP) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    low * LENGTH_STEP
}

/// Why nothing fits: measured on the candidate that needs least memory.
pub fn refusal(request: &Request) -> Refusal {
    let machine = request.machine;
    let plans = candidates(request);
    let smallest = plans.iter().min_by_key(|plan| plan.predicted_peak_bytes);
    let needed = smallest.map_or(u64::MAX, |plan| plan.predicted_peak_bytes);
    let disk = smallest.map_or(0, |plan| plan.disk_bytes);
    let memory = match machine.device {
        DeviceKind::Cpu => "host memory",
        DeviceKind::Cuda => "device memory",
    };
    let by_disk = needed <= machine.device_bytes;
    Refusal {
        tokens: request.tokens,
        longest_tokens: longest(request),
        wall: if by_disk { "disk".into() } else { memory.into() },
        needed_bytes: if by_disk { disk } else { needed },
        available_bytes: if by_disk { machine.disk_bytes } else { machine.device_bytes },
    }
}

fn fits(request: &Request, plan: &Plan) -> bool {
    plan.predicted_peak_bytes <= request.machine.device_bytes && plan.disk_bytes <= request.machine.disk_bytes
}

/// Every combination worth pricing, each with the extras that still fit.
fn candidates(request: &Request) -> Vec<Plan> {
    bare_choices(request).into_iter().map(|bare| with_extras(request, bare)).collect()
}

/// Every combination of chunk and tile size, place, kind of gradients and number of kept inputs.
fn bare_choices(request: &Request) -> Vec<Choice> {
    let model = request.model;
    let Sizes { chunks, mlp_tiles, .. } = Sizes::of(request.machine.device);
    let chunks: Vec<u64> = if let Some(chunk) = request.forced.chunk_tokens {
        vec![chunk]
    } else {
        let longest = request.tokens.min(chunks[0]);
        chunks.iter().copied().filter(|c| *c < longest).chain([longest]).collect()
    };
    let tiles = request.forced.mlp_tile_rows.map_or(mlp_tiles.to_vec(), |rows| vec![rows]);
    let tiles_of = |chunk: u64| {
        let mut tiles: Vec<u64> = tiles.iter().map(|tile| chunk.min(*tile)).collect();
        tiles.dedup();
        tiles
    };
    let widths = request.widths();
    let gradients = match request.forced.gradients {
        Some(gradients) => vec![gradients],
        None if widths.storage < widths.wide && request.micro_batches == 1 => vec![Gradients::Wide, Gradients::Storage],
        None => vec![Gradients::Wide],
    };
    let fewest = segments::fewest_slots(model.n_layers);
    let slots: Vec<u64> = match request.forced.checkpoint_slots {
        Some(slots) => vec![slots],
        None => (fewest..=model.n_layers).collect(),
    };
    let places: Vec<Place> = request.forced.place.map_or(vec![Place::Device, Place::Disk], |place| vec![place]);
    let mut choices = Vec::new();
    for chunk in chunks {
        for tile in tiles_of(chunk) {
            for slots in &slots {
                for place in &places {
                    let all = gradients.iter();
                    choices.extend(all.filter_map(|kind| bare_choice(request, (chunk, tile), *slots, *place, *kind)));
                }
            }
        }
    }
    choices
}

/// The choice with nothing kept beyond layer inputs.
fn bare_choice(
    request: &Request,
    (chunk, tile): (u64, u64),
    slots: u64,
    place: Place,
    gradients: Gradients,
) -> Option<Choice> {
    let model = request.model;
    let widths = request.widths();
    let segment_starts = segments::starts(model.n_layers, slots)?;
    let bytes = Sizes::of(request.machine.device).logits_tile_bytes;
    let rows = (bytes / (model.vocab_size * widths.storage)).clamp(16, request.tokens.max(16));
    Some(Choice {
        chunk_tokens: chunk,
        mlp_tile_rows: tile,
        loss_tile_rows: request.forced.loss_tile_rows.unwrap_or(rows).min(request.tokens),
        checkpoint_slots: segments::slots_needed(&segment_starts, model.n_layers),
        segment_starts,
        checkpoint_place: place,
        gradients,
        kept_attention_layers: 0,
        kept_qkv_layers: 0,
        kept_gate_up_layers: 0,
        attention_workspace: workspace::attention(model, request.machine.device, chunk, request.tokens),
    })
}

/// What may be kept by layer.
#[derive(Debug, Clone, Copy)]
enum Extra {
    Attention,
    Qkv,
    GateUp,
}

impl Extra {
    fn layers(self, choice: &mut Choice) -> &mut u64 {
        match self {
            Self::Attention => &mut choice.kept_attention_layers,
            Self::Qkv => &mut choice.kept_qkv_layers,
            Self::GateUp => &mut choice.kept_gate_up_layers,
        }
    }

    fn forced(self, forced: &Forced) -> Option<u64> {
        match self {
            Self::Attention => forced.kept_attention_layers,
            Self::Qkv => forced.kept_qkv_layers,
            Self::GateUp => forced.kept_gate_up_layers,
        }
    }
}

/// Adds kept tensors while they fit, best saving per byte first: a byte of kept attention output saves 2 T FLOPs, a byte
/// of a kept projection saves 2 h.
fn with_extras(request: &Request, mut choice: Choice) -> Plan {
    let order = if request.tokens >= request.model.hidden_size {
        [Extra::Attention, Extra::Qkv, Extra::GateUp]
    } else {
        [Extra::Qkv, Extra::GateUp, Extra::Attention]
    };
    for extra in order {
        if let Some(layers) = extra.forced(&request.forced) {
            *extra.layers(&mut choice) = layers.min(request.model.n_layers);
            continue;
        }
        // Bytes grow with the number of layers, so the most that fit are found by bisection.
        let (mut low, mut high) = (0, request.model.n_layers);
        while low < high {
            let middle = (low + high).div_ceil(2);
            *extra.layers(&mut choice) = middle;
            if fits(request, &priced(request, choice.clone())) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        *extra.layers(&mut choice) = low;
    }
    priced(request, choice)
}

/// A choice with its layout, peak and time.
fn priced(request: &Request, choice: Choice) -> Plan {
    let widths = request.widths();
    let layout: Layout = lay_out(request.model, widths, request.tokens, &choice);
    Plan {
        device: request.machine.device,
        precision: request.precision,
        tokens: request.tokens,
        ledger: layout.ledger(),
        predicted_peak_bytes: layout.bytes + workspace::process(request.machine.device),
        disk_bytes: disk_bytes(request.model, widths, request.tokens, &choice),
        step_seconds: step_seconds(request.model, request.machine, widths, request.tokens, &choice),
        choice,
        layout,
    }
}
