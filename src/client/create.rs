//! `longhaul jobs create`: flags into the body of a create request.
//!
//! The body may start from a JSON file; flags are put over it. What is in the body is for the server to judge: here
//! only what cannot be put into JSON is refused.

use std::{fs, io::Write, path::PathBuf};

use serde_json::{Map, Value, json};

use super::{Failure, Result, http::Client, say};
use crate::domain::ids::random_suffix;

/// Flags of `longhaul jobs create`.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Args {
    /// Name of the base model
    #[arg(long)]
    pub model: Option<String>,
    /// Id of an uploaded file to train on; may be repeated
    #[arg(long = "training-file", value_name = "FILE_ID")]
    pub training_files: Vec<String>,
    /// Id of an uploaded file to evaluate on; may be repeated
    #[arg(long = "validation-file", value_name = "FILE_ID")]
    pub validation_files: Vec<String>,
    /// Part of the fine-tuned model's name
    #[arg(long)]
    pub suffix: Option<String>,
    /// Seed of data order and random numbers
    #[arg(long)]
    pub seed: Option<u64>,
    /// Any other field by its path, such as training.sequence_length=16384; may be repeated
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub settings: Vec<String>,
    /// JSON file with the request's body; flags are put over it
    #[arg(long, value_name = "FILE")]
    pub from: Option<PathBuf>,
    /// Print the job object instead of its id
    #[arg(long)]
    pub json: bool,
}

/// Creates the job, once even if the connection breaks, and prints its id.
pub fn run(args: &Args, client: &Client, out: &mut dyn Write) -> Result {
    let body = body(args)?;
    let job = client.post_again("/v1/fine_tuning/jobs", &body, &random_suffix())?;
    let id = job["id"].as_str().ok_or_else(|| Failure::shape(client.server(), "an id", &job))?;
    if args.json { say(out, &job) } else { say(out, id) }
}

/// The request's body.
pub fn body(args: &Args) -> Result<Value> {
    let mut body = match &args.from {
        None => json!({}),
        Some(path) => {
            let text = fs::read_to_string(path).map_err(Failure::file(path))?;
            let refuse = |cause: String| Failure::Usage(format!("{}: {cause}", path.display()));
            let body: Value = serde_json::from_str(&text).map_err(|error| refuse(error.to_string()))?;
            if !body.is_object() {
                return Err(refuse("must hold a JSON object".to_owned()));
            }
            body
        }
    };
    if let Some(model) = &args.model {
        put(&mut body, "model", json!(model))?;
    }
    for (files, single, list) in [
        (&args.training_files, "training_file", "training.additional_training_files"),
        (&args.validation_files, "validation_file", "training.additional_validation_files"),
    ] {
        if let Some((first, more)) = files.split_first() {
            put(&mut body, single, json!(first))?;
            if !more.is_empty() {
                put(&mut body, list, json!(more))?;
            }
        }
    }
    if let Some(suffix) = &args.suffix {
        put(&mut body, "suffix", json!(suffix))?;
    }
    if let Some(seed) = args.seed {
        put(&mut body, "seed", json!(seed))?;
    }
    for setting in &args.settings {
        let Some((path, value)) = setting.split_once('=') else {
            return Err(Failure::Usage(format!("--set {setting}: must be PATH=VALUE")));
        };
        // What is not JSON is a string: --set training.schedule=linear.
        let value = serde_json::from_str(value).unwrap_or_else(|_| json!(value));
        put(&mut body, path, value)?;
    }
    Ok(body)
}

/// Sets a field by its path, making the objects on the way.
fn put(body: &mut Value, path: &str, value: Value) -> Result {
    let mut place = body;
    for name in path.split('.') {
        if name.is_empty() {
            return Err(Failure::Usage(format!("--set {path}: a field has no name")));
        }
        if place.is_null() {
            *place = Value::Object(Map::new());
        }
        let Value::Object(fields) = place else {
            return Err(Failure::Usage(format!("--set {path}: {name} would stand inside something that is no object")));
        };
        place = fields.entry(name).or_insert(Value::Null);
    }
    *place = value;
    Ok(())
}
