//! `longhaul projects`: made, limited and listed in a server's database.

use std::{
    ffi::OsString,
    io::{self, Write},
};

use serde_json::json;

use super::{
    database::{self, with_store},
    keys::name,
};
use crate::{
    config::Stored,
    store::{self, projects::Project, quotas::Limits},
};

/// Flags of `longhaul projects`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

/// What to do with projects.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Command {
    /// Make a project and print its id
    Create {
        /// A name that no other project has
        #[arg(value_parser = name)]
        name: String,
    },
    /// Limit what a project may use. What is not named stays as it is; none lifts a limit
    Set {
        /// The project's id or name
        project: String,
        /// Bytes of its files and of uploads under way
        #[arg(long, value_parser = limit, value_name = "BYTES|none")]
        max_stored_bytes: Option<Limit>,
        /// Its jobs that have not ended
        #[arg(long, value_parser = limit, value_name = "N|none")]
        max_jobs: Option<Limit>,
        /// Tokens trained by its jobs of the last 24 hours, after which it makes no new ones
        #[arg(long, value_parser = limit, value_name = "N|none")]
        max_tokens_per_day: Option<Limit>,
        /// Tokens trained by all its jobs, after which it makes no new ones
        #[arg(long, value_parser = limit, value_name = "N|none")]
        max_tokens: Option<Limit>,
    },
    /// List projects as lines of JSON, the oldest first
    List,
}

/// A limit as it is written.
#[derive(Debug, Clone, Copy)]
pub struct Limit(Option<u64>);

fn limit(text: &str) -> Result<Limit, String> {
    match text {
        "none" => Ok(Limit(None)),
        number => match number.parse::<u64>() {
            Ok(limit) if i64::try_from(limit).is_ok() => Ok(Limit(Some(limit))),
            _ => Err("must be a whole number, or none".to_owned()),
        },
    }
}

/// Why a command on projects did nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Database(#[from] database::Error),
    #[error("the database: {}", database::one_line(.0))]
    Store(#[from] store::Error),
    #[error("there is no project {0}: `longhaul projects list` shows them")]
    Absent(String),
    #[error("there is a project named {0} already: give another name")]
    Taken(String),
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
}

/// Does it, and prints what came.
pub fn run(args: &Stored<Args>, path: OsString, out: &mut impl Write) -> Result<(), Error> {
    with_store(&args.database, &args.data, path, async |store| match &args.args.command {
        Command::Create { name } => {
            let made = store.create_project(name).await?.ok_or_else(|| Error::Taken(name.clone()))?;
            Ok(writeln!(out, "{}", made.id)?)
        }
        Command::Set { project, max_stored_bytes, max_jobs, max_tokens_per_day, max_tokens } => {
            let found = store.project(project).await?.ok_or_else(|| Error::Absent(project.clone()))?;
            let before = store.limits(&found.id).await?;
            let set = |named: &Option<Limit>, before: Option<u64>| named.map_or(before, |limit| limit.0);
            let limits = Limits {
                stored_bytes: set(max_stored_bytes, before.stored_bytes),
                jobs: set(max_jobs, before.jobs),
                tokens_per_day: set(max_tokens_per_day, before.tokens_per_day),
                tokens: set(max_tokens, before.tokens),
            };
            store.set_limits(&found.id, &limits).await?;
            Ok(writeln!(out, "{}", line(&found, &limits))?)
        }
        Command::List => {
            for project in store.projects().await? {
                let limits = store.limits(&project.id).await?;
                writeln!(out, "{}", line(&project, &limits))?;
            }
            Ok(())
        }
    })
}

fn line(project: &Project, limits: &Limits) -> serde_json::Value {
    json!({
        "id": project.id, "name": project.name, "created_at": project.created_at,
        "max_stored_bytes": limits.stored_bytes, "max_jobs": limits.jobs, "max_tokens_per_day": limits.tokens_per_day,
        "max_tokens": limits.tokens,
    })
}
