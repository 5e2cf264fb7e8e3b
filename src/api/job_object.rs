//! A job as JSON: what is sent to make one and what is answered.
//!
//! The shapes are OpenAI's; what is ours stands under `training` and `progress`. [`CreateJob`] is here for the contract
//! alone: bodies are read by `domain::JobRequest`, field by field, and a test holds the two together.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::{
    domain::{TrainingSpec, hyperparameters::BASE_LEARNING_RATE},
    store::{Listed, jobs::Job},
};

/// A job to be made.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "describes the body in the contract; domain::JobRequest reads it")]
pub struct CreateJob {
    /// Name of a base model of this server, see `/v1/models`; or `organization/name`, or `organization/name@revision`, of a model on the
    /// hub of its executors, which is fetched before the files are validated.
    #[schema(min_length = 1, max_length = 256)]
    model: String,
    /// Id of an uploaded file with purpose `fine-tune`.
    training_file: String,
    /// Id of a file whose loss is measured before, during and after training.
    #[schema(required = false)]
    validation_file: Option<String>,
    /// Part of the fine-tuned model's name: letters, digits, `-`, `_`, `.`.
    #[schema(required = false, min_length = 1, max_length = 64)]
    suffix: Option<String>,
    /// Seed of every random number of the run; chosen and shown where absent.
    #[schema(required = false, minimum = 0, maximum = 2_147_483_647)]
    seed: Option<u64>,
    /// At most 16 pairs of strings, keys up to 64 and values up to 512 characters.
    #[schema(required = false)]
    metadata: Option<BTreeMap<String, String>>,
    #[schema(required = false)]
    method: Option<CreateMethod>,
    /// The older place of `method.supervised.hyperparameters`.
    #[schema(required = false, deprecated)]
    hyperparameters: Option<CreateHyperparameters>,
    /// Not offered: absent or empty.
    #[schema(required = false, value_type = Option<Vec<Object>>)]
    integrations: Option<Vec<Value>>,
    #[schema(required = false)]
    training: Option<CreateTraining>,
}

/// How to train. Only `supervised` is offered.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "see CreateJob")]
pub struct CreateMethod {
    /// `supervised`
    #[schema(rename = "type")]
    kind: String,
    #[schema(required = false)]
    supervised: Option<CreateSupervised>,
}

/// Settings of supervised training.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "see CreateJob")]
pub struct CreateSupervised {
    #[schema(required = false)]
    hyperparameters: Option<CreateHyperparameters>,
}

/// OpenAI's three numbers; each may also be `"auto"`, the default.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "see CreateJob")]
pub struct CreateHyperparameters {
    /// Passes over the data, 1 to 1000; auto is 1.
    #[schema(required = false, value_type = Option<Value>)]
    n_epochs: Option<u64>,
    /// Sequences of one optimizer step, 1 to 65536; auto is 1.
    #[schema(required = false, value_type = Option<Value>)]
    batch_size: Option<u64>,
    /// The peak learning rate in multiples of 1e-5; auto is 1.
    #[schema(required = false, value_type = Option<Value>)]
    learning_rate_multiplier: Option<f64>,
}

