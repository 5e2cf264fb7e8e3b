//! What of the model each rank owns (ZeRO-3, arXiv 1910.02054): an equal part of every unit, and the heads it computes.
//!
//! Units are gathered whole: the embedding, each layer, the last norm, and a head that is not tied. A rank's own parts lie one
//! behind the other in the order of units. With one rank the parts are the units and the whole is the flat order.

use super::Ranks;
use crate::domain::{
    ModelConfig,
    heads::{self, HeadRun},
};

/// A rank's part is a multiple of so many parameters, so that vectors of it are aligned.
const PART_ELEMENTS: u64 = 64;

/// Parameters that a rank owns of a unit of `n`; the last ranks' parts may reach beyond its end.
pub fn part(n: u64, world: u64) -> u64 {
    if world == 1 { n } else { n.div_ceil(world).next_multiple_of(PART_ELEMENTS) }
}

/// Parameters of every unit, in order.
pub fn units(model: &ModelConfig) -> Vec<u64> {
    let vocabulary = model.vocab_size * model.hidden_size;
    let mut units = vec![vocabulary];
    units.extend((0..model.n_layers).map(|_| model.layer_params()));
    units.push(model.hidden_size);
    if !model.tie_word_embeddings {
        units.push(vocabulary);
    }
    units
}

/// Parameters that a rank owns in all.
pub fn owned(model: &ModelConfig, world: u64) -> u64 {
    units(model).into_iter().map(|n| part(n, world)).sum()
}

/// Heads of every rank of a sequence-parallel group.
pub fn heads(model: &ModelConfig, ranks: Ranks) -> Vec<Vec<HeadRun>> {
    let of = |rank| heads::of_rank(model.n_heads, model.n_kv_heads, ranks.sequence, rank);
    (0..ranks.sequence).map(of).collect()
}

/// Columns of keys over the whole sequence's tensors of all ranks: more than the model has where ranks share heads.
pub fn all_kv_columns(model: &ModelConfig, ranks: Ranks) -> u64 {
    let n_kv_heads: u64 = heads(model, ranks).iter().flatten().map(HeadRun::n_kv_heads).sum();
    n_kv_heads * model.head_dim
}

/// Columns of queries, and of keys at most, in the whole sequence's tensors of a rank.
pub fn head_columns(model: &ModelConfig, ranks: Ranks) -> (u64, u64) {
    let kv = heads(model, ranks).iter().map(|runs| runs.iter().map(HeadRun::n_kv_heads).sum()).max().unwrap_or(0);
    (model.q_size() / ranks.sequence, kv * model.head_dim)
}
