//! Settings from flags and environment: the only reader of the latter. Each flag of a server role names its variable.
//!
//! Out: one [`Cli`], parsed. What the values mean is checked by the role that they are for.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Parser, Subcommand};

use crate::{
    bench,
    cli::{keys, model, plan, projects},
    client::{self, download, jobs, upload, watch},
    telemetry,
};

/// Fine-tunes language models on documents of millions of tokens.
#[derive(Debug, Parser)]
#[command(name = "longhaul", version, after_help = client::EXIT_STATUSES)]
pub struct Cli {
    #[command(subcommand)]
    pub role: Role,
    /// What is logged, as in info,longhaul::store=debug
    #[arg(long, env = "LONGHAUL_LOG", default_value = "info", global = true, hide = true, value_name = "FILTER")]
    pub log: String,
    /// How a log line looks
    #[arg(long, env = "LONGHAUL_LOG_FORMAT", default_value = "text", global = true, hide = true)]
    pub log_format: telemetry::Format,
}

/// What this process is.
#[derive(Debug, Subcommand)]
pub enum Role {
    /// Serve the API, and execute jobs on this host
    Serve(Serve),
    /// Execute jobs of another host's API
    Execute(Execute),
    /// Train one job; started by an executor, which writes its orders
    #[command(hide = true)]
    Train,
    /// What this machine would do about a model and a sequence length
    Plan(Stating<plan::Args>),
    /// What this host can train on, as JSON
    Machine(Stating<Nothing>),
    /// Measure a device's speeds, for the planner
    Calibrate(Here<bench::calibrate::Args>),
    /// Measure a training step on random weights
    #[command(subcommand)]
    Bench(Bench),
    /// Make a model folder
    #[command(subcommand)]
    Model(Model),
    /// Send files to a server and print their ids
    Upload(Remote<upload::Args>),
    /// Make, list, show, cancel, pause and resume fine-tuning jobs
    Jobs(Remote<jobs::Args>),
    /// Make, list and revoke keys of a server; it asks for one as soon as there is one
    Keys(Stored<keys::Args>),
    /// Make, limit and list projects, to which files, jobs and keys belong
    Projects(Stored<projects::Args>),
    /// Follow a job to its end
    Watch(Remote<watch::Args>),
    /// Fetch the files of a checkpoint, checked and resumable
    Download(Remote<download::Args>),
}

/// Flags of `longhaul serve`.
#[derive(Debug, Clone, clap::Args)]
pub struct Serve {
    #[command(flatten)]
    pub places: Places,
    #[command(flatten)]
    pub database: Database,
    /// Address to listen on; port 0 takes a free one
    #[arg(long, env = "LONGHAUL_LISTEN", default_value = "127.0.0.1:8080", value_name = "ADDRESS")]
    pub listen: SocketAddr,
    /// Address that tells Prometheus what the service counts, as in 127.0.0.1:9090; none by default. Whoever reaches it may read it
    #[arg(long, env = "LONGHAUL_METRICS", value_name = "ADDRESS")]
    pub metrics: Option<SocketAddr>,
    /// Ask for a key although none was made yet; without this, one is asked for as soon as there is one
    #[arg(long, env = "LONGHAUL_REQUIRE_KEYS")]
    pub require_keys: bool,
    /// Listen beyond this host although nobody needs a key yet: whoever reaches the address can do everything
    #[arg(long, env = "LONGHAUL_OPEN_TO_ALL")]
    pub open_to_all: bool,
    /// Serve the API only; jobs wait for an executor elsewhere
    #[arg(long, env = "LONGHAUL_NO_EXECUTOR")]
    pub no_executor: bool,
    /// Largest uploaded file, bytes
    #[arg(long, env = "LONGHAUL_MAX_UPLOAD_BYTES", default_value_t = 64 << 30, value_name = "BYTES")]
    pub max_upload_bytes: u64,
    #[command(flatten)]
    pub executor: Executor,
}

