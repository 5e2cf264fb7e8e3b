//! Casts, sums, squares, and the clipping factor.

use rayon::prelude::*;

use super::{
    element::{Storage, num::Float},
    simd::vectorised,
};

/// Elements of a block: fixed, so that sums do not depend on the number of cores.
const BLOCK: usize = 1 << 16;
const LANES: usize = 16;

/// `to = f(from)` element by element.
pub(super) fn map<A: Copy + Sync, B: Send>(to: &mut [B], from: &[A], f: impl Fn(A) -> B + Sync) {
    to.par_chunks_mut(BLOCK).zip(from.par_chunks(BLOCK)).for_each(|(to, from)| {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = f(*from));
    });
}

/// `to += from`.
pub(super) fn accumulate<A: Storage, B: Storage<Wide = A::Wide>>(to: &mut [B], from: &[A]) {
    to.par_chunks_mut(BLOCK).zip(from.par_chunks(BLOCK)).for_each(|(to, from)| {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = B::narrow(to.widen() + from.widen()));
    });
}

/// Sum of squares: lanes within a block, blocks in order, blocks added in f64.
pub(super) fn sum_squares<S: Storage>(x: &[S]) -> f64 {
    let blocks: Vec<f64> = x
        .par_chunks(BLOCK)
        .map(|block| {
            vectorised(|| {
                let mut lanes = [0f64; LANES];
                for chunk in block.chunks(LANES) {
                    for (lane, x) in lanes.iter_mut().zip(chunk) {
                        let x = x.widen().f64();
                        *lane += x * x;
                    }
                }
                lanes.into_iter().sum()
            })
        })
        .collect();
    blocks.into_iter().sum()
}

/// `min(1, max_norm / (sqrt(sum) + 1e-6))`, 1 without a limit.
pub(super) fn clip_scale<W: Float>(sum: W, max_norm: f64) -> W {
    if max_norm == 0.0 { W::ONE } else { W::of((max_norm / (sum.f64().sqrt() + 1e-6)).min(1.0)) }
}
