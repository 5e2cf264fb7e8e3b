//! A folder that appears whole or not at all: written under another name, synced, renamed.
//!
//! Every file is hashed while it is written. Whatever goes wrong, a full disk above all, leaves the target's name free and
//! removes what was begun.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::{
    domain::progress::WrittenFile,
    engine::{Error, Result},
};

/// A folder in the making.
#[derive(Debug)]
pub struct Staging {
    target: PathBuf,
    aside: PathBuf,
    files: Vec<WrittenFile>,
    done: bool,
}

impl Staging {
    /// Begins `parent/name`, aside as `parent/name.tmp`. What an earlier, interrupted attempt left there goes.
    pub fn begin(parent: &Path, name: &str) -> Result<Self> {
        let (target, aside) = (parent.join(name), parent.join(format!("{name}.tmp")));
        remove(&aside)?;
        fs::create_dir_all(&aside).map_err(Error::file(&aside))?;
        Ok(Self { target, aside, files: Vec::new(), done: false })
    }

    /// Writes one file, `/`-separated path relative to the folder, through `fill`.
    pub fn write(&mut self, path: &str, fill: impl FnOnce(&mut HashingWriter) -> Result) -> Result {
        let full = self.aside.join(path);
        if let Some(folder) = full.parent() {
            fs::create_dir_all(folder).map_err(Error::file(folder))?;
        }
        let file = File::create(&full).map_err(Error::file(&full))?;
        let mut writer = HashingWriter {
            file: io::BufWriter::with_capacity(1 << 20, file),
            path: full.clone(),
            hash: Sha256::new(),
            bytes: 0,
        };
        fill(&mut writer)?;
        let HashingWriter { file, hash, bytes, .. } = writer;
        let file = file.into_inner().map_err(|error| Error::file(&full)(error.into_error()))?;
        file.sync_all().map_err(Error::file(&full))?;
        self.files.push(WrittenFile { path: path.to_owned(), bytes, sha256: hex(&hash.finalize()) });
        Ok(())
    }

    /// Writes bytes that are already there.
    pub fn write_bytes(&mut self, path: &str, bytes: &[u8]) -> Result {
        self.write(path, |writer| writer.put(bytes))
    }

    /// Gives the folder its name. It replaces a folder of that name, which only an attempt that died between this and its
    /// report can have left.
    pub fn finish(mut self) -> Result<Vec<WrittenFile>> {
        let mut folders = vec![self.aside.clone()];
        while let Some(folder) = folders.pop() {
            File::open(&folder).and_then(|f| f.sync_all()).map_err(Error::file(&folder))?;
            for entry in fs::read_dir(&folder).map_err(Error::file(&folder))? {
                let path = entry.map_err(Error::file(&folder))?.path();
                if path.is_dir() {
                    folders.push(path);
                }
            }
        }
        remove(&self.target)?;
        fs::rename(&self.aside, &self.target).map_err(Error::file(&self.target))?;
        if let Some(parent) = self.target.parent() {
            File::open(parent).and_then(|f| f.sync_all()).map_err(Error::file(parent))?;
        }
        self.done = true;
        Ok(std::mem::take(&mut self.files))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.done {
            // The error that brought us here is the one to report.
            let _ = fs::remove_dir_all(&self.aside);
        }
    }
}

/// Removes a folder if it is there.
fn remove(folder: &Path) -> Result {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::file(folder)(error)),
        _ => Ok(()),
    }
}

/// A file being written, with its digest so far.
#[derive(Debug)]
pub struct HashingWriter {
    file: io::BufWriter<File>,
    path: PathBuf,
    hash: Sha256,
    bytes: u64,
}

impl HashingWriter {
    /// Appends bytes.
    pub fn put(&mut self, bytes: &[u8]) -> Result {
        self.file.write_all(bytes).map_err(Error::file(&self.path))?;
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}
