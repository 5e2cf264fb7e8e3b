//! The states of a job and which may follow which. The database enforces the same table (`migrations/0002_jobs.sql`).

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a job is in its life (design: `validating_files -> queued -> running -> succeeded | failed | cancelled`,
/// with `paused` from any state before the end, and back to where the job was).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobStatus {
    /// Accepted; an executor tokenizes and counts the files before it may queue.
    ValidatingFiles,
    /// Waiting for an executor.
    Queued,
    /// Held by an executor under a lease.
    Running,
    /// Set aside by the user; keeps its checkpoints.
    Paused,
    /// Ended with a model.
    Succeeded,
    /// Ended without, and `error` says why.
    Failed,
    /// Ended by the user.
    Cancelled,
}

impl JobStatus {
    /// Every status, in the order of a life.
    pub const ALL: [Self; 7] = [
        Self::ValidatingFiles,
        Self::Queued,
        Self::Running,
        Self::Paused,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// The word used in the API and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ValidatingFiles => "validating_files",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The status of that word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.as_str() == word)
    }

    /// True when nothing follows.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// True when a job may go from `self` to `next`.
    pub fn may_become(self, next: Self) -> bool {
        use JobStatus::{Cancelled, Failed, Paused, Queued, Running, Succeeded, ValidatingFiles};
        matches!(
            (self, next),
            (ValidatingFiles, Queued | Paused | Failed | Cancelled)
                | (Queued, Running | Paused | Failed | Cancelled)
                | (Running, Queued | Paused | Succeeded | Failed | Cancelled)
                | (Paused, ValidatingFiles | Queued | Cancelled)
        )
    }
}

impl fmt::Display for JobStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
