//! Which rows of a sequence each rank has: of every chunk an equal piece, in the order of ranks.

use std::ops::Range;

/// Rows of rank `rank`, chunk by chunk.
pub(super) fn of_rank(tokens: u64, chunk: u64, n_ranks: u64, rank: u64) -> Vec<Range<u64>> {
    let piece = |start: u64| {
        let n = (tokens.min(start + chunk) - start) / n_ranks;
        start + rank * n..start + (rank + 1) * n
    };
    (0..tokens).step_by(chunk as usize).map(piece).collect()
}

/// Elements in these rows.
pub(super) fn taken(all: &[i32], rows: &[Range<u64>]) -> Vec<i32> {
    rows.iter().flat_map(|rows| &all[rows.start as usize..rows.end as usize]).copied().collect()
}
