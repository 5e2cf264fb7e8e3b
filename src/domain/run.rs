//! `RunSpec`: everything a trainer needs to be told about one job. Intent, already validated; never machine numbers.

use std::{fmt, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::{JobId, TrainingSpec, ids::random_suffix, machine::Machine};

/// What the executor hands the trainer as the first line on its standard input.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunSpec {
    pub job: JobId,
    /// The lease's epoch: names the attempt in paths and logs.
    pub epoch: i64,
    /// Folder of the base model in Hugging Face layout.
    pub model: PathBuf,
    /// Name of the base model, written into events and `config.json`'s `_name_or_path`.
    pub model_name: String,
    /// When the job was made, in seconds since 1970: the day that chat templates are told.
    #[serde(default)]
    pub created_at: u64,
    pub training_files: Vec<DataFile>,
    pub validation_files: Vec<DataFile>,
    pub training: TrainingSpec,
    /// Tokens of a sequence, as the validation settled it where the request leaves it open. With it a job that goes on elsewhere,
    /// on other devices, cuts its documents as before.
    pub sequence_length: Option<u64>,
    /// What all ranks of the run share, as the executor sees it.
    pub machine: Machine,
    /// How they are arranged, a process each.
    pub ranks: Ranks,
    /// Which of them this process is.
    pub place: Place,
    /// Its GPU, in the driver's order, where it has one.
    pub gpu: usize,
    /// Folders to look for NVIDIA's libraries in.
    pub libraries: Vec<PathBuf>,
    /// Folder of the job on this host, owned by the trainer while it runs: `checkpoints/step-N/`, `spill/`, `tokens/` go under it.
    pub work_dir: PathBuf,
    /// A complete checkpoint folder (with its `resume/` part) to continue from.
    pub resume_from: Option<PathBuf>,
    /// Read the data, count, preview and stop before any training.
    pub inspect_only: bool,
}

/// How the ranks of a run are arranged: `data` replicas, each of `sequence` ranks that share one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ranks {
    pub sequence: u64,
    pub data: u64,
}

impl Ranks {
    /// One rank.
    pub const ONE: Self = Self { sequence: 1, data: 1 };

    /// All of them; weights, gradients and states are dealt to so many (ZeRO-3).
    pub fn world(self) -> u64 {
        self.sequence * self.data
    }
}

/// A process among those that train a run together, and how it finds the others. Of one rank only the number counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub rank: u64,
    /// `host:port`. Rank 0 listens there, and on port 0 takes a free one, which it tells; the others call.
    pub address: String,
    /// Who knows it may join.
    pub token: Token,
}

impl Place {
    /// Rank 0 of a run whose ranks are all on this host.
    pub fn first() -> Self {
        Self { rank: 0, address: "127.0.0.1:0".into(), token: Token::random() }
    }
}

/// What another host is asked for in a run: `n` of its ranks from `first` on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Part {
    pub first: u64,
    pub n: u64,
    pub of: Ranks,
    /// As all ranks of the run are planned, on whichever host.
    pub machine: Machine,
    pub token: Token,
}

/// A secret of one attempt's ranks. No log shows it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(String);

impl Token {
    /// A fresh one.
    pub fn random() -> Self {
        Self(random_suffix())
    }

    /// The secret itself.
    pub fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// One uploaded file, copied out to local disk by the executor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFile {
    pub path: PathBuf,
    /// The name it was uploaded under; decides the format and is shown in errors. Never a path.
    pub filename: String,
}
