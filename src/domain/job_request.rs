//! A request to make a job, checked field by field: OpenAI's shape, with our extensions under `training`.
//!
//! In: the JSON body. Out: what was asked, every value in range, or the first field that cannot be used. What only the
//! running service knows (do the files exist, does a host have the model, does the sequence fit) is for the caller.

use serde_json::Value;

use super::{
    FileId, Invalid, TrainingSpec,
    fields::Fields,
    hyperparameters::{self, TRAINING_FIELDS},
};

/// Top-level fields that OpenAI's shape has and this service reads, and `training`, which is ours.
pub const REQUEST_FIELDS: [&str; 10] = [
    "model",
    "training_file",
    "validation_file",
    "hyperparameters",
    "method",
    "suffix",
    "seed",
    "metadata",
    "integrations",
    "training",
];
/// Lists under `training`, for data in more than one file.
pub const MORE_FILES: [&str; 2] = ["additional_training_files", "additional_validation_files"];
/// Most files in one of the lists.
pub const MAX_ADDITIONAL_FILES: usize = 1000;
/// Under `training`: which of the project's jobs is earlier.
pub const PRIORITY: &str = "priority";
/// Highest priority.
const MAX_PRIORITY: u64 = 100;
const MAX_MODEL_NAME: usize = 256;
const MAX_SUFFIX: usize = 64;
const MAX_METADATA_PAIRS: usize = 16;
const MAX_METADATA_KEY: usize = 64;
const MAX_METADATA_VALUE: usize = 512;

/// A request to make a job.
#[derive(Debug, Clone, PartialEq)]
pub struct JobRequest {
    /// Name of the base model.
    pub model: String,
    /// At least one, in order.
    pub training_files: Vec<FileRef>,
    pub validation_files: Vec<FileRef>,
    pub suffix: Option<String>,
    /// An object of strings.
    pub metadata: Option<Value>,
    pub training: TrainingSpec,
    /// Higher is earlier, among the project's jobs; 0 where nothing was said.
    pub priority: i32,
    /// False when the seed is for the caller to choose.
    pub seed_given: bool,
}

/// A file as a request names it, and where it does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileRef {
    pub id: FileId,
    /// JSON path, for errors.
    pub param: String,
}

impl FileRef {
    /// The refusal of a file that is not there.
    pub fn missing(&self) -> Invalid {
        no_such_file(&self.param, self.id.as_str())
    }
}

impl JobRequest {
    /// Reads and checks a body.
    pub fn read(body: &Value) -> Result<Self, Invalid> {
        let fields = Fields::root(body)?;
        fields.only(&REQUEST_FIELDS)?;
        let training = fields.object("training")?;
        if let Some(training) = &training {
            let known: Vec<&str> = TRAINING_FIELDS.into_iter().chain(MORE_FILES).chain([PRIORITY]).collect();
            training.only(&known)?;
        }
        let model = fields.text("model", 1..=MAX_MODEL_NAME)?;
        let model = model.ok_or_else(|| missing(&fields, "model", "the name of a base model"))?.to_owned();
        let training_files = files(&fields, "training_file", training.as_ref(), MORE_FILES[0])?;
        if training_files.is_empty() {
            return Err(missing(&fields, "training_file", "the id of an uploaded file"));
        }
        let validation_files = files(&fields, "validation_file", training.as_ref(), MORE_FILES[1])?;
        if !fields.list("integrations", usize::MAX)?.is_empty() {
            let message = "integrations are not offered: leave the list out and follow the job's events instead";
            return Err(Invalid::with_code("unsupported_parameter", "integrations", message));
        }
        let priority = match &training {
            Some(training) => training.whole(PRIORITY, 0..=MAX_PRIORITY)?,
            None => None,
        };
        let resolved = hyperparameters::resolve(&fields)?;
        if resolved.training.evaluation_interval.is_some() && validation_files.is_empty() {
            let message = "training.evaluation_interval needs a validation_file to evaluate on";
            return Err(Invalid::new("training.evaluation_interval", message));
        }
        Ok(Self {
            model,
            training_files,
            validation_files,
            suffix: suffix(&fields)?,
            metadata: metadata(&fields)?,
            training: resolved.training,
            priority: priority.unwrap_or_default() as i32,
            seed_given: resolved.seed_given,
        })
    }
}

