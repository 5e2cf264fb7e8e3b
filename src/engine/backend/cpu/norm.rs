//! `rmsnorm` and its backward: rows over the cores; the gain's gradient in blocks of fixed size, added up in order.

use rayon::prelude::*;

use super::{
    element::{Storage, num::Float},
    simd::vectorised,
};

/// Rows of a block: fixed, so that sums do not depend on the number of cores.
const BLOCK_ROWS: usize = 64;
/// Independent partial sums of a row: lets the loop vectorise, and fixes the order.
const LANES: usize = 16;

/// Sum of `f` over pairs, in lanes.
#[inline(always)]
fn lane_sum<S: Storage>(a: &[S], b: &[S], f: impl Fn(S::Wide, S::Wide) -> S::Wide) -> S::Wide {
    let mut lanes = [S::Wide::ZERO; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: S::Wide =
        a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| f(a.widen(), b.widen())).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f(a.widen(), b.widen());
        }
    }
    lanes.into_iter().sum::<S::Wide>() + rest
}

#[inline(always)]
fn inverse_rms<S: Storage>(x: &[S], eps: f64) -> S::Wide {
    let mean = lane_sum(x, x, |a, b| a * b) / S::Wide::of(x.len() as f64);
    S::Wide::ONE / (mean + S::Wide::of(eps)).sqrt()
}

/// `y = x * r * w` with `r = 1 / sqrt(mean(x^2) + eps)`, by row of h elements.
pub(super) fn rmsnorm<S: Storage>(y: &mut [S], x: &[S], w: &[S], eps: f64) {
    let h = w.len();
    y.par_chunks_mut(h).zip(x.par_chunks(h)).for_each(|(y, x)| {
        vectorised(|| {
            let r = inverse_rms(x, eps);
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = S::narrow(x.widen() * r * w.widen());
            }
        });
    });
}

/// With g = dy * w and n = x * r: `dx += r (g - n mean(g n))`, `dw += sum over rows of dy n`.
pub(super) fn rmsnorm_backward<S: Storage>(dx: &mut [S], dw: &mut [S::Wide], dy: &[S], x: &[S], w: &[S], eps: f64) {
    let h = w.len();
    let block = BLOCK_ROWS * h;
    let partials: Vec<Vec<S::Wide>> = dx
        .par_chunks_mut(block)
        .zip(dy.par_chunks(block))
        .zip(x.par_chunks(block))
        .map(|((dx, dy), x)| {
            let mut partial = vec![S::Wide::ZERO; h];
            for ((dx, dy), x) in dx.chunks_mut(h).zip(dy.chunks(h)).zip(x.chunks(h)) {
                vectorised(|| row_backward(dx, &mut partial, dy, x, w, eps));
            }
            partial
        })
        .collect();
    for partial in partials {
        dw.iter_mut().zip(partial).for_each(|(dw, p)| *dw += p);
    }
}

#[inline(always)]
fn row_backward<S: Storage>(dx: &mut [S], dw: &mut [S::Wide], dy: &[S], x: &[S], w: &[S], eps: f64) {
    let r = inverse_rms(x, eps);
    let mut lanes = [S::Wide::ZERO; LANES];
    for ((dy, x), w) in dy.chunks(LANES).zip(x.chunks(LANES)).zip(w.chunks(LANES)) {
        for (((lane, dy), x), w) in lanes.iter_mut().zip(dy).zip(x).zip(w) {
            *lane += dy.widen() * w.widen() * x.widen();
        }
    }
    let dot: S::Wide = lanes.into_iter().sum();
    // mean(g n) * n = x * r * r * dot / h
    let pull = dot * r * r / S::Wide::of(x.len() as f64);
    for ((((dx, dw), dy), x), w) in dx.iter_mut().zip(dw).zip(dy).zip(x).zip(w) {
        let (dy, x) = (dy.widen(), x.widen());
        *dw += dy * x * r;
        *dx = S::narrow(dx.widen() + r * (dy * w.widen() - x * pull));
    }
}
