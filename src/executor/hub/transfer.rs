//! One file into the cache: from where an earlier try stopped, verified before it has its name.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
    thread,
    time::Duration,
};

use sha1::{Digest, Sha1};
use sha2::Sha256;
use tokio_util::sync::CancellationToken;

use super::{
    Failure,
    cache::Place,
    failure::Result,
    remote::{Remote, RemoteFile, Tries},
};
use crate::domain::hex;

/// Bytes taken at once.
const BUFFER: usize = 1 << 18;
/// Characters of a tag that is a SHA-256.
const SHA256_LENGTH: usize = 64;
/// Pause between two looks at a lock that another process holds.
const LOCKED: Duration = Duration::from_millis(200);

/// A file on its way.
pub(super) struct Transfer<'a> {
    pub remote: &'a Remote,
    pub commit: &'a str,
    pub file: &'a str,
    pub about: &'a RemoteFile,
    pub stop: &'a CancellationToken,
}

impl Transfer<'_> {
    /// Makes the blob, unless it is there. `progress` hears how many of its bytes are here.
    pub(super) fn run(&self, place: &Place, mut progress: impl FnMut(u64)) -> Result<()> {
        for path in [&place.whole, &place.lock] {
            let folder = path.parent().unwrap_or(Path::new("."));
            fs::create_dir_all(folder).map_err(Failure::disk(folder))?;
        }
        let _lock = self.lock(&place.lock)?;
        if fs::metadata(&place.whole).is_ok_and(|facts| facts.len() == self.about.bytes) {
            return Ok(());
        }
        let path = &place.incomplete;
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = file.map_err(Failure::disk(path))?;
        // A second time from nothing, for the case that what an earlier try left was something else.
        for last in [false, true] {
            let mut digest = self.receive(&mut file, path, &mut progress)?;
            if digest.finish() == self.about.tag {
                file.sync_all().map_err(Failure::disk(path))?;
                return fs::rename(path, &place.whole).map_err(Failure::disk(&place.whole));
            }
            file.set_len(0).map_err(Failure::disk(path))?;
            if last {
                break;
            }
        }
        Err(Failure::Refused(format!("{} does not have the digest that the hub says ({})", self.file, self.about.tag)))
    }

    /// Keeps others from the blob: processes that share the cache, Hugging Face's tools among them.
    fn lock(&self, path: &Path) -> Result<File> {
        let file =
            OpenOptions::new().write(true).create(true).truncate(false).open(path).map_err(Failure::disk(path))?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(fs::TryLockError::WouldBlock) if self.stop.is_cancelled() => return Err(Failure::Stopped),
                Err(fs::TryLockError::WouldBlock) => thread::sleep(LOCKED),
                Err(fs::TryLockError::Error(error)) => return Err(Failure::disk(path)(error)),
            }
        }
    }

    /// All bytes, over as many connections as it takes; answers their digest.
    fn receive(&self, file: &mut File, path: &Path, progress: &mut impl FnMut(u64)) -> Result<Digested> {
        let (mut digest, mut here) = self.resume(file, path)?;
        let mut tries = Tries::default();
        while here < self.about.bytes {
            let before = here;
            let failure = match self.connection(file, path, &mut digest, &mut here, progress) {
                Ok(()) => Failure::Away(format!("the hub ended {} before its end", self.file)),
                Err(failure) => failure,
            };
            if here > before {
                tries.forget();
            }
            if here < self.about.bytes {
                tries.again(failure, self.stop)?;
            } else if !matches!(failure, Failure::Away(_)) {
                return Err(failure);
            }
        }
        Ok(digest)
    }

    /// Digests what an earlier try left.
    fn resume(&self, file: &mut File, path: &Path) -> Result<(Digested, u64)> {
        let there = file.metadata().map_err(Failure::disk(path))?.len();
        if there > self.about.bytes {
            file.set_len(0).map_err(Failure::disk(path))?;
        }
        file.seek(SeekFrom::Start(0)).map_err(Failure::disk(path))?;
        let mut digest = Digested::new(self.about);
        let (mut buffer, mut here) = (vec![0; BUFFER], 0);
        loop {
            match file.read(&mut buffer).map_err(Failure::disk(path))? {
                0 => return Ok((digest, here)),
                n => {
                    digest.take(&buffer[..n]);
                    here += n as u64;
                }
            }
        }
    }

    /// One connection: from where we are as far as it goes.
    fn connection(
        &self,
        file: &mut File,
        path: &Path,
        digest: &mut Digested,
        here: &mut u64,
        progress: &mut impl FnMut(u64),
    ) -> Result<()> {
        let (answer, goes_on) = self.remote.content(self.commit, self.file, *here)?;
        if *here > 0 && !goes_on {
            // It sends the whole.
            file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).map_err(Failure::disk(path))?;
            (*digest, *here) = (Digested::new(self.about), 0);
        }
        let mut body = answer.into_body().into_reader();
        let mut buffer = vec![0; BUFFER];
        while !self.stop.is_cancelled() {
            let n =
                body.read(&mut buffer).map_err(|error| Failure::Away(format!("{} broke off: {error}", self.file)))?;
            if n == 0 {
                return Ok(());
            }
            if *here + n as u64 > self.about.bytes {
                return Err(Failure::Refused(format!("{} is longer than the hub says", self.file)));
            }
            file.write_all(&buffer[..n]).map_err(Failure::disk(path))?;
            digest.take(&buffer[..n]);
            *here += n as u64;
            progress(*here);
        }
        Err(Failure::Stopped)
    }
}

/// The digest that a tag is: SHA-256 of the content, or what git calls it.
enum Digested {
    Sha256(Sha256),
    Git(Sha1),
}

impl Digested {
    fn new(about: &RemoteFile) -> Self {
        if about.tag.len() == SHA256_LENGTH {
            return Self::Sha256(Sha256::new());
        }
        Self::Git(Sha1::new().chain_update(format!("blob {}\0", about.bytes)))
    }

    fn take(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(digest) => digest.update(bytes),
            Self::Git(digest) => digest.update(bytes),
        }
    }

    fn finish(&mut self) -> String {
        match self {
            Self::Sha256(digest) => hex(&digest.finalize_reset()),
            Self::Git(digest) => hex(&digest.finalize_reset()),
        }
    }
}
