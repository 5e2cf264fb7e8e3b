//! `longhaul plan`: what this machine would do about a model and a sequence length, before anything is started.

use std::io::{self, Write};

use serde_json::json;

use crate::{
    bench::shapes,
    domain::{
        Invalid, Machine, ModelConfig,
        machine::{DeviceKind, Network, usable},
        training::{Moments, Precision},
    },
    engine::{Error, Result},
    plan::{self, Forced, Place, Plan, Ranks, Request},
    trainer::gpu::{self, Stated},
};

/// Flags of `longhaul plan`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Folder of a model in Hugging Face layout
    #[arg(long, conflicts_with = "shape", required_unless_present = "shape")]
    pub model: Option<std::path::PathBuf>,
    /// A known shape instead of a folder: tiny, 10m, llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, llama-3.1-70b
    #[arg(long)]
    pub shape: Option<String>,
    /// Layers, instead of the model's own number
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub layers: Option<u64>,
    /// Tokens of one sequence; the longest that fits by default
    #[arg(long)]
    pub sequence_length: Option<u64>,
    /// cpu or cuda; a GPU where there is one by default, as for jobs
    #[arg(long)]
    pub device: Option<DeviceKind>,
    /// A GPU to plan for that need not be here, as in H200; a card that is not known needs --device-memory
    #[arg(long, value_name = "NAME")]
    pub gpu: Option<String>,
    /// GPUs of a host that the plan may take; 1 by default
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub gpus: Option<u32>,
    /// Hosts alike, each with as many GPUs
    #[arg(long, value_name = "N", requires = "network_bandwidth", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub hosts: Option<u32>,
    /// What a GPU sends to the others of its host, bytes/s; measured or from a data sheet by default
    #[arg(long, value_name = "BYTES", value_parser = bandwidth)]
    pub peer_bandwidth: Option<f64>,
    /// What a GPU sends to other hosts while all GPUs of its host do, bytes/s
    #[arg(long, value_name = "BYTES", requires = "hosts", value_parser = bandwidth)]
    pub network_bandwidth: Option<f64>,
    /// Bytes of a host's disk for spilled tensors; a half of what is free here by default
    #[arg(long, value_name = "BYTES")]
    pub disk: Option<u64>,
    /// Ranks that share a sequence; the planner's choice by default
    #[arg(long, value_name = "N")]
    pub sequence_ranks: Option<u64>,
    /// Sequences of an optimizer step, over all replicas
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub gradient_accumulation_steps: u32,
    /// f32 or bf16; bf16 on a GPU, f32 on the CPU by default
    #[arg(long)]
    pub precision: Option<Precision>,
    /// Storage type of AdamW's moments: f32 or bf16
    #[arg(long, default_value = "f32")]
    pub moments: Moments,
    /// Print the plan as JSON
    #[arg(long)]
    pub json: bool,
}

/// Plans for a device of this `host` and prints the result. `read_config` loads a model folder's config.
pub fn run(
    args: &Args,
    host: &Machine,
    stated: &Stated,
    read_config: impl FnOnce(&std::path::Path) -> Result<ModelConfig>,
    out: &mut impl Write,
) -> Result {
    let mut model = match (&args.model, &args.shape) {
        (Some(folder), _) => read_config(folder)?,
        (None, Some(name)) => shapes::named(name).ok_or_else(|| {
            Invalid::new("--shape", format!("no shape is called {name}: take one of {}", shapes::NAMES.join(", ")))
        })?,
        (None, None) => return Err(Invalid::new("--model", "give --model FOLDER or --shape NAME").into()),
    };
    model.n_layers = args.layers.unwrap_or(model.n_layers);
    let mut machine = machine(args, host, stated)?;
    machine.disk_bytes = args.disk.unwrap_or(machine.disk_bytes);
    let precision = args.precision.unwrap_or(Precision::of(machine.device));
    if (machine.device, precision) == (DeviceKind::Cuda, Precision::F32) {
        return Err(
            Invalid::new("--precision", "a GPU trains in bf16: leave --precision out, or add --device cpu").into()
        );
    }
    let mut request = Request {
        model: &model,
        precision,
        moments: args.moments,
        tokens: 128,
        micro_batches: args.gradient_accumulation_steps.into(),
        machine: &machine,
        forced: Forced { sequence_ranks: args.sequence_ranks, ..Forced::default() },
    };
    if let Some(wish) = args.sequence_ranks {
        plan::ranks::check("--sequence-ranks", wish, &model, &machine)?;
    }
    let longest = plan::longest(&request);
    request.tokens = args.sequence_length.unwrap_or(longest.max(128));
    let plan = plan::plan(&request).map_err(Invalid::from)?;
    let printed = if args.json {
        writeln!(out, "{}", json!({ "longest_tokens": longest, "machine": machine, "plan": plan }))
    } else {
        print(out, &plan, &model, &machine, longest)
    };
    printed.map_err(Error::file("standard output"))
}

/// The devices that are planned for.
fn machine(args: &Args, host: &Machine, stated: &Stated) -> Result<Machine> {
    let names_cpu = args.precision == Some(Precision::F32);
    let names_gpu = args.gpu.is_some() || args.gpus.is_some() || args.hosts.is_some();
    let wanted = args.device.or(names_cpu.then_some(DeviceKind::Cpu));
    if wanted == Some(DeviceKind::Cpu) {
        let message =
            "--gpu, --gpus and --hosts are for GPUs, which train in bf16: leave out --device cpu and --precision f32";
        return if names_gpu { Err(Invalid::new("--gpu", message).into()) } else { Ok(host.clone()) };
    }
    let mut machine = match &args.gpu {
        Some(name) => Machine { n_devices: args.gpus.unwrap_or(1), ..gpu::imagined(name, host, stated)? },
        None => here(args, names_gpu.then_some(DeviceKind::Cuda).or(wanted), host, stated)?,
    };
    machine.rates.peer_bytes = args.peer_bandwidth.unwrap_or(machine.rates.peer_bytes);
    let hosts = args.hosts.zip(args.network_bandwidth);
    machine.network = hosts.map(|(n_hosts, link_bytes)| Network { n_hosts, link_bytes });
    Ok(machine)
}

