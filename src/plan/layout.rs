//! Where everything lies in a rank's two arenas, and how much of it there is: the memory ledger.
//!
//! One list of regions, each with a place, a shape and a category. The engine looks its tensors up here and allocates
//! nothing of its own, so the ledger cannot differ from what a step uses. Work buffers that are never alive together
//! (a layer's chunk work, the loss's and the update's) lie over each other.

use serde::{Deserialize, Serialize};

use super::{Choice, Gradients, Ranks, Widths, shards};
use crate::domain::ModelConfig;

/// Every region starts at a multiple of this many bytes.
const ALIGNMENT: u64 = 256;

/// What a region holds. T, c, t, h, f, V, nq, nk, d as in ARCHITECTURE.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Slot {
    /// All parameters, flat, but those of layers whose weights are in host memory.
    Weights,
    HostWeights,
    /// Where layers visit the device, two at once: those in host memory, and with several ranks all.
    LayerWeights,
    /// With several ranks: embedding or head, and the last norm, whole. Between steps the former is free, and pieces of a
    /// checkpoint pass through it.
    VocabularyWeights,
    NormWeights,
    /// Their gradients, and AdamW's two moments, flat, wide.
    Gradients,
    /// Wide sums of one layer's gradients, and of embedding or head and the last norm, where the flat ones are storage.
    LayerGradients,
    VocabularyGradients,
    MomentM,
    MomentV,
    /// Low halves of the master weights (bf16 storage only), flat.
    MasterLow,
    /// The same of the first parameters, in host memory.
    HostMomentM,
    HostMomentV,
    HostMasterLow,
    /// Where they pass through the device: two buffers of each.
    StagedWeights,
    StagedM,
    StagedV,
    StagedLow,
    /// Token ids, labels, positions `[T, 1]`.
    Ids,
    Labels,
    Positions,
    /// cos and sin of every position `[T, d]`.
    Rope,
    /// Loss sums, square sum, clip scale.
    Scalars,
    /// Residual stream and its gradient `[T, h]`.
    X,
    Dy,
    /// Keys, values `[T, nk d]` and their gradients (wide) of the layer at hand.
    K,
    V,
    Dk,
    Dv,
    /// Kept layer inputs, `slots * T` rows of h: the first of them in host memory, the rest here.
    HostCheckpoints,
    Checkpoints,
    /// Kept by layer: attention output `[T, nq d]` and log-sum-exp `[T, nq]`, q, k, v, gate and up `[T, 2f]`.
    KeptO,
    KeptLse,
    KeptQ,
    KeptK,
    KeptV,
    KeptGateUp,
    /// Work of one chunk of attention.
    Xn,
    Qkv,
    Q,
    O,
    Lse,
    H1,
    DO,
    Dq,
    Delta,
    AttentionWorkspace,
    /// With several ranks, a chunk's own rows with all heads: q or a gradient, attention output, k, v and their gradients (wide);
    /// and blocks of columns on their way between ranks.
    LocalQ,
    LocalO,
    LocalK,
    LocalV,
    LocalDk,
    LocalDv,
    Packed,
    /// Work of one tile of the feed-forward.
    MlpNorm,
    GateUp,
    Act,
    DMlpNorm,
    /// Work of one tile of the loss.
    LossNorm,
    Logits,
    DLossNorm,
}

/// The ledger's lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Category {
    Weights,
    Gradients,
    Optimizer,
    /// Whole-sequence tensors of the layer at hand.
    Sequence,
    /// Kept layer inputs.
    Checkpoints,
    /// Kept attention output, q/k/v, gate and up.
    Kept,
    /// Chunk and tile buffers.
    Work,
    /// Tokens, labels, positions, angles, scalars.
    Batch,
}

/// Element type of a region, by role; the engine knows the type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Element {
    Storage,
    Wide,
    Bf16,
    Index,
    Half,
    Byte,
}

/// One of a rank's two blocks of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arena {
    /// Where operations compute.
    Device,
    /// Host memory that copies reach by themselves.
    Host,
}