/// Which database a server uses.
#[derive(Debug, Clone, clap::Args)]
pub struct Database {
    /// Postgres to use (postgres://...); without it, a private one in the data folder
    #[arg(long, env = "DATABASE_URL", global = true, hide_env_values = true, value_name = "URL")]
    pub database_url: Option<String>,
    /// Folder of Postgres' programs for the private one; found by itself where it is in the usual places
    #[arg(long, env = "LONGHAUL_POSTGRES_BIN", global = true, value_name = "DIR")]
    pub postgres_bin: Option<PathBuf>,
    /// User that runs the private Postgres when this process is root
    #[arg(long, env = "LONGHAUL_POSTGRES_USER", global = true, value_name = "NAME")]
    pub postgres_user: Option<String>,
}

/// A command that looks into a server's database, whether the server runs or not.
#[derive(Debug, Clone, clap::Args)]
pub struct Stored<A: clap::Args> {
    #[command(flatten)]
    pub args: A,
    /// Folder that the server keeps its things in
    #[arg(long, env = "LONGHAUL_DATA", default_value = ".longhaul", global = true, value_name = "DIR")]
    pub data: PathBuf,
    #[command(flatten)]
    pub database: Database,
}

/// Flags of `longhaul execute`.
#[derive(Debug, Clone, clap::Args)]
pub struct Execute {
    #[command(flatten)]
    pub places: Places,
    /// Postgres that the API uses
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: String,
    #[command(flatten)]
    pub executor: Executor,
}

/// Where a server role keeps things.
#[derive(Debug, Clone, clap::Args)]
pub struct Places {
    /// Folder for everything that this process keeps
    #[arg(long, env = "LONGHAUL_DATA", default_value = ".longhaul", value_name = "DIR")]
    pub data: PathBuf,
    /// Folder of checkpoints, shared between the API and its executors; weights/ in the data folder by default
    #[arg(long, env = "LONGHAUL_WEIGHTS", value_name = "DIR")]
    pub weights: Option<PathBuf>,
    /// Folder of base models, each a Hugging Face folder; models/ in the data folder by default
    #[arg(long, env = "LONGHAUL_MODELS", value_name = "DIR")]
    pub models: Option<PathBuf>,
}

/// How an executor works.
#[derive(Debug, Clone, clap::Args)]
pub struct Executor {
    /// Seconds after which the job of an executor that is gone goes to another one
    #[arg(long, env = "LONGHAUL_LEASE", default_value = "30", value_parser = seconds, value_name = "SECONDS")]
    pub lease: Duration,
    /// Seconds that a trainer may take to write a checkpoint when the server is stopped
    #[arg(long, env = "LONGHAUL_GRACE", default_value = "60", value_parser = seconds, value_name = "SECONDS")]
    pub grace: Duration,
    /// Seconds that a look for GPUs may take before it is given up and tried again
    #[arg(long, env = "LONGHAUL_MACHINE_TIMEOUT", default_value = "60", value_parser = seconds, value_name = "SECONDS")]
    pub machine_timeout: Duration,
    /// Name or address under which other hosts reach this one, for jobs that take several hosts; the host's name by default
    #[arg(long, env = "LONGHAUL_ADDRESS", value_name = "HOST")]
    pub address: Option<String>,
    #[command(flatten)]
    pub hub: Hub,
    #[command(flatten)]
    pub sizes: Sizes,
    #[command(flatten)]
    pub devices: Devices,
}

/// Where base models come from that are in no folder: organization/name, or organization/name@revision.
#[derive(Debug, Clone, clap::Args)]
pub struct Hub {
    /// Hub that base models are fetched from by name
    #[arg(long, env = "HF_ENDPOINT", default_value = "https://huggingface.co", value_name = "URL")]
    pub hub_endpoint: String,
    /// Token for models that the hub gives to some accounts only
    #[arg(long, env = "HF_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub hub_token: Option<String>,
    /// Cache of the hub's models, shared with Hugging Face's tools; hub/ in HF_HOME by default
    #[arg(long, env = "HF_HUB_CACHE", value_name = "DIR")]
    pub hub_cache: Option<PathBuf>,
    /// Fetch no models; those in the cache may still be used
    #[arg(long, env = "LONGHAUL_NO_FETCH")]
    pub no_fetch: bool,
    #[arg(long, env = "HF_HOME", hide = true)]
    pub hf_home: Option<PathBuf>,
    #[arg(long, env = "HOME", hide = true, default_value = ".")]
    pub home: PathBuf,
}

