//! AdamW, on wide weights or on bf16 weights with the low halves of an exact f32 master.

use half::bf16;
use rayon::prelude::*;

use super::{
    element::{Real, Storage, num::Float},
    simd::vectorised,
};
use crate::engine::backend::AdamW;

const BLOCK: usize = 1 << 15;

/// A step's constants in the wide type.
#[derive(Debug, Clone, Copy)]
struct Constants<W> {
    beta1: W,
    beta2: W,
    one_minus_beta1: W,
    one_minus_beta2: W,
    /// Learning rate over the first bias correction.
    rate: W,
    /// One over the square root of the second bias correction.
    v_scale: W,
    epsilon: W,
    /// `1 - lr wd`.
    shrink: W,
}

impl<W: Float> Constants<W> {
    fn of(hyper: &AdamW) -> Self {
        let t = hyper.step as i32;
        Self {
            beta1: W::of(hyper.beta1),
            beta2: W::of(hyper.beta2),
            one_minus_beta1: W::of(1.0 - hyper.beta1),
            one_minus_beta2: W::of(1.0 - hyper.beta2),
            rate: W::of(hyper.learning_rate / (1.0 - hyper.beta1.powi(t))),
            v_scale: W::of(1.0 / (1.0 - hyper.beta2.powi(t)).sqrt()),
            epsilon: W::of(hyper.epsilon),
            shrink: W::of(1.0 - hyper.learning_rate * hyper.weight_decay),
        }
    }

    /// New (p, m, v).
    #[inline(always)]
    fn step(&self, p: W, m: W, v: W, g: W) -> (W, W, W) {
        let m = self.beta1 * m + self.one_minus_beta1 * g;
        let v = self.beta2 * v + self.one_minus_beta2 * g * g;
        (p * self.shrink - self.rate * m / (v.sqrt() * self.v_scale + self.epsilon), m, v)
    }
}

/// Wide weights.
pub(super) fn wide<W: Real, G: Storage<Wide = W>>(
    (w, m, v): (&mut [W], &mut [W], &mut [W]),
    g: &[G],
    scale: W,
    hyper: &AdamW,
) {
    let constants = Constants::of(hyper);
    let blocks = w.par_chunks_mut(BLOCK).zip(m.par_chunks_mut(BLOCK)).zip(v.par_chunks_mut(BLOCK));
    blocks.zip(g.par_chunks(BLOCK)).for_each(|(((w, m), v), g)| {
        vectorised(|| {
            for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(g) {
                (*w, *m, *v) = constants.step(*w, *m, *v, g.widen() * scale);
            }
        });
    });
}

/// bf16 weights whose f32 master is split: the weight is the master rounded to nearest, `low` its low 16 bits.
pub(super) fn split<G: Storage<Wide = f32>>(
    (w, low): (&mut [bf16], &mut [u16]),
    (m, v): (&mut [f32], &mut [f32]),
    g: &[G],
    scale: f32,
    hyper: &AdamW,
) {
    let constants = Constants::of(hyper);
    let weights = w.par_chunks_mut(BLOCK).zip(low.par_chunks_mut(BLOCK));
    let moments = m.par_chunks_mut(BLOCK).zip(v.par_chunks_mut(BLOCK));
    weights.zip(moments).zip(g.par_chunks(BLOCK)).for_each(|(((w, low), (m, v)), g)| {
        vectorised(|| {
            for ((((w, low), m), v), g) in w.iter_mut().zip(low).zip(m).zip(v).zip(g) {
                let p;
                (p, *m, *v) = constants.step(master(*w, *low), *m, *v, g.widen() * scale);
                (*w, *low) = parts(p);
            }
        });
    });
}

/// The f32 master of a weight and its low half.
pub fn master(w: bf16, low: u16) -> f32 {
    let high = w.to_bits().wrapping_sub(low >> 15);
    f32::from_bits(u32::from(high) << 16 | u32::from(low))
}

/// A master as a weight rounded to nearest, and its low half.
pub fn parts(master: f32) -> (bf16, u16) {
    let bits = master.to_bits();
    (bf16::from_bits((bits.wrapping_add(0x8000) >> 16) as u16), bits as u16)
}