/// A place in an arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    pub slot: Slot,
    pub arena: Arena,
    pub category: Category,
    pub element: Element,
    pub rows: u64,
    pub cols: u64,
    pub offset: u64,
    pub bytes: u64,
}

/// Both arenas.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    pub regions: Vec<Region>,
    /// Size of the device arena.
    pub bytes: u64,
    /// Size of the host arena.
    pub host_bytes: u64,
}

impl Layout {
    /// The region of a slot, if this plan has it.
    pub fn region(&self, slot: Slot) -> Option<&Region> {
        self.regions.iter().find(|r| r.slot == slot)
    }

    /// Bytes of an arena by category. Overlaid work counts once, as the largest of its uses, so the sum is the arena.
    pub fn ledger(&self, arena: Arena) -> Vec<(Category, u64)> {
        let mut ledger: Vec<(Category, u64)> = Vec::new();
        let mut end = 0;
        let mut ordered: Vec<&Region> = self.regions.iter().filter(|r| r.arena == arena).collect();
        ordered.sort_by_key(|r| r.offset);
        for region in ordered {
            let region_end = align(region.offset + region.bytes);
            let new = region_end.saturating_sub(end.max(region.offset));
            end = end.max(region_end);
            match ledger.iter_mut().find(|(c, _)| *c == region.category) {
                Some((_, bytes)) => *bytes += new,
                None => ledger.push((region.category, new)),
            }
        }
        ledger.sort_by_key(|(c, _)| *c);
        ledger
    }
}

fn align(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGNMENT)
}

/// Lays out one rank's arenas for sequences of up to `tokens` tokens under these choices. All ranks have the same layout.
pub fn lay_out(model: &ModelConfig, widths: Widths, tokens: u64, choice: &Choice) -> Layout {
    let mut laying = Laying { widths, layout: Layout::default(), end: 0 };
    laying.persistent(model, choice);
    laying.batch(model, choice.local(tokens));
    laying.sequence(model, tokens, choice);
    let base = laying.end;
    laying.layer_work(model, tokens, choice);
    let layer_end = std::mem::replace(&mut laying.end, base);
    laying.loss_work(model, choice);
    let loss_end = std::mem::replace(&mut laying.end, base);
    laying.update_work(choice);
    laying.layout.bytes = laying.end.max(layer_end).max(loss_end);
    laying.layout
}

struct Laying {
    widths: Widths,
    layout: Layout,
    /// Of the device arena so far.
    end: u64,
}

impl Laying {
    fn put(&mut self, slot: Slot, category: Category, element: Element, rows: u64, cols: u64) {
        self.end = self.put_at(Arena::Device, self.end, slot, category, element, rows, cols);
    }

    fn put_host(&mut self, slot: Slot, category: Category, element: Element, rows: u64, cols: u64) {
        let end = self.layout.host_bytes;
        self.layout.host_bytes = self.put_at(Arena::Host, end, slot, category, element, rows, cols);
    }

    /// A region from `offset` on, and where it ends.
    fn put_at(
        &mut self,
        arena: Arena,
        offset: u64,
        slot: Slot,
        category: Category,
        element: Element,
        rows: u64,
        cols: u64,
    ) -> u64 {
        let bytes = rows * cols * self.widths.of(element);
        if bytes > 0 {
            self.layout.regions.push(Region { slot, arena, category, element, rows, cols, offset, bytes });
        }
        align(offset + bytes)
    }

