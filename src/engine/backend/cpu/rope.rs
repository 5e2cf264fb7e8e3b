//! Rotary positions: the table of angles, the split of a fused projection, and its backward.

use rayon::prelude::*;

use super::element::{Storage, num::Float};
use crate::engine::backend::Heads;

/// `table [c, d]`: cos of `position * frequency` in the first half of a row, sin in the second; all of it in f64.
pub(super) fn rope_table<W: Float + Send>(table: &mut [W], positions: &[i32], frequencies: &[f64]) {
    let half = frequencies.len();
    table.par_chunks_mut(2 * half).zip(positions).for_each(|(row, position)| {
        let (cos, sin) = row.split_at_mut(half);
        for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(frequencies) {
            let (s, c) = (f64::from(*position) * frequency).sin_cos();
            (*cos, *sin) = (W::of(c), W::of(s));
        }
    });
}

/// Rotates the pairs (j, j + d/2) of every head of a row by the row's angles.
fn rotate<S: Storage>(to: &mut [S], from: impl Fn(usize) -> S::Wide, table: &[S::Wide], inverse: bool) {
    let d = table.len();
    let half = d / 2;
    let (cos, sin) = table.split_at(half);
    for (head, to) in to.chunks_mut(d).enumerate() {
        let (low, high) = to.split_at_mut(half);
        for j in 0..half {
            let (a, b) = (from(head * d + j), from(head * d + j + half));
            let s = if inverse { -sin[j] } else { sin[j] };
            low[j] = S::narrow(a * cos[j] - b * s);
            high[j] = S::narrow(b * cos[j] + a * s);
        }
    }
}

/// Widths of a row's parts: q and k (each 0 when absent); v is as wide as k.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts {
    pub q: usize,
    pub kv: usize,
}

impl Parts {
    pub(super) fn of(heads: Heads, q: bool, kv: bool) -> Self {
        let width = |present: bool, n: u64| if present { (n * heads.head_dim) as usize } else { 0 };
        Self { q: width(q, heads.n_heads), kv: width(kv, heads.n_kv_heads) }
    }

    fn row(self) -> usize {
        self.q + 2 * self.kv
    }
}

/// Rows of the fused projection to rotated q, rotated k and plain v; absent parts are empty slices.
pub(super) fn split<S: Storage>(
    (q, k, v): (&mut [S], &mut [S], &mut [S]),
    qkv: &[S],
    table: &[S::Wide],
    parts: Parts,
    d: usize,
) {
    let rows = table.len() / d;
    let row_of = |i: usize| &qkv[i * parts.row()..(i + 1) * parts.row()];
    let angles = |i: usize| &table[i * d..(i + 1) * d];
    if parts.q > 0 {
        q.par_chunks_mut(parts.q).enumerate().take(rows).for_each(|(i, q)| {
            let row = row_of(i);
            rotate(q, |j| row[j].widen(), angles(i), false);
        });
    }
    if parts.kv > 0 {
        k.par_chunks_mut(parts.kv).zip(v.par_chunks_mut(parts.kv)).enumerate().for_each(|(i, (k, v))| {
            let row = &row_of(i)[parts.q..];
            rotate(k, |j| row[j].widen(), angles(i), false);
            v.copy_from_slice(&row[parts.kv..]);
        });
    }
}

/// Gradient of the fused projection from those of its parts, rotated back.
pub(super) fn merge_backward<S: Storage>(
    dqkv: &mut [S],
    dq: &[S],
    (dk, dv): (&[S::Wide], &[S::Wide]),
    table: &[S::Wide],
    parts: Parts,
    d: usize,
) {
    dqkv.par_chunks_mut(parts.row()).enumerate().for_each(|(i, row)| {
        let angles = &table[i * d..(i + 1) * d];
        let (to_q, rest) = row.split_at_mut(parts.q);
        let (to_k, to_v) = rest.split_at_mut(parts.kv);
        let (dq, kv) = (&dq[i * parts.q..], i * parts.kv);
        rotate(to_q, |j| dq[j].widen(), angles, true);
        rotate(to_k, |j| dk[kv + j], angles, true);
        to_v.iter_mut().zip(&dv[kv..]).for_each(|(to, from)| *to = S::narrow(*from));
    });
}
