//! A tensor on both backends with the same values, and how far apart they are after an operation.

use half::bf16;

use crate::engine::{
    Result,
    backend::{
        ALIGNMENT, Backend, DType, Stream, Tensor,
        cpu::{Cpu, adamw},
        cuda::Cuda,
    },
};

/// Bytes of the reference's arena: zero pages until they are used.
const REFERENCE_BYTES: u64 = 8 << 30;
/// The same for the reference that stores bf16.
const SAME_BYTES: u64 = 2 << 30;
/// A NaN in bf16 and f32.
const POISON: u8 = 0xff;

/// The two sides of one tensor. Made by [`Twins::storage`] and its like, storage is f32 on the CPU, holding values that bf16
/// holds too; made by [`Twins::same`], both sides hold the same bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Twin {
    pub(super) cpu: Tensor,
    pub(super) gpu: Tensor,
}

/// Both backends and the free ends of their arenas.
pub(super) struct Twins {
    pub(super) cpu: Cpu<f32>,
    pub(super) gpu: Cuda,
    /// Stores what the GPU stores, for operations that must agree in every bit.
    pub(super) same: Cpu<bf16>,
    free: (u64, u64),
    free_same: u64,
    gpu_bytes: u64,
    random: u64,
}

impl Twin {
    /// `n` elements from element `first` on, as one row: slices of flat arrays start anywhere.
    pub(super) fn part(self, first: u64, n: u64) -> Self {
        Self { cpu: self.cpu.part(first, n), gpu: self.gpu.part(first, n) }
    }
}

impl Twins {
    pub(super) fn new(mut cpu: Cpu<f32>, mut same: Cpu<bf16>, gpu: Cuda, gpu_bytes: u64) -> Result<Self> {
        cpu.reserve(REFERENCE_BYTES, 0)?;
        same.reserve(SAME_BYTES, 0)?;
        Ok(Self { cpu, gpu, same, free: (0, 0), free_same: 0, gpu_bytes, random: 0x9e37_79b9_7f4a_7c15 })
    }

    /// Forgets every tensor.
    pub(super) fn clear(&mut self) {
        self.free = (0, 0);
        self.free_same = 0;
    }

    fn place(free: &mut u64, dtype: DType, rows: u64, cols: u64) -> Tensor {
        let tensor = Tensor::device(*free, dtype, rows, cols);
        *free = (*free + tensor.bytes()).next_multiple_of(ALIGNMENT);
        tensor
    }

    /// A tensor on the GPU alone, of undefined content.
    pub(super) fn gpu_only(&mut self, dtype: DType, rows: u64, cols: u64) -> Tensor {
        let tensor = Self::place(&mut self.free.1, dtype, rows, cols);
        assert!(self.free.1 <= self.gpu_bytes, "the measured shapes need more than --memory");
        tensor
    }

    fn twin(&mut self, cpu: DType, gpu: DType, rows: u64, cols: u64) -> Twin {
        let cpu = Self::place(&mut self.free.0, cpu, rows, cols);
        Twin { cpu, gpu: self.gpu_only(gpu, rows, cols) }
    }

    /// Sum of four uniform numbers: near enough to normal, standard deviation 1.
    fn noise(&mut self) -> f32 {
        let mut sum = 0.0;
        for _ in 0..4 {
            // xorshift64* (Vigna 2016).
            self.random ^= self.random >> 12;
            self.random ^= self.random << 25;
            self.random ^= self.random >> 27;
            let bits = self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40;
            sum += bits as f32 / (1 << 23) as f32 - 1.0;
        }
        sum * 0.75f32.sqrt()
    }

    /// `count` values of standard deviation `spread` about `mean`, rounded to bf16.
    fn values(&mut self, count: u64, mean: f32, spread: f32) -> Vec<bf16> {
        (0..count).map(|_| bf16::from_f32(mean + spread * self.noise())).collect()
    }

