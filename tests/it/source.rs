//! Rust source, read just well enough to judge it: tokens without comments and text, and the paths they name.
//!
//! In: the text of one file and the module it is. Out: every path it names, resolved to the root of the crate where it
//! can be. No type knowledge: a path is what is written, so a re-export counts as the module that is named.

/// One token of code. Comments are dropped, string and character literals become `Literal`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Token {
    Word(String),
    /// `::`
    Separator,
    Literal,
    Sign(char),
}

impl Token {
    fn word(&self) -> Option<&str> {
        match self {
            Self::Word(word) => Some(word),
            _ => None,
        }
    }

    fn is(&self, sign: char) -> bool {
        *self == Self::Sign(sign)
    }
}

/// Cuts source into tokens.
pub fn tokens(source: &str) -> Vec<Token> {
    let text: Vec<char> = source.chars().collect();
    let mut out = Vec::new();
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        let c = text[at];
        if starts(rest, "//") {
            at += rest.iter().position(|c| *c == '\n').unwrap_or(rest.len());
        } else if starts(rest, "/*") {
            at += block_comment(rest);
        } else if let Some(length) = literal(rest) {
            out.push(Token::Literal);
            at += length;
        } else if c.is_alphanumeric() || c == '_' {
            let length = rest.iter().position(|c| !(c.is_alphanumeric() || *c == '_')).unwrap_or(rest.len());
            out.push(Token::Word(rest[..length].iter().collect()));
            at += length;
        } else if starts(rest, "::") {
            out.push(Token::Separator);
            at += 2;
        } else {
            if !c.is_whitespace() {
                out.push(Token::Sign(c));
            }
            at += 1;
        }
    }
    out
}

fn starts(text: &[char], with: &str) -> bool {
    text.len() >= with.len() && with.chars().zip(text).all(|(a, b)| a == *b)
}

