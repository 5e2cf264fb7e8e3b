//! The CUDA backend, as far as it goes: memory, the row kernels (RMSNorm, SwiGLU, cross entropy) and attention, with the
//! signatures that `trait Backend` gives them. The reference is `Cpu`; `longhaul bench ops` holds the two against each other.
//!
//! Everything of NVIDIA's is opened at run time ([`libraries`]), our own kernels are embedded ([`kernels`]), memory is one
//! arena ([`device`]). One process drives one GPU from one thread.

mod attention;
mod cudnn;
mod device;
pub mod kernels;
mod libraries;
mod operations;

use std::path::PathBuf;

pub use self::device::Device;
use self::{cudnn::Attention, kernels::Kernels};
use super::{DType, Tensor};
use crate::engine::{Error, Result};

/// One GPU, its kernels and its attention plans.
#[derive(Debug)]
pub struct Cuda {
    pub device: Device,
    kernels: Kernels,
    attention: Attention,
    /// First free byte after the arena's tensors: where operations keep partial results. See [`SCRATCH_BYTES`].
    scratch: u64,
}

/// Device memory that the operations themselves need beyond their tensors: partial sums of RMSNorm's gain gradient, losses of
/// a logits tile's rows. Constant, so that a plan can count it before the device is there.
pub const SCRATCH_BYTES: u64 = 16 << 20;

impl Cuda {
    /// Opens the libraries and a GPU, and takes `arena_bytes` of its memory for tensors. `folders` are searched for cuDNN
    /// after the library path and before Python's packages.
    pub fn open(ordinal: usize, arena_bytes: u64, folders: &[PathBuf]) -> Result<Self> {
        // What this binary lacks comes first: no driver can make up for it.
        kernels::embedded()?;
        libraries::open(folders)?;
        let scratch = arena_bytes.next_multiple_of(super::ALIGNMENT);
        let device = Device::open(ordinal, scratch + SCRATCH_BYTES)?;
        let kernels = Kernels::load(&device)?;
        let attention = Attention::new(&device)?;
        Ok(Self { device, kernels, attention, scratch })
    }

    /// Version of cuDNN as it says itself: 91900 is 9.19.0.
    pub fn cudnn_version(&self) -> usize {
        self.attention.version()
    }

    /// `[rows, cols]` f32 of the scratch, for the duration of one operation.
    fn scratch(&self, rows: u64, cols: u64) -> Tensor {
        let tensor = Tensor::device(self.scratch, DType::F32, rows, cols);
        assert!(tensor.bytes() <= SCRATCH_BYTES, "an operation's partial sums are cut to fit the scratch");
        tensor
    }
}

/// Turns a driver error into ours.
fn driver(call: &str) -> impl Fn(cudarc::driver::DriverError) -> Error + '_ {
    move |error| Error::Device { library: "CUDA driver", call: call.to_owned(), cause: error.to_string() }
}