/// As many devices of this host as are asked for.
fn here(args: &Args, wanted: Option<DeviceKind>, host: &Machine, stated: &Stated) -> Result<Machine> {
    let found = gpu::found(host, stated)?;
    let devices: Vec<Machine> = usable(&found.machines, wanted).cloned().collect();
    let n = args.gpus.unwrap_or(1) as usize;
    match Machine::together(&devices[..n.min(devices.len())]) {
        Some(machine) if devices.len() >= n => Ok(machine),
        Some(_) => {
            let message = format!("{} GPUs are here, not {n}; add --gpu NAME to plan for others", devices.len());
            Err(Invalid::new("--gpus", message).into())
        }
        None => Err(Error::Missing(found.without_cuda.unwrap_or_else(|| "there is no GPU here".into()))),
    }
}

fn bandwidth(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
        _ => Err("must be a number of bytes a second above 0, as in 275e9".into()),
    }
}

fn print(out: &mut impl Write, plan: &Plan, model: &ModelConfig, machine: &Machine, longest: u64) -> io::Result<()> {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let choice = &plan.choice;
    writeln!(out, "model      {} parameters, {} layers", model.n_params(), model.n_layers)?;
    let (device, precision) = (&machine.device_name, plan.precision.as_str());
    writeln!(out, "machine    {device}, {:.2} GiB usable, {precision}", gib(machine.device_bytes))?;
    if machine.all_devices() > 1 {
        print_ranks(out, plan, machine)?;
    }
    writeln!(out, "sequence   {} tokens (longest that fits: {longest})", plan.tokens)?;
    let (seconds, source) = (plan.optimizer_step_seconds, &machine.rates.source);
    let sequences = match plan.sequences {
        1 => String::new(),
        n => format!(" for {n} sequences, one after another"),
    };
    writeln!(out, "step       {seconds:.3} s predicted{sequences} ({source} rates)")?;
    writeln!(
        out,
        "chunk      {} tokens, tiles of {} (feed-forward) and {} rows (loss)",
        choice.chunk_tokens, choice.mlp_tile_rows, choice.loss_tile_rows
    )?;
    let place = match choice.checkpoint_place {
        Place::Memory => "in memory",
        Place::Disk => "on disk",
    };
    writeln!(
        out,
        "inputs     {} held at once, {place}; segments start at layers {:?}",
        choice.checkpoint_slots, choice.segment_starts
    )?;
    writeln!(
        out,
        "kept       attention of {} layers, q/k/v of {}, gate and up of {}",
        choice.kept_attention_layers, choice.kept_qkv_layers, choice.kept_gate_up_layers
    )?;
    writeln!(out, "\n{:<14}{:>16}{:>10}", "a rank holds", "bytes", "GiB")?;
    for (category, bytes) in &plan.ledger {
        writeln!(out, "{:<14}{bytes:>16}{:>10.3}", format!("{category:?}").to_lowercase(), gib(*bytes))?;
    }
    writeln!(out, "{:<14}{:>16}{:>10.3}", "peak", plan.predicted_peak_bytes, gib(plan.predicted_peak_bytes))?;
    for (category, bytes) in &plan.host_ledger {
        let name = format!("host {}", format!("{category:?}").to_lowercase());
        writeln!(out, "{name:<14}{bytes:>16}{:>10.3}", gib(*bytes))?;
    }
    if plan.predicted_host_peak_bytes > 0 {
        let bytes = plan.predicted_host_peak_bytes;
        writeln!(out, "{:<14}{bytes:>16}{:>10.3}", "host peak", gib(bytes))?;
    }
    if plan.disk_bytes > 0 {
        writeln!(out, "{:<14}{:>16}{:>10.3}", "disk", plan.disk_bytes, gib(plan.disk_bytes))?;
    }
    if plan.choice.ranks.world() > 1 {
        print_traffic(out, plan)?;
    }
    Ok(())
}

/// How the devices are used.
fn print_ranks(out: &mut impl Write, plan: &Plan, machine: &Machine) -> io::Result<()> {
    let Ranks { sequence, data } = plan.choice.ranks;
    let hosts = machine.network.map_or(1, |network| network.n_hosts);
    let (used, here) = (sequence * data, machine.n_devices);
    writeln!(out, "devices    {used} of {hosts} x {here}: {sequence} to a sequence, {data} sequences at a time")
}

/// What one rank sends in an optimizer step.
fn print_traffic(out: &mut impl Write, plan: &Plan) -> io::Result<()> {
    let (traffic, seconds) = (plan.traffic, plan.traffic_seconds);
    writeln!(out, "\n{:<14}{:>16}{:>10}", "a rank sends", "bytes", "adds s")?;
    for (name, bytes, seconds) in [
        ("weights", traffic.weights, seconds.weights),
        ("gradients", traffic.gradients, seconds.gradients),
        ("heads", traffic.heads, seconds.heads),
    ] {
        writeln!(out, "{name:<14}{bytes:>16}{seconds:>10.3}")?;
    }
    Ok(())
}
