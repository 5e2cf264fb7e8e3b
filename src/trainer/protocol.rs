//! Lines in, lines out: the only thing an executor and its trainers agree on. A run of several ranks has a trainer for each; rank
//! 0 speaks for all, and of the others only how they ended counts.
//!
//! JSON, one message a line. The executor writes [`Order`]s to the trainer's standard input, the trainer writes
//! [`Report`]s to its standard output; standard error is the trainer's log. End of file on standard input is the
//! executor's death, and so the trainer's.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::domain::{
    Event, Invalid, RunSpec,
    progress::{DataSummary, Evaluation, StepMetrics, WrittenCheckpoint},
};

/// How often a trainer says that it is alive, whatever its step is doing. One that is silent for several of these is stuck.
pub const ALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// Longest line either side accepts; a longer one is garbage and ends the conversation.
pub const MAX_LINE_BYTES: usize = 4 << 20;

/// What an executor tells its trainer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum Order {
    /// The first line: what to train.
    Start { run: Box<RunSpec> },
    /// The lease was renewed; it ends this many milliseconds from now. Past it, by its own monotonic clock, the trainer exits.
    Lease { remaining_ms: u64 },
    /// Stop at the next step boundary; write a checkpoint first if asked to.
    Stop { checkpoint: bool },
}

/// What a trainer tells its executor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "snake_case")]
pub enum Report {
    /// The process runs. Sent on its own beside everything else.
    Alive,
    /// Rank 0 of several listens for the others at this address.
    Meeting { address: String },
    /// Something the customer should read.
    Event { event: Event },
    /// The data set was read; sent once, before the first step.
    Data { summary: DataSummary },
    /// One optimizer step is done.
    Step { metrics: StepMetrics },
    /// The validation files were evaluated at this step.
    Evaluation { evaluation: Evaluation },
    /// A checkpoint folder is complete on disk: written aside, synced, renamed.
    Checkpoint { checkpoint: WrittenCheckpoint },
    /// The run is over as intended. Follows the last checkpoint.
    Finished { trained_tokens: u64 },
    /// Stopped because it was told to, at this step.
    Stopped { step: u64 },
    /// The run cannot go on and running it again would not help: the customer's input is at fault.
    Refused { error: Invalid },
    /// The run cannot go on; another try may help (full disk, lost device). `lost` is the rank whose end this one only follows.
    Broken {
        message: String,
        #[serde(default)]
        lost: Option<u64>,
    },
}
