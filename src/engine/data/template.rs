//! A model folder's chat template: Jinja as `transformers` renders it, for text that is to be tokenized.
//!
//! What a template may ask for beyond the language: `raise_exception`, `strftime_now`, the methods of Python's strings and
//! dictionaries, `tojson` that escapes nothing, and `{% generation %}` around what the assistant says. The last is a tag that
//! our renderer does not know; sentinel characters take its place, and the marks are where they come out.

use std::{ops::Range, path::Path};

use minijinja::{Environment, Error, ErrorKind, syntax::SyntaxConfig, value::Kwargs, value::Serde};
use serde::Serialize;
use serde_json::{Map, Value, ser::PrettyFormatter};

use super::{dates, examples::Chat};
use crate::domain::Invalid;

/// Stand for the tags: characters that Unicode promises never to assign, so that no text has them.
const BEGIN: char = '\u{fdd0}';
const END: char = '\u{fdd1}';
/// Files that hold a template, the first found counts; else it stands in `tokenizer_config.json`.
const FILE: &str = "chat_template.jinja";
const OLDER_FILE: &str = "chat_template.json";
/// Largest template file that is read.
const MAX_BYTES: u64 = 1 << 20;
/// The names of templates where a model has several.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// A text, and which bytes of it are trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marked {
    pub text: String,
    /// In order, without overlap.
    pub trained: Vec<Range<usize>>,
}

/// The chat templates of a model.
#[derive(Debug)]
pub struct Template {
    environment: Environment<'static>,
    /// Special tokens by name, such as `bos_token`.
    tokens: Map<String, Value>,
    /// Template text, changes with it.
    source: String,
}

impl Template {
    /// The template of a model folder with this `tokenizer_config.json`; none where it has none. `now` is the time that
    /// templates are told, in seconds since 1970.
    pub fn open(folder: &Path, config: &Value, now: u64) -> Result<Option<Self>, Invalid> {
        let refuse = |message: String| Invalid::with_code("invalid_chat_template", "model", message);
        let sources = sources(folder, config).map_err(refuse)?;
        let mut environment = environment(now);
        for (name, source) in &sources {
            environment
                .add_template_owned(name.clone(), without_generation_tags(source))
                .map_err(|error| refuse(format!("the model's chat template cannot be used: {}", reason(&error))))?;
        }
        let source: String = sources.iter().map(|(_, source)| source.as_str()).collect();
        let is_token = |key: &str| key.ends_with("_token");
        let content = |value: &Value| value.as_str().or_else(|| value["content"].as_str()).map(Value::from);
        let tokens = config.as_object().into_iter().flatten().filter(|(key, _)| is_token(key));
        let tokens = tokens.filter_map(|(key, value)| Some((key.clone(), content(value)?))).collect();
        Ok((!sources.is_empty()).then_some(Self { environment, tokens, source }))
    }

    /// Its text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether what it renders depends on the day.
    pub fn tells_time(&self) -> bool {
        self.source.contains("strftime_now")
    }

    /// Renders the first `n` messages of a conversation. What `{% generation %}` surrounds is marked.
    ///
    /// A complaint is in the template's words where it raised one.
    pub fn render(&self, chat: &Chat, n: usize, add_generation_prompt: bool) -> Result<Marked, String> {
        let several = self.environment.get_template(TOOL_USE).ok().filter(|_| !chat.tools.is_null());
        let template = several.map_or_else(|| self.environment.get_template(DEFAULT), Ok);
        let rendered =
            template.and_then(|template| template.render(Serde(self.context(chat, n, add_generation_prompt))));
        unmark(
            &rendered.map_err(|error| format!("the model's chat template refuses the messages: {}", reason(&error)))?,
        )
    }

    fn context(&self, chat: &Chat, n: usize, add_generation_prompt: bool) -> Value {
        let messages = chat.messages[..n].iter().map(|message| {
            let mut fields = message.fields.clone();
            if message.role() == "developer" && !self.source.contains("developer") {
                fields.insert("role".into(), "system".into());
            }
            Value::Object(fields)
        });
        let mut context = self.tokens.clone();
        context.insert("messages".into(), messages.collect());
        context.insert("tools".into(), chat.tools.clone());
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        Value::Object(context)
    }
}

