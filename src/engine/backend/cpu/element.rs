//! Element types: what is stored, and the wide type that sums are made in.

use bytemuck::Pod;
use half::bf16;

use crate::engine::backend::DType;

/// A type that weights and activations may be stored in.
pub trait Storage: Pod + Send + Sync + std::fmt::Debug + PartialEq {
    /// The type of sums.
    type Wide: Real;
    const DTYPE: DType;
    fn widen(self) -> Self::Wide;
    /// To nearest, ties to even.
    fn narrow(wide: Self::Wide) -> Self;
    /// The elements themselves, where storage is already wide: lets a GEMM read them in place.
    fn as_wide(elements: &[Self]) -> Option<&[Self::Wide]>;
    /// See [`Storage::as_wide`].
    fn as_wide_mut(elements: &mut [Self]) -> Option<&mut [Self::Wide]>;
}

/// A type of sums: f32 or f64.
pub trait Real: Storage<Wide = Self> + num::Float {}

/// The arithmetic that the operations need, named here so that they read alike for f32 and f64.
pub mod num {
    use std::{
        iter::Sum,
        ops::{Add, AddAssign, Div, DivAssign, Mul, MulAssign, Neg, Sub, SubAssign},
    };

    /// Arithmetic of a float.
    pub trait Float:
        Copy
        + PartialOrd
        + Add<Output = Self>
        + Sub<Output = Self>
        + Mul<Output = Self>
        + Div<Output = Self>
        + Neg<Output = Self>
        + AddAssign
        + SubAssign
        + MulAssign
        + DivAssign
        + Sum
    {
        const ZERO: Self;
        const ONE: Self;
        const NEG_INFINITY: Self;
        fn of(value: f64) -> Self;
        fn f64(self) -> f64;
        fn sqrt(self) -> Self;
        /// Accurate to a few units in the last place; written so that a loop over it vectorises.
        fn exp(self) -> Self;
        fn ln(self) -> Self;
        fn max(self, other: Self) -> Self;
    }

    impl Float for f32 {
        const ZERO: Self = 0.0;
        const ONE: Self = 1.0;
        const NEG_INFINITY: Self = f32::NEG_INFINITY;
        fn of(value: f64) -> Self {
            value as f32
        }
        fn f64(self) -> f64 {
            self.into()
        }
        fn sqrt(self) -> Self {
            self.sqrt()
        }
        #[inline(always)]
        fn exp(self) -> Self {
            exp_f32(self)
        }
        fn ln(self) -> Self {
            self.ln()
        }
        #[inline(always)]
        fn max(self, other: Self) -> Self {
            if self > other { self } else { other }
        }
    }

    impl Float for f64 {
        const ZERO: Self = 0.0;
        const ONE: Self = 1.0;
        const NEG_INFINITY: Self = f64::NEG_INFINITY;
        fn of(value: f64) -> Self {
            value
        }
        fn f64(self) -> f64 {
            self
        }
        fn sqrt(self) -> Self {
            self.sqrt()
        }
        fn exp(self) -> Self {
            self.exp()
        }
        fn ln(self) -> Self {
            self.ln()
        }
        #[inline(always)]
        fn max(self, other: Self) -> Self {
            if self > other { self } else { other }
        }
    }

    /// e^x for f32: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for e^r, and n added to the exponent bits.
    /// Below -87 it gives 0, above 88 the largest finite power; NaN stays NaN.
    #[inline(always)]
    fn exp_f32(x: f32) -> f32 {
        // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer and leaves it in the low mantissa bits.
        const ROUND: f32 = 12_582_912.0;
        // ln 2 in two parts, the first with enough trailing zeros that n times it is exact.
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        let clamped = if x < -87.0 { -87.0 } else { x };
        let clamped = if clamped > 88.0 { 88.0 } else { clamped };
        let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = clamped - n * LN2_HIGH - n * LN2_LOW;
        let p = 1.987_569_1e-4f32;
        let p = p * r + 1.398_199_9e-3;
        let p = p * r + 8.333_452e-3;
        let p = p * r + 4.166_579_6e-2;
        let p = p * r + 1.666_666_5e-1;
        let p = p * r + 0.5;
        let p = p * (r * r) + r + 1.0;
        let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
        let value = p * power;
        if x < -87.0 { 0.0 } else { value }
    }
}

impl Real for f32 {}
impl Real for f64 {}

macro_rules! wide_storage {
    ($type:ty, $dtype:expr) => {
        impl Storage for $type {
            type Wide = $type;
            const DTYPE: DType = $dtype;
            fn widen(self) -> Self {
                self
            }
            fn narrow(wide: Self) -> Self {
                wide
            }
            fn as_wide(elements: &[Self]) -> Option<&[Self]> {
                Some(elements)
            }
            fn as_wide_mut(elements: &mut [Self]) -> Option<&mut [Self]> {
                Some(elements)
            }
        }
    };
}
wide_storage!(f32, DType::F32);
wide_storage!(f64, DType::F64);

impl Storage for bf16 {
    type Wide = f32;
    const DTYPE: DType = DType::Bf16;
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn narrow(wide: f32) -> Self {
        Self::from_f32(wide)
    }
    fn as_wide(_: &[Self]) -> Option<&[f32]> {
        None
    }
    fn as_wide_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
}