/// An extension: everything else there is to say about the training. All fields are optional.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "see CreateJob")]
pub struct CreateTraining {
    /// Tokens of one training sequence; absent takes the longest document, as far as the machine carries it.
    #[schema(required = false, minimum = 2, maximum = 1_073_741_824)]
    sequence_length: Option<u64>,
    /// What becomes of a longer document: `refuse` (default), `split` or `truncate`. Counts are told as events.
    #[schema(required = false)]
    long_documents: Option<String>,
    /// Several documents to one sequence, without attention across their bounds; default true.
    #[schema(required = false)]
    packing: Option<bool>,
    /// Passes over the data; default 1. Not together with `max_steps`.
    #[schema(required = false, minimum = 1, maximum = 1000)]
    n_epochs: Option<u64>,
    /// Optimizer steps.
    #[schema(required = false, minimum = 1, maximum = 100_000_000)]
    max_steps: Option<u64>,
    /// Sequences of one optimizer step; default 1. The same number as `batch_size`.
    #[schema(required = false, minimum = 1, maximum = 65536)]
    gradient_accumulation_steps: Option<u64>,
    /// Peak learning rate; default 1e-5. Not together with `learning_rate_multiplier`.
    #[schema(required = false, exclusive_minimum = 0, maximum = 10)]
    learning_rate: Option<f64>,
    /// `cosine` (default), `linear` or `constant`.
    #[schema(required = false)]
    schedule: Option<String>,
    /// Steps over which the rate rises from 0; default 0.
    #[schema(required = false, minimum = 0, maximum = 100_000_000)]
    warmup_steps: Option<u64>,
    /// Fraction of the peak rate that the schedule ends on; default 0.1.
    #[schema(required = false, minimum = 0, maximum = 1)]
    min_lr_ratio: Option<f64>,
    /// Default 0.1.
    #[schema(required = false, minimum = 0, maximum = 10)]
    weight_decay: Option<f64>,
    /// AdamW; default 0.9.
    #[schema(required = false, minimum = 0, maximum = 0.999_999)]
    beta1: Option<f64>,
    /// AdamW; default 0.95.
    #[schema(required = false, minimum = 0, maximum = 0.999_999_99)]
    beta2: Option<f64>,
    /// AdamW; default 1e-8.
    #[schema(required = false, exclusive_minimum = 0, maximum = 1)]
    epsilon: Option<f64>,
    /// Global gradient norm above which gradients are scaled down; default 1, 0 turns clipping off.
    #[schema(required = false, minimum = 0, maximum = 1e9)]
    max_grad_norm: Option<f64>,
    /// A checkpoint each so many steps; absent: only at the end.
    #[schema(required = false, minimum = 1, maximum = 100_000_000)]
    checkpoint_interval: Option<u64>,
    /// An evaluation on the validation files each so many steps.
    #[schema(required = false, minimum = 1, maximum = 100_000_000)]
    evaluation_interval: Option<u64>,
    /// The same as the top-level `seed`.
    #[schema(required = false, minimum = 0, maximum = 2_147_483_647)]
    seed: Option<u64>,
    /// Storage type of weights and activations: `f32` or `bf16`. Absent is `bf16` on a GPU and `f32` on the CPU; `f32` trains
    /// on the CPU only.
    #[schema(required = false)]
    precision: Option<String>,
    /// Storage type of AdamW's moments: `f32` (default), or `bf16`, rounded stochastically, where memory is short.
    #[schema(required = false)]
    moments: Option<String>,
    /// Ranks that share every sequence, each with a part of its tokens and of weights and states: a GPU each, or a process on
    /// the CPU. It divides the model's query heads. Absent, a job on GPUs gets as many as it needs, and more while they are
    /// free and make it much faster; a job on the CPU gets 1.
    #[schema(required = false, minimum = 1, maximum = 128)]
    sequence_parallel_size: Option<u64>,
    /// Groups of such ranks that take different sequences of a step at the same time. It divides
    /// `gradient_accumulation_steps`. Absent is as above.
    #[schema(required = false, minimum = 1, maximum = 1024)]
    data_parallel_size: Option<u64>,
    /// `cpu` or `cuda`; absent takes a GPU where the host has one. Refused where no host has such a device.
    #[schema(required = false)]
    device: Option<String>,
    /// Which of the project's jobs trains earlier: higher is earlier, default 0, and every hour of waiting adds one. Between
    /// projects the one that trains on the fewest devices is next.
    #[schema(required = false, minimum = 0, maximum = 100)]
    priority: Option<u32>,
    /// Ids of further training files, after `training_file`.
    #[schema(required = false, max_items = 1000)]
    additional_training_files: Option<Vec<String>>,
    /// Ids of further validation files, after `validation_file`.
    #[schema(required = false, max_items = 1000)]
    additional_validation_files: Option<Vec<String>>,
}

/// A fine-tuning job.
#[derive(Debug, Serialize, ToSchema)]
pub struct JobObject {
    #[schema(example = "ftjob-4xQm2ZtK8fGz0aB1cD2eF3gH")]
    id: String,
    /// Always `fine_tuning.job`.
    object: &'static str,
    /// Unix seconds.
    created_at: i64,
    /// The base model.
    model: String,
    /// The project that the job belongs to.
    organization_id: String,
    training_file: String,
    #[schema(required)]
    validation_file: Option<String>,
    /// `validating_files`, `queued`, `running`, `paused`, `succeeded`, `failed` or `cancelled`.
    status: &'static str,
    hyperparameters: Hyperparameters,
    method: Method,
    /// Once a job that did any step has ended: the id of a CSV file of purpose `fine-tune-results`, a line for each step, with the
    /// columns step, train_loss, train_accuracy, valid_loss, valid_mean_token_accuracy, and beyond OpenAI's learning_rate,
    /// grad_norm (before clipping), seconds, tokens_per_second, tokens_seen, train_labels, valid_labels. Losses (cross entropy,
    /// nats) and accuracies are means over labels: every token of a document but its first, padding not counted, so
    /// train_labels of them in the step's sequences and valid_labels in the whole of the validation files. Cells are empty
    /// where nothing was measured, as where no evaluation ran; step 0 is the base model, evaluated.
    result_files: Vec<String>,
    seed: i64,
    /// Why the job failed.
    #[schema(required)]
    error: Option<JobError>,
    /// Name of the result, once there is one.
    #[schema(required)]
    fine_tuned_model: Option<String>,
    #[schema(required)]
    finished_at: Option<i64>,
    /// Tokens trained on, without padding, over all epochs.
    #[schema(required)]
    trained_tokens: Option<i64>,
    #[schema(required)]
    estimated_finish: Option<i64>,
    integrations: Vec<String>,
    #[schema(required, value_type = Option<BTreeMap<String, String>>)]
    metadata: Option<Value>,
    #[schema(required)]
    user_provided_suffix: Option<String>,
    /// The resolved settings, every default filled in (an extension). `precision` is null where it follows from the device,
    /// until the first checkpoint settles it; `device` is null where any will do.
    training: Value,
    /// Numbers of the last optimizer step (an extension): step, total_steps, train_loss, learning_rate, grad_norm,
    /// tokens_per_second, tokens_seen, device_peak_bytes and more.
    #[schema(required, value_type = Option<Value>)]
    progress: Option<Value>,
}

