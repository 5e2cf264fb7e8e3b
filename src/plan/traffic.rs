//! What ranks send each other for a sequence: bytes that one rank sends, and the seconds they add.
//!
//! Weights and sums of gradients go around all ranks, and between hosts over the links of all devices of a host at once.
//! Exchanges of heads stay in the group that shares a sequence; what they send to another host goes over the rank's own link.
//! The latency of a call is not counted.

use serde::{Deserialize, Serialize};

use super::{Choice, Ranks, Widths, cost, ranks, segments, shards};
use crate::domain::{Machine, ModelConfig, machine::Rates};

/// Bytes that one rank sends to others; the mean, where ranks have uneven heads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Its parts of the weights, for every gather.
    pub weights: u64,
    /// Sums of gradients that others own.
    pub gradients: u64,
    /// q, k, v, attention output and their gradients, to the ranks of the same sequence.
    pub heads: u64,
}

/// Seconds that they add to the work.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    pub weights: f64,
    pub gradients: f64,
    pub heads: f64,
}

impl Seconds {
    /// All three.
    pub fn sum(&self) -> f64 {
        self.weights + self.gradients + self.heads
    }

    /// Of so many sequences.
    #[must_use]
    pub fn times(&self, n: u64) -> Self {
        let n = n as f64;
        Self { weights: self.weights * n, gradients: self.gradients * n, heads: self.heads * n }
    }
}

impl Traffic {
    /// Of one forward and backward over a sequence of `tokens` tokens on each replica.
    pub fn of(model: &ModelConfig, widths: Widths, tokens: u64, choice: &Choice) -> Self {
        let Ranks { sequence, .. } = choice.ranks;
        let other_ranks = choice.ranks.world() - 1;
        let weights = Weights::of(model, choice);
        let (rows, kv) = (choice.local(tokens), shards::all_kv_columns(model, choice.ranks));
        let heads = (0..model.n_layers).map(|layer| rows * head_bytes(model, widths, kv, choice, layer)).sum::<u64>();
        Self {
            weights: (weights.gathers * weights.layer + weights.outside) * widths.storage * other_ranks,
            gradients: shards::owned(model, choice.ranks.world()) * widths.wide * other_ranks,
            heads: heads * (sequence - 1) / sequence,
        }
    }

    /// Of so many sequences.
    #[must_use]
    pub fn times(&self, n: u64) -> Self {
        Self { weights: self.weights * n, gradients: self.gradients * n, heads: self.heads * n }
    }
}

/// Parameters that each rank sends to each other in a sequence's gathers.
struct Weights {
    /// Of one layer, and how often layers are gathered.
    layer: u64,
    gathers: u64,
    /// Of embedding, last norm and head, each gathered once.
    outside: u64,
}

impl Weights {
    fn of(model: &ModelConfig, choice: &Choice) -> Self {
        let world = choice.ranks.world();
        let layer = shards::part(model.layer_params(), world);
        let gathers = gathers(&segments::walk(&choice.segment_starts, model.n_layers));
        Self { layer, gathers, outside: shards::owned(model, world) - model.n_layers * layer }
    }
}

/// Layers that are sent for on a walk over `order` with room for two at once: the one at hand and the next.
fn gathers(order: &[u64]) -> u64 {
    let mut held = [None, None];
    let mut current = 1;
    let mut sent = 0;
    for (i, layer) in order.iter().enumerate() {
        for coming in order[i..].iter().take(2) {
            if !held.contains(&Some(*coming)) {
                held[1 - current] = Some(*coming);
                sent += 1;
            }
            if coming == layer {
                current = usize::from(held[1] == Some(*layer));
            }
        }
    }
    sent
}

/// How fast a rank sends, bytes/s.
pub(super) struct Links {
    ranks: Ranks,
    /// To the next of all ranks.
    around: f64,
    /// To ranks of its host, and to those of others.
    inside: f64,
    outside: f64,
    /// Ranks of its group that are on its host, where fewest are.
    together: u64,
    /// Device memory, read plus written.
    memory: f64,
}

