//! `longhaul projects`: made and listed in a server's database.

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
    store::{self, projects::Project},
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
    /// List projects as lines of JSON, the oldest first
    List,
}

/// Why a command on projects did nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Database(#[from] database::Error),
    #[error("the database: {}", database::one_line(.0))]
    Store(#[from] store::Error),
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
        Command::List => {
            for project in store.projects().await? {
                writeln!(out, "{}", line(&project))?;
            }
            Ok(())
        }
    })
}

fn line(project: &Project) -> serde_json::Value {
    json!({"id": project.id, "name": project.name, "created_at": project.created_at})
}