    /// An activation or weight: noise about `mean`.
    pub(super) fn storage(&mut self, rows: u64, cols: u64, mean: f32, spread: f32) -> Result<Twin> {
        let twin = self.twin(DType::F32, DType::Bf16, rows, cols);
        let values = self.values(rows * cols, mean, spread);
        let wide: Vec<f32> = values.iter().map(|value| value.to_f32()).collect();
        self.cpu.upload(twin.cpu, bytemuck::cast_slice(&wide))?;
        self.gpu.device.upload(twin.gpu, bytemuck::cast_slice(&values))?;
        Ok(twin)
    }

    /// A sum that an operation adds to: the same noise on both sides.
    pub(super) fn wide(&mut self, rows: u64, cols: u64) -> Result<Twin> {
        let twin = self.twin(DType::F32, DType::F32, rows, cols);
        let values: Vec<f32> = (0..rows * cols).map(|_| self.noise()).collect();
        self.cpu.upload(twin.cpu, bytemuck::cast_slice(&values))?;
        self.gpu.device.upload(twin.gpu, bytemuck::cast_slice(&values))?;
        Ok(twin)
    }

    /// Labels or ids.
    pub(super) fn integers(&mut self, values: &[i32]) -> Result<Twin> {
        let twin = self.twin(DType::I32, DType::I32, values.len() as u64, 1);
        self.cpu.upload(twin.cpu, bytemuck::cast_slice(values))?;
        self.gpu.device.upload(twin.gpu, bytemuck::cast_slice(values))?;
        Ok(twin)
    }

    /// An output, NaN on the GPU until it is written; `gpu` says what it is stored as.
    pub(super) fn output(&mut self, gpu: DType, rows: u64, cols: u64) -> Result<Twin> {
        let twin = self.twin(DType::F32, gpu, rows, cols);
        self.gpu.device.fill_bytes(twin.gpu, POISON)?;
        Ok(twin)
    }

    /// Bytes on the GPU and on the CPU that stores bf16. `dtype` and shape must fit them.
    pub(super) fn same(&mut self, dtype: DType, rows: u64, cols: u64, bytes: &[u8]) -> Result<Twin> {
        let cpu = Self::place(&mut self.free_same, dtype, rows, cols);
        let twin = Twin { cpu, gpu: self.gpu_only(dtype, rows, cols) };
        self.same.upload(twin.cpu, bytes)?;
        self.gpu.device.upload(twin.gpu, bytes)?;
        Ok(twin)
    }

    /// Noise for [`Self::same`], of standard deviation 1.
    pub(super) fn same_noise(&mut self, dtype: DType, rows: u64, cols: u64) -> Result<Twin> {
        let values: Vec<f32> = (0..rows * cols).map(|_| self.noise()).collect();
        let bytes: Vec<u8> = match dtype {
            DType::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        };
        self.same(dtype, rows, cols, &bytes)
    }

    /// f32 masters, split as an update splits them: the weights, and the low halves. Halves drawn apart would not do: a
    /// weight of 0 beside a low half of 0x8000 or more is no master's, but a NaN, whose bits no two processors agree on.
    pub(super) fn same_masters(&mut self, rows: u64, cols: u64) -> Result<[Twin; 2]> {
        let halves: Vec<_> = (0..rows * cols).map(|_| adamw::parts(self.noise())).collect();
        let weights: Vec<bf16> = halves.iter().map(|(weight, _)| *weight).collect();
        let low: Vec<u16> = halves.iter().map(|(_, low)| *low).collect();
        Ok([
            self.same(DType::Bf16, rows, cols, bytemuck::cast_slice(&weights))?,
            self.same(DType::U16, rows, cols, bytemuck::cast_slice(&low))?,
        ])
    }

    /// An output for [`Self::same`], NaN on both sides until it is written.
    pub(super) fn same_output(&mut self, dtype: DType, rows: u64, cols: u64) -> Result<Twin> {
        self.same(dtype, rows, cols, &vec![POISON; (rows * cols * dtype.bytes()) as usize])
    }

