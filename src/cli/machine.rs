//! `longhaul machine`: what this host can train on, as JSON. An executor asks a child of this kind.

use std::io::Write;

use crate::{
    domain::Machine,
    engine::{Error, Result},
    trainer::gpu::{self, Stated},
};

/// Looks for GPUs beside this `host` and prints every device that a job may train on.
pub fn run(host: &Machine, stated: &Stated, out: &mut impl Write) -> Result {
    let found = gpu::found(host, stated)?;
    let text = serde_json::to_string_pretty(&found).expect("machines are made of strings and numbers");
    writeln!(out, "{text}").map_err(Error::file("standard output"))
}
