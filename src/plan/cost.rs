//! Predicted time of a step: FLOPs over rates, bytes over bandwidths. Which plan is faster matters more than the figure.

use super::{
    Choice, Gradients, Place, Widths, shards,
    traffic::{Links, Seconds, Traffic},
};
use crate::domain::{
    Machine, ModelConfig,
    machine::{DeviceKind, Rates},
};

/// Share of a hidden copy's time that the work beside it loses.
pub(super) const HINDRANCE: f64 = 0.05;

/// FLOPs of one forward of one layer over a sequence, by part.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerFlops {
    pub qkv: f64,
    /// Causal: half of all pairs.
    pub attention: f64,
    pub output: f64,
    pub gate_up: f64,
    pub down: f64,
}

impl LayerFlops {
    /// For `tokens` tokens that all attend to each other causally.
    pub fn of(model: &ModelConfig, tokens: u64) -> Self {
        let t = tokens as f64;
        let (h, f) = (model.hidden_size as f64, model.intermediate_size as f64);
        let (q, kv) = (model.q_size() as f64, model.kv_size() as f64);
        Self {
            qkv: 2.0 * t * h * (q + 2.0 * kv),
            attention: 2.0 * t * t * q,
            output: 2.0 * t * h * q,
            gate_up: 4.0 * t * h * f,
            down: 2.0 * t * h * f,
        }
    }

    fn dense(&self) -> f64 {
        self.qkv + self.output + self.gate_up + self.down
    }
}

/// Rows at which products and attention reach half their speed, by device: small ones are slower.
fn half_speed_tokens(device: DeviceKind) -> f64 {
    match device {
        DeviceKind::Cpu => 24.0,
        DeviceKind::Cuda => 128.0,
    }
}

/// Share of its best rate that attention reaches, by chunk. The pairs of a chunk with itself are a triangle, slow when it is
/// small; those with the keys before it a rectangle, slow when the chunk's queries and their sums leave the cache (measured on
/// a Hopper card: chunks of 32K against 128K keys take 5 % longer than chunks of 16K). Ranks that share a sequence have fewer
/// heads each: their queries fit the cache for longer, and small chunks cost them more (two Hopper cards: chunks of 8K against
/// 128K keys take 3 % longer than chunks of 16K).
fn attention_efficiency(device: DeviceKind, tokens: f64, chunk: f64, sequence_ranks: u64) -> f64 {
    let alone = half_speed_tokens(device);
    match device {
        DeviceKind::Cpu => chunk / (chunk + alone),
        DeviceKind::Cuda => {
            let half = if sequence_ranks == 1 { alone } else { HALF_SPEED_SHARED };
            let triangles = chunk / tokens;
            let in_cache = 1.0 + chunk / sequence_ranks as f64 / SLOW_RECTANGLE;
            let seconds = triangles * (chunk + HALF_SPEED_TRIANGLE) / chunk
                + (1.0 - triangles) * in_cache * (chunk + half) / chunk;
            1.0 / seconds
        }
    }
}

/// Tokens of a chunk at which its triangle would take half the rate, the rectangle of one that ranks share likewise, and any
/// rectangle twice the time.
const HALF_SPEED_TRIANGLE: f64 = 1100.0;
const HALF_SPEED_SHARED: f64 = 690.0;
const SLOW_RECTANGLE: f64 = 400_000.0;

/// Speeds of one of `world` ranks while all work: those on a CPU share its cores and memory, those of a host its disk.
fn rates(machine: &Machine, world: u64) -> Rates {
    let here = machine.ranks_on_host(world) as f64;
    let rates = &machine.rates;
    let on_device = match machine.device {
        DeviceKind::Cpu => here,
        DeviceKind::Cuda => 1.0,
    };
    Rates {
        gemm_flops: rates.gemm_flops / on_device,
        attention_flops: rates.attention_flops / on_device,
        memory_bytes: rates.memory_bytes / on_device,
        link_bytes: rates.link_bytes / on_device,
        peer_bytes: rates.peer_bytes / on_device,
        disk_bytes: rates.disk_bytes / here,
        source: rates.source.clone(),
    }
}

/// Seconds of one forward, backward and update over one sequence of `tokens` tokens on each replica.
pub fn step_seconds(model: &ModelConfig, machine: &Machine, widths: Widths, tokens: u64, choice: &Choice) -> f64 {
    Step::new(model, machine, widths, tokens, choice).seconds()
}

/// Seconds of these that are the update's, and are not spent again for another sequence of the same step.
pub fn update_seconds(model: &ModelConfig, machine: &Machine, widths: Widths, choice: &Choice) -> f64 {
    let step = Step::new(model, machine, widths, 1, choice);
    let world = choice.ranks.world() as f64;
    step.update_bytes() / world / step.rates.memory_bytes + step.state_bytes() as f64 / step.rates.link_bytes
}

