//! A value somebody sent that cannot be used: which field, why, and what would do.

use serde::{Deserialize, Serialize};

/// One refused value. Becomes a 400 with `param` over HTTP, one line in the CLI, `error` on a failed job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Invalid {
    /// JSON path of the field (`training.sequence_length`), or the setting or file it came from.
    pub param: String,
    /// What is wrong and the way out, one sentence, for the person who sent it.
    pub message: String,
    /// Machine-readable kind, stable across versions (`invalid_value`, `sequence_too_long`, ...).
    pub code: String,
}

impl Invalid {
    /// A refusal with the general code `invalid_value`.
    pub fn new(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::with_code("invalid_value", param, message)
    }

    /// A refusal with a code of its own.
    pub fn with_code(code: &str, param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: param.into(), message: message.into(), code: code.to_owned() }
    }
}