/// Every template by its name.
fn sources(folder: &Path, config: &Value) -> Result<Vec<(String, String)>, String> {
    if let Some(source) = read(folder, FILE)? {
        return Ok(vec![(DEFAULT.into(), source)]);
    }
    let found = match read(folder, OLDER_FILE)? {
        Some(text) => {
            let value: Value =
                serde_json::from_str(&text).map_err(|error| format!("{OLDER_FILE} is not valid JSON: {error}"))?;
            value["chat_template"].clone()
        }
        None => config["chat_template"].clone(),
    };
    match found {
        Value::Null => Ok(Vec::new()),
        Value::String(source) => Ok(vec![(DEFAULT.into(), source)]),
        Value::Array(several) => {
            let named =
                |value: &Value| Some((value["name"].as_str()?.to_owned(), value["template"].as_str()?.to_owned()));
            let several: Option<Vec<_>> = several.iter().map(named).collect();
            let several = several.ok_or("chat_template is a list of something else than names with templates")?;
            if !several.iter().any(|(name, _)| name == DEFAULT) {
                return Err(format!("none of the chat templates is named {DEFAULT}"));
            }
            Ok(several)
        }
        _ => Err("chat_template is neither a string nor a list".into()),
    }
}

fn read(folder: &Path, name: &str) -> Result<Option<String>, String> {
    let path = folder.join(name);
    match std::fs::metadata(&path) {
        Ok(metadata) if metadata.len() > MAX_BYTES => {
            Err(format!("{name} has {} bytes: {MAX_BYTES} are read at most", metadata.len()))
        }
        Ok(_) => std::fs::read_to_string(&path).map(Some).map_err(|error| format!("{name}: {error}")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("{name}: {error}")),
    }
}

fn environment(now: u64) -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the delimiters are the usual ones"));
    // Names of templates end in no file type, so nothing is escaped.
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", move |format: &str| dates::format(now, format));
    environment.add_filter("tojson", to_json);
    environment
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it.
#[expect(clippy::needless_pass_by_value, reason = "the shape of a filter")]
fn to_json(value: &minijinja::Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Asked for by some templates, and what is done anyway.
    let _ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let indent = indent.map(|n| " ".repeat(n));
    let mut out = Vec::new();
    let written = match &indent {
        Some(indent) => value.serialize(&mut serde_json::Serializer::with_formatter(
            &mut out,
            PrettyFormatter::with_indent(indent.as_bytes()),
        )),
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
    };
    let refuse = |why: String| Error::new(ErrorKind::InvalidOperation, format!("tojson: {why}"));
    written.map_err(|error| refuse(error.to_string()))?;
    String::from_utf8(out).map_err(|error| refuse(error.to_string()))
}

/// A space after every comma and colon.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The template with sentinels in place of its generation tags. Each keeps what it does to the white space on both sides.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(length) = tag.find("%}").map(|end| end + 2) else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(length);
        let inner = &tag[2..length - 2];
        let name = inner.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        let sentinel = match name {
            "generation" => Some(BEGIN.to_string()),
            "endgeneration" => Some(END.to_string()),
            _ => None,
        };
        match sentinel {
            Some(sentinel) => {
                let sign = |c: Option<char>| c.filter(|c| "-+".contains(*c)).map_or(String::new(), String::from);
                let (left, right) = (sign(inner.chars().next()), sign(inner.chars().next_back()));
                out.extend(["{%", &left, " if true %}", &sentinel, "{% endif ", &right, "%}"]);
            }
            None => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Takes the sentinels out.
fn unmark(rendered: &str) -> Result<Marked, String> {
    let mut marked = Marked { text: String::with_capacity(rendered.len()), trained: Vec::new() };
    let mut open = None;
    for part in rendered.split_inclusive([BEGIN, END]) {
        marked.text.push_str(part.trim_end_matches([BEGIN, END]));
        let here = marked.text.len();
        open = match (part.chars().next_back(), open) {
            (Some(BEGIN), None) => Some(here),
            (Some(END), Some(start)) => {
                marked.trained.push(start..here);
                None
            }
            (Some(BEGIN | END), _) => return Err("the model's chat template nests its generation marks".into()),
            (_, open) => open,
        };
    }
    Ok(marked)
}

/// What a template says, or what is wrong with it.
fn reason(error: &Error) -> String {
    let detail = error.detail().map_or_else(|| error.to_string(), str::to_owned);
    match error.line() {
        Some(line) if error.kind() == ErrorKind::SyntaxError => format!("{detail} (line {line} of the template)"),
        _ => detail,
    }
}
