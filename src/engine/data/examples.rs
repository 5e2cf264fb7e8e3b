//! What a line of a `.jsonl` file says: a text, a prompt with its completion, or the messages of a conversation.
//!
//! A complaint is the rest of a sentence that begins with the file and the line; it names the field.

use serde_json::{Map, Value};

/// Who may speak. `developer` is a later word for `system`.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];
/// What a line can be, by the field that says so.
const KINDS: [&str; 3] = ["text", "completion", "messages"];
/// Fields that images and sound would stand in, and older forms of what is read.
const NOT_READ: [(&str, &str); 3] = [
    ("function_call", "is an older form: write it as tool_calls"),
    ("audio", "holds no text"),
    ("images", "holds no text"),
];

/// One example to train on.
#[derive(Debug, Clone, PartialEq)]
pub enum Example {
    /// All of it is trained.
    Text(String),
    /// Only the completion is trained.
    Pair { prompt: String, completion: String },
    /// Only what the assistant says is trained.
    Chat(Chat),
}

/// A conversation, as the model's chat template will have it.
#[derive(Debug, Clone, PartialEq)]
pub struct Chat {
    pub messages: Vec<Message>,
    /// Descriptions of tools; null where there are none.
    pub tools: Value,
}

/// A message: its fields as templates know them, and whether its author trains.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    pub fields: Map<String, Value>,
    /// For an assistant's turn that does not have `weight` 0.
    pub trained: bool,
}

impl Message {
    /// The role it was given.
    pub fn role(&self) -> &str {
        self.fields.get("role").and_then(Value::as_str).unwrap_or_default()
    }
}

impl Example {
    /// Reads a line.
    pub fn parse(line: &str) -> Result<Self, String> {
        let value: Value = serde_json::from_str(line).map_err(|error| format!("not valid JSON: {error}"))?;
        let Value::Object(mut object) = value else {
            return Err("a line must be an object such as {\"text\": \"...\"}".into());
        };
        let kinds: Vec<&str> = KINDS.into_iter().filter(|kind| object.contains_key(*kind)).collect();
        match kinds.as_slice() {
            ["text"] => Ok(Self::Text(string(&mut object, "text")?)),
            ["completion"] => {
                let (prompt, completion) = (string(&mut object, "prompt")?, string(&mut object, "completion")?);
                if completion.is_empty() {
                    return Err("completion is empty, so nothing of the line would be trained".into());
                }
                Ok(Self::Pair { prompt, completion })
            }
            ["messages"] => Chat::parse(&mut object).map(Self::Chat),
            [] if object.contains_key("prompt") => Err("there is a prompt and no completion".into()),
            [] => Err("the object has no text, no prompt with completion and no messages".into()),
            several => Err(format!("the object has {}: a line is one of them", several.join(" and "))),
        }
    }

    /// About how many bytes of text it has.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Pair { prompt, completion } => prompt.len() + completion.len(),
            Self::Chat(chat) => {
                let content =
                    |message: &Message| message.fields.get("content").and_then(Value::as_str).map_or(0, str::len);
                chat.messages.iter().map(content).sum()
            }
        }
    }
}

fn string(object: &mut Map<String, Value>, field: &str) -> Result<String, String> {
    match object.remove(field) {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(_)) => Err(format!("{field} must be a string; a list of messages belongs under messages")),
        Some(_) => Err(format!("{field} must be a string")),
        None => Err(format!("the object has no {field}")),
    }
}

impl Chat {
    fn parse(object: &mut Map<String, Value>) -> Result<Self, String> {
        let Some(Value::Array(messages)) = object.remove("messages") else {
            return Err("messages must be a list".into());
        };
        if messages.is_empty() {
            return Err("messages is empty".into());
        }
        let tools = object.remove("tools").unwrap_or_default();
        check_tools(&tools)?;
        if object.get("functions").is_some_and(|functions| !functions.is_null()) {
            return Err("functions is an older form: write it as tools".into());
        }
        let messages = messages
            .into_iter()
            .enumerate()
            .map(|(i, message)| Message::parse(message).map_err(|why| format!("messages[{i}]{why}")));
        let messages = messages.collect::<Result<Vec<_>, _>>()?;
        if !messages.iter().any(|message| message.trained) {
            return Err(
                "messages has no message of the assistant with weight 1, so nothing of it would be trained".into()
            );
        }
        Ok(Self { messages, tools })
    }
}

