//! `RunSpec`: everything a trainer needs to be told about one job. Intent, already validated; never machine numbers.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{JobId, TrainingSpec, machine::Machine};

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
    pub training_files: Vec<DataFile>,
    pub validation_files: Vec<DataFile>,
    pub training: TrainingSpec,
    /// What this trainer runs on, as the executor sees it.
    pub machine: Machine,
    /// Which GPU that is, in the driver's order, where it is one.
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

/// One uploaded file, copied out to local disk by the executor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFile {
    pub path: PathBuf,
    /// The name it was uploaded under; decides the format and is shown in errors. Never a path.
    pub filename: String,
}
