//! Blocks of columns, from one matrix into another.

use rayon::prelude::*;

/// Calls `f` with every row's block of `width` elements: of `to`, whose rows have `to_cols` elements, from `to_first` on, and of
/// `from` likewise.
pub(super) fn by_row<A: Send, B: Sync>(
    (to, to_cols, to_first): (&mut [A], usize, usize),
    (from, from_cols, from_first): (&[B], usize, usize),
    width: usize,
    f: impl Fn(&mut [A], &[B]) + Sync,
) {
    to.par_chunks_exact_mut(to_cols).zip(from.par_chunks_exact(from_cols)).for_each(|(to, from)| {
        f(&mut to[to_first..to_first + width], &from[from_first..from_first + width]);
    });
}
