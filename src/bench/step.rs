//! `longhaul bench step`: optimizer steps on random weights and tokens, one JSON line each, and one of their median.
//!
//! The same planner, session and kernels as a job; only weights, tokens and the absence of files differ.

use std::{ffi::OsString, io::Write, path::Path, time::Instant};

use serde_json::json;

use super::{
    random,
    random::Random,
    ranks::{self, Place},
    sequence::Sequence,
    shapes, timeline,
};
use crate::{
    domain::{
        Invalid, Machine, ModelConfig, heads,
        machine::DeviceKind,
        training::{Moments, Precision},
    },
    engine::{
        Result,
        backend::{AdamW, Backend, DType, Tensor, cpu::Cpu, cuda::Cuda},
        comm::{Comm, Groups, HostComm, nccl::Nccl, tcp::Tcp},
        meter,
        model::MemoryProof,
        train::session::{Session, Totals},
    },
    plan::{self, Forced, Gradients, Plan, Ranks, shards},
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
    /// Packs the sequence of documents of so many tokens on average, other ones in every step
    #[arg(long)]
    pub document_tokens: Option<u64>,
    /// cpu or cuda
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Ranks that share the sequence, each a process: on cuda with a GPU each
    #[arg(long, default_value_t = 1)]
    pub ranks: u64,
    /// What rank 0 gives to the processes that it starts
    #[arg(long, hide = true)]
    pub place: Option<String>,
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
    /// Rows of kept layer inputs in host memory, counted over all slots, instead of the planner's choice
    #[arg(long)]
    pub checkpoint_host_rows: Option<u64>,
    /// Parameters whose optimizer state is in host memory, instead of the planner's choice
    #[arg(long)]
    pub optimizer_host_elements: Option<u64>,
    /// Layers whose weights are in host memory, instead of the planner's choice
    #[arg(long)]
    pub weights_host_layers: Option<u64>,
    /// Storage type of the moments: f32 or bf16
    #[arg(long, default_value = "f32")]
    pub moments: Moments,
    /// Gradients kept as wide or as storage, instead of the planner's choice
    #[arg(long)]
    pub gradients: Option<String>,
    /// Memory proof: attends only in so many layers, and there only in the chunks of --attention-chunks
    #[arg(long, requires = "attention_chunks")]
    pub attention_in_layers: Option<u64>,
    /// Memory proof: attends only in so many chunks, those with the longest prefix
    #[arg(long, requires = "attention_in_layers")]
    pub attention_chunks: Option<u64>,
    /// After the steps, one more with a mark around every operation: where the time goes, and with several ranks what runs beside
    /// what in one layer (cuda)
    #[arg(long)]
    pub profile: bool,
}

/// What is run where.
struct Job<'a> {
    args: &'a Args,
    config: ModelConfig,
    machine: Machine,
    plan: Plan,
    here: Here<'a>,
}

/// What the process has.
#[derive(Debug, Clone, Copy)]
pub struct Here<'a> {
    /// Where a plan that spills does so.
    pub scratch: &'a Path,
    /// Its arguments, with which it starts the other ranks.
    pub arguments: &'a [OsString],
}

/// Runs the steps and writes a line each to `out`. `host` is this machine without its GPUs, `stated` what is said of those.
pub fn run(args: &Args, host: &Machine, stated: &Stated, here: Here, out: &mut impl Write) -> Result {
    let config = shape(args)?;
    let place = args.place.as_deref().map(Place::parse).transpose()?;
    match args.device.as_str() {
        "cpu" => {
            let precision = args.precision.unwrap_or(Precision::of(DeviceKind::Cpu));
            let job = planned(args, config, host.clone(), (precision, here), place.as_ref())?;
            match precision {
                Precision::F32 => on_cpu(Cpu::<f32>::new(threads(args))?, &job, place.as_ref(), out),
                Precision::Bf16 => on_cpu(Cpu::<half::bf16>::new(threads(args))?, &job, place.as_ref(), out),
            }
        }
        "cuda" => {
            if args.precision == Some(Precision::F32) {
                return Err(Invalid::new("--precision", "a GPU trains in bf16: leave --precision out").into());
            }
            let cuda = Cuda::open(place.as_ref().map_or(0, |place| place.rank), stated.libraries)?;
            let machine = gpu::machine(&cuda, host, stated)?;
            let job = planned(args, config, machine, (Precision::Bf16, here), place.as_ref())?;
            on_cuda(cuda, &job, (place.as_ref(), stated), out)
        }
        other => Err(Invalid::new("--device", format!("device is cpu or cuda, not {other}")).into()),
    }
}

fn on_cpu<B: Backend>(cpu: B, job: &Job, place: Option<&Place>, out: &mut impl Write) -> Result {
    if job.args.ranks == 1 {
        return steps(cpu, Groups::alone(), job, out).map(drop);
    }
    let (_others, comm) = met(job, place)?;
    steps(cpu, Groups::new::<B>(comm, job.args.ranks)?, job, out)?.leave()
}

