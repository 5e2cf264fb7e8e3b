//! Base models of this host: folders in the models folder, each in Hugging Face layout, and whole models in the cache that it
//! shares with Hugging Face's tools.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{Settings, hub};
use crate::domain::{BaseModel, HubName, Invalid, ModelConfig};

/// Largest `config.json` that is read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Files without which a model cannot be trained; of the second kind one is enough.
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: [&str; 2] = ["model.safetensors", "model.safetensors.index.json"];

/// Where the model of a job is.
pub(super) enum Located {
    Here(PathBuf),
    /// On a hub, which may be asked for it.
    OnHub(HubName),
}

/// Every model that can be named: those of the models folder, what cannot be trained with the reason, and those of the cache that can.
pub(super) fn found(settings: &Settings) -> Vec<BaseModel> {
    let mut models = in_folder(&settings.models_folder);
    for cached in hub::found(&settings.hub.cache) {
        // The folder's own come first; a part of a model, or one of another kind, is some other tool's affair.
        if models.iter().any(|model| model.name == cached.name) || !shards_are_here(&cached.folder) {
            continue;
        }
        let model = model(cached.name, &cached.folder);
        models.extend(model.config.is_some().then_some(model));
    }
    models.sort_by(|a, b| a.name.cmp(&b.name));
    models
}

/// Models of the folder, `name` or `organization/name`.
fn in_folder(folder: &Path) -> Vec<BaseModel> {
    let mut models = Vec::new();
    for (name, path) in folders(folder) {
        if path.join("config.json").is_file() {
            models.push(model(name, &path));
            continue;
        }
        let inner = folders(&path).into_iter().filter(|(_, path)| path.join("config.json").is_file());
        models.extend(inner.map(|(inner, path)| model(format!("{name}/{inner}"), &path)));
    }
    models
}

/// Where a model is. Only names that [`found`] gives have a folder, so no name can lead out of the models folder.
pub(super) fn locate(settings: &Settings, name: &str) -> Result<Located, Invalid> {
    if in_folder(&settings.models_folder).iter().any(|model| model.name == name) {
        return Ok(Located::Here(settings.models_folder.join(name)));
    }
    let is_meant =
        |cached: &hub::Cached| cached.name == name && config(&cached.folder).is_ok() && shards_are_here(&cached.folder);
    if let Some(cached) = hub::found(&settings.hub.cache).into_iter().find(is_meant) {
        return Ok(Located::Here(cached.folder));
    }
    let why = match name.parse::<HubName>() {
        Ok(name) if settings.hub.fetch => return Ok(Located::OnHub(name)),
        Ok(_) => ", and its executors may fetch none from a hub (LONGHAUL_NO_FETCH)",
        Err(()) => "",
    };
    let message = format!("the base model {name} is not in the models folder of any host that could train it{why}");
    Err(Invalid::with_code("model_not_found", "model", message))
}

/// False where an index names files that are not there (yet).
fn shards_are_here(folder: &Path) -> bool {
    let Ok(text) = fs::read_to_string(folder.join(WEIGHTS[1])) else { return folder.join(WEIGHTS[0]).is_file() };
    let index: Value = serde_json::from_str(&text).unwrap_or_default();
    let mut named = index["weight_map"].as_object().into_iter().flat_map(|map| map.values()).filter_map(Value::as_str);
    folder.join(WEIGHTS[0]).is_file() || named.all(|file| folder.join(file).is_file())
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
