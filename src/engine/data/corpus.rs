//! The tokens of a data set: written to a file once, memory-mapped after.
//!
//! Two files named by a digest of everything that decides their content (the documents' bytes and the tokenizer's):
//! `<key>.tokens` holds all tokens as little-endian i32, `<key>.documents` the bounds and origins. The second is renamed into
//! place last; where it stands, both are whole.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::{
    Tokenizer,
    documents::{self, Document},
    pack::Piece,
};
use crate::{
    domain::{Invalid, run::DataFile},
    engine::{Error, Result, file_map::FileMap},
};

/// Part of the key: raised when the files' form or the tokenization changes.
const VERSION: &[u8] = b"longhaul tokens 2";
/// Documents are tokenized beside each other, about so many bytes of them.
const BATCH_BYTES: usize = 4 << 20;

/// A tokenized data set.
#[derive(Debug)]
pub struct Corpus {
    tokens: FileMap,
    documents: Vec<Origin>,
    files: Vec<String>,
    /// Documents without text, left out.
    pub empty_documents: u64,
}

/// An id and whether a loss counts it: kept as the id, or as its complement where none does.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Token(i32);

impl Token {
    /// A token with this id.
    pub fn new(id: u32, trained: bool) -> Self {
        Self(if trained { id as i32 } else { !(id as i32) })
    }

    /// What the tokenizer calls it.
    pub fn id(self) -> i32 {
        if self.is_trained() { self.0 } else { !self.0 }
    }

    /// Whether a loss counts it where it is a label.
    pub fn is_trained(self) -> bool {
        self.0 >= 0
    }
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
    pub fn document(&self, i: usize) -> &[Token] {
        let start = if i == 0 { 0 } else { self.documents[i - 1].end };
        &bytemuck::cast_slice(&self.tokens)[start as usize..self.documents[i].end as usize]
    }

    /// Length of a document in tokens.
    pub fn length(&self, i: usize) -> u64 {
        let start = if i == 0 { 0 } else { self.documents[i - 1].end };
        self.documents[i].end - start
    }

    /// Labels of a piece of a document that a loss counts: its trained tokens after the first.
    pub fn labels(&self, piece: &Piece) -> u64 {
        let tokens = &self.document(piece.document)[piece.start as usize..][..piece.length as usize];
        tokens.iter().skip(1).filter(|token| token.is_trained()).count() as u64
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

/// The two files as they are written.
struct Writer<'a> {
    tokenizer: &'a Tokenizer,
    tokens: Aside,
    origins: Vec<Origin>,
    end: u64,
    empty: u64,
    /// Read and not yet tokenized.
    batch: Vec<Document>,
    batch_bytes: usize,
}

fn write(files: &[DataFile], tokenizer: &Tokenizer, tokens: &Path, documents: &Path) -> Result {
    let tokens = Aside::create(tokens)?;
    let (origins, batch) = (Vec::new(), Vec::new());
    let mut writer = Writer { tokenizer, tokens, origins, end: 0, empty: 0, batch, batch_bytes: 0 };
    for (i, file) in files.iter().enumerate() {
        documents::read(file, |document| {
            writer.batch_bytes += document.example.bytes();
            writer.batch.push(document);
            if writer.batch_bytes < BATCH_BYTES { Ok(()) } else { writer.flush(i, file) }
        })?;
        writer.flush(i, file)?;
    }
    let Writer { tokens, origins, empty, .. } = writer;
    if origins.is_empty() {
        let names: Vec<&str> = files.iter().map(|f| f.filename.as_str()).collect();
        let message = format!("{} hold no document with any text", names.join(", "));
        return Err(Invalid::with_code("invalid_training_file", "training_file", message).into());
    }
    tokens.finish()?;
    let mut documents_file = Aside::create(documents)?;
    documents_file.put(bytemuck::bytes_of(&Origin { end: 0, file: 0, line: empty }))?;
    documents_file.put(bytemuck::cast_slice(&origins))?;
    documents_file.finish()
}

impl Writer<'_> {
    /// Tokenizes what was read of the file with this index, and writes it in its order.
    fn flush(&mut self, index: usize, file: &DataFile) -> Result {
        self.batch_bytes = 0;
        let batch = std::mem::take(&mut self.batch);
        let tokenized: Vec<_> = batch.par_iter().map(|document| self.tokenizer.example(&document.example)).collect();
        for (document, tokens) in batch.iter().zip(tokenized) {
            let tokens = tokens.map_err(|error| at(error, &file.filename, document.line))?;
            if tokens.is_empty() {
                self.empty += 1;
                continue;
            }
            self.end += tokens.len() as u64;
            self.origins.push(Origin { end: self.end, file: index as u64, line: document.line });
            self.tokens.put(bytemuck::cast_slice(&tokens))?;
        }
        Ok(())
    }
}

/// What is wrong with a document, with its file and line.
fn at(error: Error, name: &str, line: u64) -> Error {
    match error {
        Error::Input(invalid) => {
            Invalid { message: format!("{name} line {line}: {}", invalid.message), ..invalid }.into()
        }
        other => other,
    }
}
