//! Our own kernels: machine code embedded by the build, loaded once, launched by name.
#![expect(unsafe_code, reason = "a launch hands addresses and counts to code that the compiler cannot see")]

use std::collections::HashMap;

use cudarc::{
    driver::{
        CudaFunction, LaunchConfig, PushKernelArg,
        sys::{CUdevice_attribute, CUfunction_attribute_enum},
    },
    nvrtc::Ptx,
};

use super::{device::Device, driver};
use crate::engine::{Error, Result};

/// Name of a source file without its ending, and the fatbin made of it. Empty when the build found no nvcc.
const FATBINS: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Every kernel by the file that holds it. `_8` reads 16 bytes a thread and wants rows of a multiple of 8, `_4` reads 4
/// elements of a flat array and wants its address to be a multiple of theirs; `_1` takes any.
pub const KERNELS: &[(&str, &[&str])] = &[
    ("adamw", &["adamw_split_4", "adamw_split_1", "adamw_wide_4", "adamw_wide_1"]),
    (
        "attention",
        &[
            "attention_accumulate",
            "attention_stage",
            "attention_add_staged",
            "attention_stage_statistics",
            "attention_merge",
            "attention_merge_statistics",
        ],
    ),
    ("columns", &["copy_columns_16", "copy_columns_2", "add_columns_4", "add_columns_1"]),
    ("cross_entropy", &["cross_entropy_8", "cross_entropy_1", "cross_entropy_sums"]),
    (
        "elementwise",
        &[
            "fill_words",
            "fill_halves",
            "cast_4",
            "cast_1",
            "accumulate_4",
            "accumulate_1",
            "sum_squares_4",
            "sum_squares_1",
            "sum_squares_total",
            "clip_scale",
        ],
    ),
    (
        "embedding",
        &[
            "embedding_8",
            "embedding_1",
            "embedding_pairs",
            "embedding_count",
            "embedding_scan",
            "embedding_place",
            "embedding_backward_2",
            "embedding_backward_1",
        ],
    ),
    ("rmsnorm", &["rmsnorm_8", "rmsnorm_1", "rmsnorm_backward_8", "rmsnorm_backward_1", "rmsnorm_gain"]),
    ("rope", &["rope_table", "rope_split_8", "rope_split_1", "rope_merge_backward_8", "rope_merge_backward_1"]),
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
pub(super) enum Argument<'a> {
    /// Address of a tensor that holds what the kernel's header says.
    Pointer(u64),
    Count(i64),
    Small(u32),
    Flag(i32),
    Float(f32),
    Double(f64),
    /// `struct Frequencies` of rope.cu, which travels among the arguments.
    Frequencies(&'a [f64; MOST_FREQUENCIES]),
    /// `struct Entries` of attention.cu, which does too.
    StagedRows(&'a StagedRows),
}

/// Of each entry of a staged tensor: the row of the other tensor where its row 0 would lie, and from which of its rows on,
/// and before which, there are rows.
pub(crate) type StagedRows = [[i32; 3]; MOST_STAGED];

/// Most entries of a staged tensor.
pub(crate) const MOST_STAGED: usize = 64;

/// Most frequencies that rope_table takes.
pub(super) const MOST_FREQUENCIES: usize = 128;

impl Argument<'_> {
    /// A count that the kernel takes in 32 bits.
    ///
    /// # Panics
    /// When it is more: operations are on chunks, which hold fewer elements.
    pub(super) fn small(count: u64) -> Self {
        Self::Small(u32::try_from(count).unwrap_or_else(|_| panic!("{count} is more than one launch takes")))
    }
}

/// The shape of a launch: blocks, threads of a block (a multiple of 32), bytes of dynamic shared memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub(super) blocks: u64,
    pub(super) threads: u32,
    pub(super) shared_bytes: u32,
}

/// Bytes of dynamic shared memory that a block can ask for on every supported GPU.
pub(super) const MOST_SHARED_BYTES: u32 = 96 << 10;

/// The kernels that ask for more than the usual 48 KiB.
const LARGE: [&str; 4] = ["rmsnorm_backward_8", "rmsnorm_backward_1", "cross_entropy_8", "cross_entropy_1"];

/// Loaded functions.
#[derive(Debug)]
pub(super) struct Kernels {
    functions: HashMap<&'static str, CudaFunction>,
    shared_bytes: HashMap<&'static str, u64>,
}

/// Lets a kernel have all the shared memory that the GPU has for a block; what is left for the dynamic part.
fn enlarge(device: &Device, name: &str, function: &CudaFunction) -> Result<u64> {
    let most = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    let most = device.context.attribute(most).map_err(driver("ask for shared memory"))?;
    let of_the_code = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
    let left = most - function.get_attribute(of_the_code).map_err(driver(name))?;
    let dynamic = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    function.set_attribute(dynamic, left).map_err(driver(name))?;
    Ok(left as u64)
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
        let mut shared_bytes = HashMap::new();
        for name in LARGE {
            shared_bytes.insert(name, enlarge(device, name, &functions[name])?);
        }
        Ok(Self { functions, shared_bytes })
    }

    /// Most bytes of dynamic shared memory that this GPU gives a block of one of [`LARGE`].
    pub(super) fn shared_bytes(&self, name: &str) -> u64 {
        self.shared_bytes[name]
    }

    /// Queues a kernel on the device's stream. A launch of no blocks is none.
    pub(super) fn launch(&self, device: &Device, name: &str, grid: Grid, arguments: &[Argument]) -> Result {
        if grid.blocks == 0 {
            return Ok(());
        }
        let blocks = u32::try_from(grid.blocks).ok().filter(|blocks| i32::try_from(*blocks).is_ok());
        let blocks = blocks.unwrap_or_else(|| panic!("{name}: {} blocks are more than a grid holds", grid.blocks));
        let mut launch = device.compute().launch_builder(&self.functions[name]);
        for argument in arguments {
            match argument {
                Argument::Pointer(address) => launch.arg(address),
                Argument::Count(count) => launch.arg(count),
                Argument::Small(count) => launch.arg(count),
                Argument::Flag(flag) => launch.arg(flag),
                Argument::Float(value) => launch.arg(value),
                Argument::Double(value) => launch.arg(value),
                Argument::Frequencies(values) => launch.arg(*values),
                Argument::StagedRows(values) => launch.arg(*values),
            };
        }
        let shape = LaunchConfig {
            grid_dim: (blocks, 1, 1),
            block_dim: (grid.threads, 1, 1),
            shared_mem_bytes: grid.shared_bytes,
        };
        // SAFETY: the operations of this backend pass what the kernel's header lists, addresses of tensors checked to lie in
        // the arena with the shapes that the counts say.
        unsafe { launch.launch(shape) }.map(drop).map_err(driver(name))
    }
}
