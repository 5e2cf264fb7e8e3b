//! Documents out of uploaded files: `.txt` and `.md` are one document each, `.jsonl` one a line, in one of several forms.
//!
//! Every complaint names the file as it was uploaded and the line.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
};

use super::examples::Example;
use crate::{
    domain::{Invalid, run::DataFile},
    engine::{Error, Result},
};

/// Longest line of a `.jsonl` file, and largest `.txt` file: one document must fit in memory while it is tokenized.
const MAX_DOCUMENT_BYTES: u64 = 4 << 30;

/// One document and where it came from.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    pub example: Example,
    /// Line of its file, from 1.
    pub line: u64,
}

fn refuse<T>(message: String) -> Result<T> {
    Err(Invalid::with_code("invalid_training_file", "training_file", message).into())
}

/// Calls `each` for every document of a file, in order.
pub fn read(file: &DataFile, mut each: impl FnMut(Document) -> Result) -> Result {
    let name = &file.filename;
    let opened = File::open(&file.path).map_err(Error::file(&file.path))?;
    let size = opened.metadata().map_err(Error::file(&file.path))?.len();
    if size == 0 {
        return refuse(format!("{name} is empty"));
    }
    match name.rsplit_once('.').map(|(_, extension)| extension.to_ascii_lowercase()).as_deref() {
        Some("txt" | "md") => {
            if size > MAX_DOCUMENT_BYTES {
                return refuse(format!("{name} has {size} bytes: one document has {MAX_DOCUMENT_BYTES} at most"));
            }
            let mut bytes = Vec::with_capacity(size as usize);
            BufReader::new(opened).read_to_end(&mut bytes).map_err(Error::file(&file.path))?;
            each(Document { example: Example::Text(utf8(bytes, name, 1)?), line: 1 })
        }
        Some("jsonl") => lines(BufReader::with_capacity(1 << 20, opened), file, each),
        _ => refuse(format!("{name} is neither .jsonl, .txt nor .md: rename it so that its format is known")),
    }
}

fn lines(mut reader: impl BufRead, file: &DataFile, mut each: impl FnMut(Document) -> Result) -> Result {
    let name = &file.filename;
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        let read = reader.by_ref().take(MAX_DOCUMENT_BYTES + 1).read_until(b'\n', &mut bytes);
        if read.map_err(Error::file(&file.path))? == 0 {
            break;
        }
        if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
            return refuse(format!("{name} line {line}: a line has {MAX_DOCUMENT_BYTES} bytes at most"));
        }
        if bytes.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let text = utf8(std::mem::take(&mut bytes), name, line)?;
        match Example::parse(&text) {
            Ok(example) => each(Document { example, line })?,
            Err(why) => return refuse(format!("{name} line {line}: {why}")),
        }
    }
    Ok(())
}

fn utf8(bytes: Vec<u8>, name: &str, line: u64) -> Result<String> {
    String::from_utf8(bytes).or_else(|error| {
        let valid = error.utf8_error().valid_up_to();
        let line = line + error.as_bytes()[..valid].iter().filter(|b| **b == b'\n').count() as u64;
        refuse(format!("{name} line {line}: not valid UTF-8; save the file as UTF-8"))
    })
}
