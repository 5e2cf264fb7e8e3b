//! The GPUs that the driver shows to this process.

use std::path::PathBuf;

use cudarc::driver::CudaContext;

use super::{Error, Result, backend::cuda::Cuda};

/// A GPU that can train, as it was a moment ago.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    pub name: String,
    pub free_bytes: u64,
    pub total_bytes: u64,
}

impl Gpu {
    /// What an open GPU says of itself.
    pub fn of(cuda: &Cuda) -> Result<Self> {
        let (free_bytes, total_bytes) = cuda.device.memory_bytes()?;
        Ok(Self { name: cuda.device.name()?, free_bytes, total_bytes })
    }
}

/// Every GPU in the driver's order, each opened as a trainer would open it; `folders` as for [`Cuda::open`]. A place in the
/// order is what [`Cuda::open`] takes, so the search ends at the first GPU that cannot be opened. The first error is why
/// there are no more: always for a host without any, never for one whose GPUs all work.
pub fn found(folders: &[PathBuf]) -> (Vec<Gpu>, Option<Error>) {
    let mut gpus = Vec::new();
    loop {
        match Cuda::open(gpus.len(), folders).and_then(|cuda| Gpu::of(&cuda)) {
            Ok(gpu) => gpus.push(gpu),
            Err(error) => return (gpus, Some(error)),
        }
        // Only now: with an open GPU the driver is there to be asked.
        match CudaContext::device_count() {
            Ok(count) if gpus.len() < count as usize => {}
            Ok(_) => return (gpus, None),
            Err(error) => {
                let error =
                    Error::Device { library: "CUDA driver", call: "count GPUs".into(), cause: error.to_string() };
                return (gpus, Some(error));
            }
        }
    }
}
