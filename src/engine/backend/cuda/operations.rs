//! The row operations of `trait Backend` on CUDA: checks of shapes, then a launch. Storage is bf16, wide is f32.

use super::{
    super::{DType, Tensor},
    Cuda, SCRATCH_BYTES,
    kernels::{
        Argument::{Count, Flag, Float, Pointer},
        Grid, MOST_SHARED_BYTES,
    },
};
use crate::engine::Result;

/// Threads of a block in rmsnorm.cu and swiglu.cu.
const ROW_THREADS: u32 = 256;
/// Threads of a block in cross_entropy.cu.
const LOGITS_THREADS: u32 = 1024;
/// Bytes that 16-byte and single accesses of cross_entropy.cu take at once.
const LOGITS_VECTORS: [u64; 2] = [16, 2];
/// Columns of a block of rmsnorm_gain.
const GAIN_COLUMNS: u64 = 32;

/// A tensor must be a dense matrix of this shape and type: everything else is a bug of the caller.
pub(super) fn expect(name: &str, tensor: Tensor, dtype: DType, rows: u64, cols: u64) {
    let found = (tensor.dtype, tensor.rows, tensor.cols);
    assert_eq!(found, (dtype, rows, cols), "{name}: element type, rows and columns");
}

/// One block a row.
pub(super) fn rows(blocks: u64, threads: u32) -> Grid {
    Grid { blocks, threads, shared_bytes: 0 }
}

/// Variant of a kernel by the length of its rows: 16-byte accesses need each row to start on a multiple of 16 bytes.
pub(super) fn wide_or_single<'a>(cols: u64, wide: &'a str, single: &'a str) -> &'a str {
    if cols.is_multiple_of(8) { wide } else { single }
}

impl Cuda {
    /// `Backend::rmsnorm`.
    pub fn rmsnorm(&mut self, y: Tensor, x: Tensor, w: Tensor, eps: f64) -> Result {
        let (n, h) = (x.rows, x.cols);
        expect("x", x, DType::Bf16, n, h);
        expect("y", y, DType::Bf16, n, h);
        expect("w", w, DType::Bf16, 1, h);
        let [y, x, w] = [y, x, w].map(|tensor| Pointer(self.device.address(tensor)));
        let kernel = wide_or_single(h, "rmsnorm_8", "rmsnorm_1");
        let arguments = [y, x, w, Count(h as i64), Float(eps as f32)];
        self.kernels.launch(&self.device, kernel, rows(n, ROW_THREADS), &arguments)
    }

    /// `Backend::rmsnorm_backward`. Rows of up to 24,576 elements: a block keeps its gain sums in shared memory.
    ///
    /// # Panics
    /// When a row is longer than that.
    pub fn rmsnorm_backward(&mut self, dx: Tensor, dw: Tensor, dy: Tensor, x: Tensor, w: Tensor, eps: f64) -> Result {
        let (n, h) = (x.rows, x.cols);
        for (name, tensor) in [("dx", dx), ("dy", dy), ("x", x)] {
            expect(name, tensor, DType::Bf16, n, h);
        }
        expect("w", w, DType::Bf16, 1, h);
        expect("dw", dw, DType::F32, 1, h);
        assert!(h * 4 <= u64::from(MOST_SHARED_BYTES), "a row of {h} elements does not fit shared memory");
        // Four blocks a multiprocessor hide each other's barriers; more only make the second stage longer.
        let blocks = n.min(4 * self.device.multiprocessors()).min(SCRATCH_BYTES / (h * 4));
        let partials = Pointer(self.device.address(self.scratch(blocks, h)));
        let [dx, dw, dy, x, w] = [dx, dw, dy, x, w].map(|tensor| Pointer(self.device.address(tensor)));
        let kernel = wide_or_single(h, "rmsnorm_backward_8", "rmsnorm_backward_1");
        let grid = Grid { blocks, threads: ROW_THREADS, shared_bytes: h as u32 * 4 };
        let arguments = [dx, partials, dy, x, w, Count(n as i64), Count(h as i64), Float(eps as f32)];
        self.kernels.launch(&self.device, kernel, grid, &arguments)?;
        let arguments = [dw, partials, Count(blocks as i64), Count(h as i64)];
        let columns = rows(h.div_ceil(GAIN_COLUMNS), ROW_THREADS);
        self.kernels.launch(&self.device, "rmsnorm_gain", columns, &arguments)
    }

    /// `Backend::swiglu`.
    pub fn swiglu(&mut self, act: Tensor, gate_up: Tensor) -> Result {
        let (n, f) = (act.rows, act.cols);
        expect("act", act, DType::Bf16, n, f);
        expect("gate_up", gate_up, DType::Bf16, n, 2 * f);
        let [act, gate_up] = [act, gate_up].map(|tensor| Pointer(self.device.address(tensor)));
        let kernel = wide_or_single(f, "swiglu_8", "swiglu_1");
        self.kernels.launch(&self.device, kernel, rows(n, ROW_THREADS), &[act, gate_up, Count(f as i64)])
    }

    /// `Backend::swiglu_backward`, in place.
    pub fn swiglu_backward(&mut self, gate_up: Tensor, dact: Tensor) -> Result {
        let (n, f) = (dact.rows, dact.cols);
        expect("dact", dact, DType::Bf16, n, f);
        expect("gate_up", gate_up, DType::Bf16, n, 2 * f);
        let [gate_up, dact] = [gate_up, dact].map(|tensor| Pointer(self.device.address(tensor)));
        let kernel = wide_or_single(f, "swiglu_backward_8", "swiglu_backward_1");
        self.kernels.launch(&self.device, kernel, rows(n, ROW_THREADS), &[gate_up, dact, Count(f as i64)])
    }

    /// `Backend::cross_entropy`.
    pub fn cross_entropy(&mut self, sums: Tensor, logits: Tensor, labels: Tensor, gradient: Option<f64>) -> Result {
        let (t, vocab) = (logits.rows, logits.cols);
        expect("logits", logits, DType::Bf16, t, vocab);
        expect("labels", labels, DType::I32, t, 1);
        expect("sums", sums, DType::F32, 1, 2);
        let losses = Pointer(self.device.address(self.scratch(t, 2)));
        let [sums, logits, labels] = [sums, logits, labels].map(|tensor| Pointer(self.device.address(tensor)));
        let kernel = wide_or_single(vocab, "cross_entropy_8", "cross_entropy_1");
        let (with_gradient, scale) = (Flag(gradient.is_some().into()), Float(gradient.unwrap_or(0.0) as f32));
        let vector = LOGITS_VECTORS[usize::from(!vocab.is_multiple_of(8))];
        let slot = 2 * vector * u64::from(LOGITS_THREADS);
        let slots = (vocab * 2).div_ceil(slot).min(self.kernels.shared_bytes(kernel) / slot);
        let blocks = t.min(self.device.multiprocessors());
        let grid = Grid { shared_bytes: (slots * slot) as u32, ..rows(blocks, LOGITS_THREADS) };
        let counts = [t, vocab].map(|count| Count(count as i64));
        let arguments = [losses, logits, labels, counts[0], counts[1], with_gradient, scale, Flag(slots as i32)];
        self.kernels.launch(&self.device, kernel, grid, &arguments)?;
        let arguments = [sums, losses, Count(t as i64)];
        self.kernels.launch(&self.device, "cross_entropy_sums", rows(1, LOGITS_THREADS), &arguments)
    }
}
