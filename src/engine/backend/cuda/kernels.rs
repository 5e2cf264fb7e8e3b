//! Our own kernels: machine code embedded by the build, loaded once, launched by name.
#![expect(unsafe_code, reason = "a launch hands addresses and counts to code that the compiler cannot see")]

use std::collections::HashMap;

use cudarc::{
    driver::{CudaFunction, LaunchConfig, PushKernelArg, sys::CUfunction_attribute_enum},
    nvrtc::Ptx,
};

use super::{device::Device, driver};
use crate::engine::{Error, Result};

/// Name of a source file without its ending, and the fatbin made of it. Empty when the build found no nvcc.
const FATBINS: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Every kernel by the file that holds it. `_8` reads 16 bytes a thread and wants rows of a multiple of 8; `_1` takes any.
pub const KERNELS: &[(&str, &[&str])] = &[
    ("attention", &["attention_accumulate"]),
    ("cross_entropy", &["cross_entropy_8", "cross_entropy_1", "cross_entropy_sums"]),
    ("rmsnorm", &["rmsnorm_8", "rmsnorm_1", "rmsnorm_backward_8", "rmsnorm_backward_1", "rmsnorm_gain"]),
    ("swiglu", &["swiglu_8", "swiglu_1", "swiglu_backward_8", "swiglu_backward_1"]),
];

/// The embedded fatbins by name of their source, or what this binary lacks.
pub fn embedded() -> Result<&'static [(&'static str, &'static [u8])]> {
    if FATBINS.is_empty() {
        return Err(Error::Missing(
            "this binary was built without nvcc and holds no GPU kernels: run kernels/toolchain and build it again"
                .to_owned(),
        ));
    }
    Ok(FATBINS)
}

/// What a kernel takes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Argument {
    /// Address of a tensor that holds what the kernel's header says.
    Pointer(u64),
    Count(i64),
    Flag(i32),
    Float(f32),
}

/// The shape of a launch: blocks, threads of a block (a multiple of 32), bytes of dynamic shared memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub(super) blocks: u64,
    pub(super) threads: u32,
    pub(super) shared_bytes: u32,
}

/// Most bytes of dynamic shared memory that a block can ask for on every supported GPU.
pub(super) const MOST_SHARED_BYTES: u32 = 96 << 10;

/// Loaded functions.
#[derive(Debug)]
pub(super) struct Kernels {
    functions: HashMap<&'static str, CudaFunction>,
}

impl Kernels {
    /// Loads every kernel of [`KERNELS`].
    pub(super) fn load(device: &Device) -> Result<Self> {
        let fatbins = embedded()?;
        let mut functions = HashMap::new();
        for (file, names) in KERNELS {
            let fatbin = fatbins.iter().find(|(name, _)| name == file).map(|(_, bytes)| *bytes);
            let fatbin =
                fatbin.ok_or_else(|| Error::Missing(format!("this binary was built without kernels/{file}.cu")))?;
            let module = device.context.load_module(Ptx::from_binary(fatbin.to_vec())).map_err(driver(file))?;
            for name in *names {
                let function = module.load_function(name).map_err(driver(name))?;
                functions.insert(*name, function);
            }
        }
        let large = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        for name in ["rmsnorm_backward_8", "rmsnorm_backward_1"] {
            functions[name].set_attribute(large, MOST_SHARED_BYTES as i32).map_err(driver(name))?;
        }
        Ok(Self { functions })
    }

    /// Queues a kernel on the device's stream. A launch of no blocks is none.
    pub(super) fn launch(&self, device: &Device, name: &str, grid: Grid, arguments: &[Argument]) -> Result {
        if grid.blocks == 0 {
            return Ok(());
        }
        let blocks = u32::try_from(grid.blocks).ok().filter(|blocks| i32::try_from(*blocks).is_ok());
        let blocks = blocks.unwrap_or_else(|| panic!("{name}: {} blocks are more than a grid holds", grid.blocks));
        let mut launch = device.stream.launch_builder(&self.functions[name]);
        for argument in arguments {
            match argument {
                Argument::Pointer(address) => launch.arg(address),
                Argument::Count(count) => launch.arg(count),
                Argument::Flag(flag) => launch.arg(flag),
                Argument::Float(value) => launch.arg(value),
            };
        }
        let shape = LaunchConfig {
            grid_dim: (blocks, 1, 1),
            block_dim: (grid.threads, 1, 1),
            shared_mem_bytes: grid.shared_bytes,
        };
        // SAFETY: `operations` and `attention` pass what the kernel's header lists, addresses of tensors checked to lie in
        // the arena with the shapes that the counts say.
        unsafe { launch.launch(shape) }.map(drop).map_err(driver(name))
    }
}