fn on_cuda(cuda: Cuda, job: &Job, (place, stated): (Option<&Place>, &Stated), out: &mut impl Write) -> Result {
    if job.args.ranks == 1 {
        let mut run = steps(cuda, Groups::alone(), job, out)?;
        return if job.args.profile { profile(&mut run, out) } else { Ok(()) };
    }
    let (_others, comm) = met(job, place)?;
    let comm = Nccl::new(&cuda, comm, stated.libraries)?;
    let mut run = steps(cuda, Groups::new::<Cuda>(comm, job.args.ranks)?, job, out)?;
    if job.args.profile {
        profile(&mut run, out)?;
    }
    run.leave()
}

/// The other ranks: started by rank 0, met by all.
fn met(job: &Job, place: Option<&Place>) -> Result<(Option<ranks::Others>, HostComm<Tcp>)> {
    if let Some(place) = place {
        return Ok((None, place.meet()?));
    }
    let (others, comm) = ranks::start(job.args.ranks as usize, &job.plan, job.here.scratch, job.here.arguments)?;
    Ok((Some(others), comm))
}

fn planned<'a>(
    args: &'a Args,
    config: ModelConfig,
    mut machine: Machine,
    (precision, here): (Precision, Here<'a>),
    place: Option<&Place>,
) -> Result<Job<'a>> {
    machine.device_bytes = args.memory.unwrap_or(machine.device_bytes);
    if let Some(place) = place {
        let plan = place.plan()?;
        return Ok(Job { args, config, machine, plan, here });
    }
    let (model, machine_ref, tokens, moments) = (&config, &machine, args.tokens, args.moments);
    let forced = forced(args)?;
    let request = plan::Request { model, precision, moments, tokens, micro_batches: 1, machine: machine_ref, forced };
    let plan = plan::plan(&request).map_err(Invalid::from)?;
    Ok(Job { args, config, machine, plan, here })
}

/// Choices that the flags make.
fn forced(args: &Args) -> Result<Forced> {
    let gradients = match args.gradients.as_deref() {
        None => None,
        Some("wide") => Some(Gradients::Wide),
        Some("storage") => Some(Gradients::Storage),
        Some(other) => {
            return Err(Invalid::new("--gradients", format!("gradients are wide or storage, not {other}")).into());
        }
    };
    Ok(Forced {
        ranks: Some(Ranks { sequence: args.ranks, data: 1 }),
        chunk_tokens: args.chunk,
        checkpoint_slots: args.slots,
        checkpoint_host_rows: args.checkpoint_host_rows,
        optimizer_host_elements: args.optimizer_host_elements,
        weights_host_layers: args.weights_host_layers,
        kept_attention_layers: args.kept_layers,
        kept_qkv_layers: args.kept_layers,
        kept_gate_up_layers: args.kept_layers,
        gradients,
        ..Forced::default()
    })
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
    let sizes = heads::group_sizes(config.n_heads);
    if !sizes.contains(&args.ranks) {
        let message = format!("{} query heads are shared by {sizes:?} ranks, not {}", config.n_heads, args.ranks);
        return Err(Invalid::new("--ranks", message).into());
    }
    if args.document_tokens == Some(0) {
        return Err(Invalid::new("--document-tokens", "a document has 1 token or more").into());
    }
    if args.tokens < 2 || !args.tokens.is_multiple_of(args.ranks) {
        let message = format!("a sequence has 2 tokens or more, a multiple of --ranks {}", args.ranks);
        return Err(Invalid::new("--tokens", message).into());
    }
    Ok(config)
}

/// Steps of one job on random data.
struct Run<'a, B, C> {
    job: &'a Job<'a>,
    session: Session<B, C>,
    random: Random,
    step: u64,
}

impl<'a, B: Backend, C: Comm<B>> Run<'a, B, C> {
    fn new(backend: B, groups: Groups<C>, job: &'a Job<'a>) -> Result<Self> {
        let mut session = Session::among(backend, groups, &job.plan, &job.config, job.here.scratch)?;
        if job.args.document_tokens.is_none() {
            let whole = 0..job.args.tokens;
            session.prepare(std::slice::from_ref(&whole))?;
        }
        random::weights(&mut session)?;
        if let Some(proof) = proof(job) {
            session.prove_memory(proof);
        }
        session.groups.world.barrier(&mut session.backend)?;
        Ok(Self { job, session, random: Random(0x9e37_79b9_7f4a_7c15), step: 0 })
    }

    /// Ends when every rank does.
    fn leave(mut self) -> Result {
        self.session.groups.world.barrier(&mut self.session.backend)
    }

    /// The most of every rank's peak bytes, on the device and on the host.
    fn peaks(&mut self) -> Result<(u64, u64)> {
        let world = &mut self.session.groups.world;
        let mut peaks = vec![0; 2 * world.n_ranks()];
        peaks[2 * world.rank()] = self.session.backend.peak_bytes();
        peaks[2 * world.rank() + 1] = self.session.backend.peak_host_bytes();
        world.all_reduce_counts(&mut peaks)?;
        let most = |first: usize| peaks.iter().skip(first).step_by(2).copied().max().unwrap_or(0);
        Ok((most(0), most(1)))
    }

