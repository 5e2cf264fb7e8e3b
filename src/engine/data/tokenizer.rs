//! A model folder's tokenizer: text to ids, with the begin and end tokens that the folder says a document has, and
//! conversations to ids by its chat template, which writes such tokens itself.
//!
//! Long documents are cut before a space between two letters and the parts tokenized beside each other. Tokenizers that
//! split words by pattern first (byte-level BPE) give the same ids for the parts as for the whole; any other kind is given
//! the whole document.

use std::{ops::Range, path::Path};

use rayon::prelude::*;
use serde_json::Value;
use tokenizers::{PostProcessorWrapper, Tokenizer as HuggingFace};

use super::{
    Token, chat,
    examples::Example,
    template::{Marked, Template},
};
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
    /// Or what is wrong with it, which matters only to conversations.
    template: std::result::Result<Option<Template>, Invalid>,
    /// Whether parts of a document may be tokenized apart.
    splits: bool,
    /// Digest of the files it was read from.
    digest: Vec<u8>,
}

fn refuse<T>(message: String) -> Result<T> {
    Err(Invalid::with_code("invalid_tokenizer", "model", message).into())
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, if there, `tokenizer_config.json` and the chat template, and checks every id against the
    /// model's vocabulary. `now` is the time that templates are told, in seconds since 1970: it is the job's, so that whoever
    /// tokenizes its data does it alike.
    pub fn open(folder: &Path, vocab_size: u64, now: u64) -> Result<Self> {
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
        // It would only add the tokens that are added here, and take white space out of the offsets that marks go by.
        inner.with_post_processor(None::<PostProcessorWrapper>);
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
        let template = Template::open(folder, &config, now);
        let digest = digest(&[&bytes, &config_bytes, &told(template.as_ref().ok().and_then(Option::as_ref), now)]);
        let splits = splits_words_first(&serde_json::from_slice(&bytes).unwrap_or(Value::Null));
        let wants = |key: &str| config.get(key).and_then(Value::as_bool) != Some(false);
        Ok(Self {
            bos: bos.filter(|_| wants("add_bos_token")),
            eos: eos.filter(|_| wants("add_eos_token")),
            inner,
            template,
            splits,
            digest,
        })
    }

    /// Changes with the tokenizer's files.
    pub fn digest(&self) -> &[u8] {
        &self.digest
    }

    /// The tokens of an example and which of them are trained. An empty text gives none at all.
    pub fn example(&self, example: &Example) -> Result<Vec<Token>> {
        match example {
            Example::Text(text) => {
                self.document(text).map(|ids| ids.into_iter().map(|id| Token::new(id, true)).collect())
            }
            Example::Pair { prompt, completion } => {
                let text = format!("{prompt}{completion}");
                let mut tokens = self.marked(&text, std::slice::from_ref(&(prompt.len()..text.len())))?;
                self.begin(&mut tokens, |token| token.id() as u32, |id| Token::new(id, false));
                self.end(&mut tokens, |token| token.id() as u32, |id| Token::new(id, true));
                Ok(tokens)
            }
            Example::Chat(chat) => {
                let Some(template) = self.template.as_ref().map_err(Invalid::clone)? else {
                    let message = "messages need a chat template, and the model has none: put a chat_template.jinja into its \
                                   folder, or write the lines as prompt and completion or as text";
                    return Err(Invalid::with_code("no_chat_template", "model", message).into());
                };
                let marked = chat::mark(chat, template);
                let Marked { text, trained } =
                    marked.map_err(|why| Invalid::with_code("invalid_training_file", "training_file", why))?;
                self.marked(&text, &trained)
            }
        }
    }

    /// A document's ids: begin token, text, end token, each where the text does not have it already. Empty text gives no ids
    /// at all.
    pub fn document(&self, text: &str) -> Result<Vec<u32>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let encode = |part: &&str| self.inner.encode_fast(*part, false);
        let encoded: Vec<_> = self.parts(text).par_iter().map(encode).collect();
        let mut ids = Vec::new();
        for encoding in encoded {
            ids.extend_from_slice(encoding.map_err(failed)?.get_ids());
        }
        self.begin(&mut ids, |id| *id, |id| id);
        self.end(&mut ids, |id| *id, |id| id);
        Ok(ids)
    }

    /// The text of ids, special tokens and all.
    pub fn text(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, false).map_err(failed)
    }

    /// Tokens of a text. One that has a byte of the trained ranges is trained.
    fn marked(&self, text: &str, trained: &[Range<usize>]) -> Result<Vec<Token>> {
        let encode = |part: &&str| self.inner.encode(*part, false);
        let parts = self.parts(text);
        let encoded: Vec<_> = parts.par_iter().map(encode).collect();
        let mut tokens = Vec::new();
        let mut ranges = trained.iter().peekable();
        let mut first = 0;
        for (part, encoding) in parts.iter().zip(encoded) {
            let encoding = encoding.map_err(failed)?;
            for (id, (start, end)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
                let (start, end) = (first + start, first + end);
                while ranges.next_if(|range| range.end <= start).is_some() {}
                tokens.push(Token::new(*id, ranges.peek().is_some_and(|range| range.start < end)));
            }
            first += part.len();
        }
        Ok(tokens)
    }

    fn parts<'a>(&self, text: &'a str) -> Vec<&'a str> {
        if self.splits { parts(text) } else { vec![text] }
    }

    /// Texts made for a model may begin with its begin token already: a second one would be seen by nobody but the model.
    fn begin<T>(&self, tokens: &mut Vec<T>, id: impl Fn(&T) -> u32, new: impl Fn(u32) -> T) {
        if let Some(bos) = self.bos.filter(|bos| tokens.first().map(&id) != Some(*bos)) {
            tokens.insert(0, new(bos));
        }
    }

    fn end<T>(&self, tokens: &mut Vec<T>, id: impl Fn(&T) -> u32, new: impl Fn(u32) -> T) {
        if let Some(eos) = self.eos.filter(|eos| tokens.last().map(&id) != Some(*eos)) {
            tokens.push(new(eos));
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the shape of map_err")]
fn failed(error: tokenizers::Error) -> Error {
    Invalid::with_code("invalid_tokenizer", "model", format!("the tokenizer failed on a document: {error}")).into()
}

fn digest(parts: &[&[u8]]) -> Vec<u8> {
    use sha2::{Digest, Sha256};
    parts.iter().flat_map(Sha256::digest).collect()
}

/// What a chat template makes its text of, beside the messages.
fn told(template: Option<&Template>, now: u64) -> Vec<u8> {
    let time = template.filter(|template| template.tells_time()).map(|_| now.to_le_bytes());
    let source = template.map_or("", Template::source).as_bytes();
    [source, time.as_ref().map_or(&[], <[u8; 8]>::as_slice)].concat()
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
