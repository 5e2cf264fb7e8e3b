//! A model folder as the Hugging Face libraries know it: config, tokenizer, weights in shards.

use std::path::Path;

use serde_json::{Value, json};

use super::{
    safetensors::{Planned, shards, write},
    staging::{HashingWriter, Staging},
};
use crate::{
    domain::Invalid,
    engine::{Error, Result, backend::DType},
};

/// Largest weight file: clients of plain HTTP refuse files of 50 GB, and smaller ones resume better.
const SHARD_BYTES: u64 = 5_000_000_000;
/// Files beside config and weights that belong to a model, copied as they are.
const COMPANIONS: [&str; 10] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
];
/// A config.json is a page; anything larger is not one.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// The text of a model folder's `config.json`.
pub fn config_text(folder: &Path) -> Result<String> {
    let path = folder.join("config.json");
    let refuse = |message: String| Invalid::with_code("invalid_model", "model", message);
    let size =
        std::fs::metadata(&path).map_err(|error| refuse(format!("{} cannot be read: {error}", path.display())))?.len();
    if size > MAX_CONFIG_BYTES {
        return Err(
            refuse(format!("{} has {size} bytes: a config has {MAX_CONFIG_BYTES} at most", path.display())).into()
        );
    }
    std::fs::read_to_string(&path).map_err(Error::file(&path))
}

/// Writes weights as `model.safetensors`, or as shards of at most 5 GB with an index. `fill` writes the elements of the
/// tensor with that index.
pub fn write_weights(
    staging: &mut Staging,
    tensors: &[Planned],
    mut fill: impl FnMut(&mut HashingWriter, usize) -> Result,
) -> Result {
    let groups = shards(tensors, SHARD_BYTES);
    if let [only] = groups.as_slice() {
        return staging.write("model.safetensors", |w| write(w, &tensors[only.clone()], |w, i| fill(w, i)));
    }
    let mut weight_map = serde_json::Map::new();
    for (n, group) in groups.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", n + 1, groups.len());
        for tensor in &tensors[group.clone()] {
            weight_map.insert(tensor.name.clone(), Value::from(name.clone()));
        }
        staging.write(&name, |w| write(w, &tensors[group.clone()], |w, i| fill(w, group.start + i)))?;
    }
    let total: u64 = tensors.iter().map(Planned::bytes).sum();
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    staging.write_bytes("model.safetensors.index.json", format!("{index:#}\n").as_bytes())
}

/// Writes `config.json` as its author wrote it but for the element type, and copies tokenizer and generation files.
pub fn write_companions(staging: &mut Staging, base: &Path, dtype: DType) -> Result {
    let text = config_text(base)?;
    let mut config: Value = serde_json::from_str(&text).map_err(|error| {
        Invalid::with_code("invalid_model", "model", format!("config.json is not valid JSON: {error}"))
    })?;
    let word = match dtype {
        DType::Bf16 => "bfloat16",
        DType::F64 => "float64",
        _ => "float32",
    };
    if let Some(object) = config.as_object_mut() {
        let key = if object.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        object.insert(key.into(), word.into());
    }
    staging.write_bytes("config.json", format!("{config:#}\n").as_bytes())?;
    for name in COMPANIONS {
        let path = base.join(name);
        if path.is_file() {
            let bytes = std::fs::read(&path).map_err(Error::file(&path))?;
            staging.write_bytes(name, &bytes)?;
        }
    }
    Ok(())
}
