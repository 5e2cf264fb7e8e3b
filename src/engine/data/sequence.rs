//! One sequence as the model takes it: ids, labels shifted within each document, positions, document bounds.

use std::{collections::BTreeMap, ops::Range, sync::Mutex};

use super::{
    Corpus, Token,
    pack::{Packed, Settings, pack, shuffled},
};
use crate::{domain::progress::DataSummary, engine::Result};

/// A label that no loss counts.
pub const IGNORED: i32 = -100;

/// A data set, packed.
#[derive(Debug)]
pub struct Dataset {
    corpus: Corpus,
    packed: Packed,
    settings: Settings,
    /// Whether each epoch has an order of its own; validation data keep theirs.
    shuffle: bool,
    /// Order of the epoch last asked for.
    order: Mutex<BTreeMap<u64, Vec<usize>>>,
}

/// One sequence. The first three are equally long.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sequence {
    pub ids: Vec<i32>,
    /// The next id of the same document where it is trained, or [`IGNORED`].
    pub labels: Vec<i32>,
    /// From 0 in every document.
    pub positions: Vec<i32>,
    /// Bounds of the documents with their padding, covering the sequence without gaps.
    pub documents: Vec<Range<u64>>,
    /// Tokens without padding.
    pub n_tokens: u64,
}

impl Dataset {
    /// Packs a corpus.
    pub fn new(corpus: Corpus, settings: Settings, shuffle: bool) -> Result<Self> {
        let packed = pack(&corpus, &settings)?;
        Ok(Self { corpus, packed, settings, shuffle, order: Mutex::default() })
    }

    /// What was counted.
    pub fn summary(&self) -> &DataSummary {
        &self.packed.summary
    }

    /// Sequences of one pass.
    pub fn sequences_per_epoch(&self) -> u64 {
        self.packed.ends.len() as u64
    }

    /// Sequence `index` of an epoch. Any may be asked for at any time: a resumed run seeks.
    ///
    /// # Panics
    /// When `index` is not below [`Self::sequences_per_epoch`].
    pub fn sequence(&self, epoch: u64, index: u64) -> Sequence {
        let index = if self.shuffle { self.place(epoch, index as usize) } else { index as usize };
        let mut sequence = Sequence::default();
        for piece in self.packed.sequence(index) {
            let tokens = &self.corpus.document(piece.document)[piece.start as usize..][..piece.length as usize];
            sequence.push(tokens, self.settings.pad_to);
        }
        sequence
    }

    /// Which sequence comes at a place of an epoch's order.
    fn place(&self, epoch: u64, index: usize) -> usize {
        let mut order = self.order.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // One epoch's order is kept: steps walk through an epoch before they go to the next.
        if !order.contains_key(&epoch) {
            order.clear();
        }
        let of_epoch =
            order.entry(epoch).or_insert_with(|| shuffled(self.packed.ends.len(), self.settings.seed, epoch));
        of_epoch[index]
    }
}

impl Sequence {
    /// Lengthens it to a multiple of so many tokens, by a document that nobody learns from.
    pub fn pad(&mut self, multiple: u64) {
        let tokens = self.ids.len() as u64;
        self.append_padding(tokens.next_multiple_of(multiple) - tokens);
    }

    /// Appends such a document of so many tokens.
    pub fn append_padding(&mut self, tokens: u64) {
        if tokens > 0 {
            let start = self.ids.len();
            let end = start + tokens as usize;
            self.ids.resize(end, 0);
            self.labels.resize(end, IGNORED);
            self.positions.extend(0..tokens as i32);
            self.documents.push(start as u64..end as u64);
        }
    }

    /// Appends a document, padded to a multiple of `pad_to`. Padding stands behind the document's last token, so no token
    /// sees it, and it has no label, so no loss counts it.
    fn push(&mut self, tokens: &[Token], pad_to: u64) {
        let start = self.ids.len();
        let end = start + tokens.len().next_multiple_of(pad_to as usize);
        self.ids.extend(tokens.iter().map(|token| token.id()));
        self.ids.resize(end, 0);
        self.labels.extend(tokens[1..].iter().map(|token| if token.is_trained() { token.id() } else { IGNORED }));
        self.labels.resize(end, IGNORED);
        self.positions.extend((0..end - start).map(|position| position as i32));
        self.documents.push(start as u64..end as u64);
        self.n_tokens += tokens.len() as u64;
    }
}
