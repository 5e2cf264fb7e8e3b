//! What a run reports as it goes: counts of its data, numbers of its steps, checkpoints on disk.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Counts of the data set as it will be trained on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DataSummary {
    pub documents: u64,
    pub tokens: u64,
    /// Tokens that a loss counts, over one epoch: those that are trained.
    pub valid_labels: u64,
    /// Tokens added to fill documents and sequences.
    pub padding: u64,
    /// Documents cut into several sequences, and cut short.
    pub split_documents: u64,
    pub truncated_documents: u64,
    /// Empty documents left out.
    pub empty_documents: u64,
    /// Pieces left out of which no token is trained.
    #[serde(default)]
    pub untrained_pieces: u64,
    pub longest_document: u64,
    pub sequences: u64,
    pub sequence_length: u64,
    pub total_steps: u64,
    /// The held-out files, where there are some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<HeldOut>,
    /// The first examples.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub preview: Vec<PreviewedExample>,
}

/// Counts of the validation files.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HeldOut {
    pub documents: u64,
    pub tokens: u64,
    /// Tokens that the loss counts.
    pub valid_labels: u64,
    pub sequences: u64,
}

/// One example as the model will have it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PreviewedExample {
    /// File and line.
    pub origin: String,
    pub tokens: u64,
    pub trained_tokens: u64,
    /// Its begin, in runs of tokens that are all trained or all not.
    pub spans: Vec<PreviewedSpan>,
    /// Runs that are not shown.
    pub more_spans: u64,
}

/// A run of tokens of an example.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PreviewedSpan {
    pub trained: bool,
    pub tokens: u64,
    /// Its text, or the begin of it.
    pub text: String,
    /// The end of its text, where the middle is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<String>,
}

/// The validation files, evaluated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Optimizer steps done before it; 0 is the base model.
    pub step: u64,
    /// Mean cross entropy, nats, over all valid labels of the validation files.
    pub valid_loss: f64,
    pub valid_mean_token_accuracy: f64,
    pub valid_labels: u64,
}

/// Numbers of one optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Steps done, counting this one.
    pub step: u64,
    pub total_steps: u64,
    /// Mean cross entropy, nats, over the step's valid labels.
    pub train_loss: f64,
    /// Fraction of valid labels that the model ranks first.
    pub train_mean_token_accuracy: f64,
    pub learning_rate: f64,
    /// Global norm before clipping.
    pub grad_norm: f64,
    pub seconds: f64,
    pub tokens_per_second: f64,
    /// Valid labels of this step, and tokens (without padding) since the job began.
    pub valid_labels: u64,
    pub tokens_seen: u64,
    /// Peak bytes by the operating system's (or driver's) count.
    pub device_peak_bytes: u64,
    pub estimated_seconds_left: f64,
}

/// A complete checkpoint folder on the executor's disk.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct WrittenCheckpoint {
    pub step: u64,
    /// Folder name under the run's `work_dir/checkpoints/`.
    pub folder: String,
    /// Every file of it, paths relative to the folder, `/`-separated. Those under `resume/` are for continuing, not for download.
    pub files: Vec<WrittenFile>,
    /// `train_loss`, `valid_loss`, ... at this step.
    pub metrics: BTreeMap<String, f64>,
    /// True for the one that ends the run: it becomes the fine-tuned model.
    pub last: bool,
    pub trained_tokens: u64,
}

/// One file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrittenFile {
    pub path: String,
    pub bytes: u64,
    /// Lower-case hex.
    pub sha256: String,
}
