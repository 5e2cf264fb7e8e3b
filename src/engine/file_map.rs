//! Read-only memory maps: the fence around the one promise that Rust cannot check.
#![expect(unsafe_code, reason = "a memory map is sound only while nobody shortens the file")]

use std::{fs::File, ops::Deref, path::Path};

use memmap2::Mmap;

use crate::engine::{Error, Result};

/// A file's bytes, brought into memory as they are read.
#[derive(Debug)]
pub struct FileMap(Mmap);

impl FileMap {
    /// Maps a file for reading. An empty file maps to no bytes.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::file(path))?;
        // SAFETY: the map is read-only and private to this process. Model folders and token files are written aside and
        // renamed by whoever makes them and never changed in place after.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::file(path))?;
        Ok(Self(map))
    }
}

impl Deref for FileMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
