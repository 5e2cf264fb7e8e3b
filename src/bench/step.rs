//! `longhaul bench step`: optimizer steps on random weights and tokens, one JSON line each, and one of their median.
//!
//! The same planner, session and kernels as a job; only weights, tokens and the absence of files differ.

use std::{io::Write, path::Path, time::Instant};

use serde_json::json;

use super::{random, random::Random, shapes};
use crate::{
    domain::{Invalid, Machine, ModelConfig, machine::DeviceKind, training::Precision},
    engine::{
        Result,
        backend::{AdamW, Backend, DType, Tensor, cpu::Cpu, cuda::Cuda},
        meter,
        model::Batch,
        train::session::Session,
    },
    plan::{self, Forced, Gradients, Plan},
    trainer::gpu::{self, Stated},
};

/// Flags of `longhaul bench step`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Shape of the model: tiny, 10m, llama-3.2-1b, llama-3.2-3b, llama-3.1-8b
    #[arg(long, default_value = "tiny")]
    pub shape: String,
    /// Layers, instead of the shape's own number
    #[arg(long)]
    pub layers: Option<u64>,
    /// Tokens of the one sequence of a step
    #[arg(long, default_value_t = 2048)]
    pub tokens: u64,
    /// cpu or cuda
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// GPUs that share the sequence
    #[arg(long, default_value_t = 1)]
    pub gpus: u32,
    /// Steps, the first being a warm-up
    #[arg(long, default_value_t = 3)]
    pub steps: u64,
    /// f32 or bf16; on cuda bf16, elsewhere f32 by default
    #[arg(long)]
    pub precision: Option<Precision>,
    /// Threads of the CPU backend; all cores by default
    #[arg(long)]
    pub threads: Option<usize>,
    /// Bytes of memory the plan may use; what the host has by default
    #[arg(long)]
    pub memory: Option<u64>,
    /// Tokens of a chunk, instead of the planner's choice
    #[arg(long)]
    pub chunk: Option<u64>,
    /// Layer inputs kept at once, instead of the planner's choice
    #[arg(long)]
    pub slots: Option<u64>,
    /// Layers whose attention output, q/k/v, gate and up are all kept, instead of the planner's choice
    #[arg(long)]
    pub kept_layers: Option<u64>,
    /// Gradients kept as wide or as storage, instead of the planner's choice
    #[arg(long)]
    pub gradients: Option<String>,
}

/// What is run where.
struct Job<'a> {
    args: &'a Args,
    config: ModelConfig,
    machine: Machine,
    plan: Plan,
    /// Where a plan that spills does so.
    scratch: &'a Path,
}

/// Runs the steps and writes a line each to `out`. `host` is this machine without its GPUs, `stated` what is said of those.
pub fn run(args: &Args, host: &Machine, stated: &Stated, scratch: &Path, out: &mut impl Write) -> Result {
    if args.gpus != 1 {
        return Err(Invalid::new("--gpus", "more than one rank is not there yet: use --gpus 1").into());
    }
    let config = shape(args)?;
    match args.device.as_str() {
        "cpu" => {
            let precision = args.precision.unwrap_or(Precision::of(DeviceKind::Cpu));
            let job = planned(args, config, host.clone(), precision, scratch)?;
            match precision {
                Precision::F32 => steps(Cpu::<f32>::new(threads(args))?, &job, out)?,
                Precision::Bf16 => steps(Cpu::<half::bf16>::new(threads(args))?, &job, out)?,
            }
        }
        "cuda" => {
            if args.precision == Some(Precision::F32) {
                return Err(Invalid::new("--precision", "a GPU trains in bf16: leave --precision out").into());
            }
            let cuda = Cuda::open(0, stated.libraries)?;
            let machine = gpu::machine(&cuda, host, stated)?;
            let job = planned(args, config, machine, Precision::Bf16, scratch)?;
            steps(cuda, &job, out)?;
        }
        other => return Err(Invalid::new("--device", format!("device is cpu or cuda, not {other}")).into()),
    }
    Ok(())
}

fn planned<'a>(
    args: &'a Args,
    config: ModelConfig,
    mut machine: Machine,
    precision: Precision,
    scratch: &'a Path,
) -> Result<Job<'a>> {
    machine.device_bytes = args.memory.unwrap_or(machine.device_bytes);
    let gradients = match args.gradients.as_deref() {
        None => None,
        Some("wide") => Some(Gradients::Wide),
        Some("storage") => Some(Gradients::Storage),
        Some(other) => {
            return Err(Invalid::new("--gradients", format!("gradients are wide or storage, not {other}")).into());
        }
    };
    let forced = Forced {
        chunk_tokens: args.chunk,
        checkpoint_slots: args.slots,
        kept_attention_layers: args.kept_layers,
        kept_qkv_layers: args.kept_layers,
        kept_gate_up_layers: args.kept_layers,
        gradients,
        ..Forced::default()
    };
    let (tokens, machine_ref) = (args.tokens, &machine);
    let request = plan::Request { model: &config, precision, tokens, micro_batches: 1, machine: machine_ref, forced };
    let plan = plan::plan(&request).map_err(Invalid::from)?;
    Ok(Job { args, config, machine, plan, scratch })
}

fn threads(args: &Args) -> usize {
    args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into))
}

