//! Which installed PostgreSQL to run: named by a setting, on the search path, where distributions put it, or where
//! `pg_config` says. The newest is taken, unless a cluster exists: then the version that made it.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::Error;

/// Folders of parallel versions: `<root>/<version>/bin` (Debian, Ubuntu), `<root>-<version>/bin` (Red Hat's own builds).
const VERSIONED_ROOTS: [&str; 2] = ["/usr/lib/postgresql", "/usr/pgsql"];

/// Where to look.
#[derive(Debug, Clone, Default)]
pub struct Search {
    /// The setting: a folder with `initdb` and `postgres`; nothing else is looked at.
    pub folder: Option<PathBuf>,
    /// The environment's `PATH`.
    pub path: OsString,
}

/// One installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Binaries {
    pub(super) folder: PathBuf,
    /// Major version, as clusters record it in `PG_VERSION`.
    pub(super) major: u32,
}

impl Binaries {
    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The installation in `folder`, where there is a whole one.
    fn in_folder(folder: &Path) -> Option<Self> {
        // Links are followed: a wrapper elsewhere would look for its parts beside itself.
        let postgres = fs::canonicalize(folder.join("postgres")).ok()?;
        let folder = postgres.parent()?.to_owned();
        if !folder.join("initdb").exists() {
            return None;
        }
        let said = Command::new(&postgres).arg("--version").output().ok()?;
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        // "postgres (PostgreSQL) 15.18 (Debian ...)"; a development version says "18devel".
        let number = said.split_whitespace().nth(2)?;
        let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
        Some(Self { folder, major: digits.parse().ok()? })
    }
}

impl Search {
    /// The installation to run the cluster with, which may not exist yet.
    pub(super) fn find(&self, cluster: &Path) -> Result<Binaries, Error> {
        let folders = self.folders();
        let mut found: Vec<Binaries> = Vec::new();
        for folder in &folders {
            if let Some(binaries) = Binaries::in_folder(folder)
                && !found.contains(&binaries)
            {
                found.push(binaries);
            }
        }
        let wanted = fs::read_to_string(cluster.join("PG_VERSION")).ok().map(|text| text.trim().to_owned());
        let fits = |b: &&Binaries| wanted.as_ref().is_none_or(|wanted| *wanted == b.major.to_string());
        match found.iter().filter(fits).max_by_key(|b| b.major) {
            Some(binaries) => Ok(binaries.clone()),
            None if found.is_empty() => {
                Err(Error::NotFound { looked: folders.iter().map(|f| f.display().to_string()).collect() })
            }
            None => Err(Error::Version {
                cluster: cluster.to_owned(),
                made_by: wanted.unwrap_or_default(),
                found: found.iter().map(|b| format!("{} in {}", b.major, b.folder.display())).collect(),
            }),
        }
    }

    /// Every folder worth a look, in the order of preference among equal versions.
    fn folders(&self) -> Vec<PathBuf> {
        if let Some(folder) = &self.folder {
            return vec![folder.clone()];
        }
        let mut folders: Vec<PathBuf> = std::env::split_paths(&self.path).filter(|p| p.is_absolute()).collect();
        folders.extend(VERSIONED_ROOTS.iter().flat_map(|root| versioned(Path::new(root))));
        let config = Command::new("pg_config").env("PATH", &self.path).arg("--bindir").output();
        if let Ok(said) = config
            && said.status.success()
        {
            folders.push(PathBuf::from(String::from_utf8_lossy(&said.stdout).trim()));
        }
        folders.dedup();
        folders
    }
}

/// `root/15/bin`, `root/16/bin`, and `root-16/bin`; the pattern itself where there are none, so that messages show it.
fn versioned(root: &Path) -> Vec<PathBuf> {
    let (Some(parent), Some(name)) = (root.parent(), root.file_name().and_then(|n| n.to_str())) else {
        return Vec::new();
    };
    let entries = |folder: &Path| {
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let dashed = format!("{name}-");
    let beside = entries(parent)
        .into_iter()
        .filter(|path| path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(&dashed)));
    let mut folders: Vec<PathBuf> = entries(root).into_iter().chain(beside).map(|path| path.join("bin")).collect();
    if folders.is_empty() {
        folders.push(root.join("*/bin"));
    }
    folders
}
