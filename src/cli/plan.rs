//! `longhaul plan`: what this machine would do about a model and a sequence length, before anything is started.

use std::io::{self, Write};

use serde_json::json;

use crate::{
    bench::shapes,
    domain::{
        Invalid, Machine, ModelConfig,
        machine::{DeviceKind, usable},
        training::{Moments, Precision},
    },
    engine::{Error, Result},
    plan::{self, Forced, Place, Plan, Request},
    trainer::gpu::{self, Stated},
};

/// Flags of `longhaul plan`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Folder of a model in Hugging Face layout
    #[arg(long, conflicts_with = "shape", required_unless_present = "shape")]
    pub model: Option<std::path::PathBuf>,
    /// A known shape instead of a folder: tiny, 10m, llama-3.2-1b, llama-3.2-3b, llama-3.1-8b
    #[arg(long)]
    pub shape: Option<String>,
    /// Tokens of one sequence; the longest that fits by default
    #[arg(long)]
    pub sequence_length: Option<u64>,
    /// cpu or cuda; a GPU where there is one by default, as for jobs
    #[arg(long)]
    pub device: Option<DeviceKind>,
    /// A GPU to plan for that need not be here, as in H200; a card that is not known needs --device-memory
    #[arg(long, value_name = "NAME")]
    pub gpu: Option<String>,
    /// f32 or bf16; bf16 on a GPU, f32 on the CPU by default
    #[arg(long)]
    pub precision: Option<Precision>,
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
    let model = match (&args.model, &args.shape) {
        (Some(folder), _) => read_config(folder)?,
        (None, Some(name)) => shapes::named(name).ok_or_else(|| {
            Invalid::new("--shape", format!("no shape is called {name}: take one of {}", shapes::NAMES.join(", ")))
        })?,
        (None, None) => return Err(Invalid::new("--model", "give --model FOLDER or --shape NAME").into()),
    };
    let machine = machine(args, host, stated)?;
    let precision = args.precision.unwrap_or(Precision::of(machine.device));
    if (machine.device, precision) == (DeviceKind::Cuda, Precision::F32) {
        return Err(
            Invalid::new("--precision", "a GPU trains in bf16: leave --precision out, or add --device cpu").into()
        );
    }
    let mut request = Request {
        model: &model,
        precision,
        moments: Moments::F32,
        tokens: 128,
        micro_batches: 1,
        machine: &machine,
        forced: Forced::default(),
    };
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

/// The device that is planned for.
fn machine(args: &Args, host: &Machine, stated: &Stated) -> Result<Machine> {
    let wanted = args.device.or((args.precision == Some(Precision::F32)).then_some(DeviceKind::Cpu));
    match (&args.gpu, wanted) {
        (Some(_), Some(DeviceKind::Cpu)) => Err(Invalid::new(
            "--gpu",
            "--gpu names a GPU, which trains in bf16: leave out --device cpu and --precision f32",
        )
        .into()),
        (Some(name), _) => gpu::imagined(name, host, stated),
        (None, Some(DeviceKind::Cpu)) => Ok(host.clone()),
        (None, wanted) => {
            let found = gpu::found(host, stated)?;
            let machine = usable(&found.machines, wanted).next().cloned();
            machine.ok_or_else(|| Error::Missing(found.without_cuda.unwrap_or_else(|| "there is no GPU here".into())))
        }
    }
}

fn print(out: &mut impl Write, plan: &Plan, model: &ModelConfig, machine: &Machine, longest: u64) -> io::Result<()> {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let choice = &plan.choice;
    writeln!(out, "model      {} parameters, {} layers", model.n_params(), model.n_layers)?;
    let (device, precision) = (&machine.device_name, plan.precision.as_str());
    writeln!(out, "machine    {device}, {:.2} GiB usable, {precision}", gib(machine.device_bytes))?;
    writeln!(out, "sequence   {} tokens (longest that fits: {longest})", plan.tokens)?;
    writeln!(out, "step       {:.3} s predicted ({} rates)", plan.step_seconds, machine.rates.source)?;
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
    writeln!(out, "\n{:<14}{:>16}{:>10}", "memory", "bytes", "GiB")?;
    for (category, bytes) in &plan.ledger {
        writeln!(out, "{:<14}{bytes:>16}{:>10.3}", format!("{category:?}").to_lowercase(), gib(*bytes))?;
    }
    writeln!(out, "{:<14}{:>16}{:>10.3}", "peak", plan.predicted_peak_bytes, gib(plan.predicted_peak_bytes))?;
    if plan.disk_bytes > 0 {
        writeln!(out, "{:<14}{:>16}{:>10.3}", "disk", plan.disk_bytes, gib(plan.disk_bytes))?;
    }
    Ok(())
}
