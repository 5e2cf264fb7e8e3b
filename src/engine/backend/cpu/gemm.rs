//! Matrix products of strided views: the fence around matrixmultiply's raw pointers.
#![expect(unsafe_code, reason = "matrixmultiply takes raw pointers; views are bounds-checked here first")]

use super::element::Real;

/// A read-only strided view: element (i, j) lies at `i * row_stride + j * col_stride`.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, W> {
    data: &'a [W],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, W> View<'a, W> {
    /// `rows` x `cols`, each row `row_stride` elements after the last.
    ///
    /// # Panics
    /// When the last element lies outside `data`.
    pub fn new(data: &'a [W], rows: usize, cols: usize, row_stride: usize) -> Self {
        let view = Self { data, rows, cols, row_stride, col_stride: 1 };
        if rows > 0 && cols > 0 {
            assert!((rows - 1) * row_stride + cols - 1 < data.len(), "a view of {rows} x {cols} leaves its data");
        }
        view
    }

    /// The same elements with rows and columns exchanged.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// The element types matrixmultiply has kernels for.
pub trait Gemm: Sized {
    /// `c [m, n] = alpha a [m, k] b [k, n] + beta c`; rows of c are `row_stride` apart.
    ///
    /// The sum over k runs in an order that depends on k alone, so cutting a product along m or n changes no bit.
    ///
    /// # Panics
    /// When shapes disagree or c is too short.
    fn gemm(c: &mut [Self], row_stride: usize, alpha: Self, a: View<Self>, b: View<Self>, beta: Self);
}

macro_rules! gemm {
    ($type:ty, $kernel:path) => {
        impl Gemm for $type {
            fn gemm(c: &mut [Self], row_stride: usize, alpha: Self, a: View<Self>, b: View<Self>, beta: Self) {
                let (m, k, n) = (a.rows, a.cols, b.cols);
                assert_eq!(k, b.rows, "inner dimensions of a product");
                if m == 0 || n == 0 {
                    return;
                }
                assert!(
                    (m - 1) * row_stride + n <= c.len() && row_stride >= n,
                    "the output of a product leaves its data"
                );
                // SAFETY: every view was checked to end inside its slice, c just now; c is borrowed mutably, so it
                // overlaps neither a nor b; strides are below isize::MAX because they index slices.
                unsafe {
                    $kernel(
                        m,
                        k,
                        n,
                        alpha,
                        a.data.as_ptr(),
                        a.row_stride as isize,
                        a.col_stride as isize,
                        b.data.as_ptr(),
                        b.row_stride as isize,
                        b.col_stride as isize,
                        beta,
                        c.as_mut_ptr(),
                        row_stride as isize,
                        1,
                    );
                }
            }
        }
    };
}
gemm!(f32, matrixmultiply::sgemm);
gemm!(f64, matrixmultiply::dgemm);

/// Widened copy of storage elements, for products of a storage type without kernels of its own.
pub(super) fn widened<S: super::element::Storage>(elements: &[S]) -> std::borrow::Cow<'_, [S::Wide]>
where
    S::Wide: Real,
{
    match S::as_wide(elements) {
        Some(wide) => std::borrow::Cow::Borrowed(wide),
        None => std::borrow::Cow::Owned(elements.iter().map(|e| e.widen()).collect()),
    }
}
