//! The tokens of a data set: written to a file once, memory-mapped after.
//!
//! Two files named by a digest of everything that decides their content (the documents' bytes and the tokenizer's):
//! `<key>.tokens` holds all ids as little-endian i32, `<key>.documents` the bounds and origins. The second is renamed into
//! place last; where it stands, both are whole.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::{Tokenizer, documents};
use crate::{
    domain::{Invalid, run::DataFile},
    engine::{Error, Result, file_map::FileMap},
};

/// Part of the key: raised when the files' form or the tokenization changes.
const VERSION: &[u8] = b"longhaul tokens 1";

/// A tokenized data set.
#[derive(Debug)]
pub struct Corpus {
    tokens: FileMap,
    documents: Vec<Origin>,
    files: Vec<String>,
    /// Documents without text, left out.
    pub empty_documents: u64,
}

/// Where a document ends among the tokens, and where it came from.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
struct Origin {
    end: u64,
    file: u64,
    line: u64,
}

impl Corpus {
    /// Tokenizes these files into `folder`, or finds them tokenized there already.
    pub fn open(files: &[DataFile], tokenizer: &Tokenizer, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::file(folder))?;
        let key = key(files, tokenizer)?;
        let (tokens, documents) = (folder.join(format!("{key}.tokens")), folder.join(format!("{key}.documents")));
        if !documents.is_file() {
            write(files, tokenizer, &tokens, &documents)?;
        }
        let map = FileMap::open(&documents)?;
        let mut origins: Vec<Origin> = bytemuck::allocation::pod_collect_to_vec(&map);
        // The first record counts what was left out.
        let empty_documents = origins.first().map_or(0, |first| first.line);
        origins.drain(..origins.len().min(1));
        let files = files.iter().map(|f| f.filename.clone()).collect();
        Ok(Self { tokens: FileMap::open(&tokens)?, documents: origins, files, empty_documents })
    }

    /// Number of documents with at least one token.
    pub fn n_documents(&self) -> usize {
        self.documents.len()
    }

    /// Tokens of a document.
    pub fn document(&self, i: usize) -> &[i32] {
        let start = if i == 0 { 0 } else { self.documents[i - 1].end };
        &bytemuck::cast_slice(&self.tokens)[start as usize..self.documents[i].end as usize]
    }

    /// Length of a document in tokens.
    pub fn length(&self, i: usize) -> u64 {
        let start = if i == 0 { 0 } else { self.documents[i - 1].end };
        self.documents[i].end - start
    }

    /// All tokens.
    pub fn n_tokens(&self) -> u64 {
        self.documents.last().map_or(0, |last| last.end)
    }

    /// A document's file and line, for a message.
    pub fn name(&self, i: usize) -> String {
        let Origin { file, line, .. } = self.documents[i];
        format!("{} line {line}", self.files[file as usize])
    }
}

/// Digest of the documents' bytes, their formats and the tokenizer.
fn key(files: &[DataFile], tokenizer: &Tokenizer) -> Result<String> {
    let mut all = Sha256::new();
    all.update(VERSION);
    all.update(tokenizer.digest());
    for file in files {
        let mut one = Sha256::new();
        let mut opened = File::open(&file.path).map_err(Error::file(&file.path))?;
        std::io::copy(&mut opened, &mut HashWriter(&mut one)).map_err(Error::file(&file.path))?;
        all.update(one.finalize());
        all.update(file.filename.rsplit_once('.').map_or("", |(_, extension)| extension));
    }
    let digest = all.finalize();
    Ok(digest[..16].iter().map(|byte| format!("{byte:02x}")).collect())
}

struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A file written aside.
struct Aside {
    writer: BufWriter<File>,
    aside: PathBuf,
    target: PathBuf,
}

impl Aside {
    fn create(target: &Path) -> Result<Self> {
        let aside = target.with_extension(format!("{}.tmp", std::process::id()));
        let file = File::create(&aside).map_err(Error::file(&aside))?;
        Ok(Self { writer: BufWriter::with_capacity(1 << 20, file), aside, target: target.to_owned() })
    }

    fn put(&mut self, bytes: &[u8]) -> Result {
        self.writer.write_all(bytes).map_err(Error::file(&self.aside))
    }

    fn finish(self) -> Result {
        let file = self.writer.into_inner().map_err(|error| Error::file(&self.aside)(error.into_error()))?;
        file.sync_all().map_err(Error::file(&self.aside))?;
        fs::rename(&self.aside, &self.target).map_err(Error::file(&self.target))
    }
}

fn write(files: &[DataFile], tokenizer: &Tokenizer, tokens: &Path, documents: &Path) -> Result {
    let mut ids_file = Aside::create(tokens)?;
    let mut origins = Vec::new();
    let (mut end, mut empty) = (0, 0);
    for (i, file) in files.iter().enumerate() {
        documents::read(file, |document| {
            let ids = tokenizer.document(&document.text)?;
            if ids.is_empty() {
                empty += 1;
                return Ok(());
            }
            end += ids.len() as u64;
            origins.push(Origin { end, file: i as u64, line: document.line });
            ids_file.put(bytemuck::cast_slice(&ids))
        })?;
    }
    if origins.is_empty() {
        let names: Vec<&str> = files.iter().map(|f| f.filename.as_str()).collect();
        let message = format!("{} hold no document with any text", names.join(", "));
        return Err(Invalid::with_code("invalid_training_file", "training_file", message).into());
    }
    ids_file.finish()?;
    let mut documents_file = Aside::create(documents)?;
    documents_file.put(bytemuck::bytes_of(&Origin { end: 0, file: 0, line: empty }))?;
    documents_file.put(bytemuck::cast_slice(&origins))?;
    documents_file.finish()
}
