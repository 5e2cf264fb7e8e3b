//! Base models by name from a Hugging Face Hub: fetched once, into the cache that other tools of the host share.
//!
//! [`cache`] knows the folders, [`remote`] the wire, [`transfer`] brings one file, this file a model. Blocking, on a thread of its
//! own: whoever waits for it may go away at any time, and what has come by then is kept for the next try.

mod cache;
mod failure;
mod remote;
mod transfer;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

pub use self::cache::{Cached, found};
pub use self::failure::Failure;
use self::{
    cache::Repository,
    failure::Result,
    remote::{Remote, RemoteFile},
    transfer::Transfer,
};

use crate::domain::{Event, HubName, Invalid, ModelConfig};

/// Files beside the weights, as far as a repository has them. The first two it must have.
const SMALL: [&str; 9] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
];
const NEEDED: usize = 2;
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Largest small file.
const MAX_SMALL_BYTES: u64 = 256 << 20;
/// Most shards.
const MOST_SHARDS: usize = 10_000;
/// Pause between two events about progress.
const TELL: Duration = Duration::from_secs(20);

/// What an operator may set.
#[derive(Clone)]
pub struct Settings {
    /// `https://huggingface.co`, or what stands in its place.
    pub endpoint: String,
    /// Sent to the endpoint's host, and to no other.
    pub token: Option<String>,
    /// The cache's folder, with a folder for each repository.
    pub cache: PathBuf,
    /// False where only what is in the cache already may be used.
    pub fetch: bool,
}

impl std::fmt::Debug for Settings {
    /// Without the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { endpoint, cache, fetch, .. } = self;
        f.debug_struct("Settings")
            .field("endpoint", endpoint)
            .field("cache", cache)
            .field("fetch", fetch)
            .finish_non_exhaustive()
    }
}

/// Says how far it is, and hears when it is wanted no more.
#[derive(Debug, Clone)]
pub struct Watcher {
    /// Where it tells.
    pub events: UnboundedSender<Event>,
    /// Cancelled once nobody wants the model.
    pub stop: CancellationToken,
}

impl Watcher {
    fn tell(&self, message: String, data: Value) {
        // Nobody listens any more only where nobody wants the model any more.
        let _ = self.events.send(Event::info(message, data));
    }
}

/// Brings a model here, whole and verified, and answers its folder.
pub fn fetch(settings: &Settings, name: &HubName, watcher: &Watcher) -> Result<PathBuf> {
    let remote = Remote::new(settings, name, watcher.stop.clone())?;
    let listing = remote.listing()?;
    let repository = Repository::new(&settings.cache, name);
    let folder = repository.snapshot(&listing.commit);
    fs::create_dir_all(&folder).map_err(Failure::disk(&folder))?;
    let mut fetching =
        Fetching { remote, repository, commit: listing.commit.clone(), watcher, moved: Moved::default() };

    let small: Vec<&str> = SMALL.into_iter().filter(|file| listing.files.contains(*file)).collect();
    if let Some(missing) = SMALL[..NEEDED].iter().find(|file| !listing.files.contains(**file)) {
        return Err(untrainable(name, &format!("its repository has no {missing}")));
    }
    for file in small {
        let about = fetching.remote.about(&listing.commit, file)?;
        fetching.bring(file, &about, MAX_SMALL_BYTES)?;
        if file == SMALL[0] {
            check_config(name, &folder.join(file))?;
        }
    }
    let shards = if listing.files.contains(WEIGHTS) {
        vec![WEIGHTS.to_owned()]
    } else if listing.files.contains(INDEX) {
        let about = fetching.remote.about(&listing.commit, INDEX)?;
        fetching.bring(INDEX, &about, MAX_SMALL_BYTES)?;
        shards(name, &folder.join(INDEX))?
    } else {
        return Err(untrainable(name, "its repository has no weights as safetensors"));
    };
    fetching.weights(name, shards)?;
    fetching.repository.keep_ref(&name.revision, &listing.commit)?;
    Ok(folder)
}

/// A fetch under way.
struct Fetching<'a> {
    remote: Remote,
    repository: Repository,
    commit: String,
    watcher: &'a Watcher,
    moved: Moved,
}