    /// Share of a tensor's bytes that differ, of one made by [`Self::same`] and its like.
    pub(super) fn differing(&mut self, twin: Twin) -> Result<f64> {
        let mut sides = [(); 2].map(|()| vec![0u8; twin.gpu.bytes() as usize]);
        self.same.download(twin.cpu, &mut sides[0])?;
        self.gpu.device.download(twin.gpu, &mut sides[1])?;
        let differing = sides[0].iter().zip(&sides[1]).filter(|(a, b)| a != b).count();
        Ok(differing as f64 / sides[0].len() as f64)
    }

    /// Random bf16 on the GPU alone, for timing: a tile of noise over and over.
    pub(super) fn noise_on_gpu(&mut self, rows: u64, cols: u64) -> Result<Tensor> {
        const TILE: u64 = 1 << 24;
        let tensor = self.gpu_only(DType::Bf16, rows, cols);
        let flat = Tensor { rows: 1, cols: tensor.elements(), ..tensor };
        let first = Tensor { cols: flat.cols.min(TILE), ..flat };
        let values = self.values(first.cols, 0.0, 1.0);
        self.gpu.device.upload(first, bytemuck::cast_slice(&values))?;
        let mut done = first.cols;
        while done < flat.cols {
            let cols = (flat.cols - done).min(TILE);
            let to = Tensor { offset: flat.offset + done * 2, cols, ..flat };
            self.gpu.device.copy(Stream::Compute, to, Tensor { cols, ..first })?;
            done += cols;
        }
        Ok(tensor)
    }

    /// Elements of the CPU's side.
    pub(super) fn expected(&mut self, twin: Twin) -> Result<Vec<f32>> {
        let mut values = vec![0f32; twin.cpu.elements() as usize];
        self.cpu.download(twin.cpu, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }

    /// Says what the GPU's side should be, where the CPU backend has no such operation.
    pub(super) fn expect(&mut self, twin: Twin, values: &[f32]) -> Result {
        self.cpu.upload(twin.cpu, bytemuck::cast_slice(values))
    }

    /// `||gpu - cpu|| / ||cpu||` over the whole tensor; NaN when any element is.
    pub(super) fn error(&mut self, twin: Twin) -> Result<f64> {
        let reference = self.expected(twin)?;
        let found: Vec<f32> = if twin.gpu.dtype == DType::Bf16 {
            let mut values = vec![bf16::ZERO; reference.len()];
            self.gpu.device.download(twin.gpu, bytemuck::cast_slice_mut(&mut values))?;
            values.iter().map(|value| value.to_f32()).collect()
        } else {
            let mut values = vec![0f32; reference.len()];
            self.gpu.device.download(twin.gpu, bytemuck::cast_slice_mut(&mut values))?;
            values
        };
        let pairs = || found.iter().zip(&reference).map(|(a, b)| (f64::from(*a), f64::from(*b)));
        let distance: f64 = pairs().map(|(a, b)| (a - b) * (a - b)).sum();
        let size: f64 = pairs().map(|(_, b)| b * b).sum();
        Ok((distance / size).sqrt())
    }

    /// Median seconds of `rounds` runs on the GPU after one that warms up.
    pub(super) fn seconds(&mut self, rounds: usize, mut run: impl FnMut(&mut Cuda) -> Result) -> Result<f64> {
        run(&mut self.gpu)?;
        let mut times = Vec::with_capacity(rounds);
        for _ in 0..rounds {
            times.push(self.timed(&mut run)?);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[rounds / 2])
    }

    fn timed(&mut self, run: &mut impl FnMut(&mut Cuda) -> Result) -> Result<f64> {
        let start = self.gpu.device.mark(Stream::Compute)?;
        run(&mut self.gpu)?;
        let end = self.gpu.device.mark(Stream::Compute)?;
        self.gpu.device.seconds_between(&start, &end)
    }
}
