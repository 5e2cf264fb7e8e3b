//! The cache of Hugging Face's tools on disk: blobs by their tags, snapshots of links to them, refs from names to commits.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use super::{Failure, failure::Result};
use crate::domain::HubName;

/// A model that is in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cached {
    /// What a job asks for.
    pub name: String,
    pub folder: PathBuf,
}

/// Every snapshot of the cache under the names that lead to it, whether it is whole or not: `organization/name` for `main`, and
/// `organization/name@...` for any other ref and for each commit.
pub fn found(cache: &Path) -> Vec<Cached> {
    let mut found = Vec::new();
    for entry in entries(cache) {
        let Some(repository) = entry.strip_prefix("models--").and_then(|name| name.split_once("--")) else { continue };
        let (folder, repository) = (cache.join(&entry), format!("{}/{}", repository.0, repository.1));
        let mut add = |revision: &str, commit: &str| {
            let named: Option<HubName> = format!("{repository}@{revision}").parse().ok();
            // A ref's content becomes a path here.
            let plain = !commit.is_empty() && commit.bytes().all(|b| b.is_ascii_alphanumeric());
            let snapshot = folder.join("snapshots").join(commit);
            if let Some(name) = named.filter(|_| plain && snapshot.is_dir()) {
                found.push(Cached { name: name.to_string(), folder: snapshot });
            }
        };
        for name in entries(&folder.join("refs")) {
            if let Ok(commit) = fs::read_to_string(folder.join("refs").join(&name)) {
                add(&name, commit.trim());
            }
        }
        for commit in entries(&folder.join("snapshots")) {
            add(&commit, &commit);
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

fn entries(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| !name.starts_with('.')).collect()
}

/// One repository's folder.
#[derive(Debug)]
pub(super) struct Repository {
    folder: PathBuf,
    /// Where locks on its blobs lie, as Hugging Face's tools have them.
    locks: PathBuf,
}

/// Where a blob goes, and what keeps two processes from fetching it at once.
#[derive(Debug)]
pub(super) struct Place {
    pub whole: PathBuf,
    pub incomplete: PathBuf,
    pub lock: PathBuf,
}

impl Repository {
    pub(super) fn new(cache: &Path, name: &HubName) -> Self {
        let folder = format!("models--{}--{}", name.organization, name.name);
        Self { locks: cache.join(".locks").join(&folder), folder: cache.join(folder) }
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, tag: &str) -> Place {
        let blobs = self.folder.join("blobs");
        Place {
            whole: blobs.join(tag),
            incomplete: blobs.join(format!("{tag}.incomplete")),
            lock: self.locks.join(format!("{tag}.lock")),
        }
    }

    /// Bytes of a blob that are here, whole or not.
    pub(super) fn bytes_here(&self, tag: &str) -> u64 {
        let place = self.blob(tag);
        let bytes = |path: &Path| fs::metadata(path).ok().map(|facts| facts.len());
        bytes(&place.whole).or_else(|| bytes(&place.incomplete)).unwrap_or_default()
    }

    /// Refuses what the disk has no room for.
    pub(super) fn check_room(&self, missing: u64) -> Result<()> {
        let facts = rustix::fs::statvfs(&self.folder).map_err(io::Error::from).map_err(Failure::disk(&self.folder))?;
        let free = facts.f_bavail.saturating_mul(facts.f_frsize);
        if missing > free { Err(Failure::no_room(&self.folder, missing, free)) } else { Ok(()) }
    }

    /// Makes a file of a snapshot: a relative link to its blob, put in place at once.
    pub(super) fn link(&self, commit: &str, file: &str, tag: &str) -> Result<()> {
        let path = self.snapshot(commit).join(file);
        let target = PathBuf::from("../../blobs").join(tag);
        if fs::read_link(&path).is_ok_and(|there| there == target) {
            return Ok(());
        }
        let aside = path.with_file_name(format!(".{file}.{}", std::process::id()));
        let _ = fs::remove_file(&aside);
        symlink(&target, &aside).and_then(|()| fs::rename(&aside, &path)).map_err(Failure::disk(&path))
    }

    /// Remembers which commit a name stands for. A commit stands for itself.
    pub(super) fn keep_ref(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit {
            return Ok(());
        }
        let refs = self.folder.join("refs");
        fs::create_dir_all(&refs).map_err(Failure::disk(&refs))?;
        let (path, aside) = (refs.join(revision), refs.join(format!(".{revision}.{}", std::process::id())));
        fs::write(&aside, commit).and_then(|()| fs::rename(&aside, &path)).map_err(Failure::disk(&path))
    }
}
