//! One binary, several roles: reads the flags, starts the role, turns its end into an exit status.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::Parser;
use longhaul::{
    client::{self, download, http::Client, jobs, upload, watch},
    config::{Cli, Remote, Role},
};

fn main() -> ExitCode {
    match Cli::parse().role {
        Role::Upload(remote) => ask(&remote, upload::run),
        Role::Jobs(remote) => ask(&remote, jobs::run),
        Role::Watch(remote) => ask(&remote, watch::run),
        Role::Download(remote) => ask(&remote, download::run),
    }
}

/// Runs a client command.
fn ask<A: clap::Args>(
    remote: &Remote<A>,
    command: impl FnOnce(&A, &Client, &mut dyn Write) -> client::Result,
) -> ExitCode {
    let done = Client::new(&remote.server).and_then(|client| command(&remote.args, &client, &mut io::stdout()));
    done.map_or_else(|failure| failed(&failure, failure.exit_status()), |()| ExitCode::SUCCESS)
}

/// One line on standard error.
fn failed(why: &dyn std::fmt::Display, status: u8) -> ExitCode {
    // There is no better place to tell that standard error is gone.
    let _ = writeln!(io::stderr(), "longhaul: {why}");
    ExitCode::from(status)
}
