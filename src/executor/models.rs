//! Base models of this host: folders in the models folder, each in Hugging Face layout.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::domain::{BaseModel, Invalid, ModelConfig};

/// Largest `config.json` that is read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Files without which a model cannot be trained; of the second kind one is enough.
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: [&str; 2] = ["model.safetensors", "model.safetensors.index.json"];

/// Every model of the folder, `name` or `organization/name`, by name. What cannot be trained is listed with the reason.
pub(super) fn found(folder: &Path) -> Vec<BaseModel> {
    let mut models = Vec::new();
    for (name, path) in folders(folder) {
        if path.join("config.json").is_file() {
            models.push(model(name, &path));
            continue;
        }
        let inner = folders(&path).into_iter().filter(|(_, path)| path.join("config.json").is_file());
        models.extend(inner.map(|(inner, path)| model(format!("{name}/{inner}"), &path)));
    }
    models.sort_by(|a, b| a.name.cmp(&b.name));
    models
}

/// The folder of a model. Only names that [`found`] gives have one, so no name can lead out of the models folder.
pub(super) fn folder_of(folder: &Path, name: &str) -> Result<PathBuf, Invalid> {
    if found(folder).iter().any(|model| model.name == name) {
        return Ok(folder.join(name));
    }
    let message = format!("the base model {name} is not in the models folder of any host that could train it");
    Err(Invalid::with_code("model_not_found", "model", message))
}

/// Folders in a folder, without hidden ones: those are under way.
fn folders(folder: &Path) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let named = entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())));
    named.filter(|(name, path)| !name.starts_with('.') && path.is_dir()).collect()
}

fn model(name: String, folder: &Path) -> BaseModel {
    match config(folder) {
        Ok(config) => BaseModel { name, config: Some(config), problem: None },
        Err(problem) => BaseModel { name, config: None, problem: Some(problem) },
    }
}

fn config(folder: &Path) -> Result<ModelConfig, String> {
    if !folder.join(TOKENIZER).is_file() {
        return Err(format!("its folder has no {TOKENIZER}"));
    }
    if !WEIGHTS.iter().any(|name| folder.join(name).is_file()) {
        return Err(format!("its folder has neither {}", WEIGHTS.join(" nor ")));
    }
    let path = folder.join("config.json");
    let bytes = fs::metadata(&path).map_err(|error| format!("config.json: {error}"))?.len();
    if bytes > MAX_CONFIG_BYTES {
        return Err(format!("config.json has {bytes} bytes; at most {MAX_CONFIG_BYTES} are read"));
    }
    let text = fs::read_to_string(&path).map_err(|error| format!("config.json: {error}"))?;
    ModelConfig::from_config_text(&text).map_err(|invalid| invalid.message)
}