/// Length of a comment that may hold others.
fn block_comment(text: &[char]) -> usize {
    let (mut at, mut depth) = (0, 0);
    while at < text.len() {
        if starts(&text[at..], "/*") {
            depth += 1;
            at += 2;
        } else if starts(&text[at..], "*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    at
}

/// Length of the string or character that begins here, if one does.
fn literal(text: &[char]) -> Option<usize> {
    let prefix = ["br", "cr", "b", "c", "r"]
        .into_iter()
        .find(|p| starts(text, p) && text.get(p.len()).is_some_and(|c| matches!(c, '"' | '#' | '\'')));
    let prefix = prefix.unwrap_or_default();
    let body = &text[prefix.len()..];
    if prefix.ends_with('r') {
        let hashes = body.iter().take_while(|c| **c == '#').count();
        if body.get(hashes) != Some(&'"') {
            return None; // r#type
        }
        let end: String = format!("\"{}", "#".repeat(hashes));
        let inner = &body[hashes + 1..];
        let length = (0..inner.len()).find(|i| starts(&inner[*i..], &end)).unwrap_or(inner.len());
        return Some(prefix.len() + hashes + 1 + length + end.len());
    }
    match body.first() {
        Some('"') => Some(prefix.len() + quoted(body, '"')),
        // 'a' and '\n' are characters, 'a is a lifetime.
        Some('\'') if body.get(1) == Some(&'\\') || body.get(2) == Some(&'\'') => {
            Some(prefix.len() + quoted(body, '\''))
        }
        _ => None,
    }
}

fn quoted(text: &[char], quote: char) -> usize {
    let mut at = 1;
    while at < text.len() {
        match text[at] {
            '\\' => at += 2,
            c if c == quote => return at + 1,
            _ => at += 1,
        }
    }
    text.len()
}

/// Every path of more than one segment, and every path of a `use`, as it is written, groups spelled out; paths into this
/// crate begin with `crate`. `module` is the file's own place, `["engine", "alst"]` for `src/engine/alst/mod.rs`.
pub fn paths(tokens: &[Token], module: &[&str]) -> Vec<Vec<String>> {
    let own = declared_modules(tokens);
    let mut found = Vec::new();
    let mut nesting: Vec<(usize, String)> = Vec::new(); // inline modules: depth of braces outside, name
    let mut depth = 0;
    let mut at = 0;
    while at < tokens.len() {
        let token = &tokens[at];
        if token.is('{') {
            if at >= 2 && tokens[at - 2].word() == Some("mod") {
                let name = tokens[at - 1].word().unwrap_or_default().to_owned();
                nesting.push((depth, name));
            }
            depth += 1;
        } else if token.is('}') {
            depth = depth.saturating_sub(1);
            nesting.pop_if(|(outside, _)| *outside == depth);
        }
        let in_use = token.word() == Some("use") && at + 1 < tokens.len();
        let begins = token.word().is_some() && tokens.get(at + 1) == Some(&Token::Separator);
        let continues = at > 0 && tokens[at - 1] == Token::Separator;
        // pub(in crate::a) says how far up a name is seen and imports nothing.
        let bounds = at > 2 && tokens[at - 1].word() == Some("in") && tokens[at - 3].word() == Some("pub");
        if !(in_use || begins && !continues) || bounds {
            at += 1;
            continue;
        }
        let start = if in_use { at + 1 } else { at };
        let mut written = Vec::new();
        at = tree(tokens, start, &[], &mut written).max(at + 1);
        let here: Vec<&str> = module.iter().copied().chain(nesting.iter().map(|(_, name)| name.as_str())).collect();
        found.extend(written.into_iter().map(|path| resolve(path, &here, &own)));
    }
    found
}

/// Reads `a::b::{c, d::*}` from `at`; returns where it ends.
fn tree(tokens: &[Token], mut at: usize, prefix: &[String], out: &mut Vec<Vec<String>>) -> usize {
    let mut path = prefix.to_vec();
    if tokens.get(at) == Some(&Token::Separator) {
        at += 1;
    }
    loop {
        match tokens.get(at) {
            Some(Token::Word(word)) => {
                if word != "self" || path.is_empty() {
                    path.push(word.clone());
                }
                at += 1;
            }
            Some(Token::Sign('*')) => {
                path.push("*".into());
                at += 1;
            }
            Some(Token::Sign('{')) => {
                at += 1;
                while at < tokens.len() && !tokens[at].is('}') {
                    let next = tree(tokens, at, &path, out);
                    // Skips commas and `as name`.
                    at = next.max(at + 1);
                    while at < tokens.len() && !tokens[at].is('}') && !tokens[at - 1].is(',') {
                        at += 1;
                    }
                }
                return at + 1;
            }
            _ => break,
        }
        if tokens.get(at) != Some(&Token::Separator) {
            break;
        }
        at += 1;
    }
    if path.len() > prefix.len() || !path.is_empty() {
        out.push(path);
    }
    at
}

/// Turns `super::x`, `self::x` and a child's `x::y` into `crate::...`.
fn resolve(path: Vec<String>, here: &[&str], own: &[String]) -> Vec<String> {
    let mut base: Vec<String> = here.iter().map(|s| (*s).to_owned()).collect();
    let mut rest = path.as_slice();
    match path.first().map(String::as_str) {
        Some("super") => {
            while rest.first().is_some_and(|s| s == "super") {
                base.pop();
                rest = &rest[1..];
            }
        }
        Some("self") => rest = &rest[1..],
        Some(first) if own.iter().any(|m| m == first) => {}
        _ => return path,
    }
    std::iter::once("crate".to_owned()).chain(base).chain(rest.iter().cloned()).collect()
}

/// Names of `mod x;` and `mod x {`.
fn declared_modules(tokens: &[Token]) -> Vec<String> {
    let declares = |w: &[Token]| w[0].word() == Some("mod") && (w[2].is(';') || w[2].is('{'));
    tokens.windows(3).filter(|w| declares(w)).filter_map(|w| w[1].word().map(str::to_owned)).collect()
}
