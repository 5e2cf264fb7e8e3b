//! From a request's numbers to a [`TrainingSpec`]: ranges, "auto" and defaults, all resolved in one place.
//!
//! OpenAI's fields (`method.supervised.hyperparameters`, the older top-level `hyperparameters`, `seed`) and our extension
//! object `training` say the same things in two vocabularies. A thing may be said once: two places that disagree are
//! refused, never ranked.

use super::{
    Invalid, TrainingSpec,
    fields::{Fields, Setting},
    machine::DeviceKind,
    training::{
        LongDocuments, MAX_DATA_PARALLEL_SIZE, MAX_SEQUENCE_LENGTH, MAX_SEQUENCE_PARALLEL_SIZE, Moments, Precision,
        Schedule,
    },
};

/// Peak learning rate that a `learning_rate_multiplier` of 1 stands for: that of full fine-tuning at batch 1.
pub const BASE_LEARNING_RATE: f64 = 1e-5;
/// Largest multiplier: beyond it the rate would pass the 10 that `training.learning_rate` ends at.
const MAX_MULTIPLIER: f64 = 1e6;
const MAX_EPOCHS: u64 = 1000;
const MAX_STEPS: u64 = 100_000_000;
const MAX_ACCUMULATION: u64 = 65_536;
/// OpenAI's bound: seeds fit 31 bits.
pub const MAX_SEED: u64 = i32::MAX as u64;
/// Smallest rate and multiplier: zero would train nothing.
const ABOVE_ZERO: f64 = 1e-30;

/// Fields of `training` that are numbers and choices; the request adds its lists of files.
pub const TRAINING_FIELDS: [&str; 23] = [
    "sequence_length",
    "long_documents",
    "packing",
    "n_epochs",
    "max_steps",
    "gradient_accumulation_steps",
    "learning_rate",
    "schedule",
    "warmup_steps",
    "min_lr_ratio",
    "weight_decay",
    "beta1",
    "beta2",
    "epsilon",
    "max_grad_norm",
    "checkpoint_interval",
    "evaluation_interval",
    "seed",
    "precision",
    "moments",
    "sequence_parallel_size",
    "data_parallel_size",
    "device",
];

/// The numbers of a request, resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    pub training: TrainingSpec,
    /// False when the request named no seed, and `training.seed` is for the caller to choose.
    pub seed_given: bool,
}

/// Reads everything that says how to train out of a request's body.
pub fn resolve(body: &Fields) -> Result<Resolved, Invalid> {
    let asked = supervised(body)?;
    let mut resolved = Resolved { training: TrainingSpec::default(), seed_given: false };
    let seed = body.whole("seed", 0..=MAX_SEED)?;
    let training = body.object("training")?;
    if let Some(fields) = &training {
        read_training(fields, &mut resolved.training)?;
    }
    let said = |name: &str| training.as_ref().filter(|fields| fields.value(name).is_some());
    let spec = &mut resolved.training;

    if let Some((path, n)) = asked.n_epochs {
        if let Some(fields) = said("n_epochs").filter(|_| spec.n_epochs != Some(n as u32)) {
            return Err(fields.refuse("n_epochs", format!("disagrees with {path}: give one of them")));
        }
        if let Some(fields) = said("max_steps") {
            return Err(fields.refuse("max_steps", format!("and {path} both say how long to train: give one of them")));
        }
        spec.n_epochs = Some(n as u32);
    }
    if let Some((path, n)) = asked.batch_size {
        if let Some(fields) =
            said("gradient_accumulation_steps").filter(|_| u64::from(spec.gradient_accumulation_steps) != n)
        {
            let why = format!("disagrees with {path}, which is the same number here: give one of them");
            return Err(fields.refuse("gradient_accumulation_steps", why));
        }
        spec.gradient_accumulation_steps = n as u32;
    }
    if let Some((path, multiplier)) = asked.learning_rate_multiplier {
        if let Some(fields) = said("learning_rate") {
            let why = format!("and {path} both set the learning rate: give one of them");
            return Err(fields.refuse("learning_rate", why));
        }
        spec.learning_rate = BASE_LEARNING_RATE * multiplier;
    }
    if let Some(seed) = seed {
        if let Some(fields) = said("seed").filter(|_| spec.seed != seed) {
            return Err(fields.refuse("seed", "disagrees with seed: give one of them"));
        }
        spec.seed = seed;
    }
    resolved.seed_given = seed.is_some() || said("seed").is_some();
    resolved.training.check("training")?;
    Ok(resolved)
}

/// OpenAI's three numbers, each with the path it came by.
#[derive(Default)]
struct Supervised {
    n_epochs: Option<(String, u64)>,
    /// Sequences of one optimizer step, as `gradient_accumulation_steps` counts them too.
    batch_size: Option<(String, u64)>,
    learning_rate_multiplier: Option<(String, f64)>,
}

