//! AdamW, on wide weights or on bf16 weights with the low halves of an exact f32 master; moments wide or bf16.

use bytemuck::Pod;
use half::bf16;
use rayon::prelude::*;

use super::{
    element::{Real, Storage, num::Float},
    simd::vectorised,
    typed,
};
use crate::engine::backend::{AdamW, DType, OptimizerState, Tensor};

const BLOCK: usize = 1 << 15;

/// A step's constants in the wide type. The formulas are part of the definition: another backend takes these numbers.
#[derive(Debug, Clone, Copy)]
pub struct Constants<W> {
    pub beta1: W,
    pub beta2: W,
    pub one_minus_beta1: W,
    pub one_minus_beta2: W,
    /// Learning rate over the first bias correction.
    pub rate: W,
    /// One over the square root of the second bias correction.
    pub v_scale: W,
    pub epsilon: W,
    /// `1 - lr wd`.
    pub shrink: W,
}

impl<W: Float> Constants<W> {
    pub fn of(hyper: &AdamW) -> Self {
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

/// Number `index` of the SplitMix64 sequence (Steele, Lea & Flood 2014) that starts at `key`.
#[inline(always)]
fn draw(key: u64, index: u64) -> u64 {
    let z = key.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Start of a step's sequence: element i of a tensor draws number `first_index + i` of it, wherever the tensor is cut.
pub fn key(hyper: &AdamW) -> u64 {
    draw(draw(0, hyper.seed), hyper.step)
}

/// A type that moments are stored in, beside sums in `W`.
trait Moment<W>: Pod + Send + Sync {
    fn widen(self) -> W;
    /// bf16: stochastically by 16 random bits, so that what is lost to rounding is zero in the mean. Wide: as it is.
    fn round(value: W, random: u16) -> Self;
}

impl<W: Real> Moment<W> for W {
    #[inline(always)]
    fn widen(self) -> W {
        self
    }

    #[inline(always)]
    fn round(value: W, _: u16) -> Self {
        value
    }
}

impl<W: Real> Moment<W> for bf16 {
    #[inline(always)]
    fn widen(self) -> W {
        W::of(f32::from(self).into())
    }

    #[inline(always)]
    fn round(value: W, random: u16) -> Self {
        let value = value.f64() as f32;
        let bits = value.to_bits();
        // Infinity stays, a NaN stays one: neither may carry into the sign.
        if !value.is_finite() {
            let quiet = if value.is_nan() { 0x40 } else { 0 };
            return Self::from_bits((bits >> 16) as u16 | quiet);
        }
        Self::from_bits((bits.wrapping_add(random.into()) >> 16) as u16)
    }
}

/// What an update does to every element.
#[derive(Debug, Clone, Copy)]
struct Update<W> {
    constants: Constants<W>,
    scale: W,
    key: u64,
    first_index: u64,
}

impl<W: Real> Update<W> {
    /// Updates the moments of element `i` of the tensor; its new parameter.
    #[inline(always)]
    fn element<M: Moment<W>, G: Storage<Wide = W>>(&self, i: usize, p: W, m: &mut M, v: &mut M, g: G) -> W {
        let (p, mean, square) = self.constants.step(p, m.widen(), v.widen(), g.widen() * self.scale);
        let random = draw(self.key, self.first_index.wrapping_add(i as u64));
        (*m, *v) = (M::round(mean, random as u16), M::round(square, (random >> 16) as u16));
        p
    }
}

/// `Backend::adamw` on the bytes of (w, low, m, v, g, scale); low is empty where the weights are wide.
pub(super) fn adamw<S: Storage>(bytes: [&mut [u8]; 6], state: &OptimizerState, g: Tensor, hyper: &AdamW) {
    assert_eq!(state.m.dtype, state.v.dtype, "both moments are stored alike");
    match (state.m.dtype == DType::Bf16, g.dtype == S::DTYPE) {
        (true, true) => update::<S::Wide, bf16, S>(bytes, state, g, hyper),
        (true, false) => update::<S::Wide, bf16, S::Wide>(bytes, state, g, hyper),
        (false, true) => update::<S::Wide, S::Wide, S>(bytes, state, g, hyper),
        (false, false) => update::<S::Wide, S::Wide, S::Wide>(bytes, state, g, hyper),
    }
}

fn update<W: Real, M: Moment<W> + Storage, G: Storage<Wide = W>>(
    [w, low, m, v, g_bytes, scale]: [&mut [u8]; 6],
    state: &OptimizerState,
    g: Tensor,
    hyper: &AdamW,
) {
    let scale = bytemuck::cast_slice::<u8, W>(scale)[0];
    let update = Update { constants: Constants::of(hyper), scale, key: key(hyper), first_index: hyper.first_index };
    let moments = (typed::<M>(m, state.m), typed::<M>(v, state.v));
    let g = &*typed::<G>(g_bytes, g);
    if state.low.is_some() {
        split((typed(w, state.w), bytemuck::cast_slice_mut(low)), moments, g, &update);
    } else {
        wide(typed(w, state.w), moments, g, &update);
    }
}

/// Wide weights.
fn wide<W: Real, M: Moment<W>, G: Storage<Wide = W>>(
    w: &mut [W],
    (m, v): (&mut [M], &mut [M]),
    g: &[G],
    update: &Update<W>,
) {
    let blocks = w.par_chunks_mut(BLOCK).zip(m.par_chunks_mut(BLOCK)).zip(v.par_chunks_mut(BLOCK));
    blocks.zip(g.par_chunks(BLOCK)).enumerate().for_each(|(block, (((w, m), v), g))| {
        vectorised(|| {
            for (i, (((w, m), v), g)) in w.iter_mut().zip(m).zip(v).zip(g).enumerate() {
                *w = update.element(block * BLOCK + i, *w, m, v, *g);
            }
        });
    });
}

/// bf16 weights whose f32 master is split: the weight is the master rounded to nearest, `low` its low 16 bits.
fn split<W: Real, M: Moment<W>, G: Storage<Wide = W>>(
    (w, low): (&mut [bf16], &mut [u16]),
    (m, v): (&mut [M], &mut [M]),
    g: &[G],
    update: &Update<W>,
) {
    let weights = w.par_chunks_mut(BLOCK).zip(low.par_chunks_mut(BLOCK));
    let moments = m.par_chunks_mut(BLOCK).zip(v.par_chunks_mut(BLOCK));
    weights.zip(moments).zip(g.par_chunks(BLOCK)).enumerate().for_each(|(block, (((w, low), (m, v)), g))| {
        vectorised(|| {
            for (i, ((((w, low), m), v), g)) in w.iter_mut().zip(low).zip(m).zip(v).zip(g).enumerate() {
                // The wide type of bf16 weights is f32, so nothing is lost on the way through f64.
                let p = update.element(block * BLOCK + i, W::of(master(*w, *low).into()), m, v, *g);
                (*w, *low) = parts(p.f64() as f32);
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