/// Seconds of these in which a rank sends to others and nothing else is done.
pub fn traffic_seconds(
    model: &ModelConfig,
    machine: &Machine,
    widths: Widths,
    tokens: u64,
    choice: &Choice,
) -> Seconds {
    Step::new(model, machine, widths, tokens, choice).traffic_seconds()
}

/// One sequence on each replica.
struct Step<'a> {
    model: &'a ModelConfig,
    machine: &'a Machine,
    widths: Widths,
    tokens: u64,
    choice: &'a Choice,
    /// Of one rank, at their best.
    rates: Rates,
    /// FLOP/s of products and of attention with these chunks.
    gemm: f64,
    attention: f64,
}

impl<'a> Step<'a> {
    fn new(model: &'a ModelConfig, machine: &'a Machine, widths: Widths, tokens: u64, choice: &'a Choice) -> Self {
        let rates = rates(machine, choice.ranks.world());
        let chunk = choice.chunk_tokens.min(tokens) as f64;
        let rows = chunk / choice.ranks.sequence as f64;
        let gemm = rates.gemm_flops * rows / (rows + half_speed_tokens(machine.device));
        let attention =
            rates.attention_flops * attention_efficiency(machine.device, tokens as f64, chunk, choice.ranks.sequence);
        Self { model, machine, widths, tokens, choice, rates, gemm, attention }
    }

    fn seconds(&self) -> f64 {
        let (model, widths, tokens, choice) = (self.model, self.widths, self.tokens, self.choice);
        let flops = LayerFlops::of(model, tokens);
        // Ranks that share a sequence share its rows and heads evenly; all ranks share the weights' update.
        let (sharing, world) = (choice.ranks.sequence as f64, choice.ranks.world() as f64);
        let (forward_bytes, backward_bytes) = self.other_bytes();
        let layers = model.n_layers;

        let mut dense = 0.0;
        let mut attended = 0.0;
        let mut bytes = 0.0;
        for layer in 0..layers {
            let kept_attention = layer < choice.kept_attention_layers;
            let kept_qkv = layer < choice.kept_qkv_layers;
            let kept_gate_up = layer < choice.kept_gate_up_layers;
            // Forward and backward proper.
            dense += 3.0 * flops.dense();
            attended += 3.5 * flops.attention;
            bytes += forward_bytes + backward_bytes;
            // Rebuilt inside the layer's backward: q, k, v, attention, h1, gate and up; not down.
            dense += flops.output;
            dense += if kept_qkv { 0.0 } else { flops.qkv };
            dense += if kept_gate_up { 0.0 } else { flops.gate_up };
            attended += if kept_attention { 0.0 } else { flops.attention };
            // Re-run to rebuild the next layer's input.
            if rerun(choice, layers, layer) {
                dense += flops.output + flops.down;
                dense += if kept_gate_up { 0.0 } else { flops.gate_up };
                dense += if kept_qkv || kept_attention { 0.0 } else { flops.qkv };
                attended += if kept_attention { 0.0 } else { flops.attention };
                bytes += forward_bytes;
            }
        }
        let head = 6.0 * tokens as f64 * (model.hidden_size * model.vocab_size) as f64;
        bytes += self.update_bytes() * sharing / world;
        // Logits are written once and read twice, their gradient written once and read twice.
        bytes += (tokens * model.vocab_size * 6 * widths.storage) as f64;
        let disk = disk_bytes(model, widths, tokens, choice) as f64 * 2.0 / self.rates.disk_bytes;
        ((dense + head) / self.gemm + attended / self.attention + bytes / self.rates.memory_bytes) / sharing
            + self.visit_seconds()
            + self.traffic_seconds().sum()
            + self.link_seconds()
            + disk
    }

    /// Bytes that the operations between products and attention move in one layer's forward, and in its backward with what that
    /// repeats, over all ranks of the sequence. Elements a token: a norm reads and writes h; rotation moves q, k, v twice; SwiGLU
    /// reads 2 f and writes f.
    fn other_bytes(&self) -> (f64, f64) {
        let (model, widths, tokens) = (self.model, self.widths, self.tokens);
        let chunk = self.choice.chunk_tokens.min(tokens);
        let (h, f) = (model.hidden_size, model.intermediate_size);
        let qkv = model.q_size() + 2 * model.kv_size();
        let forward = 2 * 2 * h + 2 * qkv + 3 * f;
        let backward = 2 * (2 + 4) * h + 2 * 2 * qkv + (3 + 5) * f;
        let by_token = |elements: u64| (elements * widths.storage * tokens) as f64;
        // Each chunk adds its gradients of all keys before it: read in storage, read and written wide.
        let seen = tokens as f64 * (tokens as f64 + chunk as f64) / (2.0 * chunk as f64);
        let kv = shards::all_kv_columns(model, self.choice.ranks);
        let accumulated = seen * (2 * kv * (widths.storage + 2 * widths.wide)) as f64;
        (by_token(forward), by_token(backward) + accumulated)
    }

