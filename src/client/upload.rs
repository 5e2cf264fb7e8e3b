//! `longhaul upload`: files to the server, streamed; their ids out, in the order of the files. Large ones go in parts.

use std::{fs::File, io::Write, path::PathBuf};

use super::{Failure, Result, bar, http::Client, multipart, parts, say};

/// Size of a part unless told otherwise, and the largest that a server takes.
const PART_BYTES: u64 = 32 << 20;
const MOST_PART_BYTES: u64 = 64 << 20;
const AT_ONCE: u64 = 4;

/// Flags of `longhaul upload`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Files to send: .txt and .md are one document each, .jsonl has one document a line
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    /// What the files are for
    #[arg(long, default_value = "fine-tune")]
    pub purpose: String,
    /// Print each file object as a line of JSON instead of its id
    #[arg(long)]
    pub json: bool,
    /// Bytes of a part; a larger file is sent in several, and one that broke off goes on with those that are there
    #[arg(long, default_value_t = PART_BYTES, value_parser = clap::value_parser!(u64).range(1..=MOST_PART_BYTES), value_name = "BYTES")]
    pub part_bytes: u64,
    /// Parts that are sent at once
    #[arg(long, default_value_t = AT_ONCE, value_parser = clap::value_parser!(u64).range(1..=32), value_name = "N")]
    pub at_once: u64,
}

impl Default for Args {
    fn default() -> Self {
        let (files, purpose) = (Vec::new(), "fine-tune".to_owned());
        Self { files, purpose, json: false, part_bytes: PART_BYTES, at_once: AT_ONCE }
    }
}

/// Sends every file; stops at the first that fails.
pub fn run(args: &Args, client: &Client, out: &mut dyn Write) -> Result {
    for path in &args.files {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        let Some(name) = name else {
            return Err(Failure::Usage(format!("{} is not a file", path.display())));
        };
        let file = File::open(path).map_err(Failure::file(path))?;
        let facts = file.metadata().map_err(Failure::file(path))?;
        if !facts.is_file() {
            return Err(Failure::Usage(format!("{} is not a file", path.display())));
        }
        let progress = bar::bytes(&name, facts.len());
        let answer = if facts.len() > args.part_bytes {
            let (part, at_once) = (args.part_bytes, args.at_once as usize);
            let whole = parts::Whole { path, name: &name, purpose: &args.purpose, bytes: facts.len(), part, at_once };
            whole.send(client, &progress)
        } else {
            let seen = progress.clone();
            let mut form = multipart::form(file, facts.len(), &name, &args.purpose, move |n| seen.inc(n));
            client.post_form("/v1/files", &mut form, None)
        };
        progress.finish_and_clear();
        let answer = answer?;
        let id = answer["id"].as_str().ok_or_else(|| Failure::shape(client.server(), "an id", &answer))?;
        if args.json { say(out, &answer)? } else { say(out, id)? }
    }
    Ok(())
}
