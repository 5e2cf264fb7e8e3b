//! What ranks send each other in a step: bytes that one rank sends, and the seconds they add.

use serde::{Deserialize, Serialize};

use super::{Choice, Ranks, Widths, cost, shards};
use crate::domain::{Machine, ModelConfig};

/// Bytes that one rank sends to others in a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Its parts of the weights, for every gather.
    pub weights: u64,
    /// Sums of gradients that others own.
    pub gradients: u64,
    /// q, k, v, attention output and their gradients, to the ranks of the same sequence.
    pub heads: u64,
}

impl Traffic {
    /// Of one forward, backward and update over a sequence of `tokens` tokens.
    pub fn of(model: &ModelConfig, widths: Widths, tokens: u64, choice: &Choice) -> Self {
        let Ranks { sequence, .. } = choice.ranks;
        let world = choice.ranks.world();
        let others = |bytes: u64| bytes / world * (world - 1);
        let layer = world * shards::part(model.layer_params(), world);
        let vocabulary = model.vocab_size * model.hidden_size;
        let visits: u64 =
            (0..model.n_layers).map(|layer| if cost::rerun(choice, model.n_layers, layer) { 3 } else { 2 }).sum();
        let outside = if model.tie_word_embeddings { vocabulary } else { 2 * vocabulary };
        let rows = tokens / sequence;
        let heads = (0..model.n_layers).map(|layer| rows * head_bytes(model, widths, choice, layer)).sum::<u64>();
        Self {
            weights: others((visits * layer + 2 * vocabulary) * widths.storage),
            gradients: others((model.n_layers * layer + outside) * widths.wide),
            heads: heads / sequence * (sequence - 1),
        }
    }

    /// Seconds that it adds: weights travel beside the work on the layer before, of which a forward takes `forward` seconds.
    pub fn seconds(&self, machine: &Machine, layers: u64, forward: f64) -> f64 {
        let rate = if machine.rates.peer_bytes > 0.0 { machine.rates.peer_bytes } else { machine.rates.link_bytes };
        let hidden = forward * 2.0 * layers as f64;
        let weights = self.weights as f64 / rate;
        (weights - hidden).max(0.0) + cost::HINDRANCE * weights + (self.gradients + self.heads) as f64 / rate
    }
}

/// Bytes of one token in all exchanges of a layer, to all ranks.
fn head_bytes(model: &ModelConfig, widths: Widths, choice: &Choice, layer: u64) -> u64 {
    let q = model.q_size() * widths.storage;
    // Keys go to every rank that shares them.
    let kv = choice.ranks.sequence * shards::head_columns(model, choice.ranks).1;
    let (kept_attention, kept_qkv) = (layer < choice.kept_attention_layers, layer < choice.kept_qkv_layers);
    let again = u64::from(cost::rerun(choice, model.n_layers, layer));
    let keys = 1 + u64::from(!kept_qkv) + if kept_qkv || kept_attention { 0 } else { again };
    let queries = 1 + u64::from(!kept_qkv) + if kept_qkv || kept_attention { 0 } else { again };
    // Outputs come back in every forward and backward; do goes and dq comes, as do dk and dv in the wide type.
    let outputs = 2 + again + 2;
    (queries + outputs) * q + keys * 2 * kv * widths.storage + 2 * kv * widths.wide
}