fn shape(args: &Args) -> Result<ModelConfig> {
    let mut config = shapes::named(&args.shape).ok_or_else(|| {
        Invalid::new("--shape", format!("no shape is called {}: take one of {}", args.shape, shapes::NAMES.join(", ")))
    })?;
    config.n_layers = args.layers.unwrap_or(config.n_layers);
    for (flag, value) in [("--layers", config.n_layers), ("--steps", args.steps)] {
        if value == 0 || value > 10_000 {
            return Err(Invalid::new(flag, format!("{flag} must be between 1 and 10000, not {value}")).into());
        }
    }
    if args.tokens < 2 {
        return Err(Invalid::new("--tokens", "a sequence has 2 tokens or more").into());
    }
    Ok(config)
}

fn steps<B: Backend>(backend: B, job: &Job, out: &mut impl Write) -> Result {
    let Job { args, config, machine, plan, scratch } = job;
    let mut session = Session::new(backend, plan, config, scratch)?;
    random::weights(&mut session)?;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut measured = Vec::new();
    for step in 1..=args.steps {
        let ids: Vec<i32> = (0..args.tokens).map(|_| (random.next() % config.vocab_size) as i32).collect();
        let mut labels = ids[1..].to_vec();
        labels.push(-100);
        let positions: Vec<i32> = (0..args.tokens as i32).collect();
        let whole = 0..args.tokens;
        let batch =
            Batch { ids: &ids, labels: &labels, positions: &positions, documents: std::slice::from_ref(&whole) };
        let hyper = AdamW {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            step,
            seed: 0,
            first_index: 0,
        };
        let start = Instant::now();
        let totals = session.step(&[batch], &hyper, 1.0)?;
        let seconds = start.elapsed().as_secs_f64();
        let peak = meter::peak_flops(machine.device, &machine.device_name);
        let speed = meter::speed(config, &[args.tokens], seconds, peak);
        measured.push((seconds, speed));
        let line = json!({
            "step": step, "shape": args.shape, "layers": config.n_layers, "tokens": args.tokens,
            "device": args.device, "device_name": machine.device_name,
            "loss": totals.mean_loss(), "grad_norm": totals.grad_norm,
            "seconds": seconds, "predicted_seconds": plan.step_seconds,
            "tokens_per_second": speed.tokens_per_second,
            "model_gflops_per_second": speed.model_flops / 1e9, "causal_mfu": speed.causal_mfu,
            "predicted_peak_bytes": plan.predicted_peak_bytes, "real_peak_bytes": session.backend.peak_bytes(),
            "arena_bytes": plan.layout.bytes, "arena_high_water_bytes": session.backend.touched_bytes(),
            "placements": placements(plan),
        });
        print(&line, out)?;
    }
    drop(session);
    let gemm = match machine.device {
        DeviceKind::Cpu => Some(gemm_flops(threads(args))?),
        DeviceKind::Cuda => None,
    };
    print(&summary(measured, gemm), out)
}

fn print(line: &serde_json::Value, out: &mut impl Write) -> Result {
    let written = writeln!(out, "{line}").and_then(|()| out.flush());
    written.map_err(crate::engine::Error::file(Path::new("standard output")))
}

/// The median step after the warm-up; on the CPU beside the rate of an f32 matrix product on the same threads.
fn summary(mut measured: Vec<(f64, meter::Speed)>, gemm: Option<f64>) -> serde_json::Value {
    if measured.len() > 1 {
        measured.remove(0);
    }
    measured.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (seconds, speed) = &measured[measured.len() / 2];
    json!({
        "median_seconds": seconds, "tokens_per_second": speed.tokens_per_second,
        "model_gflops_per_second": speed.model_flops / 1e9, "causal_mfu": speed.causal_mfu,
        "gemm_gflops_per_second": gemm.map(|gemm| gemm / 1e9),
        "share_of_gemm": gemm.map(|gemm| speed.model_flops / gemm),
    })
}

/// The best of several f32 products `[2048, 1024] [1024, 1024]^T`, FLOP/s.
fn gemm_flops(threads: usize) -> Result<f64> {
    const M: u64 = 2048;
    const N: u64 = 1024;
    let tensor = |offset, rows| Tensor::device(offset, DType::F32, rows, N);
    let (x, y, w) = (tensor(0, M), tensor(4 * M * N, M), tensor(8 * M * N, N));
    let mut cpu = Cpu::<f32>::new(threads)?;
    cpu.reserve(4 * N * (2 * M + N), 0)?;
    cpu.fill(x, 0.5)?;
    cpu.fill(w, 0.25)?;
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        let start = Instant::now();
        cpu.matmul(y, x, w, 0.0)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok((2 * M * N * N) as f64 / best)
}

/// What the plan chose, for the reader of a line.
fn placements(plan: &Plan) -> serde_json::Value {
    let choice = &plan.choice;
    json!({
        "chunk_tokens": choice.chunk_tokens, "mlp_tile_rows": choice.mlp_tile_rows,
        "loss_tile_rows": choice.loss_tile_rows, "segment_starts": choice.segment_starts,
        "checkpoints": choice.checkpoint_place, "gradients": choice.gradients, "checkpoint_slots": choice.checkpoint_slots,
        "kept_attention_layers": choice.kept_attention_layers, "kept_qkv_layers": choice.kept_qkv_layers,
        "kept_gate_up_layers": choice.kept_gate_up_layers,
    })
}
