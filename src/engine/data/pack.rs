//! Which pieces of which documents make a sequence.
//!
//! Documents are taken in an order shuffled by the seed, and laid into the open sequence while they fit. A document longer
//! than a sequence is refused, cut into sequences of its own, or cut short, as asked. Pieces of a split document overlap by
//! one token: the last token of a piece is the first of the next, so that every trained token but the document's first is
//! a label exactly once. A piece without any label teaches nothing and is left out.

use super::Corpus;
use crate::{
    domain::{Invalid, progress::DataSummary, training::LongDocuments},
    engine::Result,
};

/// How to pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Most tokens of a sequence, padding included; a multiple of `pad_to`.
    pub sequence_length: u64,
    /// Every document is padded at its end to a multiple of this.
    pub pad_to: u64,
    /// Several documents to a sequence.
    pub packing: bool,
    pub long_documents: LongDocuments,
    /// Seeds the order of documents, and of sequences in each epoch.
    pub seed: u64,
}

/// Tokens `start..start + length` of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    pub document: usize,
    pub start: u64,
    pub length: u64,
}

/// The pieces of every sequence, and what was counted on the way.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Packed {
    /// Pieces of all sequences, one sequence after another.
    pub pieces: Vec<Piece>,
    /// Where each sequence's pieces end.
    pub ends: Vec<usize>,
    pub summary: DataSummary,
}

impl Packed {
    /// Pieces of a sequence.
    pub fn sequence(&self, i: usize) -> &[Piece] {
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.pieces[start..self.ends[i]]
    }
}

/// Packs a corpus.
pub fn pack(corpus: &Corpus, settings: &Settings) -> Result<Packed> {
    let mut packed = Packed::default();
    let mut room = 0;
    for document in shuffled(corpus.n_documents(), settings.seed, u64::MAX) {
        let length = corpus.length(document);
        let summary = &mut packed.summary;
        summary.documents += 1;
        summary.tokens += length;
        summary.longest_document = summary.longest_document.max(length);
        let longest = settings.sequence_length;
        if length <= longest {
            packed.lay(corpus, Piece { document, start: 0, length }, settings, &mut room);
            continue;
        }
        match settings.long_documents {
            LongDocuments::Refuse => return refuse(corpus, document, longest),
            LongDocuments::Truncate => {
                packed.summary.truncated_documents += 1;
                packed.lay(corpus, Piece { document, start: 0, length: longest }, settings, &mut room);
            }
            LongDocuments::Split => {
                packed.summary.split_documents += 1;
                let mut start = 0;
                while start + 1 < length {
                    let piece = Piece { document, start, length: longest.min(length - start) };
                    packed.lay(corpus, piece, settings, &mut room);
                    start += longest - 1;
                }
            }
        }
    }
    packed.summary.empty_documents = corpus.empty_documents;
    packed.summary.sequences = packed.ends.len() as u64;
    packed.summary.sequence_length = settings.sequence_length;
    if packed.summary.valid_labels == 0 {
        let message =
            "the files hold no token to train on: of every document a single token is left, or none that is trained"
                .to_owned();
        return Err(Invalid::with_code("invalid_training_file", "training_file", message).into());
    }
    Ok(packed)
}

fn refuse(corpus: &Corpus, document: usize, longest: u64) -> Result<Packed> {
    let (name, length) = (corpus.name(document), corpus.length(document));
    let message = format!(
        "{name}: the document has {length} tokens and training.sequence_length is {longest}: raise it, or set \
         training.long_documents to split or truncate"
    );
    Err(Invalid::with_code("document_too_long", "training.sequence_length", message).into())
}

impl Packed {
    /// Puts a piece into the open sequence, or opens one.
    fn lay(&mut self, corpus: &Corpus, piece: Piece, settings: &Settings, room: &mut u64) {
        let labels = corpus.labels(&piece);
        if labels == 0 {
            self.summary.untrained_pieces += 1;
            return;
        }
        let padded = piece.length.next_multiple_of(settings.pad_to);
        self.summary.valid_labels += labels;
        self.summary.padding += padded - piece.length;
        self.pieces.push(piece);
        if settings.packing && padded <= *room {
            *room -= padded;
            if let Some(last) = self.ends.last_mut() {
                *last += 1;
            }
            return;
        }
        *room = settings.sequence_length.saturating_sub(padded);
        self.ends.push(self.pieces.len());
    }
}

/// The numbers `0..n` in an order that (seed, epoch) alone decides (Fisher and Yates).
pub fn shuffled(n: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    let mut state = mix(seed ^ mix(epoch));
    for i in (1..n).rev() {
        state = mix(state.wrapping_add(i as u64));
        // The bias of a remainder is n / 2^64: nothing that data could show.
        order.swap(i, (state % (i as u64 + 1)) as usize);
    }
    order
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a random number for every number.
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