fn supervised(body: &Fields) -> Result<Supervised, Invalid> {
    let old = body.object("hyperparameters")?;
    let Some(method) = body.object("method")? else {
        return old.map_or_else(|| Ok(Supervised::default()), |fields| read_hyperparameters(&fields));
    };
    if method.word("type", &[("supervised", true), ("dpo", false), ("reinforcement", false)])? == Some(false) {
        let why = "must be \"supervised\": preference and reinforcement training are not offered";
        return Err(Invalid::with_code("unsupported_method", method.path("type"), format!("method.type {why}")));
    }
    method.only(&["type", "supervised"])?;
    let Some(supervised) = method.object("supervised")? else {
        return old.map_or_else(|| Ok(Supervised::default()), |fields| read_hyperparameters(&fields));
    };
    supervised.only(&["hyperparameters"])?;
    match (supervised.object("hyperparameters")?, old) {
        (Some(_), Some(_)) => {
            Err(body
                .refuse("hyperparameters", "is the older form of method.supervised.hyperparameters: give one of them"))
        }
        (Some(fields), None) | (None, Some(fields)) => read_hyperparameters(&fields),
        (None, None) => Ok(Supervised::default()),
    }
}

fn read_hyperparameters(fields: &Fields) -> Result<Supervised, Invalid> {
    fields.only(&["n_epochs", "batch_size", "learning_rate_multiplier"])?;
    let whole = |name: &str, most: u64| -> Result<Option<(String, u64)>, Invalid> {
        Ok(fields.whole_or_auto(name, 1..=most)?.given().map(|n| (fields.path(name), n)))
    };
    let multiplier: Setting<f64> = fields.number_or_auto("learning_rate_multiplier", ABOVE_ZERO..=MAX_MULTIPLIER)?;
    Ok(Supervised {
        n_epochs: whole("n_epochs", MAX_EPOCHS)?,
        batch_size: whole("batch_size", MAX_ACCUMULATION)?,
        learning_rate_multiplier: multiplier.given().map(|x| (fields.path("learning_rate_multiplier"), x)),
    })
}

/// Overwrites the defaults in `spec` with what the object `training` says.
fn read_training(fields: &Fields, spec: &mut TrainingSpec) -> Result<(), Invalid> {
    spec.sequence_length = fields.whole("sequence_length", 2..=MAX_SEQUENCE_LENGTH)?;
    spec.max_steps = fields.whole("max_steps", 1..=MAX_STEPS)?;
    spec.n_epochs = match fields.whole("n_epochs", 1..=MAX_EPOCHS)? {
        Some(n) => Some(n as u32),
        None if spec.max_steps.is_some() => None,
        None => spec.n_epochs,
    };
    spec.checkpoint_interval = fields.whole("checkpoint_interval", 1..=MAX_STEPS)?;
    spec.evaluation_interval = fields.whole("evaluation_interval", 1..=MAX_STEPS)?;
    let accumulation = fields.whole("gradient_accumulation_steps", 1..=MAX_ACCUMULATION)?;
    set(&mut spec.gradient_accumulation_steps, accumulation.map(|n| n as u32));
    let ranks = fields.whole("sequence_parallel_size", 1..=MAX_SEQUENCE_PARALLEL_SIZE)?;
    spec.sequence_parallel_size = ranks.map(|n| n as u32);
    spec.data_parallel_size = fields.whole("data_parallel_size", 1..=MAX_DATA_PARALLEL_SIZE)?.map(|n| n as u32);
    set(&mut spec.warmup_steps, fields.whole("warmup_steps", 0..=MAX_STEPS)?);
    set(&mut spec.seed, fields.whole("seed", 0..=MAX_SEED)?);
    set(&mut spec.packing, fields.switch("packing")?);

    set(&mut spec.learning_rate, fields.number("learning_rate", ABOVE_ZERO..=10.0)?);
    set(&mut spec.min_lr_ratio, fields.number("min_lr_ratio", 0.0..=1.0)?);
    set(&mut spec.weight_decay, fields.number("weight_decay", 0.0..=10.0)?);
    set(&mut spec.beta1, fields.number("beta1", 0.0..=0.999_999)?);
    set(&mut spec.beta2, fields.number("beta2", 0.0..=0.999_999_99)?);
    set(&mut spec.epsilon, fields.number("epsilon", ABOVE_ZERO..=1.0)?);
    set(&mut spec.max_grad_norm, fields.number("max_grad_norm", 0.0..=1e9)?);

    let long =
        [("refuse", LongDocuments::Refuse), ("split", LongDocuments::Split), ("truncate", LongDocuments::Truncate)];
    set(&mut spec.long_documents, fields.word("long_documents", &long)?);
    let schedules = [("constant", Schedule::Constant), ("linear", Schedule::Linear), ("cosine", Schedule::Cosine)];
    set(&mut spec.schedule, fields.word("schedule", &schedules)?);
    spec.precision = fields.word("precision", &Precision::WORDS)?;
    set(&mut spec.moments, fields.word("moments", &Moments::WORDS)?);
    spec.device = fields.word("device", &DeviceKind::WORDS)?;
    Ok(())
}

fn set<T>(place: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *place = value;
    }
}
