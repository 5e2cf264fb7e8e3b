//! The CUDA backend: the fast twin of `Cpu`, storage bf16, sums f32. `longhaul bench ops` holds the two against each other.
//!
//! Everything of NVIDIA's is opened at run time ([`libraries`]), our own kernels are embedded ([`kernels`]), matrix products
//! go through cuBLASLt ([`gemm`]), attention through cuDNN ([`cudnn`]). Memory is two arenas ([`device`]), taken once: an
//! operation allocates nothing and waits for nothing. One process drives one GPU from one thread.

mod attention;
mod columns;
mod cudnn;
mod device;
mod elementwise;
mod embedding;
mod gemm;
mod inputs;
pub mod kernels;
pub(in crate::engine) mod libraries;
mod linear;
mod operations;
mod optimizer;
mod pinned;
mod profile;
mod rope;

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use cudarc::driver::CudaEvent;

pub(crate) use self::{attention::Staged, kernels::MOST_STAGED};
use self::{cudnn::Attention, gemm::Gemm, inputs::Inputs, kernels::Kernels, profile::Profile};
pub use self::{
    device::Device,
    profile::{Part, Profiled, Span},
};
use super::{
    AdamW, AttentionGrads, AttentionSaved, Backend, DType, Heads, OptimizerState, Stream, Tensor, Window, resident,
};
use crate::{
    domain::attention_workspace,
    engine::{Error, Result},
};

/// One GPU, its kernels and the plans that its libraries made.
#[derive(Debug)]
pub struct Cuda {
    pub device: Device,
    kernels: Kernels,
    attention: Attention,
    gemm: Gemm,
    inputs: Inputs,
    /// Address of the [`SCRATCH_BYTES`] after the arena's tensors.
    scratch: u64,
    /// The scratch by its place in the arena.
    scratch_offset: u64,
    profile: Profile,
}

/// Device memory that the operations themselves need beyond their tensors: partial sums, losses of a logits tile's rows,
/// workspace of matrix products. They follow one another on the compute stream, so one piece serves all. Constant, so that
/// a plan can count it before the device is there.
pub const SCRATCH_BYTES: u64 = gemm::WORKSPACE_BYTES;

/// Bytes moved between device and file at once.
const SPILL_PIECE_BYTES: u64 = 64 << 20;

impl Cuda {
    /// Opens the libraries and a GPU. `folders` are searched for cuDNN and cuBLASLt after the library path and before
    /// Python's packages.
    pub fn open(ordinal: usize, folders: &[PathBuf]) -> Result<Self> {
        // What this binary lacks comes first: no driver can make up for it.
        kernels::embedded()?;
        libraries::open(folders)?;
        let device = Device::open(ordinal)?;
        let kernels = Kernels::load(&device)?;
        let (attention, gemm) = (Attention::new(&device)?, Gemm::new()?);
        let (inputs, profile) = (Inputs::default(), Profile::default());
        Ok(Self { device, kernels, attention, gemm, inputs, scratch: 0, scratch_offset: 0, profile })
    }

    /// Version of cuDNN as it says itself: 91900 is 9.19.0.
    pub fn cudnn_version(&self) -> usize {
        self.attention.version()
    }

    /// `[rows, cols]` f32 of the scratch, for the duration of one operation.
    fn scratch(&self, rows: u64, cols: u64) -> Tensor {
        let tensor = Tensor::device(self.scratch_offset, DType::F32, rows, cols);
        assert!(tensor.bytes() <= SCRATCH_BYTES, "an operation's partial sums are cut to fit the scratch");
        tensor
    }

    /// A tensor as pieces of whole elements that fit a bounce buffer, each with its first byte.
    fn pieces(tensor: Tensor) -> impl Iterator<Item = (u64, Tensor)> {
        let each = SPILL_PIECE_BYTES / tensor.dtype.bytes();
        (0..tensor.elements())
            .step_by(each as usize)
            .map(move |first| (first * tensor.dtype.bytes(), tensor.part(first, each.min(tensor.elements() - first))))
    }
}

/// Turns a driver error into ours.
fn driver(call: &str) -> impl Fn(cudarc::driver::DriverError) -> Error + '_ {
    move |error| Error::Device { library: "CUDA driver", call: call.to_owned(), cause: error.to_string() }
}

impl Backend for Cuda {
    type Event = CudaEvent;

