//! Matrix products through cuBLASLt: bf16 operands, sums in f32, one algorithm per shape kept for the process.
//!
//! The library counts columns first, so a row-major `[r, c]` is its `c x r`. Every product is written as its transpose:
//!
//!   forward   `y^T [n, m] = w x^T`      w and x as stored
//!   dx        `dx^T [k, m] = w^T dy^T`
//!   dw        `dw^T [k, n] += x^T dy`   in f32
#![expect(unsafe_code, reason = "the library takes attributes and operands as untyped memory")]

use std::{collections::HashMap, ffi::c_void, mem::size_of, ptr};

use cudarc::cublaslt::{
    result::{self, CublasError},
    sys::{
        self, cublasComputeType_t as Compute, cublasLtMatmulDescAttributes_t as Operand,
        cublasLtMatmulHeuristicResult_t as Heuristic, cublasLtMatmulPreferenceAttributes_t as Preference,
        cudaDataType_t as Type,
    },
};

use super::device::Device;
use crate::engine::{Error, Result};

/// Most bytes of workspace that an algorithm may ask for: what NVIDIA recommends for Hopper.
pub(super) const WORKSPACE_BYTES: u64 = 32 << 20;

/// Values of cublasOperation_t, which the bindings of this library leave out.
const AS_STORED: i32 = 0;
const TRANSPOSED: i32 = 1;

/// Which of the three products of a linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// `y [m, n] = x [m, k] w [n, k]^T + beta y`
    Forward,
    /// `dx [m, k] = dy [m, n] w [n, k] + beta dx`
    Dx,
    /// `dw [n, k] += dy [m, n]^T x [m, k]`, dw in f32
    Dw,
}

/// A product by its sizes and by the alignment of its operands, which decides what algorithms may load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    kind: Kind,
    m: u64,
    n: u64,
    k: u64,
    alignment: [u32; 3],
}

/// One operand of the library: rows and columns as it counts them, and whether it is read transposed.
#[derive(Debug, Clone, Copy)]
struct Matrix {
    rows: u64,
    cols: u64,
    transposed: bool,
}

impl Shape {
    /// The library's a, b and c, and the element type of c.
    fn operands(&self) -> ([Matrix; 3], Type) {
        let Self { kind, m, n, k, .. } = *self;
        let matrix = |rows, cols, transposed| Matrix { rows, cols, transposed };
        let (bf16, f32) = (Type::CUDA_R_16BF, Type::CUDA_R_32F);
        match kind {
            Kind::Forward => ([matrix(k, n, true), matrix(k, m, false), matrix(n, m, false)], bf16),
            Kind::Dx => ([matrix(k, n, false), matrix(n, m, false), matrix(k, m, false)], bf16),
            Kind::Dw => ([matrix(k, m, false), matrix(n, m, true), matrix(k, n, false)], f32),
        }
    }
}

/// Descriptors of a shape and the algorithm chosen for it.
#[derive(Debug)]
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    choice: Heuristic,
}

/// The library and the plans made so far.
#[derive(Debug)]
pub(super) struct Gemm {
    handle: sys::cublasLtHandle_t,
    plans: HashMap<Shape, Plan>,
}

fn lt(call: &'static str) -> impl Fn(CublasError) -> Error {
    move |error| Error::Device { library: "cuBLASLt", call: call.to_owned(), cause: error.to_string() }
}

impl Gemm {
    /// Opens the library in the current context.
    pub(super) fn new() -> Result<Self> {
        Ok(Self { handle: result::create_handle().map_err(lt("create"))?, plans: HashMap::new() })
    }

