//! Which queries of a window meet which keys in one call.

use std::ops::Range;

use super::super::super::Window;

/// Keys of a tile of the library's backward.
pub(super) const TILE_KEYS: u64 = 128;
/// Keys of a block of backward where documents are not packed: enough that reading queries anew for each does not count.
pub(super) const BLOCK_KEYS: u64 = 1 << 16;
/// Where documents are packed, keys before a fragment come in blocks of powers of two from the one to the other of these.
const LEAST_PACKED_BLOCK: u64 = 1 << 10;
pub(super) const MOST_PACKED_BLOCK: u64 = 1 << 14;

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

/// A number of rows that a call of packed documents has, where `n` are needed: whole tiles, and few different numbers.
pub(super) fn padded(n: u64) -> u64 {
    n.next_multiple_of(TILE_KEYS.max(n.next_power_of_two() / 16))
}

/// The most rows of a causal call in chunks of `c`.
pub(super) fn longest_padded(c: u64) -> u64 {
    padded(c + LEAST_PACKED_BLOCK - 1)
}

/// True where the window lies in a document that began the sequence: the sizes of its calls are few, and come again.
pub(super) fn is_one_document(window: &Window) -> bool {
    matches!(window.documents, [document] if document.start == 0)
}
