//! Fills, casts, sums, squares and the clipping factor of `trait Backend` on CUDA, over flat arrays.

use half::bf16;

use super::{
    super::{DType, Tensor},
    Cuda,
    kernels::{
        Argument::{Count, Double, Flag, Pointer},
        Grid,
    },
    operations::{expect, rows},
};
use crate::engine::Result;

/// Threads of a block in elementwise.cu, and elements that one takes before its block goes on to the next tile.
const THREADS: u32 = 256;
const ELEMENTS_OF_A_THREAD: u64 = 16;
/// Most blocks for each multiprocessor: a few times what it holds, so that none waits long for the last to finish.
const BLOCKS_OF_A_MULTIPROCESSOR: u64 = 32;
/// Blocks of sum_squares and threads of sum_squares_total. Constant, so that no card sums in another order.
const SUM_BLOCKS: u32 = 512;
/// Threads of clip_scale, of which one works.
const ONE_WARP: u32 = 32;
/// Elements of a vector of flat.cuh.
const VECTOR: u64 = 4;

/// 1 for f32, 0 for bf16.
///
/// # Panics
/// For any other type.
pub(super) fn is_wide(tensor: Tensor) -> bool {
    assert!(matches!(tensor.dtype, DType::F32 | DType::Bf16), "{tensor:?} is neither storage nor wide");
    tensor.dtype == DType::F32
}

impl Cuda {
    /// Blocks that walk over `n` elements of flat arrays, `of_a_thread` a turn of each thread.
    pub(super) fn flat(&self, n: u64, threads: u32, of_a_thread: u64) -> Grid {
        let most = BLOCKS_OF_A_MULTIPROCESSOR * self.device.multiprocessors();
        rows(n.div_ceil(u64::from(threads) * of_a_thread).min(most), threads)
    }

    /// Variant of a flat kernel: vectors of 4 elements need every array to start on a multiple of 4 of its elements. Slices
    /// of a flat layout may start anywhere.
    pub(super) fn by_fours<'a>(&self, tensors: &[Tensor], vectors: &'a str, single: &'a str) -> &'a str {
        let fits = |tensor: &Tensor| self.device.address(*tensor).is_multiple_of(VECTOR * tensor.dtype.bytes());
        if tensors.iter().all(fits) { vectors } else { single }
    }

    /// `Backend::fill`.
    ///
    /// # Panics
    /// For f64, which this backend has no use for.
    pub fn fill(&mut self, x: Tensor, value: f64) -> Result {
        let (kernel, bits) = match x.dtype {
            DType::F32 => ("fill_words", (value as f32).to_bits() as i32),
            DType::I32 => ("fill_words", value as i32),
            DType::Bf16 => ("fill_halves", bf16::from_f64(value).to_bits().into()),
            DType::U16 => ("fill_halves", (value as u16).into()),
            DType::F64 => panic!("no tensor of this backend is f64: {x:?}"),
        };
        if bits == 0 {
            return if x.elements() == 0 { Ok(()) } else { self.device.fill_bytes(x, 0) };
        }
        let arguments = [Pointer(self.device.address(x)), Count(x.elements() as i64), Flag(bits)];
        let grid = self.flat(x.elements(), THREADS, ELEMENTS_OF_A_THREAD);
        self.kernels.launch(&self.device, kernel, grid, &arguments)
    }

    /// `Backend::cast`.
    pub fn cast(&mut self, to: Tensor, from: Tensor) -> Result {
        let n = from.elements();
        assert_eq!(to.elements(), n, "elements of a cast");
        assert_ne!(is_wide(to), is_wide(from), "a cast goes between storage and wide: {to:?} = {from:?}");
        let kernel = self.by_fours(&[to, from], "cast_4", "cast_1");
        let [to_address, from_address] = [to, from].map(|tensor| Pointer(self.device.address(tensor)));
        let arguments = [to_address, from_address, Count(n as i64), Flag(is_wide(to).into())];
        self.kernels.launch(&self.device, kernel, self.flat(n, THREADS, ELEMENTS_OF_A_THREAD), &arguments)
    }

    /// `Backend::accumulate`.
    pub fn accumulate(&mut self, to: Tensor, from: Tensor) -> Result {
        let n = from.elements();
        assert_eq!(to.elements(), n, "elements of a sum");
        let kernel = self.by_fours(&[to, from], "accumulate_4", "accumulate_1");
        let wide = [to, from].map(|tensor| Flag(is_wide(tensor).into()));
        let [to, from] = [to, from].map(|tensor| Pointer(self.device.address(tensor)));
        let arguments = [to, from, Count(n as i64), wide[0], wide[1]];
        self.kernels.launch(&self.device, kernel, self.flat(n, THREADS, ELEMENTS_OF_A_THREAD), &arguments)
    }

    /// `Backend::sum_squares`.
    pub fn sum_squares(&mut self, sum: Tensor, x: Tensor) -> Result {
        expect("sum", sum, DType::F32, 1, 1);
        // f64 each.
        let partials = Pointer(self.device.address(self.scratch(u64::from(SUM_BLOCKS), 2)));
        let kernel = self.by_fours(&[x], "sum_squares_4", "sum_squares_1");
        let arguments =
            [partials, Pointer(self.device.address(x)), Count(x.elements() as i64), Flag(is_wide(x).into())];
        self.kernels.launch(&self.device, kernel, rows(SUM_BLOCKS.into(), THREADS), &arguments)?;
        let arguments = [Pointer(self.device.address(sum)), partials];
        self.kernels.launch(&self.device, "sum_squares_total", rows(1, SUM_BLOCKS), &arguments)
    }

    /// `Backend::clip_scale`.
    pub fn clip_scale(&mut self, scale: Tensor, sum: Tensor, max_norm: f64) -> Result {
        expect("scale", scale, DType::F32, 1, 1);
        expect("sum", sum, DType::F32, 1, 1);
        let [scale, sum] = [scale, sum].map(|tensor| Pointer(self.device.address(tensor)));
        self.kernels.launch(&self.device, "clip_scale", rows(1, ONE_WARP), &[scale, sum, Double(max_norm)])
    }
}