    /// What lives from the first step to the last.
    fn persistent(&mut self, model: &ModelConfig, choice: &Choice) {
        let world = choice.ranks.world();
        let (n, layer) = (shards::owned(model, world), world * shards::part(model.layer_params(), world));
        let vocabulary = world * shards::part(model.vocab_size * model.hidden_size, world);
        let norm = world * shards::part(model.hidden_size, world);
        let hosted = choice.weights_host_layers * layer / world;
        self.put_host(Slot::HostWeights, Category::Weights, Element::Storage, 1, hosted);
        self.put(Slot::Weights, Category::Weights, Element::Storage, 1, n - hosted);
        let visiting = if hosted > 0 || world > 1 { 2 } else { 0 };
        self.put(Slot::LayerWeights, Category::Weights, Element::Storage, visiting, layer);
        let gathered = u64::from(world > 1);
        self.put(Slot::VocabularyWeights, Category::Weights, Element::Storage, gathered, vocabulary);
        self.put(Slot::NormWeights, Category::Weights, Element::Storage, gathered, norm);
        match choice.gradients {
            Gradients::Wide => self.put(Slot::Gradients, Category::Gradients, Element::Wide, 1, n),
            Gradients::Storage => self.put(Slot::Gradients, Category::Gradients, Element::Storage, 1, n),
        }
        if choice.gradients == Gradients::Storage || world > 1 {
            self.put(Slot::LayerGradients, Category::Gradients, Element::Wide, 1, layer);
            self.put(Slot::VocabularyGradients, Category::Gradients, Element::Wide, 1, vocabulary + norm);
        }
        let (moment, hosted) = (choice.moment_element(), choice.optimizer_host_elements);
        let low = u64::from(self.widths.storage < self.widths.wide);
        let optimizer = Category::Optimizer;
        self.put_host(Slot::HostMomentM, optimizer, moment, 1, hosted);
        self.put_host(Slot::HostMomentV, optimizer, moment, 1, hosted);
        self.put_host(Slot::HostMasterLow, optimizer, Element::Half, low, hosted);
        self.put(Slot::MomentM, optimizer, moment, 1, n - hosted);
        self.put(Slot::MomentV, optimizer, moment, 1, n - hosted);
        self.put(Slot::MasterLow, optimizer, Element::Half, low, n - hosted);
    }

    /// What is computed once for each sequence.
    fn batch(&mut self, model: &ModelConfig, local: u64) {
        for slot in [Slot::Ids, Slot::Labels, Slot::Positions] {
            self.put(slot, Category::Batch, Element::Index, local, 1);
        }
        self.put(Slot::Rope, Category::Batch, Element::Wide, local, model.head_dim);
        self.put(Slot::Scalars, Category::Batch, Element::Wide, 8, 1);
    }

    /// Whole-sequence tensors: the streamed layer's own, kept inputs, kept intermediates.
    fn sequence(&mut self, model: &ModelConfig, tokens: u64, choice: &Choice) {
        let (h, local) = (model.hidden_size, choice.local(tokens));
        let (q, kv) = shards::head_columns(model, choice.ranks);
        let storage = Element::Storage;
        self.put(Slot::X, Category::Sequence, storage, local, h);
        self.put(Slot::Dy, Category::Sequence, storage, local, h);
        if choice.kept_qkv_layers < model.n_layers {
            self.put(Slot::K, Category::Sequence, storage, tokens, kv);
            self.put(Slot::V, Category::Sequence, storage, tokens, kv);
        }
        self.put(Slot::Dk, Category::Sequence, Element::Wide, tokens, kv);
        self.put(Slot::Dv, Category::Sequence, Element::Wide, tokens, kv);
        let (slots, hosted) = (choice.memory_slots() * local, choice.checkpoint_host_rows);
        self.put_host(Slot::HostCheckpoints, Category::Checkpoints, storage, hosted, h);
        self.put(Slot::Checkpoints, Category::Checkpoints, storage, slots - hosted, h);
        let kept = Category::Kept;
        self.put(Slot::KeptO, kept, storage, choice.kept_attention_layers * tokens, q);
        self.put(Slot::KeptLse, kept, Element::Wide, choice.kept_attention_layers * tokens, q / model.head_dim);
        self.put(Slot::KeptQ, kept, storage, choice.kept_qkv_layers * tokens, q);
        self.put(Slot::KeptK, kept, storage, choice.kept_qkv_layers * tokens, kv);
        self.put(Slot::KeptV, kept, storage, choice.kept_qkv_layers * tokens, kv);
        self.put(Slot::KeptGateUp, kept, storage, choice.kept_gate_up_layers * local, 2 * model.intermediate_size);
    }

