//! What the search tries: sizes, places and shares, combined.

use super::{Choice, Gradients, Place, Request, ranks, segments, shards, workspace};
use crate::domain::machine::DeviceKind;

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

/// Numbers of slots beyond the fewest that are all tried, and the step of those tried after them.
const NEAR_FEWEST: u64 = 3;
const SLOT_STEP: u64 = 4;
/// Shares of the optimizer's state that are tried in host memory: n over this many.
const SHARES: u64 = 4;
/// A part of the state in host memory is a multiple of so many parameters, which keeps vectors of it aligned.
const SHARE_ELEMENTS: u64 = 4096;
/// Parameters whose state passes through the device at once: enough for the link's full speed, few enough that the first and
/// the last piece, which nothing hides, do not count.
const STAGED_ELEMENTS: u64 = 32 << 20;

/// Every combination of chunk and tile size, kind of gradients, number and place of kept inputs, place of weights and of the
/// optimizer's state; nothing kept beyond layer inputs, all of them in the device's memory.
pub(super) fn bare(request: &Request) -> Vec<Choice> {
    let slots = slots(request);
    let places = request.forced.place.map_or(vec![Place::Memory, Place::Disk], |place| vec![place]);
    let mut choices = Vec::new();
    for (chunk, tile) in chunks_and_tiles(request) {
        for slots in &slots {
            let Some(segment_starts) = segments::starts(request.model.n_layers, *slots) else { continue };
            for place in &places {
                for gradients in gradients(request) {
                    for homes in homes(request) {
                        let sizes = (chunk, tile);
                        choices.push(choice(request, sizes, segment_starts.clone(), (*place, gradients), homes));
                    }
                }
            }
        }
    }
    choices
}