    fn storage(&self) -> DType {
        DType::Bf16
    }

    fn wide(&self) -> DType {
        DType::F32
    }

    fn reserve(&mut self, device_bytes: u64, host_bytes: u64) -> Result {
        self.scratch_offset = device_bytes.next_multiple_of(super::ALIGNMENT);
        self.device.reserve(self.scratch_offset + SCRATCH_BYTES, host_bytes)?;
        self.scratch = self.device.address(self.scratch(1, SCRATCH_BYTES / 4));
        self.inputs.pin()
    }

    fn upload(&mut self, to: Tensor, bytes: &[u8]) -> Result {
        self.device.upload(to, bytes)
    }

    fn queue_upload(&mut self, to: Tensor, bytes: &[u8]) -> Result {
        self.inputs.send(&self.device, to, bytes)
    }

    fn download(&mut self, from: Tensor, bytes: &mut [u8]) -> Result {
        self.device.download(from, bytes)
    }

    fn copy(&mut self, stream: Stream, to: Tensor, from: Tensor) -> Result {
        match stream {
            Stream::Compute => self.marked(Part::Move, |cuda| cuda.device.copy(stream, to, from)),
            _ => self.device.copy(stream, to, from),
        }
    }

    /// Blocks: the planner does not choose disk while pinned memory will do.
    fn spill(&mut self, _: Stream, file: &File, at: u64, from: Tensor) -> Result {
        let mut bytes = Vec::new();
        for (first, piece) in Self::pieces(from) {
            bytes.resize(piece.bytes() as usize, 0);
            self.device.download(piece, &mut bytes)?;
            file.write_all_at(&bytes, at + first).map_err(Error::file(Path::new("spill file")))?;
        }
        Ok(())
    }

    /// Blocks, as [`Self::spill`] does.
    fn unspill(&mut self, _: Stream, file: &File, at: u64, to: Tensor) -> Result {
        let mut bytes = Vec::new();
        for (first, piece) in Self::pieces(to) {
            bytes.resize(piece.bytes() as usize, 0);
            file.read_exact_at(&mut bytes, at + first).map_err(Error::file(Path::new("spill file")))?;
            self.device.upload(piece, &bytes)?;
        }
        Ok(())
    }

    fn record(&mut self, stream: Stream) -> Result<CudaEvent> {
        self.device.record(stream)
    }

    fn wait(&mut self, stream: Stream, event: &CudaEvent) -> Result {
        match stream {
            Stream::Compute => self.marked(Part::Wait, |cuda| cuda.device.wait(stream, event)),
            _ => self.device.wait(stream, event),
        }
    }

    fn synchronize(&mut self) -> Result {
        self.device.synchronize()
    }

    fn peak_bytes(&self) -> u64 {
        self.device.taken_bytes()
    }

    fn peak_host_bytes(&self) -> u64 {
        resident::peak_resident_bytes()
    }

    fn touched_bytes(&self) -> u64 {
        // Device memory is backed when it is allocated.
        self.device.arena_bytes()
    }

    fn attention_workspace(&self, heads: Heads, c: u64, kv: u64) -> u64 {
        attention_workspace::bytes(heads, c, kv)
    }

    fn prepare_attention(&mut self, heads: Heads, window: &Window) -> Result {
        self.prepare_attention(heads, window)
    }

    fn fill(&mut self, x: Tensor, value: f64) -> Result {
        self.marked(Part::Move, |cuda| cuda.fill(x, value))
    }

    fn cast(&mut self, to: Tensor, from: Tensor) -> Result {
        self.marked(Part::Move, |cuda| cuda.cast(to, from))
    }

    fn accumulate(&mut self, to: Tensor, from: Tensor) -> Result {
        self.marked(Part::Move, |cuda| cuda.accumulate(to, from))
    }

    fn copy_columns(&mut self, to: (Tensor, u64), from: (Tensor, u64), columns: u64) -> Result {
        self.marked(Part::Move, |cuda| cuda.copy_columns(to, from, columns))
    }

    fn add_columns(&mut self, to: (Tensor, u64), from: (Tensor, u64), columns: u64) -> Result {
        self.marked(Part::Move, |cuda| cuda.add_columns(to, from, columns))
    }

