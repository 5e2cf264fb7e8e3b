//! Where everything lies in a rank's device arena, and how much of it there is: the memory ledger.
//!
//! One list of regions, each with a place, a shape and a category. The engine looks its tensors up here and allocates
//! nothing of its own, so the ledger cannot differ from what a step uses. Work buffers that are never alive together
//! (a layer's chunk work and the loss's) lie over each other.

use serde::{Deserialize, Serialize};

use super::{Choice, Gradients, Widths};
use crate::domain::ModelConfig;

/// Every region starts at a multiple of this many bytes.
const ALIGNMENT: u64 = 256;

/// What a region holds. T, c, t, h, f, V, nq, nk, d as in ARCHITECTURE.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Slot {
    /// All parameters, flat.
    Weights,
    /// Their gradients, and AdamW's two moments, flat, wide.
    Gradients,
    /// Wide sums of one layer's gradients, and of embedding or head and the last norm, where the flat ones are storage.
    LayerGradients,
    VocabularyGradients,
    MomentM,
    MomentV,
    /// Low halves of the master weights (bf16 storage only), flat.
    MasterLow,
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
    /// Kept layer inputs, `slots * T` rows of h.
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
    Index,
    Half,
    Byte,
}

/// A place in the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    pub slot: Slot,
    pub category: Category,
    pub element: Element,
    pub rows: u64,
    pub cols: u64,
    pub offset: u64,
    pub bytes: u64,
}

/// The whole arena.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    pub regions: Vec<Region>,
    /// Size of the arena.
    pub bytes: u64,
}

impl Layout {
    /// The region of a slot, if this plan has it.
    pub fn region(&self, slot: Slot) -> Option<&Region> {
        self.regions.iter().find(|r| r.slot == slot)
    }

