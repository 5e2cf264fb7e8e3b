//! What several tests need: folders that clean up after themselves, a private Postgres for the whole run, small models,
//! sessions on any device, a backend that watches its streams, the service in process, jobs and checkpoints in the store.

pub mod database;
pub mod form;
pub mod model;
pub mod ranks;
pub mod rows;
pub mod sandbox;
pub mod server;
pub mod service;
pub mod stage;
pub mod watched;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

pub use database::{Database, cluster_settings, database};
pub use sandbox::Sandbox;

/// Where the tree lies that this binary was built from, for files that tests read. The binary may have been carried to
/// another machine: `LONGHAUL_TEST_DATA` names the tree there, and without it the working directory is tried.
pub fn tree() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR"));
    match std::env::var_os("LONGHAUL_TEST_DATA") {
        Some(named) => named.into(),
        None if built.is_dir() => built.to_owned(),
        None => PathBuf::from("."),
    }
}

/// Names the Python with torch and transformers that judges whole models.
pub const PYTHON: &str = "LONGHAUL_REFERENCE_PYTHON";

/// The Python that [`PYTHON`] names; says so where there is none.
pub fn reference_python() -> Option<OsString> {
    let python = std::env::var_os(PYTHON);
    if python.is_none() {
        eprintln!("SKIPPED: {PYTHON} names no Python with torch and transformers; nothing was compared with them");
    }
    python
}

/// Names a folder whose `node_modules` holds the `openai` package, for Node's client.
pub const NODE: &str = "LONGHAUL_REFERENCE_NODE";

/// The folder that [`NODE`] names; says so where there is none.
pub fn reference_node() -> Option<PathBuf> {
    let folder = std::env::var_os(NODE);
    if folder.is_none() {
        eprintln!("SKIPPED: {NODE} names no folder with the openai package for Node; its client was not run");
    }
    folder.map(PathBuf::from)
}
