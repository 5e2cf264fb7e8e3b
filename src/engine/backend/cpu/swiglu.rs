//! `act = silu(gate) * up` and its backward in place.

use rayon::prelude::*;

use super::{
    element::{Storage, num::Float},
    simd::vectorised,
};

#[inline(always)]
fn sigmoid<W: Float>(x: W) -> W {
    W::ONE / (W::ONE + (-x).exp())
}

/// Rows of `gate_up` hold f gates, then f ups.
pub(super) fn swiglu<S: Storage>(act: &mut [S], gate_up: &[S], f: usize) {
    act.par_chunks_mut(f).zip(gate_up.par_chunks(2 * f)).for_each(|(act, row)| {
        vectorised(|| {
            let (gate, up) = row.split_at(f);
            for ((act, gate), up) in act.iter_mut().zip(gate).zip(up) {
                let g = gate.widen();
                *act = S::narrow(g * sigmoid(g) * up.widen());
            }
        });
    });
}

/// `dgate = dact up (s + g s (1 - s))`, `dup = dact g s`, with s the sigmoid of g.
pub(super) fn swiglu_backward<S: Storage>(gate_up: &mut [S], dact: &[S], f: usize) {
    gate_up.par_chunks_mut(2 * f).zip(dact.par_chunks(f)).for_each(|(row, dact)| {
        vectorised(|| {
            let (gate, up) = row.split_at_mut(f);
            for ((gate, up), dact) in gate.iter_mut().zip(up).zip(dact) {
                let (g, u, d) = (gate.widen(), up.widen(), dact.widen());
                let s = sigmoid(g);
                *gate = S::narrow(d * u * (s + g * s * (S::Wide::ONE - s)));
                *up = S::narrow(d * g * s);
            }
        });
    });
}
