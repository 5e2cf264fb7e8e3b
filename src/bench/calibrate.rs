//! `longhaul calibrate`: how fast this host's device is, measured in under a minute and kept in the machine file.
//!
//! The operations are a backend's own, on random numbers (products of constants draw less power and run faster) and at sizes
//! at which what the planner takes off for small pieces is a few percent.

use std::{
    fs::{self, File},
    io::{Read, Write},
    path::Path,
    time::Instant,
};

use rustix::fs::{Advice, fadvise};
use serde_json::json;

use super::random::Random;
use crate::{
    domain::{
        Machine,
        machine::{Calibration, DeviceKind, MachineFile, Rates},
    },
    engine::{
        Error, Result,
        backend::{
            ALIGNMENT, AttentionGrads, AttentionSaved, Backend, DType, Heads, Space, Stream, Tensor, Window, cpu::Cpu,
            cuda::Cuda,
        },
    },
    trainer::gpu::{self, Stated},
};

/// Flags of `longhaul calibrate`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// cpu or cuda
    #[arg(long)]
    pub device: DeviceKind,
}

/// Where speeds are measured and kept.
#[derive(Debug, Clone, Copy)]
pub struct Folders<'a> {
    /// On the disk that trainers would spill to.
    pub scratch: &'a Path,
    pub machine_file: &'a Path,
}

/// How large the measured operations are.
struct Sizes {
    /// A product `[m, k] [n, k]^T`.
    m: u64,
    n: u64,
    k: u64,
    heads: Heads,
    /// Tokens before the query chunk's end, and of the chunk.
    tokens: u64,
    chunk: u64,
    copy_bytes: u64,
    link_bytes: u64,
}

/// A layer of a model of 8 billion parameters, a chunk of 8K tokens.
const CUDA: Sizes = Sizes {
    m: 8192,
    n: 14336,
    k: 4096,
    heads: Heads { n_heads: 32, n_kv_heads: 8, head_dim: 128 },
    tokens: 16384,
    chunk: 8192,
    copy_bytes: 1 << 30,
    link_bytes: 256 << 20,
};
/// Sizes that cores finish in a tenth of a second.
const CPU: Sizes = Sizes {
    m: 2048,
    n: 1024,
    k: 1024,
    heads: Heads { n_heads: 8, n_kv_heads: 2, head_dim: 64 },
    tokens: 1024,
    chunk: 512,
    copy_bytes: 64 << 20,
    link_bytes: 64 << 20,
};
/// Bytes written to disk and read back.
const DISK_BYTES: usize = 256 << 20;
const DISK_PIECE: usize = 4 << 20;
/// An operation is timed so often, or longer until so many seconds have passed; the median counts.
const LEAST_RUNS: usize = 3;
const LEAST_SECONDS: f64 = 0.5;

/// Measures the device, and writes its speeds into the machine file beside those of other devices in `stated`. `host` is this
/// machine without its GPUs.
pub fn run(args: &Args, host: &Machine, stated: &Stated, at: Folders, out: &mut impl Write) -> Result {
    let disk_bytes = disk_rate(at.scratch)?;
    let (machine, rates) = match args.device {
        DeviceKind::Cpu => {
            let threads = std::thread::available_parallelism().map_or(1, Into::into);
            (host.clone(), measure(Cpu::<f32>::new(threads)?, &CPU, disk_bytes)?)
        }
        DeviceKind::Cuda => {
            let cuda = Cuda::open(0, stated.libraries)?;
            (gpu::machine(&cuda, host, stated)?, measure(cuda, &CUDA, disk_bytes)?)
        }
    };
    let calibration = Calibration { device: machine.device, device_name: machine.device_name, rates };
    let mut file = stated.file.clone();
    file.put(calibration.clone());
    write(at.machine_file, &file)?;
    let line = json!({ "machine_file": at.machine_file, "calibration": calibration });
    writeln!(out, "{line:#}").map_err(Error::file("standard output"))
}

fn write(path: &Path, file: &MachineFile) -> Result {
    let text = serde_json::to_string_pretty(file).expect("speeds are made of strings and numbers");
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::create_dir_all(folder).map_err(Error::file(folder))?;
    }
    // An executor may be reading it.
    let new = path.with_extension("new");
    fs::write(&new, format!("{text}\n")).map_err(Error::file(&new))?;
    fs::rename(&new, path).map_err(Error::file(path))
}

/// The tensors of one measurement, one after another in the arena.
struct Places {
    end: u64,
    storage: DType,
    wide: DType,
}

impl Places {
    fn take(&mut self, dtype: DType, rows: u64, cols: u64) -> Tensor {
        let tensor = Tensor::device(self.end, dtype, rows, cols);
        self.end = (self.end + tensor.bytes()).next_multiple_of(ALIGNMENT);
        tensor
    }

    fn storage(&mut self, rows: u64, cols: u64) -> Tensor {
        self.take(self.storage, rows, cols)
    }

    fn wide(&mut self, rows: u64, cols: u64) -> Tensor {
        self.take(self.wide, rows, cols)
    }
}

