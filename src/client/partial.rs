//! A file while it comes in: bytes written aside under `.part`, digested on the way, renamed when they are right.
//!
//! What an earlier run left is digested first and continued. The real name never holds anything but the whole content.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::{Failure, Result};

/// Bytes read at once.
const BUFFER: usize = 1 << 18;

/// The part of a file that is here.
pub struct Partial {
    path: PathBuf,
    file: File,
    bytes: u64,
    sha256: Sha256,
}

impl Partial {
    /// Opens what is there beside `target`, at most `most` bytes of it, or begins anew.
    pub fn open(target: &Path, most: u64) -> Result<Self> {
        let mut name = target.as_os_str().to_owned();
        name.push(".part");
        let path = PathBuf::from(name);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut partial = Self { file: file.map_err(Failure::file(&path))?, path, bytes: 0, sha256: Sha256::new() };
        let there = partial.file.metadata().map_err(Failure::file(&partial.path))?.len();
        if there > most {
            partial.restart()?;
        } else {
            partial.bytes = digest(&mut partial.file, &mut partial.sha256).map_err(Failure::file(&partial.path))?;
        }
        Ok(partial)
    }

    /// Bytes that are here.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Throws away what is here.
    pub fn restart(&mut self) -> Result {
        self.sha256 = Sha256::new();
        self.bytes = 0;
        self.file.set_len(0).and_then(|()| self.file.rewind()).map_err(Failure::file(&self.path))
    }

    /// Adds bytes at the end.
    pub fn append(&mut self, bytes: &[u8]) -> Result {
        self.file.write_all(bytes).map_err(Failure::file(&self.path))?;
        self.sha256.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Gives the file its name if its content has this digest; throws it away and says false if not.
    pub fn finish(self, target: &Path, sha256: &str) -> Result<bool> {
        if hex(&self.sha256.finalize()) != sha256 {
            fs::remove_file(&self.path).map_err(Failure::file(&self.path))?;
            return Ok(false);
        }
        self.file.sync_all().map_err(Failure::file(&self.path))?;
        fs::rename(&self.path, target).map_err(Failure::file(target))?;
        Ok(true)
    }
}

/// True when `target` is there with this content.
pub fn is_whole(target: &Path, bytes: u64, sha256: &str) -> Result<bool> {
    let Ok(mut file) = File::open(target) else { return Ok(false) };
    if file.metadata().map_err(Failure::file(target))?.len() != bytes {
        return Ok(false);
    }
    let mut found = Sha256::new();
    digest(&mut file, &mut found).map_err(Failure::file(target))?;
    Ok(hex(&found.finalize()) == sha256)
}

fn digest(file: &mut File, into: &mut Sha256) -> io::Result<u64> {
    let mut buffer = vec![0; BUFFER];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(bytes),
            n => {
                into.update(&buffer[..n]);
                bytes += n as u64;
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        for nibble in [byte >> 4, byte & 15] {
            out.extend(char::from_digit(u32::from(nibble), 16));
        }
        out
    })
}