/// Bytes so far.
#[derive(Debug, Default)]
struct Moved {
    bytes: u64,
    all: u64,
    told: Option<Instant>,
}

impl Fetching<'_> {
    /// All weights, once it is known that the disk has room for them.
    fn weights(&mut self, name: &HubName, shards: Vec<String>) -> Result<()> {
        let mut files = Vec::with_capacity(shards.len());
        for shard in shards {
            let about = self.remote.about(&self.commit, &shard)?;
            files.push((shard, about));
        }
        let all: u64 = files.iter().map(|(_, about)| about.bytes).sum();
        let here: u64 = files.iter().map(|(_, about)| self.repository.bytes_here(&about.tag)).sum();
        let missing = all.saturating_sub(here);
        self.repository.check_room(missing)?;
        self.moved = Moved { bytes: 0, all, told: Some(Instant::now()) };
        let commit: String = self.commit.chars().take(12).collect();
        let message = format!(
            "Fetching the base model {name} (commit {commit}) from {}: {} in {} files, {} of it here already",
            self.remote.endpoint(),
            size(all),
            files.len(),
            size(here.min(all))
        );
        self.watcher
            .tell(message, json!({"model": name.to_string(), "commit": self.commit, "bytes": all, "bytes_here": here}));
        let begun = Instant::now();
        for (shard, about) in &files {
            self.bring(shard, about, u64::MAX)?;
        }
        let seconds = begun.elapsed().as_secs_f64();
        let message =
            format!("The base model {name} is here: {} fetched in {seconds:.0} s and verified", size(missing));
        self.watcher.tell(message, json!({"model": name.to_string(), "bytes": all, "bytes_here": all}));
        Ok(())
    }

    /// One file into the cache, unless it is there.
    fn bring(&mut self, file: &str, about: &RemoteFile, most: u64) -> Result<()> {
        if about.bytes > most {
            return Err(Failure::Refused(format!("{file} has {} bytes; at most {most} are taken", about.bytes)));
        }
        let before = self.moved.bytes;
        let (moved, watcher) = (&mut self.moved, self.watcher);
        let progress = |here: u64| {
            moved.bytes = before + here;
            if moved.told.is_some_and(|told| told.elapsed() >= TELL) {
                moved.told = Some(Instant::now());
                let message = format!("Fetched {} of {}", size(moved.bytes), size(moved.all));
                watcher.tell(message, json!({"bytes": moved.all, "bytes_here": moved.bytes}));
            }
        };
        let place = self.repository.blob(&about.tag);
        Transfer { remote: &self.remote, commit: &self.commit, file, about, stop: &self.watcher.stop }
            .run(&place, progress)?;
        self.moved.bytes = before + about.bytes;
        self.repository.link(&self.commit, file, &about.tag)
    }
}

/// What cannot be trained is refused before its weights are fetched.
fn check_config(name: &HubName, path: &Path) -> Result<()> {
    let text = fs::read_to_string(path).map_err(Failure::disk(path))?;
    ModelConfig::from_config_text(&text).map(drop).map_err(|invalid| untrainable(name, &invalid.message))
}

fn untrainable(name: &HubName, why: &str) -> Failure {
    let message = format!("the model {name} cannot be trained: {why}");
    Failure::Invalid(Invalid::with_code("model_not_trainable", "model", message))
}

/// The files that an index names.
fn shards(name: &HubName, index: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(index).map_err(Failure::disk(index))?;
    let parsed: Value = serde_json::from_str(&text).unwrap_or_default();
    let named = parsed["weight_map"].as_object().into_iter().flat_map(|map| map.values());
    let named: BTreeSet<&str> = named.filter_map(Value::as_str).collect();
    let plain = |file: &&str| file.ends_with(".safetensors") && !file.contains(['/', '\\']) && !file.starts_with('.');
    if named.is_empty() || named.len() > MOST_SHARDS || !named.iter().all(plain) {
        return Err(untrainable(name, &format!("its {INDEX} names no files of its own")));
    }
    Ok(named.into_iter().map(str::to_owned).collect())
}

fn size(bytes: u64) -> String {
    match bytes as f64 {
        b if b >= f64::from(1 << 30) => format!("{:.2} GiB", b / f64::from(1 << 30)),
        b => format!("{:.2} MiB", b / f64::from(1 << 20)),
    }
}
