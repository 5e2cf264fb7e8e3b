//! Embedding look-up, and its backward in the order of the tokens.

use rayon::prelude::*;

use super::element::Storage;

/// `x[i] = table[ids[i]]`.
pub(super) fn embedding<S: Storage>(x: &mut [S], ids: &[i32], table: &[S], h: usize) {
    x.par_chunks_mut(h).zip(ids).for_each(|(x, id)| {
        let row = *id as usize * h;
        x.copy_from_slice(&table[row..row + h]);
    });
}

/// `dtable[ids[i]] += dx[i]`: bands of columns over the cores, each in the order of i.
pub(super) fn embedding_backward<S: Storage>(dtable: &mut [S::Wide], ids: &[i32], dx: &[S], h: usize) {
    for (id, dx) in ids.iter().zip(dx.chunks(h)) {
        let row = *id as usize * h;
        dtable[row..row + h].iter_mut().zip(dx).for_each(|(to, from)| *to += from.widen());
    }
}