/// Numbers of rows of kept inputs that a choice may have in host memory: none, all, and as few as make it fit.
pub(super) fn checkpoint_host_rows(request: &Request, choice: &Choice, fits: impl Fn(&Choice) -> bool) -> Vec<u64> {
    let all = choice.memory_slots() * choice.local(request.tokens);
    if let Some(rows) = request.forced.checkpoint_host_rows {
        return vec![rows.min(all)];
    }
    if request.machine.host_bytes == 0 || all == 0 {
        return vec![0];
    }
    // Whole parts of a slot; the fewest that fit are found by bisection.
    let part = choice.local(request.tokens).div_ceil(8);
    let hosted = |rows: u64| Choice { checkpoint_host_rows: rows.min(all), ..choice.clone() };
    let (mut low, mut high) = (0, all.div_ceil(part));
    while low < high {
        let middle = u64::midpoint(low, high);
        // Less on the device is more on the host: only the device's side is asked for.
        if fits(&hosted(middle * part)) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    let mut rows = vec![0, (low * part).min(all), all];
    rows.dedup();
    rows
}

fn chunks_and_tiles(request: &Request) -> Vec<(u64, u64)> {
    let Sizes { chunks, mlp_tiles, .. } = Sizes::of(request.machine.device);
    let ranks = request.ranks().sequence;
    let whole = |chunk: u64| chunk.next_multiple_of(ranks::multiple(request.machine.device, ranks));
    let chunks: Vec<u64> = if let Some(chunk) = request.forced.chunk_tokens {
        vec![whole(chunk)]
    } else {
        let longest = request.tokens.min(whole(chunks[0]));
        chunks.iter().map(|c| whole(*c)).filter(|c| *c < longest).chain([longest]).collect()
    };
    let tiles = request.forced.mlp_tile_rows.map_or(mlp_tiles.to_vec(), |rows| vec![rows]);
    let tiles_of = |chunk: u64| {
        let mut tiles: Vec<u64> = tiles.iter().map(|tile| (chunk / ranks).min(*tile)).collect();
        tiles.dedup();
        tiles
    };
    chunks.into_iter().flat_map(|chunk| tiles_of(chunk).into_iter().map(move |tile| (chunk, tile))).collect()
}

fn gradients(request: &Request) -> Vec<Gradients> {
    let widths = request.widths();
    match request.forced.gradients {
        Some(gradients) => vec![gradients],
        None if widths.storage < widths.wide && request.sequences() == 1 => vec![Gradients::Wide, Gradients::Storage],
        None => vec![Gradients::Wide],
    }
}

fn slots(request: &Request) -> Vec<u64> {
    let n = request.model.n_layers;
    let fewest = segments::fewest_slots(n);
    let worth = |slots: &u64| *slots <= fewest + NEAR_FEWEST || slots.is_multiple_of(SLOT_STEP) || *slots == n;
    request.forced.checkpoint_slots.map_or_else(|| (fewest..=n).filter(worth).collect(), |slots| vec![slots])
}

/// What of the model is in host memory.
#[derive(Debug, Clone, Copy)]
struct Homes {
    optimizer_elements: u64,
    weight_layers: u64,
}

fn homes(request: &Request) -> Vec<Homes> {
    let (n, layers) = (shards::owned(request.model, request.ranks().world()), request.model.n_layers);
    let shares = match request.forced.optimizer_host_elements {
        Some(elements) => vec![elements.min(n)],
        None if request.machine.host_bytes == 0 => vec![0],
        None => (0..SHARES).map(|i| whole_vectors(n * i / SHARES)).chain([n]).collect(),
    };
    // Weights leave the device after all of the state, which is larger and used once a step.
    let weights = match request.forced.weights_host_layers {
        Some(layers_there) => vec![layers_there.min(layers)],
        None if request.machine.host_bytes == 0 => vec![0],
        None => vec![0, layers],
    };
    let homes = weights.into_iter().flat_map(|weight_layers| {
        shares.iter().map(move |elements| Homes { optimizer_elements: *elements, weight_layers })
    });
    homes.filter(|homes| homes.optimizer_elements >= least_hosted(request, homes.weight_layers)).collect()
}

/// Parameters whose optimizer state must be in host memory when the weights of so many layers are.
pub(super) fn least_hosted(request: &Request, weight_layers: u64) -> u64 {
    let (model, world) = (request.model, request.ranks().world());
    match weight_layers {
        0 => 0,
        layers => shards::units(model).iter().take(1 + layers as usize).map(|n| shards::part(*n, world)).sum(),
    }
}

/// At most so many parameters, such that vectors of those after them start where vectors may.
pub(super) fn whole_vectors(elements: u64) -> u64 {
    elements / SHARE_ELEMENTS * SHARE_ELEMENTS
}

fn choice(
    request: &Request,
    (chunk, tile): (u64, u64),
    segment_starts: Vec<u64>,
    (place, gradients): (Place, Gradients),
    Homes { optimizer_elements: hosted, weight_layers }: Homes,
) -> Choice {
    let (model, ranks) = (request.model, request.ranks());
    let local = request.tokens / ranks.sequence;
    let bytes = Sizes::of(request.machine.device).logits_tile_bytes;
    let rows = (bytes / (model.vocab_size * request.widths().storage)).clamp(16, local.max(16));
    Choice {
        ranks,
        chunk_tokens: chunk,
        mlp_tile_rows: tile,
        loss_tile_rows: request.forced.loss_tile_rows.unwrap_or(rows).min(local),
        checkpoint_slots: segments::slots_needed(&segment_starts, model.n_layers),
        segment_starts,
        checkpoint_place: place,
        checkpoint_host_rows: 0,
        gradients,
        moments: request.moments,
        optimizer_host_elements: hosted,
        staged_elements: hosted.min(request.forced.staged_elements.unwrap_or(STAGED_ELEMENTS)),
        weights_host_layers: weight_layers,
        kept_attention_layers: 0,
        kept_qkv_layers: 0,
        kept_gate_up_layers: 0,
        attention_workspace: workspace::attention(model, request.machine.device, ranks, chunk, request.tokens),
    }
}
