//! Why a model could not be fetched, and what would help.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::domain::Invalid;

pub(super) type Result<T> = std::result::Result<T, Failure>;

/// What stands in the way.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Trying again would not help: the customer or the operator has something to do.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The hub does not answer, or not as it should, after many tries.
    #[error("{0}")]
    Away(String),
    /// What the hub sends is not to be taken.
    #[error("the hub sends something that is not taken: {0}")]
    Refused(String),
    /// The cache cannot be written.
    #[error("{path}: {source}")]
    Disk { path: PathBuf, source: io::Error },
    /// Nobody wants it any more.
    #[error("stopped")]
    Stopped,
}

impl Failure {
    /// An error of the cache's disk. A full one is told as such: no try helps until somebody frees space.
    pub(super) fn disk(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => full(&path, "is full"),
            _ => Self::Disk { path, source },
        }
    }

    /// Not enough room, known beforehand.
    pub(super) fn no_room(path: &Path, missing: u64, free: u64) -> Self {
        full(path, &format!("has {free} bytes free and the model needs {missing} more"))
    }
}

fn full(path: &Path, what: &str) -> Failure {
    let message = format!(
        "the disk of the models' cache on the executor's host ({}) {what}; free space there, or name another cache \
         (HF_HUB_CACHE), and make the job again",
        path.display()
    );
    Failure::Invalid(Invalid::with_code("disk_full", "model", message))
}
