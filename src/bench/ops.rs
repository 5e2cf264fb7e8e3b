//! `longhaul bench ops`: each operation of the CUDA backend against the CPU reference, and its speed beside the machine's.
//!
//! Inputs are random and rounded to bf16 on both sides, so that the error is the kernel's own; outputs are poisoned first.
//! One JSON line a measurement; an error over its bound fails the command after all lines are written.

mod attention;
mod elementwise;
mod embedding;
mod optimizer;
mod packed;
mod rope;
mod rows;
mod twin;

use std::{io::Write, path::PathBuf};

use serde_json::{Value, json};

use self::twin::Twins;
use crate::{
    domain::Invalid,
    engine::{
        Error, Result,
        backend::{Backend, cpu::Cpu, cuda::Cuda},
    },
};

/// Flags of `longhaul bench ops`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// cuda: the CPU backend is the reference
    #[arg(long, default_value = "cuda")]
    pub device: String,
    /// Folder that holds cuDNN's and cuBLASLt's libraries, when they are neither on the library path nor among python3's
    /// packages
    #[arg(long, value_name = "FOLDER")]
    pub libraries: Vec<PathBuf>,
    /// Device memory for the tensors, in GiB; 24 hold every shape that is measured
    #[arg(long, default_value_t = 24)]
    pub memory: u64,
    /// Longest key prefix that attention is timed against, in tokens
    #[arg(long, default_value_t = 1 << 20)]
    pub keys: u64,
    /// Only the operations of this group: elementwise, optimizer, embedding, rope, rows, attention or packed
    #[arg(long)]
    pub only: Option<String>,
    /// Check errors, and time nothing
    #[arg(long)]
    pub check_only: bool,
    /// Threads of the CPU reference; all cores by default
    #[arg(long)]
    pub threads: Option<usize>,
}

/// Where measurements go: counts those whose error is over the bound.
struct Report<'a> {
    out: &'a mut dyn Write,
    wrong: Vec<String>,
    /// Bytes a second of a copy on the device, once it is measured: what a kernel's rate is told beside.
    copy_rate: f64,
}

type Check = fn(&mut Twins, &mut Report) -> Result;
/// Takes the longest prefix of keys, which only attention asks for.
type Measure = fn(&mut Twins, &mut Report, u64) -> Result;

/// The operations by name.
const GROUPS: [(&str, Check, Measure); 7] = [
    ("elementwise", elementwise::check, |t, r, _| elementwise::measure(t, r)),
    ("optimizer", optimizer::check, |t, r, _| optimizer::measure(t, r)),
    ("embedding", embedding::check, |t, r, _| embedding::measure(t, r)),
    ("rope", rope::check, |t, r, _| rope::measure(t, r)),
    ("rows", rows::check, |t, r, _| rows::measure(t, r)),
    ("attention", attention::check, attention::measure),
    ("packed", packed::check, |t, r, _| packed::measure(t, r)),
];

/// Timed runs of a kernel.
const ROUNDS: usize = 11;

impl Report<'_> {
    fn line(&mut self, line: &Value) -> Result {
        let written = writeln!(self.out, "{line}").and_then(|()| self.out.flush());
        written.map_err(Error::file("standard output"))
    }

    /// Relative errors of an operation's outputs at one shape.
    fn errors(&mut self, name: &str, shape: &Value, errors: &[(&str, f64)], bound: f64) -> Result {
        // Written so that NaN is wrong.
        let wrong = errors.iter().any(|(_, error)| !matches!(error.partial_cmp(&bound), Some(order) if order.is_le()));
        if wrong {
            self.wrong.push(format!("{name} {shape}"));
        }
        let outputs: serde_json::Map<String, Value> =
            errors.iter().map(|(output, error)| ((*output).to_owned(), json!(error))).collect();
        self.line(&json!({ "check": name, "shape": shape, "errors": outputs, "bound": bound, "right": !wrong }))
    }

    /// Bytes a second of a kernel, each input counted once and each output once, beside a copy's.
    fn speed(&mut self, t: &mut Twins, name: &str, bytes: u64, run: impl FnMut(&mut Cuda) -> Result) -> Result {
        let seconds = t.seconds(ROUNDS, run)?;
        let rate = bytes as f64 / seconds;
        let (speed, share) = (rate / 1e9, rate / self.copy_rate);
        let milliseconds = seconds * 1e3;
        self.line(&json!({ "speed": name, "gb_per_second": speed, "of_copy": share, "milliseconds": milliseconds }))
    }
}

/// Checks and times every operation, a line each on `out`.
pub fn run(args: &Args, out: &mut impl Write) -> Result {
    if args.device != "cuda" {
        return Err(Invalid::new("--device", format!("device is cuda, not {}", args.device)).into());
    }
    let wanted = |group: &str| args.only.as_deref().is_none_or(|only| only == group);
    if !GROUPS.iter().any(|(name, ..)| wanted(name)) {
        let names: Vec<&str> = GROUPS.iter().map(|(name, ..)| *name).collect();
        return Err(Invalid::new("--only", format!("operations are {}", names.join(", "))).into());
    }
    let mut cuda = Cuda::open(0, &args.libraries)?;
    cuda.reserve(args.memory << 30, 0)?;
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into));
    let mut report = Report { out, wrong: Vec::new(), copy_rate: f64::NAN };
    let (card, cudnn) = (cuda.device.name()?, cuda.cudnn_version());
    report.line(&json!({ "card": card, "cudnn": cudnn, "multiprocessors": cuda.device.multiprocessors() }))?;
    let mut twins = Twins::new(Cpu::new(threads)?, Cpu::new(threads)?, cuda, args.memory << 30)?;
    let (t, r) = (&mut twins, &mut report);
    for (_, check, _) in GROUPS.iter().filter(|(name, ..)| wanted(name)) {
        check(t, r)?;
    }
    if !args.check_only {
        rows::copy(t, r)?;
        for (_, _, measure) in GROUPS.iter().filter(|(name, ..)| wanted(name)) {
            measure(t, r, args.keys)?;
        }
    }
    if report.wrong.is_empty() {
        return Ok(());
    }
    Err(Error::Device { library: "longhaul", call: "bench ops".to_owned(), cause: report.wrong.join("; ") })
}
