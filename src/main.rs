//! One binary, several roles: reads the flags, starts the role, turns its end into an exit status.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::Parser;
use longhaul::{
    bench, cli,
    client::{self, download, http::Client, jobs, upload, watch},
    config::{Bench, Cli, Here, Model, Remote, Role, Sizes, Stating},
    domain::{Machine, ModelConfig, machine::MachineFile},
    engine::{self, checkpoint::huggingface},
    executor::host,
    telemetry,
    trainer::{self, gpu::Stated},
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
        Role::Plan(Stating { here, sizes }) => ended(at(&here, Some(&sizes), |host, stated| {
            cli::plan::run(&here.args, host, stated, read_config, &mut io::stdout())
        })),
        Role::Machine(Stating { here, sizes }) => {
            ended(at(&here, Some(&sizes), |host, stated| cli::machine::run(host, stated, &mut io::stdout())))
        }
        Role::Calibrate(here) => ended(calibrate(&here)),
        Role::Bench(Bench::Step(here)) => ended(at(&here, None, |host, stated| {
            let (scratch, arguments) = (std::env::temp_dir(), std::env::args_os().skip(1).collect::<Vec<_>>());
            let process = bench::step::Here { scratch: &scratch, arguments: &arguments };
            bench::step::run(&here.args, host, stated, process, &mut io::stdout())
        })),
        Role::Bench(Bench::Ops(args)) => ended(bench::ops::run(&args, &mut io::stdout())),
        Role::Model(Model::Init(args)) => ended(cli::model::init(&args)),
        Role::Keys(args) => {
            ended(cli::keys::run(&args, std::env::var_os("PATH").unwrap_or_default(), &mut io::stdout()))
        }
        Role::Projects(args) => {
            ended(cli::projects::run(&args, std::env::var_os("PATH").unwrap_or_default(), &mut io::stdout()))
        }
        Role::Upload(remote) => ask(&remote, upload::run),
        Role::Jobs(remote) => ask(&remote, jobs::run),
        Role::Watch(remote) => ask(&remote, watch::run),
        Role::Download(remote) => ask(&remote, download::run),
    }
}

/// Does something with what this host has, and with what is said of it.
fn at<A: clap::Args>(
    here: &Here<A>,
    sizes: Option<&Sizes>,
    work: impl FnOnce(&Machine, &Stated) -> engine::Result,
) -> engine::Result {
    let file = host::machine_file(&here.devices.machine_file(&here.data))?;
    let host = host::cpu(&here.data, sizes.and_then(|sizes| sizes.memory), &file);
    let device_memory = sizes.and_then(|sizes| sizes.device_memory);
    work(&host, &Stated { libraries: &here.devices.libraries, device_memory, file: &file })
}

/// Measures a device of this host. A machine file that cannot be read is no obstacle: it is what is written anew.
fn calibrate(here: &Here<bench::calibrate::Args>) -> engine::Result {
    let machine_file = &here.devices.machine_file(&here.data);
    let file = host::machine_file(machine_file).unwrap_or_else(|error| {
        tracing::warn!(%error, "the old machine file is replaced");
        MachineFile::default()
    });
    let stated = Stated { libraries: &here.devices.libraries, device_memory: None, file: &file };
    let folders = bench::calibrate::Folders { scratch: &here.data, machine_file };
    bench::calibrate::run(&here.args, &host::cpu(&here.data, None, &file), &stated, folders, &mut io::stdout())
}

/// Runs a client command.
fn ask<A: clap::Args>(
    remote: &Remote<A>,
    command: impl FnOnce(&A, &Client, &mut dyn Write) -> client::Result,
) -> ExitCode {
    let done = Client::new(&remote.server)
        .and_then(|client| client.with_key(remote.key().as_deref()))
        .and_then(|client| command(&remote.args, &client, &mut io::stdout()));
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
