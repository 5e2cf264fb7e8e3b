//! `config.json` of a Hugging Face folder to [`ModelConfig`]: old keys and those of transformers 5, and nothing ignored that
//! would change the arithmetic.

use serde_json::{Map, Value};

use super::{
    Invalid, ModelConfig,
    model::{Rope, RopeScaling},
};

/// Keys that change no number of training: names, versions, defaults of generation, notes of tools.
const HARMLESS: &[&str] = &[
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "finetuning_task",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
];
/// Keys read below.
const READ: &[&str] = &[
    "attention_bias",
    "attention_dropout",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pretraining_tp",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
];
/// Bounds on sizes: beyond them element counts leave what the engine's indices promise.
const MAX_WIDTH: u64 = 1 << 20;
const MAX_LAYERS: u64 = 10_000;
const MAX_VOCAB: u64 = 1 << 24;

/// The object under its path, for messages.
struct Fields<'a> {
    object: &'a Map<String, Value>,
    path: &'a str,
}

impl Fields<'_> {
    fn refuse<T>(&self, key: &str, message: String) -> Result<T, Invalid> {
        Err(Invalid::with_code("unsupported_model", format!("{}.{key}", self.path), message))
    }

    /// A value that is there and not null.
    fn value(&self, key: &str) -> Option<&Value> {
        self.object.get(key).filter(|v| !v.is_null())
    }

    fn count(&self, key: &str, most: u64) -> Result<Option<u64>, Invalid> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if (1..=most).contains(&n) => Ok(Some(n)),
            _ => self.refuse(key, format!("{key} must be a whole number between 1 and {most}, not {value}")),
        }
    }

    fn needed(&self, key: &str, most: u64) -> Result<u64, Invalid> {
        match self.count(key, most)? {
            Some(n) => Ok(n),
            None => self.refuse(key, format!("{key} is missing from the model's config.json")),
        }
    }

    fn number(&self, key: &str, default: Option<f64>) -> Result<f64, Invalid> {
        let Some(value) = self.value(key) else {
            return match default {
                Some(default) => Ok(default),
                None => self.refuse(key, format!("{key} is missing from the model's config.json")),
            };
        };
        match value.as_f64() {
            Some(x) if x.is_finite() && x > 0.0 => Ok(x),
            _ => self.refuse(key, format!("{key} must be a number above 0, not {value}")),
        }
    }

    /// Refuses a value that the engine does not compute, unless it is the one that changes nothing.
    fn only(&self, key: &str, neutral: &Value) -> Result<(), Invalid> {
        match self.value(key) {
            None => Ok(()),
            Some(value) if value == neutral || (value.as_f64().is_some() && value.as_f64() == neutral.as_f64()) => {
                Ok(())
            }
            Some(value) => self.refuse(key, format!("{key} {value} is not supported yet: only {neutral} is")),
        }
    }

    /// Refuses keys that nobody has said are harmless.
    fn no_others(&self, known: &[&[&str]]) -> Result<(), Invalid> {
        match self.object.keys().find(|key| !known.iter().any(|list| list.contains(&key.as_str()))) {
            None => Ok(()),
            Some(key) => self.refuse(
                key,
                format!("{key} is not known here and may change the arithmetic: remove it if it does not matter, or use another model"),
            ),
        }
    }
}

impl ModelConfig {
    /// Reads the text of a `config.json`. Untrusted: every size is bounded, every unknown key that is not null is refused.
    pub fn from_config_text(text: &str) -> Result<Self, Invalid> {
        let refuse = |message: String| Invalid::with_code("unsupported_model", "model", message);
        let value: Value =
            serde_json::from_str(text).map_err(|error| refuse(format!("config.json is not valid JSON: {error}")))?;
        let object = value.as_object().ok_or_else(|| refuse("config.json must hold a JSON object".into()))?;
        Self::from_config(object)
    }

