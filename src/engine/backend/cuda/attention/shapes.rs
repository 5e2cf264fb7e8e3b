//! The few shapes of packed calls: lengths come with the call, so a shape serves every set of documents up to its own size.

use std::ops::Range;

use super::{
    super::{
        super::{Heads, Window},
        cudnn::{Mask, Pass, Shape},
        kernels::MOST_DOCUMENTS,
    },
    BACKWARD_HEAD_KEYS, FORWARD_HEAD_KEYS,
    pieces::{BLOCK_KEYS, Piece, TILE_KEYS},
    single::Together,
};

/// Shapes come in powers of two from these on. Documents from their start: how many, and the longest.
const LEAST_DOCUMENTS: u64 = 8;
const LEAST_LENGTH: u64 = 512;
/// A single piece: its queries, as many as any chunk has, for a call's work goes by what is there; and its keys.
const LEAST_QUERIES: u64 = 1 << 15;
const LEAST_KEYS: u64 = 1 << 13;

/// A number of at least `least` as shapes count it.
fn rounded(n: u64, least: u64) -> u64 {
    n.max(least).next_power_of_two()
}

/// Powers of two from `least` to where `most` fits.
fn steps(least: u64, most: u64) -> impl Iterator<Item = u64> + Clone {
    let last = rounded(most, least);
    std::iter::successors(Some(least), |n| Some(n * 2)).take_while(move |n| *n <= last)
}

fn head_keys(pass: Pass) -> u64 {
    match pass {
        Pass::Forward => FORWARD_HEAD_KEYS,
        Pass::Backward => BACKWARD_HEAD_KEYS,
    }
}

fn shape(heads: Heads, pass: Pass, mask: Mask, documents: u64, (queries, keys): (u64, u64), most_keys: u64) -> Shape {
    let together = Together::of(heads, most_keys, head_keys(pass));
    Shape {
        mask,
        documents: Some(documents as i64),
        kv_heads: together.kv_heads as i64,
        heads: together.heads as i64,
        head_dim: heads.head_dim as i64,
        queries: queries as i64,
        keys: keys as i64,
        q_stride: (heads.n_heads * heads.head_dim) as i64,
        kv_stride: (heads.n_kv_heads * heads.head_dim) as i64,
        stats_stride: 0,
    }
}

/// Of documents from their start in a chunk of `c` rows.
fn shape_of_documents(heads: Heads, pass: Pass, c: u64, (documents, longest): (u64, u64)) -> Shape {
    // The last chunk of a sequence is shorter than others: the heads of a call follow from what any chunk may have.
    shape(heads, pass, Mask::Causal, documents, (longest, longest), c.max(LEAST_QUERIES))
}

/// Of one piece.
fn shape_of_piece(heads: Heads, pass: Pass, mask: Mask, queries: u64, keys: u64) -> Shape {
    shape(heads, pass, mask, 1, (queries, keys), keys)
}

/// The shape that a set of pieces of one call has.
pub(super) fn shape_of(heads: Heads, pass: Pass, window: &Window, pieces: &[Piece]) -> Shape {
    let first = &pieces[0];
    if first.mask() == Mask::Causal {
        let longest = pieces.iter().map(Piece::n_queries).max().unwrap_or(0);
        let sizes = (rounded(pieces.len() as u64, LEAST_DOCUMENTS), rounded(longest, LEAST_LENGTH));
        return shape_of_documents(heads, pass, window.chunk.end - window.chunk.start, sizes);
    }
    let (queries, keys) = (rounded(first.n_queries(), LEAST_QUERIES), rounded(first.n_keys(), LEAST_KEYS));
    shape_of_piece(heads, pass, first.mask(), queries, keys)
}

/// Every shape that a window of this chunk can have, whatever documents lie in it.
pub(super) fn shapes(heads: Heads, window: &Window) -> Vec<(Pass, Shape)> {
    let Range { start, end } = window.chunk;
    let c = end - start;
    // Documents of a tile or more, one of them longer than half of `longest`, fill what a chunk has.
    let fits = |documents: u64, longest: u64| {
        let fewest = if documents > LEAST_DOCUMENTS { documents / 2 } else { 0 };
        let shortest = if longest > LEAST_LENGTH { longest / 2 } else { 0 };
        fewest * TILE_KEYS + shortest < c.max(1)
    };
    let lengths = steps(LEAST_LENGTH, c);
    let sizes = steps(LEAST_DOCUMENTS, (c / TILE_KEYS).min(MOST_DOCUMENTS as u64))
        .flat_map(|documents| lengths.clone().map(move |longest| (documents, longest)))
        .filter(|(documents, longest)| fits(*documents, *longest));
    let queries = rounded(c, LEAST_QUERIES);
    let mut shapes = Vec::new();
    for sizes in sizes {
        shapes.extend([Pass::Forward, Pass::Backward].map(|pass| (pass, shape_of_documents(heads, pass, c, sizes))));
    }
    if start > 0 {
        let (forward, backward) = (steps(LEAST_KEYS, end), steps(LEAST_KEYS, start.min(BLOCK_KEYS)));
        let of = |pass, mask| move |keys| (pass, shape_of_piece(heads, pass, mask, queries, keys));
        shapes.extend(forward.map(of(Pass::Forward, Mask::CausalFromEnd)));
        shapes.extend(backward.map(of(Pass::Backward, Mask::None)));
    }
    shapes
}
