//! A large file in parts, several at once. An upload that broke off, by the network, the server or this process, goes on: the server
//! tells the parts that it has, and their digests say where in the file they belong.

use std::{
    collections::HashMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use indicatif::ProgressBar;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{
    Failure, Result,
    http::{Client, LONG, SHORT},
    jobs::text,
    multipart,
};
use crate::domain::{UploadId, hex, ids::random_suffix};

/// Most parts that a server keeps of an upload.
const MOST_PARTS: u64 = 10_000;
/// Uploads of the server that are looked through for the one to go on with.
const SEARCHED: u32 = 1000;
/// Pauses between tries of a part.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Bytes read at once.
const BUFFER: usize = 1 << 18;

/// A file to be sent.
pub(super) struct Whole<'a> {
    pub path: &'a Path,
    pub name: &'a str,
    pub purpose: &'a str,
    pub bytes: u64,
    /// Size of a part.
    pub part: u64,
    pub at_once: usize,
}

/// Parts that the server has and nobody has found a place for, by size and digest.
type There = Mutex<HashMap<(u64, String), Vec<String>>>;

impl Whole<'_> {
    /// Sends what is missing; answers the file object.
    pub(super) fn send(&self, client: &Client, progress: &ProgressBar) -> Result<Value> {
        let n_parts = self.bytes.div_ceil(self.part);
        if n_parts > MOST_PARTS {
            let least = self.bytes.div_ceil(MOST_PARTS);
            return Err(Failure::Usage(format!(
                "--part-bytes must be {least} or more for a file of {} bytes",
                self.bytes
            )));
        }
        let (upload, there) = self.begin(client)?;
        let path = format!("/v1/uploads/{upload}");
        let (next, ids) = (AtomicUsize::new(0), Mutex::new(vec![String::new(); n_parts as usize]));
        let failed: Mutex<Option<Failure>> = Mutex::new(None);
        let worker = || {
            while lock(&failed).is_none() {
                let place = next.fetch_add(1, Ordering::Relaxed);
                if place as u64 >= n_parts {
                    return;
                }
                match self.part(client, &path, place as u64, &there, progress) {
                    Ok(id) => lock(&ids)[place] = id,
                    Err(failure) => drop(lock(&failed).get_or_insert(failure)),
                }
            }
        };
        thread::scope(|scope| {
            for _ in 0..self.at_once {
                scope.spawn(worker);
            }
        });
        if let Some(failure) = lock(&failed).take() {
            return Err(failure);
        }
        // Sent again with the same parts, it answers the same.
        let body = json!({"part_ids": *lock(&ids)});
        let done = client.post_for(&format!("{path}/complete"), &body, &random_suffix(), LONG)?;
        if done["file"].is_object() {
            Ok(done["file"].clone())
        } else {
            Err(Failure::shape(client.server(), "a file", &done))
        }
    }

    /// The newest upload of this file that broke off, with its parts; else a new one.
    fn begin(&self, client: &Client) -> Result<(UploadId, There)> {
        let id = |upload: &Value| {
            let id = upload["id"].as_str().and_then(|id| id.parse::<UploadId>().ok());
            id.ok_or_else(|| Failure::shape(client.server(), "an upload's id", upload))
        };
        let listed = client.get(&format!("/v1/uploads?limit={SEARCHED}"), SHORT, |_| ())?;
        let is_this = |upload: &&Value| {
            let same = |field: &str, value: &str| upload[field].as_str() == Some(value);
            same("status", "pending")
                && same("filename", self.name)
                && same("purpose", self.purpose)
                && upload["bytes"].as_u64() == Some(self.bytes)
        };
        if let Some(known) = listed["data"].as_array().into_iter().flatten().find(is_this) {
            let id = id(known)?;
            let there = parts(client, &id)?;
            return Ok((id, Mutex::new(there)));
        }
        let new = json!({
            "filename": self.name, "purpose": self.purpose, "bytes": self.bytes, "mime_type": "application/octet-stream",
        });
        let begun = client.post_again("/v1/uploads", &new, &random_suffix())?;
        Ok((id(&begun)?, Mutex::default()))
    }

    /// The id of a part that holds these bytes: one that is there, or one that is sent now, over as many tries as it takes.
    fn part(&self, client: &Client, upload: &str, place: u64, there: &There, progress: &ProgressBar) -> Result<String> {
        let from = place * self.part;
        let bytes = self.part.min(self.bytes - from);
        let digest = self.digest(from, bytes)?;
        if let Some(id) = lock(there).get_mut(&(bytes, digest.clone())).and_then(Vec::pop) {
            progress.inc(bytes);
            return Ok(id);
        }
        let (deadline, mut pause) = (Instant::now() + LONG, FIRST_PAUSE);
        loop {
            let sent = Arc::new(AtomicU64::new(0));
            let (seen, bar) = (Arc::clone(&sent), progress.clone());
            let mut form = multipart::part(self.at(from)?, bytes, move |n| {
                seen.fetch_add(n, Ordering::Relaxed);
                bar.inc(n);
            });
            match client.post_form(&format!("{upload}/parts"), &mut form, Some(&digest)) {
                Err(Failure::Server { .. }) if Instant::now() + pause < deadline => {
                    progress.dec(sent.load(Ordering::Relaxed));
                }
                answer => {
                    let answer = answer?;
                    let id = answer["id"].as_str().map(str::to_owned);
                    return id.ok_or_else(|| Failure::shape(client.server(), "an id", &answer));
                }
            }
            thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// The file from a place on. Each reader has a position of its own.
    fn at(&self, from: u64) -> Result<File> {
        let mut file = File::open(self.path).map_err(Failure::file(self.path))?;
        file.seek(SeekFrom::Start(from)).map_err(Failure::file(self.path))?;
        Ok(file)
    }

    fn digest(&self, from: u64, bytes: u64) -> Result<String> {
        let mut part = self.at(from)?.take(bytes);
        let (mut digest, mut buffer) = (Sha256::new(), vec![0; BUFFER]);
        loop {
            match part.read(&mut buffer).map_err(Failure::file(self.path))? {
                0 => return Ok(hex(&digest.finalize())),
                n => digest.update(&buffer[..n]),
            }
        }
    }
}

/// What the server has of an upload.
fn parts(client: &Client, upload: &UploadId) -> Result<HashMap<(u64, String), Vec<String>>> {
    let mut found: HashMap<_, Vec<String>> = HashMap::new();
    let mut after = String::new();
    loop {
        let page = client.get(&format!("/v1/uploads/{upload}/parts?limit=1000{after}"), SHORT, |_| ())?;
        let list = page["data"].as_array().ok_or_else(|| Failure::shape(client.server(), "a list", &page))?;
        for part in list {
            let key = (part["bytes"].as_u64().unwrap_or_default(), text(part, "sha256"));
            found.entry(key).or_default().push(text(part, "id"));
        }
        match list.last().map(|part| text(part, "id")) {
            Some(last) if page["has_more"] == true => after = format!("&after={last}"),
            _ => return Ok(found),
        }
    }
}

/// A worker that panicked leaves nothing half done behind a lock.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
