//! `longhaul jobs`: create, list, show, cancel, pause and resume.

use std::io::Write;

use serde_json::Value;

use super::{
    Failure, Result, bar, create,
    http::{self, Client},
    plan, say,
};
use crate::domain::JobId;

/// Most jobs that one request lists.
const PAGE: u32 = 100;

/// Flags of `longhaul jobs`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

/// What to do with jobs.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Command {
    /// Make a job and print its id
    Create(create::Args),
    /// Say what a job would come to, without making it: steps, memory and time on every host
    Plan(create::Args),
    /// List jobs, newest first
    List {
        /// Most jobs to list
        #[arg(long, default_value_t = 20)]
        limit: u32,
        /// Print each job as a line of JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one job
    Show {
        /// The job's id
        job: String,
        /// Print the job object as it came
        #[arg(long)]
        json: bool,
    },
    /// Cancel a job
    Cancel(Steer),
    /// Pause a job: it keeps a checkpoint to go on from
    Pause(Steer),
    /// Let a paused job go on
    Resume(Steer),
}

/// Flags of commands that change a job.
#[derive(Debug, Clone, clap::Args)]
pub struct Steer {
    /// The job's id
    pub job: String,
    /// Print the job object as it came
    #[arg(long)]
    pub json: bool,
}

/// Runs one of the commands.
pub fn run(args: &Args, client: &Client, out: &mut dyn Write) -> Result {
    match &args.command {
        Command::Create(args) => create::run(args, client, out),
        Command::Plan(args) => plan::run(args, client, out),
        Command::List { limit, json } => list(*limit, *json, client, out),
        Command::Show { job, json } => {
            let job = client.get(&path(job)?, http::SHORT, |_| ())?;
            if *json { say(out, &job) } else { show(&job, out) }
        }
        Command::Cancel(args) => steer(args, "cancel", client, out),
        Command::Pause(args) => steer(args, "pause", client, out),
        Command::Resume(args) => steer(args, "resume", client, out),
    }
}

/// Where a job is found; refuses what is not a job's id, which would make another path.
pub(super) fn path(job: &str) -> Result<String> {
    let id: JobId = job.parse().map_err(|()| Failure::Usage(format!("a job's id looks like ftjob-..., not {job}")))?;
    Ok(format!("/v1/fine_tuning/jobs/{id}"))
}

fn steer(args: &Steer, verb: &str, client: &Client, out: &mut dyn Write) -> Result {
    let job = client.post_empty(&format!("{}/{verb}", path(&args.job)?))?;
    if args.json { say(out, &job) } else { say(out, format_args!("{} {}", text(&job, "id"), text(&job, "status"))) }
}

fn list(limit: u32, json: bool, client: &Client, out: &mut dyn Write) -> Result {
    let mut left = limit;
    let mut after = String::new();
    while left > 0 {
        let page = client.get(&format!("/v1/fine_tuning/jobs?limit={}{after}", left.min(PAGE)), http::SHORT, |_| ())?;
        let jobs = page["data"].as_array().ok_or_else(|| Failure::shape(client.server(), "a list", &page))?;
        for job in jobs {
            if json {
                say(out, job)?;
            } else {
                let (id, status, model) = (text(job, "id"), text(job, "status"), text(job, "model"));
                say(
                    out,
                    format_args!("{id}  {status:<16}  {model}  {}", text(job, "fine_tuned_model"))
                        .to_string()
                        .trim_end(),
                )?;
            }
        }
        left = left.saturating_sub(jobs.len() as u32);
        match jobs.last().map(|job| text(job, "id")) {
            Some(id) if page["has_more"] == true => after = format!("&after={id}"),
            _ => break,
        }
    }
    Ok(())
}

fn show(job: &Value, out: &mut dyn Write) -> Result {
    for name in ["id", "status", "model", "training_file", "validation_file", "fine_tuned_model", "seed"] {
        if !job[name].is_null() {
            say(out, format_args!("{name:<17} {}", text(job, name)))?;
        }
    }
    if let Some(tokens) = job["trained_tokens"].as_u64() {
        say(out, format_args!("{:<17} {}", "trained_tokens", bar::grouped(tokens)))?;
    }
    if let Some(message) = job["error"]["message"].as_str() {
        say(out, format_args!("{:<17} {message}", "error"))?;
    }
    Ok(())
}

/// A field as text, without the quotes of JSON; empty when it is not there.
pub(super) fn text(object: &Value, name: &str) -> String {
    match &object[name] {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
