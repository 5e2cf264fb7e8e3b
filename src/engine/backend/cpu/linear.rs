//! `matmul`, `matmul_dx`, `matmul_dw`: products with a weight `[n, k]`, bands of output rows over the cores.

use rayon::prelude::*;

use super::{
    element::{Real, Storage, num::Float},
    gemm::{Gemm, View, widened},
};

/// Rows of a band at the least: less is not worth a core.
const BAND_ROWS: usize = 32;
/// Rows widened at once where storage is not wide: bounds the copy.
const WIDENED_ROWS: usize = 128;

fn band(rows: usize) -> usize {
    rows.div_ceil(rayon::current_num_threads()).next_multiple_of(8).max(BAND_ROWS)
}

/// `y [m, n] = x [m, k] w [n, k]^T + beta y`.
pub(super) fn matmul<S: Storage>(y: &mut [S], x: &[S], w: &[S], (m, n, k): (usize, usize, usize), beta: f64)
where
    S::Wide: Gemm,
{
    let w = widened(w);
    product(y, x, View::new(&w, n, k, k).transposed(), (m, n, k), beta);
}

/// `dx [m, k] = dy [m, n] w [n, k] + beta dx`.
pub(super) fn matmul_dx<S: Storage>(dx: &mut [S], dy: &[S], w: &[S], (m, n, k): (usize, usize, usize), beta: f64)
where
    S::Wide: Gemm,
{
    let w = widened(w);
    product(dx, dy, View::new(&w, n, k, k), (m, k, n), beta);
}

/// `c [m, n] = a [m, k] b + beta c` with a and c in storage and b already wide.
fn product<S: Storage>(c: &mut [S], a: &[S], b: View<S::Wide>, (m, n, k): (usize, usize, usize), beta: f64)
where
    S::Wide: Gemm,
{
    let (one, beta) = (S::Wide::ONE, S::Wide::of(beta));
    c.par_chunks_mut(band(m) * n).zip(a.par_chunks(band(m) * k)).for_each(|(c, a)| {
        if let (Some(c), Some(a)) = (S::as_wide_mut(c), S::as_wide(a)) {
            S::Wide::gemm(c, n, one, View::new(a, a.len() / k, k, k), b, beta);
            return;
        }
        for (c, a) in c.chunks_mut(WIDENED_ROWS * n).zip(a.chunks(WIDENED_ROWS * k)) {
            let mut sums: Vec<S::Wide> = c.iter().map(|e| e.widen()).collect();
            S::Wide::gemm(&mut sums, n, one, View::new(&widened(a), a.len() / k, k, k), b, beta);
            c.iter_mut().zip(sums).for_each(|(c, sum)| *c = S::narrow(sum));
        }
    });
}

/// `dw [n, k] += dy [m, n]^T x [m, k]`.
pub(super) fn matmul_dw<S: Storage>(dw: &mut [S::Wide], dy: &[S], x: &[S], (m, n, k): (usize, usize, usize))
where
    S::Wide: Gemm + Real,
{
    let (dy, x) = (widened(dy), widened(x));
    let rows = band(n);
    dw.par_chunks_mut(rows * k).enumerate().for_each(|(i, dw)| {
        let dy = View::new(&dy[i * rows..], m, dw.len() / k, n).transposed();
        S::Wide::gemm(dw, k, S::Wide::ONE, dy, View::new(&x, m, k, k), S::Wide::ONE);
    });
}
