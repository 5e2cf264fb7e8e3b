//! `longhaul keys`: made, listed and revoked in a server's database.

use std::{
    ffi::OsString,
    io::{self, Write},
    time::Duration,
};

use serde_json::json;

use super::database::{self, with_store};
use crate::{
    config::Stored,
    domain::{KeyId, Scope, access::Secret},
    store::{
        self, Store,
        keys::{Key, NewKey},
    },
};

/// Seconds of a day.
const DAY: u64 = 86_400;
/// Longest name of a key, in bytes.
const MAX_NAME: usize = 128;

/// Flags of `longhaul keys`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

/// What to do with keys.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Command {
    /// Make a key and print it; it is never shown again. From the first one on, the server asks every request for a key
    Create {
        /// What the key is for; shown in lists
        #[arg(long, default_value = "", value_parser = name)]
        name: String,
        /// Id or name of the project that it acts for
        #[arg(long, default_value = "default", value_name = "PROJECT")]
        project: String,
        /// read (look and download), write (and upload, train, delete) or admin (and open models to other projects)
        #[arg(long, default_value = "write", value_parser = scope)]
        scope: Scope,
        /// Days after which it holds no longer; by default it holds until it is revoked
        #[arg(long, value_parser = clap::value_parser!(u64).range(1..=36_500), value_name = "DAYS")]
        expires_in_days: Option<u64>,
        /// Requests that it may make in a minute; by default as many as it likes
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000), value_name = "N")]
        requests_per_minute: Option<u32>,
    },
    /// List keys as lines of JSON, the oldest first
    List,
    /// Revoke a key: it fails from the next request on, for good
    Revoke {
        /// The key's id, as the list has it
        key: String,
    },
}

/// Why a command on keys did nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Database(#[from] database::Error),
    #[error("the database: {}", database::one_line(.0))]
    Store(#[from] store::Error),
    #[error(
        "--project {0}: there is no such project: `longhaul projects list` shows them, `projects create` makes one"
    )]
    NoProject(String),
    #[error("there is no key {0}: `longhaul keys list` shows them by their ids, which begin with key_")]
    NoKey(String),
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
}

/// Does it, and prints what came.
pub fn run(args: &Stored<Args>, path: OsString, out: &mut impl Write) -> Result<(), Error> {
    with_store(&args.database, &args.data, path, async |store| match &args.args.command {
        Command::Create { name, project, scope, expires_in_days, requests_per_minute } => {
            let found = store.project(project).await?.ok_or_else(|| Error::NoProject(project.clone()))?;
            let life = expires_in_days.map(|days| Duration::from_secs(days * DAY));
            let secret = Secret::random();
            let requests_per_minute = *requests_per_minute;
            let new = NewKey { project: &found.id, name, scope: *scope, life, requests_per_minute };
            store.create_key(&secret, &new).await?;
            Ok(writeln!(out, "{}", secret.reveal())?)
        }
        Command::List => {
            for key in store.keys().await? {
                writeln!(out, "{}", line(&key))?;
            }
            Ok(())
        }
        Command::Revoke { key } => revoke(&store, key).await,
    })
}

async fn revoke(store: &Store, key: &str) -> Result<(), Error> {
    let known = match key.parse::<KeyId>() {
        Ok(id) => store.revoke_key(&id).await?,
        Err(()) => false,
    };
    // Whoever pastes the key itself must not find it in a log.
    let shown: String = key.chars().take(8).collect();
    if known { Ok(()) } else { Err(Error::NoKey(shown)) }
}

fn line(key: &Key) -> serde_json::Value {
    json!({
        "id": key.id, "project": key.project, "name": key.name, "scope": key.scope.as_str(), "ends_in": key.hint,
        "created_at": key.created_at, "expires_at": key.expires_at, "revoked_at": key.revoked_at,
        "last_used_at": key.last_used_at, "requests_per_minute": key.requests_per_minute,
    })
}

fn scope(word: &str) -> Result<Scope, String> {
    Scope::parse(word).ok_or_else(|| "must be read, write or admin".to_owned())
}

/// A name that a line and the database can hold.
pub(super) fn name(text: &str) -> Result<String, String> {
    if text.len() > MAX_NAME || text.chars().any(char::is_control) {
        return Err(format!("must be at most {MAX_NAME} bytes on one line"));
    }
    Ok(text.to_owned())
}
