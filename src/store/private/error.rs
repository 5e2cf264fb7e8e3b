//! Why there is no private Postgres, and what to do about it.

use std::{io, path::PathBuf};

/// What kept the private Postgres from running. Every message names the way out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No usable installation.
    #[error(
        "no PostgreSQL server found (looked for initdb and postgres in {}); install one (Debian, Ubuntu: apt-get install \
         postgresql; Fedora: dnf install postgresql-server), or name its folder with --postgres-bin, or give DATABASE_URL",
        .looked.join(", ")
    )]
    NotFound { looked: Vec<String> },
    /// The cluster was made by a major version that is not here.
    #[error(
        "the database in {} was made by PostgreSQL {made_by}, but only {} found; install PostgreSQL {made_by} (Debian, \
         Ubuntu: apt-get install postgresql-{made_by})", .cluster.display(), .found.join(", ")
    )]
    Version { cluster: PathBuf, made_by: String, found: Vec<String> },
    /// Another server has the data folder.
    #[error("{} is used by another running server; stop that one or choose another --data", .folder.display())]
    InUse { folder: PathBuf },
    /// There is no such operating-system user.
    #[error(
        "PostgreSQL refuses to run as root, and there is no user {name} to run it as; name another with --postgres-user"
    )]
    NoAccount { name: String },
    /// The user that Postgres runs as cannot get at the data folder.
    #[error(
        "the user {account} that PostgreSQL runs as cannot enter {} (it refuses root); choose a --data that it can \
         reach, such as /var/lib/longhaul, or allow it with chmod o+x {}", .blocked.display(), .blocked.display()
    )]
    OutOfReach { account: String, blocked: PathBuf },
    /// A folder that should be ours belongs to somebody else.
    #[error("{} belongs to another user and cannot hold the socket; remove it or use a shorter --data", .0.display())]
    Foreign(PathBuf),
    /// A program of the installation failed.
    #[error("{program} failed: {said}")]
    Failed { program: String, said: String },
    /// It started but was not ready in time.
    #[error("PostgreSQL was not ready after {seconds} s; its log is {}, its last words: {said}", .log.display())]
    NotReady { seconds: u64, log: PathBuf, said: String },
    /// A file operation failed.
    #[error("cannot {verb} {what}: {source}")]
    Io { verb: &'static str, what: String, source: io::Error },
}

impl Error {
    /// For `map_err` on file operations: keeps what was tried beside the cause.
    pub(super) fn io(verb: &'static str, what: impl AsRef<std::path::Path>) -> impl FnOnce(io::Error) -> Self {
        let what = what.as_ref().display().to_string();
        move |source| Self::Io { verb, what, source }
    }
}
