//! `longhaul download`: a checkpoint's files onto this disk, each checked against the manifest's SHA-256.
//!
//! In: a job (its newest checkpoint), a fine-tuned model's name, or a checkpoint's id. Out: a folder that
//! `from_pretrained` loads. A download that breaks off, by the network or by this process, goes on where it stopped.

use std::{
    fs,
    io::{Read, Write},
    path::{Component, Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::{
    Failure, Result, bar,
    http::{self, Client, encoded},
    jobs::{self, text},
    partial::{self, Partial},
    say,
};
use crate::domain::{CheckpointId, JobId, progress::WrittenFile};

/// Bytes taken from the wire at once.
const BUFFER: usize = 1 << 16;
/// Longest time without a new byte before a download is given up.
const STALLED: Duration = Duration::from_mins(5);
/// Pause before a broken download goes on.
const PAUSE: Duration = Duration::from_secs(1);
/// Jobs looked through, newest first, for a checkpoint that is named without its job.
const SEARCHED_JOBS: u32 = 1000;

/// Flags of `longhaul download`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// A job (ftjob-..., its newest checkpoint), a checkpoint (ftckpt_...) or a fine-tuned model (ft:...)
    pub what: String,
    /// Folder to put the files in; the checkpoint's id by default
    #[arg(long, value_name = "DIR")]
    pub to: Option<PathBuf>,
    /// Also the state for continuing the run
    #[arg(long)]
    pub all: bool,
    /// Print what was downloaded as one JSON object instead of the folder
    #[arg(long)]
    pub json: bool,
}

/// Downloads what is not here yet, and prints the folder.
pub fn run(args: &Args, client: &Client, out: &mut dyn Write) -> Result {
    let (job, checkpoint) = find(&args.what, client)?;
    let files_path = format!("/v1/fine_tuning/jobs/{job}/checkpoints/{checkpoint}/files");
    let include = if args.all { "all" } else { "model" };
    let manifest = client.get(&format!("{files_path}?include={include}"), http::SHORT, |_| ())?;
    let files: Vec<WrittenFile> = serde_json::from_value(manifest["data"].clone())
        .map_err(|_| Failure::shape(client.server(), "a list of files", &manifest))?;
    let folder = args.to.clone().unwrap_or_else(|| PathBuf::from(&checkpoint));
    for file in &files {
        let target = inside(&folder, &file.path)?;
        fetch(client, &format!("{files_path}/{}", encoded(&file.path)), file, &target)?;
    }
    if !args.json {
        return say(out, folder.display());
    }
    let folder = folder.to_string_lossy();
    say(out, json!({"folder": folder, "job": job, "checkpoint": checkpoint, "files": files}))
}

/// The job and the checkpoint that are meant.
fn find(what: &str, client: &Client) -> Result<(String, String)> {
    if what.parse::<JobId>().is_ok() {
        let page = client.get(&format!("{}/checkpoints?limit=1", jobs::path(what)?), http::SHORT, |_| ())?;
        return match page["data"][0]["id"].as_str() {
            Some(id) => Ok((what.to_owned(), safe(id, client)?)),
            None => Err(Failure::Usage(format!("job {what} has no checkpoint yet"))),
        };
    }
    if what.starts_with("ft:") {
        let model = client.get(&format!("/v1/models/{}", encoded(what).replace('/', "%2F")), http::SHORT, |_| ())?;
        let job = text(&model, "fine_tuning_job_id");
        jobs::path(&job)?;
        return Ok((job, safe(&text(&model, "checkpoint_id"), client)?));
    }
    if what.parse::<CheckpointId>().is_err() {
        let way_out = "give a job (ftjob-...), a checkpoint (ftckpt_...) or a fine-tuned model (ft:...)";
        return Err(Failure::Usage(format!("{what}: {way_out}")));
    }
    let listed = client.get(&format!("/v1/fine_tuning/jobs?limit={SEARCHED_JOBS}"), http::SHORT, |_| ())?;
    for job in listed["data"].as_array().into_iter().flatten().map(|job| text(job, "id")) {
        let page = client.get(&format!("{}/checkpoints?limit=1000", jobs::path(&job)?), http::SHORT, |_| ())?;
        let has = |checkpoint: &Value| checkpoint["id"].as_str() == Some(what);
        if page["data"].as_array().is_some_and(|list| list.iter().any(has)) {
            return Ok((job, what.to_owned()));
        }
    }
    Err(Failure::Usage(format!("no job of the newest {SEARCHED_JOBS} has the checkpoint {what}; give its job's id")))
}

/// An id that the server gave, before it becomes part of paths here.
fn safe(id: &str, client: &Client) -> Result<String> {
    let id: CheckpointId = id.parse().map_err(|()| Failure::shape(client.server(), "a checkpoint's id", &id.into()))?;
    Ok(id.to_string())
}

/// Where a file of the manifest goes; refuses a path that leads out of the folder.
fn inside(folder: &Path, path: &str) -> Result<PathBuf> {
    let plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    if path.is_empty() || !plain {
        return Err(Failure::Local(format!("the manifest names {path:?}, which is not a path inside the folder")));
    }
    Ok(folder.join(path))
}

/// Makes `target` the file of the manifest.
fn fetch(client: &Client, url: &str, file: &WrittenFile, target: &Path) -> Result {
    if partial::is_whole(target, file.bytes, &file.sha256)? {
        return Ok(());
    }
    if let Some(folder) = target.parent() {
        fs::create_dir_all(folder).map_err(Failure::file(folder))?;
    }
    let progress = bar::bytes(&file.path, file.bytes);
    // A second time from nothing, for the case that what an earlier run had left was of another file.
    for _ in 0..2 {
        let mut here = Partial::open(target, file.bytes)?;
        transfer(client, url, file, &mut here, &progress)?;
        if here.finish(target, &file.sha256)? {
            progress.finish_and_clear();
            return Ok(());
        }
    }
    Err(Failure::Local(format!("{}: what the server sends does not have the manifest's checksum", file.path)))
}

/// Brings what is missing, over as many connections as it takes.
fn transfer(client: &Client, url: &str, file: &WrittenFile, here: &mut Partial, progress: &ProgressBar) -> Result {
    let mut last_byte = Instant::now();
    while here.bytes() < file.bytes {
        let before = here.bytes();
        let failure = match receive(client, url, file, here, progress) {
            Ok(()) => None,
            Err(failure @ Failure::Server { .. }) => Some(failure),
            Err(failure) => return Err(failure),
        };
        if here.bytes() > before {
            last_byte = Instant::now();
        }
        if last_byte.elapsed() > STALLED {
            let cause = "no byte came for a long time".to_owned();
            return Err(failure.unwrap_or(Failure::Server { server: client.server().to_owned(), cause }));
        }
        if here.bytes() < file.bytes {
            thread::sleep(PAUSE);
        }
    }
    Ok(())
}

/// One connection: from where we are as far as it goes.
fn receive(client: &Client, url: &str, file: &WrittenFile, here: &mut Partial, progress: &ProgressBar) -> Result {
    let from = here.bytes();
    let answer = client.open(url, |request| match from {
        0 => request,
        // The entity tag is the digest: had the content changed, the server would send it whole.
        _ => request.header("range", format!("bytes={from}-")).header("if-range", format!("\"{}\"", file.sha256)),
    })?;
    if from > 0 && answer.status().as_u16() != 206 {
        here.restart()?;
    }
    progress.set_position(here.bytes());
    let mut body = answer.into_body().into_reader();
    let mut buffer = vec![0; BUFFER];
    loop {
        let n = body.read(&mut buffer).map_err(|error| Failure::Server {
            server: client.server().to_owned(),
            cause: format!("the download of {} broke off: {error}", file.path),
        })?;
        if n == 0 {
            return Ok(());
        }
        if here.bytes() + n as u64 > file.bytes {
            return Err(Failure::Local(format!("{}: the server sends more than the manifest says", file.path)));
        }
        here.append(&buffer[..n])?;
        progress.set_position(here.bytes());
    }
}
