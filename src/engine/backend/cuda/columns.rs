//! Blocks of columns on CUDA, from one matrix into another.

use super::{
    super::{DType, Tensor},
    Cuda,
    kernels::Argument::{self, Count, Pointer},
};
use crate::engine::Result;

/// Threads of a block in columns.cu, and units that one moves.
const THREADS: u32 = 256;
const UNITS_OF_A_THREAD: u64 = 4;
/// Bytes of the wide unit.
const VECTOR: u64 = 16;

impl Cuda {
    /// `Backend::copy_columns`.
    pub fn copy_columns(&mut self, to: (Tensor, u64), from: (Tensor, u64), columns: u64) -> Result {
        self.columns(to, from, columns, ("copy_columns_16", "copy_columns_2", 2))
    }

    /// `Backend::add_columns`.
    pub fn add_columns(&mut self, to: (Tensor, u64), from: (Tensor, u64), columns: u64) -> Result {
        assert_eq!(to.0.dtype, DType::F32, "columns are added in f32");
        self.columns(to, from, columns, ("add_columns_4", "add_columns_1", 4))
    }

    /// Launches the variant whose unit divides every address and stride: the first moves 16 bytes at once, the second `small`.
    fn columns(
        &mut self,
        (to, to_column): (Tensor, u64),
        (from, from_column): (Tensor, u64),
        columns: u64,
        (wide, single, small): (&str, &str, u64),
    ) -> Result {
        assert_eq!((to.dtype, to.rows), (from.dtype, from.rows), "columns of matrices of one type and height");
        assert!(to_column + columns <= to.cols && from_column + columns <= from.cols, "columns lie in their matrices");
        if to.rows * columns == 0 {
            return Ok(());
        }
        let size = to.dtype.bytes();
        let to_address = self.device.address(to) + to_column * size;
        let from_address = self.device.address(from) + from_column * size;
        let bytes = [to_address, from_address, to.cols * size, from.cols * size, columns * size];
        let (kernel, unit) =
            if bytes.iter().all(|b| b.is_multiple_of(VECTOR)) { (wide, VECTOR) } else { (single, small) };
        let units = |elements: u64| elements * size / unit;
        let arguments = [
            Pointer(to_address),
            Pointer(from_address),
            Count(units(to.cols) as i64),
            Count(units(from.cols) as i64),
            Argument::small(units(columns)),
            Argument::small(units(to.rows * columns)),
        ];
        let grid = self.flat(to.rows * columns * size / unit, THREADS, UNITS_OF_A_THREAD);
        self.kernels.launch(&self.device, kernel, grid, &arguments)
    }
}
