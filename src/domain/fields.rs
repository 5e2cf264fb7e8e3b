//! Reading a JSON object field by field, so that every bad value is told by its exact path.
//!
//! In: an object and where it stands in the request. Out: checked values, `None` where a field is absent or null, or an
//! [`Invalid`] that names the field and what would do. Knows no field by name.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::Invalid;

/// An object of a request and its JSON path.
#[derive(Debug, Clone)]
pub struct Fields<'a> {
    path: String,
    object: &'a Map<String, Value>,
}

/// A field that may also say "auto".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting<T> {
    /// Absent, null or `"auto"`: the documented default.
    Auto,
    Given(T),
}

impl<T> Setting<T> {
    /// The value, where one was given.
    pub fn given(self) -> Option<T> {
        match self {
            Self::Auto => None,
            Self::Given(value) => Some(value),
        }
    }
}

impl<'a> Fields<'a> {
    /// The request's body itself.
    pub fn root(body: &'a Value) -> Result<Self, Invalid> {
        match body {
            Value::Object(object) => Ok(Self { path: String::new(), object }),
            other => Err(Invalid::new("body", format!("the body must be a JSON object, not {}", kind(other)))),
        }
    }

    /// The JSON path of a field of this object.
    pub fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// A refusal of one field.
    pub fn refuse(&self, name: &str, why: impl AsRef<str>) -> Invalid {
        let path = self.path(name);
        let message = format!("{path} {}", why.as_ref());
        Invalid::new(path, message)
    }

    /// Refuses the first field that is not in `known`. A misspelt setting must not be ignored: weeks of training hang on it.
    pub fn only(&self, known: &[&str]) -> Result<(), Invalid> {
        let Some(unknown) = self.object.keys().find(|name| !known.contains(&name.as_str())) else { return Ok(()) };
        let place = if self.path.is_empty() { "the request" } else { &self.path };
        let path = self.path(unknown);
        let message = format!("unknown parameter: {path}; {place} may hold {}", known.join(", "));
        Err(Invalid::with_code("unknown_parameter", path, message))
    }

    /// The raw value; absent and null are the same.
    pub fn value(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// A nested object.
    pub fn object(&self, name: &str) -> Result<Option<Fields<'a>>, Invalid> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Fields { path: self.path(name), object })),
            Some(other) => Err(self.refuse(name, format!("must be an object, not {}", kind(other)))),
        }
    }

    /// A string of `length` characters.
    pub fn text(&self, name: &str, length: RangeInclusive<usize>) -> Result<Option<&'a str>, Invalid> {
        match self.value(name) {
            None => Ok(None),
            // The database holds no zero byte in text.
            Some(Value::String(text)) if text.contains('\0') => Err(self.refuse(name, "may hold no zero character")),
            Some(Value::String(text)) if length.contains(&text.chars().count()) => Ok(Some(text)),
            Some(Value::String(text)) => Err(self.refuse(
                name,
                format!("must be {} to {} characters long, not {}", length.start(), length.end(), text.chars().count()),
            )),
            Some(other) => Err(self.refuse(name, format!("must be a string, not {}", kind(other)))),
        }
    }

    /// A whole number within `range`.
    pub fn whole(&self, name: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, Invalid> {
        let Some(value) = self.value(name) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if range.contains(&n) => Ok(Some(n)),
            _ => Err(self.refuse(
                name,
                format!("must be a whole number between {} and {}, not {}", range.start(), range.end(), shown(value)),
            )),
        }
    }

    /// A number within `range`.
    pub fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, Invalid> {
        let Some(value) = self.value(name) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if range.contains(&x) => Ok(Some(x)),
            _ => Err(self.refuse(
                name,
                format!("must be a number between {} and {}, not {}", range.start(), range.end(), shown(value)),
            )),
        }
    }

    /// A whole number within `range`, or "auto".
    pub fn whole_or_auto(&self, name: &str, range: RangeInclusive<u64>) -> Result<Setting<u64>, Invalid> {
        if self.is_auto(name) {
            return Ok(Setting::Auto);
        }
        Ok(self.whole(name, range)?.map_or(Setting::Auto, Setting::Given))
    }

    /// A number within `range`, or "auto".
    pub fn number_or_auto(&self, name: &str, range: RangeInclusive<f64>) -> Result<Setting<f64>, Invalid> {
        if self.is_auto(name) {
            return Ok(Setting::Auto);
        }
        Ok(self.number(name, range)?.map_or(Setting::Auto, Setting::Given))
    }

    /// True or false.
    pub fn switch(&self, name: &str) -> Result<Option<bool>, Invalid> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(*on)),
            Some(other) => Err(self.refuse(name, format!("must be true or false, not {}", shown(other)))),
        }
    }

    /// One of a few words, each with its meaning.
    pub fn word<T: Copy>(&self, name: &str, words: &[(&str, T)]) -> Result<Option<T>, Invalid> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let meaning = value.as_str().and_then(|text| meant(words, text));
        meaning.map(Some).ok_or_else(|| {
            let known: Vec<String> = words.iter().map(|(word, _)| format!("\"{word}\"")).collect();
            self.refuse(name, format!("must be {}, not {}", known.join(" or "), shown(value)))
        })
    }

    /// A list of at most `most` values.
    pub fn list(&self, name: &str, most: usize) -> Result<&'a [Value], Invalid> {
        match self.value(name) {
            None => Ok(&[]),
            Some(Value::Array(list)) if list.len() <= most => Ok(list),
            Some(Value::Array(list)) => {
                Err(self.refuse(name, format!("may hold at most {most} entries, not {}", list.len())))
            }
            Some(other) => Err(self.refuse(name, format!("must be a list, not {}", kind(other)))),
        }
    }

    fn is_auto(&self, name: &str) -> bool {
        self.value(name).and_then(Value::as_str) == Some("auto")
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A refused value as people will recognise it: numbers and short strings in full, the rest by kind.
fn shown(value: &Value) -> String {
    match value {
        Value::Number(_) | Value::Bool(_) => value.to_string(),
        Value::String(text) if text.len() <= 40 => format!("\"{text}\""),
        other => kind(other).to_owned(),
    }
}

/// What a text means as one of a few words.
pub(super) fn meant<T: Copy>(words: &[(&str, T)], text: &str) -> Option<T> {
    words.iter().find(|(word, _)| *word == text).map(|(_, meaning)| *meaning)
}
