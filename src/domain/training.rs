//! `TrainingSpec`: how a job trains, every "auto" that needs no data already resolved.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{
    Invalid, ModelConfig,
    fields::meant,
    heads,
    machine::{DeviceKind, Machine},
};

/// What was asked of the training, checked. Field names are those of the request's `training` object.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingSpec {
    /// Tokens of one training sequence; `None` takes the longest document, as far as the machine carries it.
    pub sequence_length: Option<u64>,
    /// What becomes of a document longer than the sequence. Never silent: counts are reported.
    pub long_documents: LongDocuments,
    /// Several documents to one sequence, with no attention and no label across their bounds.
    pub packing: bool,
    /// Passes over the data. Exactly one of `n_epochs` and `max_steps` is set.
    pub n_epochs: Option<u32>,
    /// Optimizer steps.
    pub max_steps: Option<u64>,
    /// Sequences of one optimizer step, one after another, gradients added up.
    pub gradient_accumulation_steps: u32,
    /// Peak learning rate.
    pub learning_rate: f64,
    pub schedule: Schedule,
    /// Steps over which the rate rises linearly from 0.
    pub warmup_steps: u64,
    /// Fraction of the peak rate that the schedule ends on (linear and cosine).
    pub min_lr_ratio: f64,
    pub weight_decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    /// Global gradient norm above which gradients are scaled down; 0 turns clipping off.
    pub max_grad_norm: f64,
    /// A checkpoint each so many steps; `None` only at the end.
    pub checkpoint_interval: Option<u64>,
    /// Evaluation on the validation files each so many steps (and before the first and after the last); needs a validation file.
    pub evaluation_interval: Option<u64>,
    /// Seeds the order of the data and every random number of the run.
    pub seed: u64,
    /// `None` takes the device's own, see [`TrainingSpec::precision_on`]; the first checkpoint settles it.
    pub precision: Option<Precision>,
    #[serde(default)]
    pub moments: Moments,
    /// Ranks that share each sequence, every one with its part of the tokens, weights and states; `None` takes as many as serve
    /// the job. See [`TrainingSpec::check_ranks`].
    pub sequence_parallel_size: Option<u32>,
    /// Groups of such ranks that take different sequences of a step at the same time; `None` likewise.
    pub data_parallel_size: Option<u32>,
    /// Where to train; `None` takes the best device the host has, see [`TrainingSpec::wanted_device`].
    pub device: Option<DeviceKind>,
}

/// What becomes of a document longer than the sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LongDocuments {
    /// The job fails before training, naming the first such document.
    Refuse,
    /// Cut into pieces of one sequence each, every token trained on, no attention across the cut.
    Split,
    /// Only the beginning is trained on.
    Truncate,
}

/// How the learning rate falls after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    Constant,
    Linear,
    Cosine,
}

/// Storage type of weights and activations. Sums are always f32 or wider.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    F32,
    Bf16,
}

impl Precision {
    /// Every precision by the word that requests and flags use.
    pub const WORDS: [(&str, Self); 2] = [("f32", Self::F32), ("bf16", Self::Bf16)];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// What a device trains in unless told otherwise: a GPU in the type its matrix units are made for, the CPU in the one
    /// that is exact.
    pub fn of(device: DeviceKind) -> Self {
        match device {
            DeviceKind::Cpu => Self::F32,
            DeviceKind::Cuda => Self::Bf16,
        }
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        meant(&Self::WORDS, text).ok_or_else(|| format!("precision is f32 or bf16, not {text}"))
    }
}

/// Storage type of AdamW's two moments.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Moments {
    /// The type of sums: f32, or f64 in a reference run.
    #[default]
    F32,
    /// bf16, rounded stochastically: 6 bytes of optimizer state a parameter instead of 10.
    Bf16,
}

impl Moments {
    /// Every type by the word that requests and flags use.
    pub const WORDS: [(&str, Self); 2] = [("f32", Self::F32), ("bf16", Self::Bf16)];
}

impl FromStr for Moments {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        meant(&Self::WORDS, text).ok_or_else(|| format!("moments are f32 or bf16, not {text}"))
    }
}

impl Default for TrainingSpec {
    /// The documented defaults of the API.
    fn default() -> Self {
        Self {
            sequence_length: None,
            long_documents: LongDocuments::Refuse,
            packing: true,
            n_epochs: Some(1),
            max_steps: None,
            gradient_accumulation_steps: 1,
            learning_rate: 1e-5,
            schedule: Schedule::Cosine,
            warmup_steps: 0,
            min_lr_ratio: 0.1,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            max_grad_norm: 1.0,
            checkpoint_interval: None,
            evaluation_interval: None,
            seed: 0,
            precision: None,
            moments: Moments::F32,
            sequence_parallel_size: None,
            data_parallel_size: None,
            device: None,
        }
    }
}

/// Longest sequence any setting may ask for: positions stay exact and element counts stay inside 63 bits.
pub const MAX_SEQUENCE_LENGTH: u64 = 1 << 30;
/// Most ranks that may share a sequence: as many as the largest models have query heads.
pub const MAX_SEQUENCE_PARALLEL_SIZE: u64 = 128;
/// Most replicas.
pub const MAX_DATA_PARALLEL_SIZE: u64 = 1024;

/// The field of ranks, in requests.
const RANKS: &str = "training.sequence_parallel_size";

impl TrainingSpec {
    /// What the job trains in on this device.
    pub fn precision_on(&self, device: DeviceKind) -> Precision {
        self.precision.unwrap_or(Precision::of(device))
    }

    /// The only device that will do, if there is one: that asked for, or the CPU where f32 was, which GPUs do not train in.
    /// `store::queue` claims by the same rule.
    pub fn wanted_device(&self) -> Option<DeviceKind> {
        self.device.or((self.precision == Some(Precision::F32)).then_some(DeviceKind::Cpu))
    }

