//! Which queries of a window meet which keys in one call.

use std::ops::Range;

use super::super::super::Window;
use crate::domain::attention_workspace::{BLOCK_KEYS, LEAST_PACKED_BLOCK, MOST_PACKED_BLOCK, TILE_KEYS};

/// Queries of a chunk and keys of the sequence, both by position in the sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) queries: Range<u64>,
    pub(super) keys: Range<u64>,
    /// Keys end where the queries do, and a query sees none after itself; otherwise every query sees every key.
    pub(super) causal: bool,
}

impl Piece {
    pub(super) fn n_queries(&self) -> u64 {
        self.queries.end - self.queries.start
    }

    pub(super) fn n_keys(&self) -> u64 {
        self.keys.end - self.keys.start
    }

    /// The same, keys in blocks: those before the queries, as far as they fill tiles of so many, and then the rest, causally.
    /// `block` says how many of the keys that are left come next.
    fn in_blocks(self, tile: u64, block: impl Fn(u64) -> u64) -> Vec<Self> {
        let Self { queries, keys, causal } = self;
        let own = queries.start - (queries.start - keys.start) % tile;
        let (mut pieces, mut start) = (Vec::new(), keys.start);
        while start < own {
            let end = start + block(own - start);
            pieces.push(Self { queries: queries.clone(), keys: start..end, causal: false });
            start = end;
        }
        pieces.push(Self { queries, keys: own..keys.end, causal });
        pieces
    }
}

/// Each document fragment's queries against all its keys.
pub(super) fn fragments(window: &Window) -> Vec<Piece> {
    let fragment = |document: &Range<u64>| {
        let queries = document.start.max(window.chunk.start)..document.end.min(window.chunk.end);
        let keys = document.start..queries.end;
        (!queries.is_empty()).then_some(Piece { queries, keys, causal: true })
    };
    window.documents.iter().filter_map(fragment).collect()
}

/// The pieces of backward where documents are not packed.
pub(super) fn backward_pieces(window: &Window) -> Vec<Piece> {
    let of = |fragment: Piece| fragment.in_blocks(TILE_KEYS, |left| left.min(BLOCK_KEYS));
    fragments(window).into_iter().flat_map(of).collect()
}

/// The pieces of each fragment of packed documents, of both passes: of few sizes, whatever the documents' lengths.
pub(super) fn packed_pieces(window: &Window) -> Vec<Vec<Piece>> {
    let block = |left: u64| MOST_PACKED_BLOCK.min(1 << left.ilog2());
    fragments(window).into_iter().map(|fragment| fragment.in_blocks(LEAST_PACKED_BLOCK, block)).collect()
}

/// True where the window lies in a document that began the sequence: the sizes of its calls are few, and come again.
pub(super) fn is_one_document(window: &Window) -> bool {
    matches!(window.documents, [document] if document.start == 0)
}