    /// One step over one fresh sequence: what came of it, the documents' lengths, and its seconds.
    fn step(&mut self) -> Result<(Totals, Vec<u64>, f64)> {
        let (args, vocab) = (self.job.args, self.job.config.vocab_size);
        self.step += 1;
        let sequence = Sequence::draw(&mut self.random, args.tokens, vocab, args.document_tokens);
        let hyper = AdamW {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            step: self.step,
            seed: 0,
            first_index: 0,
        };
        let start = Instant::now();
        let totals = self.session.step(&[sequence.batch()], &hyper, 1.0)?;
        Ok((totals, sequence.lengths(), start.elapsed().as_secs_f64()))
    }
}

/// What the flags leave of attention.
fn proof(job: &Job) -> Option<MemoryProof> {
    let (layers, chunks) = (job.args.attention_in_layers?, job.args.attention_chunks?);
    Some(MemoryProof { layers, rows: chunks * job.plan.choice.chunk_tokens })
}

/// All steps, a line each, and their median; the run, for what else is asked of it.
fn steps<'a, B: Backend, C: Comm<B>>(
    backend: B,
    groups: Groups<C>,
    job: &'a Job<'a>,
    out: &mut impl Write,
) -> Result<Run<'a, B, C>> {
    let Job { args, config, machine, plan, .. } = job;
    let mut run = Run::new(backend, groups, job)?;
    let mut measured = Vec::new();
    for step in 1..=args.steps {
        let (totals, lengths, seconds) = run.step()?;
        let memory = memory(plan, run.peaks()?, run.session.backend.touched_bytes());
        if let Some(proof) = proof(job) {
            let what = format!(
                "MEMORY PROOF, NOT A SPEED: attention in {} of {} layers, there in the last {} of {} tokens",
                proof.layers, config.n_layers, proof.rows, args.tokens
            );
            print(&json!({ "memory_proof": what, "step": step, "wall_seconds": seconds, "memory": memory }), out)?;
            continue;
        }
        let peak = meter::peak_flops(machine.device, &machine.device_name).map(|peak| peak * args.ranks as f64);
        let speed = meter::speed(config, &lengths, seconds, peak);
        measured.push((seconds, speed));
        let line = json!({
            "step": step, "shape": args.shape, "layers": config.n_layers, "tokens": args.tokens, "documents": lengths.len(), "ranks": args.ranks,
            "device": args.device, "device_name": machine.device_name,
            "loss": totals.mean_loss(), "grad_norm": totals.grad_norm,
            "seconds": seconds, "predicted_seconds": plan.step_seconds,
            "tokens_per_second": speed.tokens_per_second,
            "model_gflops_per_second": speed.model_flops / 1e9, "causal_mfu": speed.causal_mfu,
            "memory": memory,
        });
        print(&line, out)?;
    }
    let gemm = match machine.device {
        DeviceKind::Cpu => Some(gemm_flops(threads(args))?),
        DeviceKind::Cuda => None,
    };
    if !measured.is_empty() {
        print(&summary(measured, gemm), out)?;
    }
    Ok(run)
}

/// What was planned for a rank and the most that one took, in bytes.
fn memory(plan: &Plan, (device, host): (u64, u64), touched: u64) -> serde_json::Value {
    json!({
        "predicted_peak_bytes": plan.predicted_peak_bytes, "real_peak_bytes": device,
        "arena_bytes": plan.layout.bytes, "arena_high_water_bytes": touched,
        "predicted_host_peak_bytes": plan.predicted_host_peak_bytes, "real_host_peak_bytes": host,
        "choice": plan.choice,
    })
}

/// Where one more step's time goes.
fn profile<C: Comm<Cuda>>(run: &mut Run<Cuda, C>, out: &mut impl Write) -> Result {
    run.session.backend.start_profile()?;
    let (.., seconds) = run.step()?;
    let Some(profiled) = run.session.backend.profiled()? else { return Ok(()) };
    let parts: serde_json::Map<String, serde_json::Value> = profiled
        .parts
        .iter()
        .map(|(part, seconds, count)| (format!("{part:?}"), json!({ "seconds": seconds, "operations": count })))
        .collect();
    print(&json!({ "profiled_seconds": seconds, "parts": parts, "idle_seconds": profiled.idle() }), out)?;
    let plan::Choice { ranks, chunk_tokens, .. } = run.job.plan.choice;
    let runs = shards::heads(&run.job.config, ranks)[0].len() as u64;
    let calls = run.job.args.tokens.div_ceil(chunk_tokens) * runs;
    timeline::table(&profiled.spans, run.job.config.n_layers, calls).iter().try_for_each(|line| print(line, out))
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
