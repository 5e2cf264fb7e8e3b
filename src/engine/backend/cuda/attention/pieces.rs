//! Which queries of a window meet which keys in one call, and which of these share a call.

use std::ops::Range;

use super::super::{
    super::{Heads, Window},
    cudnn::Mask,
    kernels::MOST_DOCUMENTS,
};

/// Keys of a block of backward: enough that reading queries anew for each does not count.
pub(super) const BLOCK_KEYS: u64 = 1 << 16;
/// Keys of a tile of the library's backward.
pub(super) const TILE_KEYS: u64 = 128;
/// Packed calls lay heads beside one another and sum dq in place: the library is right with heads of a multiple of this.
const PACKED_HEAD_DIM: u64 = 16;

/// Queries of a chunk and keys of the sequence, both by position in the sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) queries: Range<u64>,
    pub(super) keys: Range<u64>,
    pub(super) causal: bool,
}

impl Piece {
    pub(super) fn n_queries(&self) -> u64 {
        self.queries.end - self.queries.start
    }

    pub(super) fn n_keys(&self) -> u64 {
        self.keys.end - self.keys.start
    }

    /// A causal piece ends where its keys do, so one of as many queries as keys starts where they do.
    pub(super) fn mask(&self) -> Mask {
        match self.causal {
            false => Mask::None,
            true if self.queries == self.keys => Mask::Causal,
            true => Mask::CausalFromEnd,
        }
    }

    fn fills_tiles(&self) -> bool {
        self.n_queries().is_multiple_of(TILE_KEYS) && self.n_keys().is_multiple_of(TILE_KEYS)
    }
}

/// Forward: each document fragment's queries against all its keys.
pub(super) fn forward_pieces(window: &Window) -> Vec<Piece> {
    let fragment = |document: &Range<u64>| {
        let queries = document.start.max(window.chunk.start)..document.end.min(window.chunk.end);
        let keys = document.start..queries.end;
        (!queries.is_empty()).then_some(Piece { queries, keys, causal: true })
    };
    window.documents.iter().filter_map(fragment).collect()
}

/// Backward: the same, keys in blocks: those before the fragment, as far as they fill tiles, and then its own.
pub(super) fn backward_pieces(window: &Window) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for Piece { queries, keys, .. } in forward_pieces(window) {
        let own = queries.start - (queries.start - keys.start) % TILE_KEYS;
        for block in (keys.start..own).step_by(BLOCK_KEYS as usize) {
            let keys = block..own.min(block + BLOCK_KEYS);
            pieces.push(Piece { queries: queries.clone(), keys, causal: false });
        }
        pieces.push(Piece { keys: own..queries.end, queries, causal: true });
    }
    pieces
}

/// True where the window lies in a document that began the sequence: its shapes are few, and each gets a plan of its own.
fn is_one_document(window: &Window) -> bool {
    matches!(window.documents, [document] if document.start == 0)
}

/// The pieces of a window by the call they go in.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Calls {
    /// Each a call of its own, with a plan for its very lengths.
    pub(super) single: Vec<Piece>,
    /// Each set a call, with lengths in device memory: documents from their start, or one piece of any other kind.
    pub(super) packed: Vec<Vec<Piece>>,
}

impl Calls {
    pub(super) fn all_single(pieces: Vec<Piece>) -> Self {
        Self { single: pieces, packed: Vec::new() }
    }

    /// Pieces that do not fill the library's tiles stay single: of the rest of a tile it has been wrong in silence.
    pub(super) fn of(heads: Heads, window: &Window, pieces: Vec<Piece>) -> Self {
        if is_one_document(window) || !heads.head_dim.is_multiple_of(PACKED_HEAD_DIM) {
            return Self::all_single(pieces);
        }
        let (tiled, single): (Vec<Piece>, Vec<Piece>) = pieces.into_iter().partition(Piece::fills_tiles);
        let (whole, parts): (Vec<Piece>, Vec<Piece>) =
            tiled.into_iter().partition(|piece| piece.mask() == Mask::Causal);
        let parts = parts.into_iter().map(|piece| vec![piece]);
        Self { single, packed: parts.chain(whole.chunks(MOST_DOCUMENTS).map(<[Piece]>::to_vec)).collect() }
    }
}