    /// Refuses ranks that the model's heads cannot be dealt to.
    pub fn check_ranks(&self, model: &ModelConfig) -> Result<(), Invalid> {
        let (n, heads) = (u64::from(self.sequence_parallel_size.unwrap_or(1)), model.n_heads);
        if heads.is_multiple_of(n) {
            return Ok(());
        }
        let sizes = heads::group_sizes(heads).into_iter().filter(|size| *size <= MAX_SEQUENCE_PARALLEL_SIZE);
        let sizes = sizes.map(|size| size.to_string()).collect::<Vec<_>>().join(", ");
        let message = format!("{RANKS} must divide the {heads} query heads of the model: one of {sizes}, not {n}");
        Err(Invalid::new(RANKS, message))
    }

    /// Devices that the job takes at the least.
    pub fn asked_devices(&self) -> u64 {
        u64::from(self.sequence_parallel_size.unwrap_or(1)) * u64::from(self.data_parallel_size.unwrap_or(1))
    }

    /// Refuses more ranks than there are GPUs of a kind together, of which this machine tells; each has one of its own.
    pub fn check_devices(&self, model: &ModelConfig, machine: &Machine) -> Result<(), Invalid> {
        let (asked, there) = (self.asked_devices(), machine.all_devices());
        if machine.device == DeviceKind::Cpu || asked <= there {
            return Ok(());
        }
        let (field, sizes) = match (self.sequence_parallel_size, u64::from(self.data_parallel_size.unwrap_or(1))) {
            (Some(n), data) if n > 1 && data <= there => {
                (RANKS, heads::group_sizes(model.n_heads).into_iter().filter(|size| size * data <= there).collect())
            }
            _ => ("training.data_parallel_size", (1..=there).collect::<Vec<u64>>()),
        };
        let sizes = sizes.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        let message = format!(
            "{field} must leave a GPU for each rank: {asked} are asked for, and {there} of a kind are there: take one of {sizes}, \
             or leave it out to get as many as serve the job"
        );
        Err(Invalid::new(field, message))
    }

    /// Checks every number against its documented range; `prefix` is the JSON path of the object (`training`).
    pub fn check(&self, prefix: &str) -> Result<(), Invalid> {
        let refuse = |field: &str, message: String| Err(Invalid::new(format!("{prefix}.{field}"), message));
        let within = |field: &str, value: f64, low: f64, high: f64| {
            if value.is_finite() && value >= low && value <= high {
                Ok(())
            } else {
                refuse(field, format!("{field} must be between {low} and {high}, not {value}"))
            }
        };
        let counted = |field: &str, value: Option<u64>, high: u64| match value {
            Some(n) if n < 1 || n > high => refuse(field, format!("{field} must be between 1 and {high}, not {n}")),
            _ => Ok(()),
        };
        if let Some(n) = self.sequence_length
            && !(2..=MAX_SEQUENCE_LENGTH).contains(&n)
        {
            return refuse(
                "sequence_length",
                format!("sequence_length must be between 2 and {MAX_SEQUENCE_LENGTH} tokens, not {n}"),
            );
        }
        match (self.n_epochs, self.max_steps) {
            (Some(_), Some(_)) => return refuse("max_steps", "give n_epochs or max_steps, not both".into()),
            (None, None) => return refuse("n_epochs", "give n_epochs or max_steps".into()),
            _ => {}
        }
        counted("n_epochs", self.n_epochs.map(u64::from), 1000)?;
        counted("max_steps", self.max_steps, 100_000_000)?;
        counted("gradient_accumulation_steps", Some(u64::from(self.gradient_accumulation_steps)), 65_536)?;
        counted("checkpoint_interval", self.checkpoint_interval, 100_000_000)?;
        counted("evaluation_interval", self.evaluation_interval, 100_000_000)?;
        counted("sequence_parallel_size", self.sequence_parallel_size.map(u64::from), MAX_SEQUENCE_PARALLEL_SIZE)?;
        counted("data_parallel_size", self.data_parallel_size.map(u64::from), MAX_DATA_PARALLEL_SIZE)?;
        within("warmup_steps", self.warmup_steps as f64, 0.0, 1e8)?;
        within("learning_rate", self.learning_rate, 0.0, 10.0)?;
        within("min_lr_ratio", self.min_lr_ratio, 0.0, 1.0)?;
        within("weight_decay", self.weight_decay, 0.0, 10.0)?;
        within("beta1", self.beta1, 0.0, 0.999_999)?;
        within("beta2", self.beta2, 0.0, 0.999_999_99)?;
        within("epsilon", self.epsilon, 1e-30, 1.0)?;
        within("max_grad_norm", self.max_grad_norm, 0.0, 1e9)?;
        within("seed", self.seed as f64, 0.0, f64::from(i32::MAX))?;
        if self.precision == Some(Precision::F32) && self.device == Some(DeviceKind::Cuda) {
            let message =
                format!("{prefix}.precision must be bf16 on a GPU: leave it out, or set {prefix}.device to cpu");
            return refuse("precision", message);
        }
        let sequences = self.gradient_accumulation_steps;
        if let Some(n) = self.data_parallel_size.filter(|n| !sequences.is_multiple_of(*n)) {
            let message = format!(
                "{prefix}.data_parallel_size must divide the {sequences} sequences of a step, of which replicas take equal \
                 shares, not be {n}: raise {prefix}.gradient_accumulation_steps, or set it to a divisor of {sequences}"
            );
            return refuse("data_parallel_size", message);
        }
        if self.learning_rate == 0.0 {
            return refuse("learning_rate", "learning_rate must be above 0".into());
        }
        Ok(())
    }
}