    /// A rank's share of a layer's forward.
    fn forward_seconds(&self) -> f64 {
        let flops = LayerFlops::of(self.model, self.tokens);
        let (bytes, _) = self.other_bytes();
        (flops.dense() / self.gemm + flops.attention / self.attention + bytes / self.rates.memory_bytes)
            / self.choice.ranks.sequence as f64
    }

    /// A rank's share of projecting a layer's keys and values.
    fn rebuild_seconds(&self) -> f64 {
        let rows = self.choice.local(self.tokens);
        (4 * rows * self.model.hidden_size * self.model.kv_size()) as f64 / self.gemm
    }

    /// Seconds that weights from the host add: a layer's cross the link beside the work on the layer before.
    fn visit_seconds(&self) -> f64 {
        let (model, choice) = (self.model, self.choice);
        let part = model.layer_params() as f64 * self.widths.storage as f64 / choice.ranks.world() as f64;
        let (crossing, forward) = (part / self.rates.link_bytes, self.forward_seconds());
        let visits = |layer| if rerun(choice, model.n_layers, layer) { 3.0 } else { 2.0 };
        let in_all: f64 = (0..choice.weights_host_layers).map(visits).sum();
        in_all * (HINDRANCE * crossing + (crossing - forward).max(0.0))
    }

    fn traffic_seconds(&self) -> Seconds {
        if self.choice.ranks.world() == 1 {
            return Seconds::default();
        }
        let (model, widths, choice) = (self.model, self.widths, self.choice);
        let Traffic { heads, .. } = Traffic::of(model, widths, self.tokens, choice);
        let links = Links::of(self.machine, &self.rates, choice.ranks);
        // On the CPU a collective ends inside its call: there is no work beside it.
        let (forward, rebuild) = match self.machine.device {
            DeviceKind::Cpu => (0.0, 0.0),
            DeviceKind::Cuda => (self.forward_seconds(), self.rebuild_seconds()),
        };
        let chunks = self.tokens.div_ceil(choice.chunk_tokens) as f64;
        // A backward takes twice as long as a forward, or longer.
        let work = 3.0 * forward * model.n_layers as f64;
        Seconds {
            weights: links.weights_seconds(model, widths, choice, forward),
            gradients: links.gradients_seconds(model, widths, choice, rebuild),
            heads: links.heads_seconds(heads, chunks, work),
        }
    }

    /// Seconds that the link to the host adds. State of the optimizer crosses it in the open, both ways at once. Kept inputs
    /// cross it beside the layers' work, but the last layer's comes back in the open, and of every layer's the chunk that its
    /// backward finishes last; and a few per cent of the hidden time is what it slows down the work beside it.
    fn link_seconds(&self) -> f64 {
        let (model, tokens, choice) = (self.model, self.tokens, self.choice);
        let slots = choice.memory_slots().max(1) as f64;
        let local = choice.local(tokens);
        let input = (local * model.hidden_size * self.widths.storage) as f64;
        let share = choice.checkpoint_host_rows as f64 / (slots * local as f64);
        let crossings = model.n_layers as f64 * share;
        let last_chunk = choice.chunk_tokens.min(tokens) as f64 / tokens as f64;
        let open = share + crossings * (last_chunk + 2.0 * HINDRANCE);
        (self.state_bytes() as f64 + input * open) / self.rates.link_bytes
    }

    /// Bytes of weights, gradients and states that an update moves in device memory, over all ranks.
    fn update_bytes(&self) -> f64 {
        let Widths { storage, wide } = self.widths;
        let gradient = match self.choice.gradients {
            Gradients::Wide => wide,
            // Cleared, added to and read in the wide type, written and read in storage.
            Gradients::Storage => 2 * wide + 2 * storage,
        };
        self.model.n_params() as f64 * (2 * storage + 4 * wide + gradient) as f64
    }

    /// Bytes of a rank's state and weights in host memory.
    fn state_bytes(&self) -> u64 {
        let low = if self.widths.storage < self.widths.wide { 2 } else { 0 };
        let layer_weights = self.model.layer_params() * self.widths.storage / self.choice.ranks.world();
        self.choice.optimizer_host_elements * (2 * self.widths.of(self.choice.moment_element()) + low)
            + self.choice.weights_host_layers * layer_weights
    }
}

/// True when a layer's forward runs again, to rebuild the input of the layer after it.
pub(super) fn rerun(choice: &Choice, layers: u64, layer: u64) -> bool {
    !choice.segment_starts.contains(&(layer + 1)) && layer + 1 < layers
}

/// Bytes of the spill file: every kept layer input, when they live on disk.
pub fn disk_bytes(model: &ModelConfig, widths: Widths, tokens: u64, choice: &Choice) -> u64 {
    match choice.checkpoint_place {
        Place::Memory => 0,
        Place::Disk => choice.checkpoint_slots * choice.local(tokens) * model.hidden_size * widths.storage,
    }
}