    /// Reads a parsed `config.json`.
    pub fn from_config(object: &Map<String, Value>) -> Result<Self, Invalid> {
        // A key with null says nothing.
        let object: Map<String, Value> =
            object.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect();
        let fields = Fields { object: &object, path: "model.config" };
        match fields.value("model_type").and_then(Value::as_str) {
            Some("llama") => {}
            other => {
                let found = other.unwrap_or("nothing");
                return fields.refuse("model_type", format!("model_type is {found}: only llama is supported yet"));
            }
        }
        fields.only("attention_bias", &Value::Bool(false))?;
        fields.only("mlp_bias", &Value::Bool(false))?;
        fields.only("attention_dropout", &Value::from(0.0))?;
        fields.only("pretraining_tp", &Value::from(1))?;
        fields.only("hidden_act", &Value::from("silu"))?;
        fields.no_others(&[HARMLESS, READ])?;

        let hidden_size = fields.needed("hidden_size", MAX_WIDTH)?;
        let n_heads = fields.needed("num_attention_heads", MAX_WIDTH)?;
        let config = Self {
            vocab_size: fields.needed("vocab_size", MAX_VOCAB)?,
            hidden_size,
            intermediate_size: fields.needed("intermediate_size", MAX_WIDTH)?,
            n_layers: fields.needed("num_hidden_layers", MAX_LAYERS)?,
            n_heads,
            n_kv_heads: fields.count("num_key_value_heads", MAX_WIDTH)?.unwrap_or(n_heads),
            head_dim: fields.count("head_dim", 4096)?.unwrap_or(hidden_size / n_heads),
            rms_norm_eps: fields.number("rms_norm_eps", Some(1e-6))?,
            tie_word_embeddings: match fields.value("tie_word_embeddings") {
                None => false,
                Some(Value::Bool(tied)) => *tied,
                Some(other) => {
                    return fields.refuse(
                        "tie_word_embeddings",
                        format!("tie_word_embeddings must be true or false, not {other}"),
                    );
                }
            },
            rope: rope(&fields)?,
            max_position_embeddings: fields.count("max_position_embeddings", 1 << 40)?.unwrap_or(2048),
        };
        config.check(&fields)?;
        Ok(config)
    }

    fn check(&self, fields: &Fields) -> Result<(), Invalid> {
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            let message = format!("{} query heads cannot share {} kv heads evenly", self.n_heads, self.n_kv_heads);
            return fields.refuse("num_key_value_heads", message);
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return fields.refuse("head_dim", format!("head_dim must be even and above 0, not {}", self.head_dim));
        }
        if fields.value("head_dim").is_none() && !self.hidden_size.is_multiple_of(self.n_heads) {
            let message = format!("hidden_size {} is not a multiple of {} heads", self.hidden_size, self.n_heads);
            return fields.refuse("num_attention_heads", message);
        }
        if self.rms_norm_eps >= 1.0 {
            return fields.refuse("rms_norm_eps", format!("rms_norm_eps must be below 1, not {}", self.rms_norm_eps));
        }
        Ok(())
    }
}

/// `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of before.
fn rope(fields: &Fields) -> Result<Rope, Invalid> {
    let (key, theta) = match fields.value("rope_parameters") {
        Some(_) => ("rope_parameters", None),
        None => ("rope_scaling", Some(fields.number("rope_theta", Some(10_000.0))?)),
    };
    let Some(value) = fields.value(key) else {
        return Ok(Rope { theta: theta.unwrap_or(10_000.0), scaling: RopeScaling::Default });
    };
    let Some(object) = value.as_object() else {
        return fields.refuse(key, format!("{key} must be an object, not {value}"));
    };
    let path = format!("{}.{key}", fields.path);
    let inner = Fields { object, path: &path };
    let theta = match theta {
        Some(theta) => theta,
        None => inner.number("rope_theta", Some(fields.number("rope_theta", Some(10_000.0))?))?,
    };
    let kind = inner.value("rope_type").or_else(|| inner.value("type")).and_then(Value::as_str).unwrap_or("default");
    let common: &[&str] = &["rope_type", "type", "rope_theta"];
    let scaling = match kind {
        "default" => {
            inner.no_others(&[common])?;
            RopeScaling::Default
        }
        "linear" => {
            inner.no_others(&[common, &["factor"]])?;
            RopeScaling::Linear { factor: inner.number("factor", None)? }
        }
        "llama3" => {
            let keys: &[&str] = &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"];
            inner.no_others(&[common, keys])?;
            let (low, high) = (inner.number("low_freq_factor", None)?, inner.number("high_freq_factor", None)?);
            if high <= low {
                return inner.refuse(
                    "high_freq_factor",
                    format!("high_freq_factor must be above low_freq_factor {low}, not {high}"),
                );
            }
            RopeScaling::Llama3 {
                factor: inner.number("factor", None)?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: inner.needed("original_max_position_embeddings", 1 << 40)?,
            }
        }
        other => {
            return inner.refuse(
                "rope_type",
                format!("rope_type {other} is not supported yet: default, linear and llama3 are"),
            );
        }
    };
    Ok(Rope { theta, scaling })
}