impl Links {
    /// `rates` are those of one of these ranks.
    pub(super) fn of(machine: &Machine, rates: &Rates, ranks: Ranks) -> Self {
        let or_link = |rate: f64| if rate > 0.0 { rate } else { rates.link_bytes };
        let (inside, memory) = (or_link(rates.peer_bytes), rates.memory_bytes);
        let here = machine.ranks_on_host(ranks.world());
        match machine.network {
            Some(network) if here < ranks.world() => {
                let outside = or_link(network.link_bytes);
                let together = ranks::common(here, ranks.sequence);
                Self { ranks, around: inside.min(outside * here as f64), inside, outside, together, memory }
            }
            _ => Self { ranks, around: inside, inside, outside: inside, together: ranks.sequence, memory },
        }
    }

    /// Seconds that the gathers of a sequence add. A layer's weights come beside the work on the layer before, of which a
    /// forward takes `forward` seconds, but for the first.
    pub(super) fn weights_seconds(&self, model: &ModelConfig, widths: Widths, choice: &Choice, forward: f64) -> f64 {
        let Weights { layer, gathers, outside } = Weights::of(model, choice);
        let crossing = |part: u64| (part * widths.storage * (self.ranks.world() - 1)) as f64 / self.around;
        let (layer, gathers) = (crossing(layer), gathers as f64);
        layer + gathers * (cost::HINDRANCE * layer + (layer - forward).max(0.0)) + crossing(outside)
    }

    /// Seconds that sums add on their way to their owners. Those of a layer go beside the `rebuild` seconds in which the next one's
    /// keys and values are projected again, where they are not kept; all others in the open.
    pub(super) fn gradients_seconds(&self, model: &ModelConfig, widths: Widths, choice: &Choice, rebuild: f64) -> f64 {
        let (world, owned) = (self.ranks.world(), shards::owned(model, self.ranks.world()));
        let crossing = |part: u64| (part * widths.wide * (world - 1)) as f64 / self.around;
        let hidden = crossing(shards::part(model.layer_params(), world)).min(rebuild);
        let rebuilt = (model.n_layers - 1).saturating_sub(choice.kept_qkv_layers);
        crossing(owned) - (1.0 - cost::HINDRANCE) * hidden * rebuilt as f64
    }

    /// Seconds that it adds when a rank sends `bytes` to the others of its group, equally many to each, over both links at once. They
    /// go chunk by chunk beside the `work` on other chunks, but for one of `chunks`. Columns are sorted by rank before they leave or after
    /// they have come: its own too are read and written once.
    pub(super) fn heads_seconds(&self, bytes: u64, chunks: f64, work: f64) -> f64 {
        let n = self.ranks.sequence;
        if n == 1 {
            return 0.0;
        }
        let to = |ranks: u64| bytes as f64 * ranks as f64 / (n - 1) as f64;
        let sent = (to(self.together - 1) / self.inside).max(to(n - self.together) / self.outside);
        let beside = sent * (1.0 - 1.0 / chunks);
        let open = sent - beside + (beside - work).max(0.0);
        open + cost::HINDRANCE * beside + 2.0 * to(n) / self.memory
    }
}

/// Bytes of one token in all exchanges of a layer, to all ranks; `kv` columns of keys go out.
fn head_bytes(model: &ModelConfig, widths: Widths, kv: u64, choice: &Choice, layer: u64) -> u64 {
    let q = model.q_size() * widths.storage;
    let (kept_attention, kept_qkv) = (layer < choice.kept_attention_layers, layer < choice.kept_qkv_layers);
    let again = u64::from(cost::rerun(choice, model.n_layers, layer));
    let projected = 1 + u64::from(!kept_qkv) + if kept_qkv || kept_attention { 0 } else { again };
    // Outputs come back in every forward and backward; do goes and dq comes, as do dk and dv in the wide type.
    let outputs = 2 + again + 2;
    (projected + outputs) * q + projected * 2 * kv * widths.storage + 2 * kv * widths.wide
}