    /// Buffers of one chunk of a layer and one tile of its feed-forward.
    fn layer_work(&mut self, model: &ModelConfig, tokens: u64, choice: &Choice) {
        let (h, f) = (model.hidden_size, model.intermediate_size);
        let c = choice.chunk_tokens.min(tokens);
        let n = choice.local(c);
        let t = choice.mlp_tile_rows.min(n);
        let (q, _) = shards::head_columns(model, choice.ranks);
        let n_heads = q / model.head_dim;
        let (work, storage, wide) = (Category::Work, Element::Storage, Element::Wide);
        self.put(Slot::Xn, work, storage, n, h);
        self.put(Slot::Qkv, work, storage, n, model.q_size() + 2 * model.kv_size());
        // While a chunk attends, the next one's queries arrive and the last one's output leaves.
        let at_once = if choice.ranks.sequence > 1 { tokens.div_ceil(c).min(2) } else { 1 };
        if choice.kept_qkv_layers < model.n_layers {
            self.put(Slot::Q, work, storage, at_once * c, q);
        }
        if choice.kept_attention_layers < model.n_layers {
            self.put(Slot::O, work, storage, at_once * c, q);
            self.put(Slot::Lse, work, wide, at_once * n_heads, c);
        }
        self.put(Slot::H1, work, storage, n, h);
        self.put(Slot::DO, work, storage, c, q);
        self.put(Slot::Dq, work, storage, c, q);
        self.put(Slot::Delta, work, wide, n_heads, c);
        self.put(Slot::AttentionWorkspace, work, Element::Byte, choice.attention_workspace, 1);
        if choice.ranks.sequence > 1 {
            self.exchange_work(model, n, choice.ranks);
        }
        self.put(Slot::MlpNorm, work, storage, t, h);
        if choice.kept_gate_up_layers < model.n_layers {
            self.put(Slot::GateUp, work, storage, t, 2 * f);
        }
        self.put(Slot::Act, work, storage, t, f);
        self.put(Slot::DMlpNorm, work, storage, t, h);
    }

    /// Buffers of the `n` rows that a rank has of a chunk, for their exchange with the other ranks.
    fn exchange_work(&mut self, model: &ModelConfig, n: u64, ranks: Ranks) {
        let (q, kv, work) = (model.q_size(), model.kv_size(), Category::Work);
        for slot in [Slot::LocalQ, Slot::LocalO] {
            self.put(slot, work, Element::Storage, n, q);
        }
        for slot in [Slot::LocalK, Slot::LocalV] {
            self.put(slot, work, Element::Storage, n, kv);
        }
        for slot in [Slot::LocalDk, Slot::LocalDv] {
            self.put(slot, work, Element::Wide, n, kv);
        }
        // What is under way at most: queries or their like three times, and gradients of keys and values, which come back from
        // every rank that shares them.
        let (storage, wide) = (self.widths.storage, self.widths.wide);
        let bytes = 3 * q * storage + 2 * shards::all_kv_columns(model, ranks) * wide;
        self.put(Slot::Packed, work, Element::Byte, n * bytes, 1);
    }

    /// Buffers of one tile of head and loss.
    fn loss_work(&mut self, model: &ModelConfig, choice: &Choice) {
        let (rows, work, storage) = (choice.loss_tile_rows, Category::Work, Element::Storage);
        self.put(Slot::LossNorm, work, storage, rows, model.hidden_size);
        self.put(Slot::Logits, work, storage, rows, model.vocab_size);
        self.put(Slot::DLossNorm, work, storage, rows, model.hidden_size);
    }

    /// Buffers that optimizer state from the host passes through.
    fn update_work(&mut self, choice: &Choice) {
        let (n, work, moment) = (choice.staged_elements, Category::Work, choice.moment_element());
        let low = if self.widths.storage < self.widths.wide { 2 } else { 0 };
        let weights = if choice.weights_host_layers > 0 { 2 } else { 0 };
        self.put(Slot::StagedWeights, work, Element::Storage, weights, n);
        self.put(Slot::StagedM, work, moment, 2, n);
        self.put(Slot::StagedV, work, moment, 2, n);
        self.put(Slot::StagedLow, work, Element::Half, low, n);
    }
}