    /// Queues a product on the compute stream. `a` and `b` are the operands in the order of [`Kind`]'s formulas (x and w,
    /// dy and w, dy and x), `c` the result, `workspace` the address of [`WORKSPACE_BYTES`].
    pub(super) fn run(
        &mut self,
        device: &Device,
        (kind, m, n, k): (Kind, u64, u64, u64),
        (a, b, c): (u64, u64, u64),
        beta: f32,
        workspace: u64,
    ) -> Result {
        if m == 0 {
            return Ok(());
        }
        // In each transposed product the second operand of the formula comes first.
        let (left, right) = (b, a);
        let alignment = [left, right, c].map(|address| 1 << address.trailing_zeros().min(8));
        let shape = Shape { kind, m, n, k, alignment };
        if !self.plans.contains_key(&shape) {
            let plan = Plan::new(self.handle, shape)?;
            self.plans.insert(shape, plan);
        }
        let Plan { product, layouts: [la, lb, lc], choice } = &self.plans[&shape];
        let pointer = |address: u64| ptr::without_provenance_mut::<c_void>(address as usize);
        let one = 1f32;
        // SAFETY: descriptors live as long as the plan; the caller's operands have the sizes of the shape, checked by
        // `operations`; alpha and beta are read during the call.
        let queued = unsafe {
            result::matmul(
                self.handle,
                *product,
                ptr::from_ref(&one).cast(),
                ptr::from_ref(&beta).cast(),
                pointer(left),
                *la,
                pointer(right),
                *lb,
                pointer(c),
                *lc,
                pointer(c),
                *lc,
                &raw const choice.algo,
                pointer(workspace),
                WORKSPACE_BYTES as usize,
                device.compute_stream().cast(),
            )
        };
        queued.map_err(lt("matmul"))
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: made in `new`, destroyed only here. A failure leaves nothing to do.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Plan {
    /// The library's first choice for a shape.
    fn new(handle: sys::cublasLtHandle_t, shape: Shape) -> Result<Self> {
        let (operands, result_type) = shape.operands();
        let product = result::create_matmul_desc(Compute::CUBLAS_COMPUTE_32F, Type::CUDA_R_32F);
        let product = product.map_err(lt("describe a product"))?;
        let transposed = |matrix: Matrix| {
            if matrix.transposed { TRANSPOSED } else { AS_STORED }
        };
        let orientations = [
            (Operand::CUBLASLT_MATMUL_DESC_TRANSA, transposed(operands[0])),
            (Operand::CUBLASLT_MATMUL_DESC_TRANSB, transposed(operands[1])),
        ];
        for (attribute, orientation) in orientations {
            let (start, bytes) = (ptr::from_ref(&orientation).cast(), size_of::<i32>());
            // SAFETY: the descriptor is live; the attribute is an int32.
            unsafe { result::set_matmul_desc_attribute(product, attribute, start, bytes) }.map_err(lt("orient"))?;
        }
        let types = [Type::CUDA_R_16BF, Type::CUDA_R_16BF, result_type];
        let mut layouts = [ptr::null_mut(); 3];
        for ((layout, matrix), element) in layouts.iter_mut().zip(operands).zip(types) {
            let made = result::create_matrix_layout(element, matrix.rows, matrix.cols, matrix.rows as i64);
            *layout = made.map_err(lt("describe an operand"))?;
        }
        let choice = choose(handle, product, layouts, shape.alignment)?;
        Ok(Self { product, layouts, choice })
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        for layout in self.layouts {
            // SAFETY: made in `new`, destroyed only here.
            let _ = unsafe { result::destroy_matrix_layout(layout) };
        }
        // SAFETY: as above.
        let _ = unsafe { result::destroy_matmul_desc(self.product) };
    }
}

/// Asks the library's heuristic for one algorithm within the workspace and the alignment.
fn choose(
    handle: sys::cublasLtHandle_t,
    product: sys::cublasLtMatmulDesc_t,
    [a, b, c]: [sys::cublasLtMatrixLayout_t; 3],
    alignment: [u32; 3],
) -> Result<Heuristic> {
    let preference = result::create_matmul_pref().map_err(lt("create a preference"))?;
    let set = |attribute, start: *const c_void, bytes| {
        // SAFETY: the preference is live and `start` holds `bytes` bytes of the attribute's type.
        unsafe { result::set_matmul_pref_attribute(preference, attribute, start, bytes) }.map_err(lt("prefer"))
    };
    let workspace = WORKSPACE_BYTES;
    let bounds = [
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment[0]),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment[1]),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment[2]),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment[2]),
    ];
    let mut found =
        set(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, ptr::from_ref(&workspace).cast(), size_of::<u64>());
    for (attribute, bytes) in &bounds {
        found = found.and_then(|()| set(*attribute, ptr::from_ref(bytes).cast(), size_of::<u32>()));
    }
    let choice = found.and_then(|()| {
        // SAFETY: every object is live.
        unsafe { result::get_matmul_algo_heuristic(handle, product, a, b, c, c, preference) }
            .map_err(lt("choose an algorithm"))
    });
    // SAFETY: made above, destroyed only here.
    let _ = unsafe { result::destroy_matmul_pref(preference) };
    choice
}
