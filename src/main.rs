//! One binary, several roles: reads the flags, starts the role, turns its end into an exit status.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::Parser;
use longhaul::{
    bench, cli,
    client::{self, download, http::Client, jobs, upload, watch},
    config::{Bench, Cli, Model, Remote, Role},
    domain::ModelConfig,
    engine::{self, checkpoint::huggingface},
    executor::host,
    telemetry, trainer,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = telemetry::start(&cli.log, cli.log_format) {
        return failed(&error, 2);
    }
    match cli.role {
        Role::Serve(args) => ended(cli::serve::run(&args, std::env::var_os("PATH").unwrap_or_default())),
        Role::Execute(args) => ended(cli::serve::execute(&args)),
        Role::Train => ended(trainer::run(io::BufReader::new(io::stdin()), io::stdout())),
        Role::Plan(args) => {
            let machine = host::cpu(&std::env::temp_dir());
            ended(cli::plan::run(&args, &machine, read_config, &mut io::stdout()))
        }
        Role::Bench(Bench::Step(args)) => {
            let scratch = std::env::temp_dir();
            ended(bench::step::run(&args, &host::cpu(&scratch), &scratch, &mut io::stdout()))
        }
        Role::Bench(Bench::Ops(args)) => ended(bench::ops::run(&args, &mut io::stdout())),
        Role::Model(Model::Init(args)) => ended(cli::model::init(&args)),
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

/// A model folder's config.
fn read_config(folder: &std::path::Path) -> engine::Result<ModelConfig> {
    Ok(ModelConfig::from_config_text(&huggingface::config_text(folder)?)?)
}

/// The exit status of a command that either did what it should or says why not.
fn ended<E: std::fmt::Display>(result: Result<(), E>) -> ExitCode {
    result.map_or_else(|error| failed(&error, 1), |()| ExitCode::SUCCESS)
}

/// One line on standard error.
fn failed(why: &dyn std::fmt::Display, status: u8) -> ExitCode {
    // There is no better place to tell that standard error is gone.
    let _ = writeln!(io::stderr(), "longhaul: {why}");
    ExitCode::from(status)
}
