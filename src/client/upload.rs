//! `longhaul upload`: files to the server, streamed; their ids out, in the order of the files.

use std::{fs::File, io::Write, path::PathBuf};

use super::{Failure, Result, bar, http::Client, multipart, say};

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
        let seen = progress.clone();
        let mut form = multipart::form(file, facts.len(), &name, &args.purpose, move |n| seen.inc(n));
        let answer = client.post_stream("/v1/files", &form.content_type, form.length, &mut *form.body);
        progress.finish_and_clear();
        let answer = answer?;
        let id = answer["id"].as_str().ok_or_else(|| Failure::shape(client.server(), "an id", &answer))?;
        if args.json { say(out, &answer)? } else { say(out, id)? }
    }
    Ok(())
}
