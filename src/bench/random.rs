//! Noise: weights and tokens for a step whose result nobody needs.

use half::bf16;
use rayon::prelude::*;

use crate::engine::{
    Result,
    backend::{Backend, DType},
    comm::Comm,
    train::session::Session,
};

/// Elements uploaded at once, and those that one core draws from one seed.
const PIECE: u64 = 1 << 24;
const DRAW: usize = 1 << 16;
/// Of every weight, as of a freshly initialised Llama.
const STANDARD_DEVIATION: f32 = 0.02;

/// xorshift64* (Vigna 2016): enough for noise.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// Uniform with [`STANDARD_DEVIATION`].
    fn weight(&mut self) -> f32 {
        let unit = (self.next() % (1 << 24)) as f32 / (1 << 23) as f32 - 1.0;
        unit * STANDARD_DEVIATION * 3f32.sqrt()
    }
}

/// Norm gains 1, everything else noise that depends on the place in the layout alone.
pub(super) fn weights<B: Backend, C: Comm<B>>(session: &mut Session<B, C>) -> Result {
    let (parameters, weights) = (session.parameters().to_vec(), session.flat_weights());
    for parameter in parameters {
        for (_, place) in session.owned(&parameter, weights) {
            if parameter.shape.len() == 1 {
                session.backend.fill(place, 1.0)?;
                continue;
            }
            for first in (0..place.elements()).step_by(PIECE as usize) {
                let piece = place.part(first, PIECE.min(place.elements() - first));
                session.backend.upload(piece, &noise(piece.elements() as usize, piece.dtype, piece.offset))?;
            }
        }
    }
    // The master's low halves begin at zero: the weights are exactly what was uploaded.
    if let Some(low) = session.optimizer().low {
        session.backend.fill(low.host, 0.0)?;
        session.backend.fill(low.device, 0.0)?;
    }
    Ok(())
}

/// Bytes of `n` random weights.
fn noise(n: usize, dtype: DType, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; n * dtype.bytes() as usize];
    let draws = bytes.par_chunks_mut(DRAW * dtype.bytes() as usize).enumerate();
    draws.for_each(|(i, bytes)| {
        let mut random = Random((seed + i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        match dtype {
            DType::Bf16 => bytemuck::cast_slice_mut(bytes).fill_with(|| bf16::from_f32(random.weight())),
            DType::F64 => bytemuck::cast_slice_mut(bytes).fill_with(|| f64::from(random.weight())),
            _ => bytemuck::cast_slice_mut(bytes).fill_with(|| random.weight()),
        }
    });
    bytes
}
