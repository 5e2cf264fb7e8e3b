//! Settings from flags and environment: the only reader of the latter. Each flag of a server role names its variable.
//!
//! Out: one [`Cli`], parsed. What the values mean is checked by the role that they are for.

use clap::{Parser, Subcommand};

use crate::{
    bench,
    cli::{model, plan},
    client::{self, download, jobs, upload, watch},
};

/// Fine-tunes language models on documents of millions of tokens.
#[derive(Debug, Parser)]
#[command(name = "longhaul", version, after_help = client::EXIT_STATUSES)]
pub struct Cli {
    #[command(subcommand)]
    pub role: Role,
}

/// What this process is.
#[derive(Debug, Subcommand)]
pub enum Role {
    /// What this machine would do about a model and a sequence length
    Plan(plan::Args),
    /// Measure a training step on random weights
    #[command(subcommand)]
    Bench(Bench),
    /// Make a model folder
    #[command(subcommand)]
    Model(Model),
    /// Send files to a server and print their ids
    Upload(Remote<upload::Args>),
    /// Make, list, show and cancel fine-tuning jobs
    Jobs(Remote<jobs::Args>),
    /// Follow a job to its end
    Watch(Remote<watch::Args>),
    /// Fetch the files of a checkpoint, checked and resumable
    Download(Remote<download::Args>),
}

/// What is measured.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Operations of the CUDA backend against the CPU reference, and their speed
    Ops(bench::ops::Args),
    /// Optimizer steps, one JSON line each
    Step(bench::step::Args),
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
}