fn check_tools(tools: &Value) -> Result<(), String> {
    match tools {
        Value::Null => Ok(()),
        Value::Array(tools) => match tools.iter().position(|tool| !tool.is_object()) {
            Some(i) => Err(format!("tools[{i}] must be an object")),
            None => Ok(()),
        },
        _ => Err("tools must be a list".into()),
    }
}

impl Message {
    /// A complaint reads on from the message's place.
    fn parse(message: Value) -> Result<Self, String> {
        let Value::Object(mut fields) = message else { return Err(" must be an object".into()) };
        // Clients write null for what is not there; templates test whether a field is there.
        fields.retain(|_, value| !value.is_null());
        let assistant = match fields.get("role").map(|role| role.as_str().unwrap_or_default()) {
            Some(role) if ROLES.contains(&role) => role == "assistant",
            Some(_) => return Err(format!(".role must be one of {}", ROLES.join(", "))),
            None => return Err(" has no role".into()),
        };
        for (field, why) in NOT_READ {
            if fields.contains_key(field) {
                return Err(format!(".{field} {why}"));
            }
        }
        let weight = match fields.remove("weight") {
            None => 1.0,
            Some(_) if !assistant => return Err(".weight is for messages of the assistant alone".into()),
            Some(weight) => weight.as_f64().filter(|w| [0.0, 1.0].contains(w)).ok_or(".weight must be 0 or 1")?,
        };
        let calls = fields.get_mut("tool_calls").map(tool_calls).transpose()?;
        if calls.is_some() && !assistant {
            return Err(".tool_calls is for messages of the assistant alone".into());
        }
        match fields.remove("content") {
            Some(content) => {
                fields.insert("content".into(), text(content)?.into());
            }
            None if calls.is_some_and(|n| n > 0) => {}
            None => return Err(" has no content".into()),
        }
        Ok(Self { fields, trained: assistant && weight > 0.0 })
    }
}

/// A content as one string: templates of text models take nothing else.
fn text(content: Value) -> Result<String, String> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        _ => return Err(".content must be a string or a list of parts".into()),
    };
    let text_of = |(i, part): (usize, Value)| match (part.get("type").and_then(Value::as_str), &part["text"]) {
        (Some("text"), Value::String(text)) => Ok(text.clone()),
        (Some("text"), _) => Err(format!(".content[{i}].text must be a string")),
        _ => Err(format!(".content[{i}].type must be text: images and sound are not trained on")),
    };
    parts.into_iter().enumerate().map(text_of).collect()
}

/// Checks calls of tools, and makes objects of arguments that are written as a string of JSON: templates print them as
/// JSON themselves. Answers how many there are.
fn tool_calls(calls: &mut Value) -> Result<usize, String> {
    let Value::Array(calls) = calls else { return Err(".tool_calls must be a list".into()) };
    for (i, call) in calls.iter_mut().enumerate() {
        let place = format!(".tool_calls[{i}].function");
        let Some(Value::Object(function)) = call.get_mut("function") else {
            return Err(format!("{place} must be an object with name and arguments"));
        };
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(format!("{place}.name must be a string"));
        }
        let arguments = function.entry("arguments").or_insert_with(|| Value::Object(Map::new()));
        if let Value::String(text) = arguments {
            *arguments = serde_json::from_str(text)
                .map_err(|error| format!("{place}.arguments is a string that is not valid JSON: {error}"))?;
        }
        if !arguments.is_object() {
            return Err(format!("{place}.arguments must be an object, or a string that holds one as JSON"));
        }
    }
    Ok(calls.len())
}
