//! Why a client command did not do what was asked: one line for people, one exit status for scripts.

use std::path::Path;

use serde_json::Value;

/// What went wrong, by whose side it is on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// A file, the disk, a checksum: something on this side. Exit status 1.
    #[error("{0}")]
    Local(String),
    /// Flags that make no sense together. Exit status 2, as for flags that cannot be read at all.
    #[error("{0}")]
    Usage(String),
    /// No answer, or one that is not the API's. Exit status 3.
    #[error("{server}: {cause}")]
    Server { server: String, cause: String },
    /// The server understood and said no. Exit status 4.
    #[error("refused ({status}): {message}")]
    Refused { status: u16, message: String },
    /// The job that was waited for failed. Exit status 5.
    #[error("job {job} failed: {message}")]
    JobFailed { job: String, message: String },
    /// The job that was waited for was cancelled. Exit status 6.
    #[error("job {0} was cancelled")]
    JobCancelled(String),
}

impl Failure {
    /// The process's exit status.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Local(_) => 1,
            Self::Usage(_) => 2,
            Self::Server { .. } => 3,
            Self::Refused { .. } => 4,
            Self::JobFailed { .. } => 5,
            Self::JobCancelled(_) => 6,
        }
    }

    /// For `map_err` on file operations: keeps the path beside the cause.
    pub(super) fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.display().to_string();
        move |error| Self::Local(format!("{path}: {error}"))
    }

    /// An answer without a field that the API promises.
    pub(super) fn shape(server: &str, what: &str, answer: &Value) -> Self {
        let mut answer = answer.to_string();
        answer.truncate(answer.floor_char_boundary(200));
        Self::Server { server: server.to_owned(), cause: format!("an answer without {what}: {answer}") }
    }
}