/// Why a job failed.
#[derive(Debug, Serialize, ToSchema)]
pub struct JobError {
    code: String,
    message: String,
    #[schema(required)]
    param: Option<String>,
}

/// OpenAI's three numbers, as they were resolved.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Hyperparameters {
    /// A number, or `auto` where `training.max_steps` says how long to train.
    n_epochs: Value,
    batch_size: u32,
    learning_rate_multiplier: f64,
}

/// How the job trains.
#[derive(Debug, Serialize, ToSchema)]
pub struct Method {
    /// `supervised`
    #[serde(rename = "type")]
    kind: &'static str,
    supervised: Supervised,
}

/// Settings of supervised training.
#[derive(Debug, Serialize, ToSchema)]
pub struct Supervised {
    hyperparameters: Hyperparameters,
}

/// One page of jobs.
#[derive(Debug, Serialize, ToSchema)]
pub struct JobList {
    /// Always `list`.
    object: &'static str,
    data: Vec<JobObject>,
    /// True when a next page exists; its `after` is the last id of this one.
    has_more: bool,
}

impl JobList {
    /// A page as JSON.
    pub fn new(listed: Listed<Job>) -> Self {
        let data = listed.rows.into_iter().map(Into::into).collect();
        Self { object: "list", data, has_more: listed.has_more }
    }
}

impl From<Job> for JobObject {
    fn from(job: Job) -> Self {
        let hyperparameters = hyperparameters(&job.training);
        let texts = |ids: &[crate::domain::FileId]| ids.iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut training = json!(job.training);
        training["priority"] = json!(job.priority);
        training["additional_training_files"] = json!(texts(job.training_files.get(1..).unwrap_or_default()));
        training["additional_validation_files"] = json!(texts(job.validation_files.get(1..).unwrap_or_default()));
        Self {
            id: job.id.to_string(),
            object: "fine_tuning.job",
            created_at: job.created_at,
            model: job.model,
            organization_id: job.project.to_string(),
            training_file: job.training_files.first().map(ToString::to_string).unwrap_or_default(),
            validation_file: job.validation_files.first().map(ToString::to_string),
            status: job.status.as_str(),
            method: Method { kind: "supervised", supervised: Supervised { hyperparameters: hyperparameters.clone() } },
            hyperparameters,
            result_files: job.result_file.iter().map(ToString::to_string).collect(),
            seed: job.seed,
            error: job.error.as_ref().map(JobError::from),
            fine_tuned_model: job.fine_tuned_model,
            finished_at: job.finished_at,
            trained_tokens: job.trained_tokens,
            estimated_finish: job.estimated_finish,
            integrations: Vec::new(),
            metadata: job.metadata,
            user_provided_suffix: job.suffix,
            training,
            progress: job.progress,
        }
    }
}

impl From<&Value> for JobError {
    fn from(error: &Value) -> Self {
        let text = |key: &str| error[key].as_str().map(str::to_owned);
        Self {
            code: text("code").unwrap_or_else(|| "server_error".into()),
            message: text("message").unwrap_or_default(),
            param: text("param"),
        }
    }
}

fn hyperparameters(training: &TrainingSpec) -> Hyperparameters {
    Hyperparameters {
        n_epochs: training.n_epochs.map_or(json!("auto"), |n| json!(n)),
        batch_size: training.gradient_accumulation_steps,
        learning_rate_multiplier: training.learning_rate / BASE_LEARNING_RATE,
    }
}