/// How much of this host may be used, where less than it has.
#[derive(Debug, Clone, clap::Args)]
pub struct Sizes {
    /// Bytes of the host's memory that a trainer may use; by default what is free, less a tenth
    #[arg(long, env = "LONGHAUL_MEMORY", value_parser = bytes, value_name = "BYTES")]
    pub memory: Option<u64>,
    /// Bytes of a GPU's memory that a trainer may use; by default what is free, less a margin
    #[arg(long, env = "LONGHAUL_DEVICE_MEMORY", value_parser = bytes, value_name = "BYTES")]
    pub device_memory: Option<u64>,
}

/// How this host's devices are found, and how fast they are.
#[derive(Debug, Clone, clap::Args)]
pub struct Devices {
    /// Folder that holds cuDNN's and cuBLASLt's libraries, when they are neither on the library path nor among python3's
    /// packages; several are given one by one or with : between them
    #[arg(long, env = "LONGHAUL_LIBRARIES", value_delimiter = ':', value_name = "FOLDER")]
    pub libraries: Vec<PathBuf>,
    /// File of measured speeds, which longhaul calibrate writes; machine.json in the data folder by default
    #[arg(long, env = "LONGHAUL_MACHINE_FILE", value_name = "FILE")]
    pub machine_file: Option<PathBuf>,
}

impl Devices {
    /// Where measured speeds are kept.
    pub fn machine_file(&self, data: &Path) -> PathBuf {
        self.machine_file.clone().unwrap_or_else(|| data.join("machine.json"))
    }
}

/// A command that looks at this host.
#[derive(Debug, Clone, clap::Args)]
pub struct Here<A: clap::Args> {
    #[command(flatten)]
    pub args: A,
    #[command(flatten)]
    pub devices: Devices,
    /// Folder that a server of this host keeps its things in
    #[arg(long, env = "LONGHAUL_DATA", default_value = ".longhaul", value_name = "DIR")]
    pub data: PathBuf,
}

/// A command that looks at this host and may be told how much of it counts.
#[derive(Debug, Clone, clap::Args)]
pub struct Stating<A: clap::Args> {
    #[command(flatten)]
    pub here: Here<A>,
    #[command(flatten)]
    pub sizes: Sizes,
}

/// No flags of a command's own.
#[derive(Debug, Clone, clap::Args)]
pub struct Nothing {}

/// Less than this is a slip: a number of GiB, say.
const LEAST_BYTES: u64 = 64 << 20;

fn bytes(text: &str) -> Result<u64, String> {
    match text.parse::<u64>() {
        Ok(n) if n >= LEAST_BYTES => Ok(n),
        _ => Err(format!("must be a number of bytes, {LEAST_BYTES} (64 MiB) or more")),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<u64>() {
        Ok(n) if (1..=86_400).contains(&n) => Ok(Duration::from_secs(n)),
        _ => Err("must be between 1 and 86400 seconds".into()),
    }
}

/// What is measured.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Operations of the CUDA backend against the CPU reference, and their speed
    Ops(bench::ops::Args),
    /// Optimizer steps, one JSON line each
    Step(Box<Here<bench::step::Args>>),
}

/// What is done with a model folder.
#[derive(Debug, Subcommand)]
pub enum Model {
    /// A small model with random weights and a tokenizer trained on the given documents
    Init(model::Args),
}

/// A client command and the server it is for.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = client::EXIT_STATUSES)]
pub struct Remote<A: clap::Args> {
    #[command(flatten)]
    pub args: A,
    /// Address of the server
    #[arg(long, env = "LONGHAUL_SERVER", default_value = "http://127.0.0.1:8080", global = true, value_name = "URL")]
    pub server: String,
    /// Key that the server asks for; OPENAI_API_KEY is taken where this is not given
    #[arg(long, env = "LONGHAUL_API_KEY", hide_env_values = true, global = true, value_name = "KEY")]
    pub api_key: Option<String>,
}

impl<A: clap::Args> Remote<A> {
    /// The key to send, if there is one. A variable that is empty is none.
    pub fn key(&self) -> Option<String> {
        let key = self.api_key.clone().filter(|key| !key.is_empty());
        key.or_else(|| std::env::var("OPENAI_API_KEY").ok().filter(|key| !key.is_empty()))
    }
}
