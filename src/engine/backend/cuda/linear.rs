//! The matrix products of `trait Backend` on CUDA: checks of shapes, then cuBLASLt. Storage is bf16, gradients of weights f32.

use super::{
    super::{DType, Tensor},
    Cuda,
    gemm::Kind,
};
use crate::engine::Result;

impl Cuda {
    /// `Backend::matmul`.
    pub fn matmul(&mut self, y: Tensor, x: Tensor, w: Tensor, beta: f64) -> Result {
        assert!((y.rows, y.cols, x.cols) == (x.rows, w.rows, w.cols), "matmul {y:?} = {x:?} {w:?}^T");
        self.product((Kind::Forward, x.rows, w.rows, w.cols), (x, w, y), beta)
    }

    /// `Backend::matmul_dx`.
    pub fn matmul_dx(&mut self, dx: Tensor, dy: Tensor, w: Tensor, beta: f64) -> Result {
        assert!((dx.rows, dx.cols, dy.cols) == (dy.rows, w.cols, w.rows), "matmul_dx {dx:?} = {dy:?} {w:?}");
        self.product((Kind::Dx, dy.rows, w.rows, w.cols), (dy, w, dx), beta)
    }

    /// `Backend::matmul_dw`.
    pub fn matmul_dw(&mut self, dw: Tensor, dy: Tensor, x: Tensor) -> Result {
        assert!((dy.cols, x.rows, x.cols) == (dw.rows, dy.rows, dw.cols), "matmul_dw {dw:?} += {dy:?}^T {x:?}");
        self.product((Kind::Dw, dy.rows, dw.rows, dw.cols), (dy, x, dw), 1.0)
    }

    fn product(&mut self, sizes: (Kind, u64, u64, u64), (a, b, c): (Tensor, Tensor, Tensor), beta: f64) -> Result {
        let result = if sizes.0 == Kind::Dw { DType::F32 } else { DType::Bf16 };
        assert_eq!((a.dtype, b.dtype, c.dtype), (DType::Bf16, DType::Bf16, result), "element types of a product");
        let [a, b, c] = [a, b, c].map(|tensor| self.device.address(tensor));
        self.gemm.run(&self.device, sizes, (a, b, c), beta as f32, self.scratch)
    }
}