    fn sum_squares(&mut self, sum: Tensor, x: Tensor) -> Result {
        self.marked(Part::Optimizer, |cuda| cuda.sum_squares(sum, x))
    }

    fn clip_scale(&mut self, scale: Tensor, sum: Tensor, max_norm: f64) -> Result {
        self.marked(Part::Optimizer, |cuda| cuda.clip_scale(scale, sum, max_norm))
    }

    fn matmul(&mut self, y: Tensor, x: Tensor, w: Tensor, beta: f64) -> Result {
        self.marked(Part::MatmulForward, |cuda| cuda.matmul(y, x, w, beta))
    }

    fn matmul_dx(&mut self, dx: Tensor, dy: Tensor, w: Tensor, beta: f64) -> Result {
        self.marked(Part::MatmulDx, |cuda| cuda.matmul_dx(dx, dy, w, beta))
    }

    fn matmul_dw(&mut self, dw: Tensor, dy: Tensor, x: Tensor) -> Result {
        self.marked(Part::MatmulDw, |cuda| cuda.matmul_dw(dw, dy, x))
    }

    fn embedding(&mut self, x: Tensor, ids: Tensor, table: Tensor) -> Result {
        self.marked(Part::Embedding, |cuda| cuda.embedding(x, ids, table))
    }

    fn embedding_backward(&mut self, dtable: Tensor, ids: Tensor, dx: Tensor) -> Result {
        self.marked(Part::Embedding, |cuda| cuda.embedding_backward(dtable, ids, dx))
    }

    fn rmsnorm(&mut self, y: Tensor, x: Tensor, w: Tensor, eps: f64) -> Result {
        self.marked(Part::Norm, |cuda| cuda.rmsnorm(y, x, w, eps))
    }

    fn rmsnorm_backward(&mut self, dx: Tensor, dw: Tensor, dy: Tensor, x: Tensor, w: Tensor, eps: f64) -> Result {
        self.marked(Part::Norm, |cuda| cuda.rmsnorm_backward(dx, dw, dy, x, w, eps))
    }

    fn rope_table(&mut self, table: Tensor, positions: Tensor, frequencies: &[f64]) -> Result {
        self.marked(Part::Rope, |cuda| cuda.rope_table(table, positions, frequencies))
    }

    fn rope_split(
        &mut self,
        q: Option<Tensor>,
        kv: Option<(Tensor, Tensor)>,
        qkv: Tensor,
        table: Tensor,
        heads: Heads,
    ) -> Result {
        self.marked(Part::Rope, |cuda| cuda.rope_split(q, kv, qkv, table, heads))
    }

    fn rope_merge_backward(
        &mut self,
        dqkv: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        table: Tensor,
        heads: Heads,
    ) -> Result {
        self.marked(Part::Rope, |cuda| cuda.rope_merge_backward(dqkv, dq, dk, dv, table, heads))
    }

    fn attention(
        &mut self,
        o: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        workspace: Tensor,
        heads: Heads,
        window: &Window,
    ) -> Result {
        self.marked(Part::AttentionForward, |cuda| cuda.attention(o, lse, q, k, v, workspace, heads, window))
    }

    fn attention_backward(
        &mut self,
        grads: AttentionGrads,
        saved: AttentionSaved,
        workspace: Tensor,
        heads: Heads,
        window: &Window,
    ) -> Result {
        self.marked(Part::AttentionBackward, |cuda| cuda.attention_backward(grads, saved, workspace, heads, window))
    }

    fn swiglu(&mut self, act: Tensor, gate_up: Tensor) -> Result {
        self.marked(Part::Swiglu, |cuda| cuda.swiglu(act, gate_up))
    }

    fn swiglu_backward(&mut self, gate_up: Tensor, dact: Tensor) -> Result {
        self.marked(Part::Swiglu, |cuda| cuda.swiglu_backward(gate_up, dact))
    }

    fn cross_entropy(&mut self, sums: Tensor, logits: Tensor, labels: Tensor, gradient: Option<f64>) -> Result {
        self.marked(Part::CrossEntropy, |cuda| cuda.cross_entropy(sums, logits, labels, gradient))
    }

    fn adamw(&mut self, state: OptimizerState, g: Tensor, scale: Tensor, hyper: &AdamW) -> Result {
        self.marked(Part::Optimizer, |cuda| cuda.adamw(state, g, scale, hyper))
    }
}
