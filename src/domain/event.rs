//! What a customer sees happening to a job.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How loud an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    Info,
    Warn,
    Error,
}

impl Level {
    /// The word used in the API and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

/// One line of a job's story. `kind` is `message` or `metrics`; metrics carry their numbers in `data` and in the text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub level: Level,
    /// `message` | `metrics`.
    #[serde(rename = "type")]
    pub kind: String,
    pub message: String,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub data: Value,
}

impl Event {
    /// A plain message without data.
    pub fn message(level: Level, message: impl Into<String>) -> Self {
        Self { level, kind: "message".into(), message: message.into(), data: Value::Null }
    }

    /// An informational message with structured data beside it.
    pub fn info(message: impl Into<String>, data: Value) -> Self {
        Self { level: Level::Info, kind: "message".into(), message: message.into(), data }
    }
}