fn missing(fields: &Fields, name: &str, what: &str) -> Invalid {
    let path = fields.path(name);
    let message = format!("you must provide {path}: {what}");
    Invalid::with_code("missing_required_parameter", path, message)
}

/// The one file of OpenAI's shape and then those of our list.
fn files(body: &Fields, single: &str, training: Option<&Fields>, list: &str) -> Result<Vec<FileRef>, Invalid> {
    let mut files = Vec::new();
    if let Some(id) = body.text(single, 1..=256)? {
        files.push(file(id, body.path(single))?);
    }
    let more = training.map_or(Ok(&[][..]), |training| training.list(list, MAX_ADDITIONAL_FILES))?;
    for (i, entry) in more.iter().enumerate() {
        let path = format!("training.{list}[{i}]");
        let Some(id) = entry.as_str() else {
            let message = format!("{path} must be the id of a file, a string");
            return Err(Invalid::new(path, message));
        };
        files.push(file(id, path)?);
    }
    if files.len() == more.len() && !more.is_empty() {
        let path = format!("training.{list}");
        let message = format!("{path} adds to {single}: name the first file there");
        return Err(Invalid::new(path, message));
    }
    if let Some(twice) = files.iter().enumerate().find(|(i, f)| files[..*i].iter().any(|g| g.id == f.id)) {
        let FileRef { id, param } = twice.1;
        return Err(Invalid::new(param, format!("{param} names {id} a second time")));
    }
    Ok(files)
}

fn file(id: &str, param: String) -> Result<FileRef, Invalid> {
    match id.parse() {
        Ok(id) => Ok(FileRef { id, param }),
        Err(()) => Err(no_such_file(&param, id)),
    }
}

fn no_such_file(param: &str, id: &str) -> Invalid {
    let message =
        format!("{param}: there is no file {id}; upload one with POST /v1/files and name the id that it answers");
    Invalid::with_code("file_not_found", param, message)
}

/// The suffix becomes part of a model's name, which stands in URLs and between colons.
fn suffix(fields: &Fields) -> Result<Option<String>, Invalid> {
    let Some(suffix) = fields.text("suffix", 1..=MAX_SUFFIX)? else { return Ok(None) };
    if suffix.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        return Ok(Some(suffix.to_owned()));
    }
    Err(fields.refuse("suffix", "may hold letters a-z, digits, \"-\", \"_\" and \".\" only"))
}

fn metadata(fields: &Fields) -> Result<Option<Value>, Invalid> {
    let Some(value) = fields.value("metadata") else { return Ok(None) };
    let Value::Object(pairs) = value else {
        return Err(fields.refuse("metadata", "must be an object of strings"));
    };
    if pairs.len() > MAX_METADATA_PAIRS {
        return Err(
            fields.refuse("metadata", format!("may hold at most {MAX_METADATA_PAIRS} pairs, not {}", pairs.len()))
        );
    }
    let metadata = fields.object("metadata")?;
    for key in pairs.keys() {
        if key.is_empty() || key.chars().count() > MAX_METADATA_KEY || key.contains('\0') {
            return Err(
                fields.refuse("metadata", format!("has a key that is not 1 to {MAX_METADATA_KEY} characters long"))
            );
        }
        if let Some(metadata) = &metadata
            && metadata.text(key, 0..=MAX_METADATA_VALUE)?.is_none()
        {
            return Err(metadata.refuse(key, "must be a string, not null"));
        }
    }
    Ok(Some(value.clone()))
}