    /// Bytes by category. Overlaid work counts once, as the larger of its two uses, so the sum is the arena.
    pub fn ledger(&self) -> Vec<(Category, u64)> {
        let mut ledger: Vec<(Category, u64)> = Vec::new();
        let mut end = 0;
        let mut ordered: Vec<&Region> = self.regions.iter().collect();
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

/// Lays out one rank's arena for sequences of up to `tokens` tokens under these choices.
pub fn lay_out(model: &ModelConfig, widths: Widths, tokens: u64, choice: &Choice) -> Layout {
    let mut laying = Laying { widths, layout: Layout::default(), end: 0 };
    laying.persistent(model, tokens, choice.gradients);
    laying.sequence(model, tokens, choice);
    let base = laying.end;
    laying.layer_work(model, tokens, choice);
    let layer_end = laying.end;
    laying.end = base;
    laying.loss_work(model, choice);
    laying.layout.bytes = laying.end.max(layer_end);
    laying.layout
}

struct Laying {
    widths: Widths,
    layout: Layout,
    end: u64,
}

impl Laying {
    fn put(&mut self, slot: Slot, category: Category, element: Element, rows: u64, cols: u64) {
        let width = match element {
            Element::Storage => self.widths.storage,
            Element::Wide => self.widths.wide,
            Element::Index => 4,
            Element::Half => 2,
            Element::Byte => 1,
        };
        let bytes = rows * cols * width;
        if bytes == 0 {
            return;
        }
        self.layout.regions.push(Region { slot, category, element, rows, cols, offset: self.end, bytes });
        self.end = align(self.end + bytes);
    }

    /// What lives from the first step to the last.
    fn persistent(&mut self, model: &ModelConfig, tokens: u64, gradients: Gradients) {
        let n = model.n_params();
        self.put(Slot::Weights, Category::Weights, Element::Storage, 1, n);
        match gradients {
            Gradients::Wide => self.put(Slot::Gradients, Category::Gradients, Element::Wide, 1, n),
            Gradients::Storage => {
                let (layer, outside) = (model.layer_params(), model.vocab_size * model.hidden_size + model.hidden_size);
                self.put(Slot::Gradients, Category::Gradients, Element::Storage, 1, n);
                self.put(Slot::LayerGradients, Category::Gradients, Element::Wide, 1, layer);
                self.put(Slot::VocabularyGradients, Category::Gradients, Element::Wide, 1, outside);
            }
        }
        self.put(Slot::MomentM, Category::Optimizer, Element::Wide, 1, n);
        self.put(Slot::MomentV, Category::Optimizer, Element::Wide, 1, n);
        if self.widths.storage < self.widths.wide {
            self.put(Slot::MasterLow, Category::Optimizer, Element::Half, 1, n);
        }
        for slot in [Slot::Ids, Slot::Labels, Slot::Positions] {
            self.put(slot, Category::Batch, Element::Index, tokens, 1);
        }
        self.put(Slot::Rope, Category::Batch, Element::Wide, tokens, model.head_dim);
        self.put(Slot::Scalars, Category::Batch, Element::Wide, 8, 1);
    }

    /// Whole-sequence tensors: the streamed layer's own, kept inputs, kept intermediates.
    fn sequence(&mut self, model: &ModelConfig, tokens: u64, choice: &Choice) {
        let (h, q, kv) = (model.hidden_size, model.q_size(), model.kv_size());
        let storage = Element::Storage;
        self.put(Slot::X, Category::Sequence, storage, tokens, h);
        self.put(Slot::Dy, Category::Sequence, storage, tokens, h);
        if choice.kept_qkv_layers < model.n_layers {
            self.put(Slot::K, Category::Sequence, storage, tokens, kv);
            self.put(Slot::V, Category::Sequence, storage, tokens, kv);
        }
        self.put(Slot::Dk, Category::Sequence, Element::Wide, tokens, kv);
        self.put(Slot::Dv, Category::Sequence, Element::Wide, tokens, kv);
        self.put(Slot::Checkpoints, Category::Checkpoints, storage, choice.memory_slots() * tokens, h);
        let kept = Category::Kept;
        self.put(Slot::KeptO, kept, storage, choice.kept_attention_layers * tokens, q);
        self.put(Slot::KeptLse, kept, Element::Wide, choice.kept_attention_layers * tokens, model.n_heads);
        self.put(Slot::KeptQ, kept, storage, choice.kept_qkv_layers * tokens, q);
        self.put(Slot::KeptK, kept, storage, choice.kept_qkv_layers * tokens, kv);
        self.put(Slot::KeptV, kept, storage, choice.kept_qkv_layers * tokens, kv);
        self.put(Slot::KeptGateUp, kept, storage, choice.kept_gate_up_layers * tokens, 2 * model.intermediate_size);
    }

    /// Buffers of one chunk of a layer and one tile of its feed-forward.
    fn layer_work(&mut self, model: &ModelConfig, tokens: u64, choice: &Choice) {
        let (h, q, kv) = (model.hidden_size, model.q_size(), model.kv_size());
        let (c, t, f) = (choice.chunk_tokens.min(tokens), choice.mlp_tile_rows.min(tokens), model.intermediate_size);
        let (work, storage, wide) = (Category::Work, Element::Storage, Element::Wide);
        self.put(Slot::Xn, work, storage, c, h);
        self.put(Slot::Qkv, work, storage, c, q + 2 * kv);
        if choice.kept_qkv_layers < model.n_layers {
            self.put(Slot::Q, work, storage, c, q);
        }
        if choice.kept_attention_layers < model.n_layers {
            self.put(Slot::O, work, storage, c, q);
            self.put(Slot::Lse, work, wide, model.n_heads, c);
        }
        self.put(Slot::H1, work, storage, c, h);
        self.put(Slot::DO, work, storage, c, q);
        self.put(Slot::Dq, work, storage, c, q);
        self.put(Slot::Delta, work, wide, model.n_heads, c);
        self.put(Slot::AttentionWorkspace, work, Element::Byte, choice.attention_workspace, 1);
        self.put(Slot::MlpNorm, work, storage, t, h);
        if choice.kept_gate_up_layers < model.n_layers {
            self.put(Slot::GateUp, work, storage, t, 2 * f);
        }
        self.put(Slot::Act, work, storage, t, f);
        self.put(Slot::DMlpNorm, work, storage, t, h);
    }

    /// Buffers of one tile of head and loss.
    fn loss_work(&mut self, model: &ModelConfig, choice: &Choice) {
        let (rows, work, storage) = (choice.loss_tile_rows, Category::Work, Element::Storage);
        self.put(Slot::LossNorm, work, storage, rows, model.hidden_size);
        self.put(Slot::Logits, work, storage, rows, model.vocab_size);
        self.put(Slot::DLossNorm, work, storage, rows, model.hidden_size);
    }
}
