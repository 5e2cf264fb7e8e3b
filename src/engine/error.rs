//! What can stop a run. Broken invariants of our own panic instead: the process dies and the executor sees it.

use std::path::PathBuf;

use crate::domain::Invalid;

/// Result of everything in the engine.
pub type Result<T = ()> = std::result::Result<T, Error>;

/// Why the engine could not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The customer's model, data or settings; running again would not help.
    #[error("{0}")]
    Input(#[from] Invalid),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File { path: PathBuf, source: std::io::Error },
    /// An arena could not be had from the operating system or the driver.
    #[error("cannot allocate {bytes} bytes of {space} memory: {cause}")]
    OutOfMemory { space: &'static str, bytes: u64, cause: String },
    /// A device or one of its libraries failed.
    #[error("{library}: {call} failed: {cause}")]
    Device { library: &'static str, call: String, cause: String },
    /// A library or driver is not there. The message lists what was looked for and where.
    #[error("{0}")]
    Missing(String),
    /// A rank of the group is gone, and the others cannot go on. `cause` reads on from the rank's name.
    #[error("{peer} {cause}; the other ranks cannot go on without it, start all of them from the last checkpoint")]
    PeerLost { rank: usize, peer: String, cause: String },
    /// The ranks of a group did not find each other. The message says who was missing or refused, and what to change.
    #[error("the ranks did not meet: {0}")]
    Rendezvous(String),
    /// Loss or gradient norm stopped being a number.
    #[error(
        "{what} is {value} at step {step}; the weights of the last checkpoint are sound, lower training.learning_rate"
    )]
    NotFinite { what: &'static str, value: f64, step: u64 },
}

impl Error {
    /// For `map_err` on file operations: keeps the path beside the cause.
    pub fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}