fn measure<B: Backend>(mut b: B, sizes: &Sizes, disk_bytes: f64) -> Result<Rates> {
    let Sizes { m, n, k, heads, tokens, chunk, copy_bytes, link_bytes } = *sizes;
    let mut places = Places { end: 0, storage: b.storage(), wide: b.wide() };
    let (x, w, y) = (places.storage(m, k), places.storage(n, k), places.storage(m, n));
    let (q_size, kv_size) = (heads.n_heads * heads.head_dim, heads.n_kv_heads * heads.head_dim);
    let rows = |places: &mut Places| places.storage(chunk, q_size);
    let (q, o, d_o, dq) = (rows(&mut places), rows(&mut places), rows(&mut places), rows(&mut places));
    let (key, value) = (places.storage(tokens, kv_size), places.storage(tokens, kv_size));
    let (dk, dv) = (places.wide(tokens, kv_size), places.wide(tokens, kv_size));
    let (lse, delta) = (places.wide(heads.n_heads, chunk), places.wide(heads.n_heads, chunk));
    let workspace = places.wide(1, b.attention_workspace(heads, chunk, tokens).div_ceil(4).max(1));
    let (from, to) = (places.wide(1, copy_bytes / 4), places.wide(1, copy_bytes / 4));
    let outside = Tensor { space: Space::Host, ..Tensor::device(0, places.wide, 1, link_bytes / 4) };
    let inside = from.part(0, link_bytes / 4);
    b.reserve(places.end, link_bytes)?;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for tensor in [x, w, q, key, value, d_o] {
        fill(&mut b, tensor, &mut random)?;
    }
    for tensor in [dk, dv, from, to] {
        b.fill(tensor, 0.0)?;
    }
    b.copy(Stream::Down, outside, inside)?;

    let product = timed(&mut b, |b| b.matmul(y, x, w, 0.0))?;
    let document = 0..tokens;
    let window = Window { chunk: tokens - chunk..tokens, documents: std::slice::from_ref(&document) };
    let forward = timed(&mut b, |b| b.attention(o, lse, q, key, value, workspace, heads, &window))?;
    let grads = AttentionGrads { dq, dk, dv, delta };
    let saved = AttentionSaved { d_o, o, lse, q, k: key, v: value };
    let backward = timed(&mut b, |b| b.attention_backward(grads, saved, workspace, heads, &window))?;
    let copy = timed(&mut b, |b| b.copy(Stream::Compute, to, from))?;
    let down = timed(&mut b, |b| b.copy(Stream::Down, outside, inside))?;
    let up = timed(&mut b, |b| b.copy(Stream::Up, inside, outside))?;

    // Every query with the keys before it: two products forward, five backward.
    let pairs = (chunk * (2 * tokens - chunk + 1) / 2) as f64;
    Ok(Rates {
        gemm_flops: (2 * m * n * k) as f64 / product,
        attention_flops: 3.5 * 4.0 * q_size as f64 * pairs / (forward + backward),
        memory_bytes: 2.0 * copy_bytes as f64 / copy,
        link_bytes: link_bytes as f64 / up.max(down),
        peer_bytes: 0.0,
        disk_bytes,
        source: "calibrated".into(),
    })
}

/// Random numbers between -1 and 1.
fn fill<B: Backend>(b: &mut B, to: Tensor, random: &mut Random) -> Result {
    let mut number = || (random.next() % (1 << 24)) as f32 / (1 << 23) as f32 - 1.0;
    let numbers = (0..to.elements()).map(|_| number());
    let bytes: Vec<u8> = match to.dtype {
        DType::Bf16 => numbers.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        _ => numbers.flat_map(f32::to_le_bytes).collect(),
    };
    b.upload(to, &bytes)
}

/// Median seconds of an operation, after one run that is not counted.
fn timed<B: Backend>(b: &mut B, mut run: impl FnMut(&mut B) -> Result) -> Result<f64> {
    run(b)?;
    b.synchronize()?;
    let mut seconds = Vec::new();
    let begin = Instant::now();
    while seconds.len() < LEAST_RUNS || begin.elapsed().as_secs_f64() < LEAST_SECONDS {
        let start = Instant::now();
        run(b)?;
        b.synchronize()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

/// Bytes a second of the disk under a folder, written or read, whichever is slower.
fn disk_rate(folder: &Path) -> Result<f64> {
    fs::create_dir_all(folder).map_err(Error::file(folder))?;
    let path = folder.join(format!("calibrate-{}", std::process::id()));
    let rate = write_and_read(&path);
    // What was measured counts; a file that stays behind is told by its name.
    let _ = fs::remove_file(&path);
    rate.map_err(Error::file(&path))
}

fn write_and_read(path: &Path) -> std::io::Result<f64> {
    let mut random = Random(1);
    // Of random bytes, which no file system compresses.
    let mut piece: Vec<u8> = (0..DISK_PIECE).map(|_| random.next() as u8).collect();
    let start = Instant::now();
    let mut file = File::create(path)?;
    for _ in 0..DISK_BYTES / DISK_PIECE {
        file.write_all(&piece)?;
    }
    file.sync_all()?;
    let written = start.elapsed().as_secs_f64();
    let mut file = File::open(path)?;
    // Out of the page cache, or memory is measured; where that cannot be asked for, writing is the slower one.
    let _ = fadvise(&file, 0, None, Advice::DontNeed);
    let start = Instant::now();
    for _ in 0..DISK_BYTES / DISK_PIECE {
        file.read_exact(&mut piece)?;
    }
    Ok(DISK_BYTES as f64 / written.max(start.elapsed().as_secs_f64()))
}
