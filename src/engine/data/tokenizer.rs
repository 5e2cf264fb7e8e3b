//! A model folder's tokenizer: text to ids, with the begin and end tokens that the folder says a document has.
//!
//! Long documents are cut before a space between two letters and the parts tokenized beside each other. Tokenizers that
//! split words by pattern first (byte-level BPE) give the same ids for the parts as for the whole; any other kind is given
//! the whole document.

use std::path::Path;

use rayon::prelude::*;
use serde_json::Value;
use tokenizers::Tokenizer as HuggingFace;

use crate::{
    domain::Invalid,
    engine::{Error, Result},
};

/// Bytes of a part of a long document.
const PART_BYTES: usize = 1 << 18;
/// Largest tokenizer file that is read: vocabularies of a million entries stay far below.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// A tokenizer and what it puts around a document.
#[derive(Debug)]
pub struct Tokenizer {
    inner: HuggingFace,
    bos: Option<u32>,
    eos: Option<u32>,
    /// Whether parts of a document may be tokenized apart.
    splits: bool,
    /// Digest of the files it was read from.
    digest: Vec<u8>,
}

fn refuse<T>(message: String) -> Result<T> {
    Err(Invalid::with_code("invalid_tokenizer", "model", message).into())
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, if there, `tokenizer_config.json`, and checks every id against the model's vocabulary.
    pub fn open(folder: &Path, vocab_size: u64) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let size = match std::fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) => return refuse(format!("the model's tokenizer.json cannot be read: {error}")),
        };
        if size > MAX_TOKENIZER_BYTES {
            return refuse(format!("tokenizer.json has {size} bytes: {MAX_TOKENIZER_BYTES} are read at most"));
        }
        let bytes = std::fs::read(&path).map_err(Error::file(&path))?;
        let mut inner = match HuggingFace::from_bytes(&bytes) {
            Ok(inner) => inner,
            Err(error) => return refuse(format!("tokenizer.json cannot be used: {error}")),
        };
        // Cutting and filling are decided by packing, in the open.
        if inner.with_truncation(None).is_err() {
            return refuse("tokenizer.json has truncation settings that cannot be taken off".into());
        }
        inner.with_padding(None);
        let config_path = folder.join("tokenizer_config.json");
        let config_bytes = std::fs::read(&config_path).unwrap_or_else(|_| b"{}".to_vec());
        let config: Value = match serde_json::from_slice(&config_bytes) {
            Ok(config) => config,
            Err(error) => return refuse(format!("tokenizer_config.json is not valid JSON: {error}")),
        };
        let largest = inner.get_vocab(true).into_values().max();
        if let Some(id) = largest
            && u64::from(id) >= vocab_size
        {
            let message = format!(
                "the tokenizer does not match the model: it has id {id}, the model's vocabulary ends at {}",
                vocab_size - 1
            );
            return refuse(message);
        }
        let (bos, eos) = (special(&inner, &config, "bos_token"), special(&inner, &config, "eos_token"));
        let digest = [bytes.as_slice(), &config_bytes].map(digest).concat();
        let splits = splits_words_first(&serde_json::from_slice(&bytes).unwrap_or(Value::Null));
        let wants = |key: &str| config.get(key).and_then(Value::as_bool) != Some(false);
        Ok(Self {
            bos: bos.filter(|_| wants("add_bos_token")),
            eos: eos.filter(|_| wants("add_eos_token")),
            inner,
            splits,
            digest,
        })
    }

    /// Changes with the tokenizer's files.
    pub fn digest(&self) -> &[u8] {
        &self.digest
    }

    /// A document's ids: begin token, text, end token. Empty text gives no ids at all.
    pub fn document(&self, text: &str) -> Result<Vec<i32>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let parts = if self.splits { parts(text) } else { vec![text] };
        let encoded: Vec<_> = parts.into_par_iter().map(|part| self.inner.encode_fast(part, false)).collect();
        let mut ids: Vec<i32> = self.bos.into_iter().map(|id| id as i32).collect();
        for encoding in encoded {
            match encoding {
                Ok(encoding) => ids.extend(encoding.get_ids().iter().map(|id| *id as i32)),
                Err(error) => return refuse(format!("the tokenizer failed on a document: {error}")),
            }
        }
        ids.extend(self.eos.map(|id| id as i32));
        Ok(ids)
    }
}

fn digest(bytes: &[u8]) -> Vec<u8> {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes).to_vec()
}

/// Id of a special token that the config names, as a string or as an object with `content`.
fn special(inner: &HuggingFace, config: &Value, key: &str) -> Option<u32> {
    let value = config.get(key)?;
    let content = value.as_str().or_else(|| value.get("content").and_then(Value::as_str))?;
    inner.token_to_id(content)
}

/// True for byte-level tokenizers that change no text before they split it, and whose added tokens hold no space.
fn splits_words_first(tokenizer: &Value) -> bool {
    let kind = |value: &Value| value.get("type").and_then(Value::as_str).map(str::to_owned);
    let plain = |byte_level: &Value| byte_level.get("add_prefix_space").and_then(Value::as_bool) == Some(false);
    let pre = &tokenizer["pre_tokenizer"];
    let by_pattern = match kind(pre).as_deref() {
        Some("ByteLevel") => plain(pre) && pre.get("use_regex").and_then(Value::as_bool) != Some(false),
        Some("Sequence") => match pre["pretokenizers"].as_array().map(Vec::as_slice) {
            Some([split, byte_level]) => {
                kind(split).as_deref() == Some("Split")
                    && kind(byte_level).as_deref() == Some("ByteLevel")
                    && plain(byte_level)
            }
            _ => false,
        },
        _ => false,
    };
    let spaced = |token: &Value| token["content"].as_str().is_none_or(|content| content.contains(' '));
    let no_spaces = tokenizer["added_tokens"].as_array().is_none_or(|tokens| !tokens.iter().any(spaced));
    by_pattern && tokenizer["normalizer"].is_null() && no_spaces
}

/// Cuts text before spaces that stand between two ASCII letters, into parts of about [`PART_BYTES`].
fn parts(text: &str) -> Vec<&str> {
    let bytes = text.as_bytes();
    let mut out = Vec::new();
    let mut start = 0;
    while bytes.len() - start > PART_BYTES {
        let from = start + PART_BYTES;
        let cut = bytes[from - 1..]
            .windows(3)
            .position(|w| w[0].is_ascii_alphabetic() && w[1] == b' ' && w[2].is_ascii_alphabetic());
        let Some(cut) = cut else { break };
        out.push(&text[start..from + cut]);
        start = from + cut;
    }
    out.push(&text[start..]);
    out
}
