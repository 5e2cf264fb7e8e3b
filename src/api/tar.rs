//! A tar archive that is never stored: its layout is computed, so it has a length, a digest and ranges before a byte is read.
//!
//! Format: POSIX.1-2001 ustar, with a pax header for names beyond 100 bytes and GNU base-256 sizes from 8 GiB on. The same
//! files make the same bytes, always: no times, owners or modes of any machine are in it.

use std::ops::Range;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use sha2::{Digest, Sha256};

use crate::{
    domain::{CheckpointId, hex, progress::WrittenFile},
    store::{Error, Weights, weights::ByteStream},
};

const BLOCK: u64 = 512;
/// Two blocks of zeros end an archive.
const END: u64 = 2 * BLOCK;
/// Bytes of the name field.
const NAME: usize = 100;
/// Largest size that 11 octal digits hold, plus one.
const OCTAL_SIZES: u64 = 1 << 33;

/// An archive of a checkpoint's files, in the order given.
#[derive(Debug, Clone)]
pub struct Archive {
    pieces: Vec<Piece>,
    bytes: u64,
    tag: String,
}

/// A run of the archive's bytes.
#[derive(Debug, Clone)]
enum Piece {
    /// Header or padding.
    Plain(Bytes),
    /// A file's content: path and size.
    File(String, u64),
}

impl Piece {
    fn len(&self) -> u64 {
        match self {
            Self::Plain(bytes) => bytes.len() as u64,
            Self::File(_, bytes) => *bytes,
        }
    }
}

impl Archive {
    /// Lays the files out.
    pub fn of(files: &[WrittenFile]) -> Self {
        let mut pieces = Vec::with_capacity(3 * files.len() + 1);
        let mut digest = Sha256::new();
        for file in files {
            if file.path.len() > NAME {
                let record = pax_path(&file.path);
                pieces.push(Piece::Plain(header("longhaul-pax-header", record.len() as u64, b'x')));
                pieces.push(Piece::Plain(padded(record)));
            }
            pieces.push(Piece::Plain(header(&file.path, file.bytes, b'0')));
            pieces.push(Piece::File(file.path.clone(), file.bytes));
            pieces.push(Piece::Plain(zeros(file.bytes.next_multiple_of(BLOCK) - file.bytes)));
            digest.update(format!("{} {} {}\n", file.sha256, file.bytes, file.path));
        }
        pieces.push(Piece::Plain(zeros(END)));
        let bytes = pieces.iter().map(Piece::len).sum();
        let tag = hex(&digest.finalize());
        Self { pieces, bytes, tag }
    }

    /// Length of the whole.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A digest that stands for the whole: archives with other bytes have another.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// Streams `range`, which must lie inside. Files are opened one after another, when their turn comes.
    pub fn read(&self, weights: &Weights, checkpoint: &CheckpointId, range: Range<u64>) -> ByteStream {
        let mut at = 0;
        let mut parts = Vec::new();
        for piece in &self.pieces {
            let (start, end) = (range.start.max(at), range.end.min(at + piece.len()));
            if start < end {
                parts.push((piece.clone(), start - at..end - at));
            }
            at += piece.len();
        }
        let (weights, checkpoint) = (weights.clone(), checkpoint.clone());
        stream::iter(parts)
            .then(move |(piece, part)| {
                let (weights, checkpoint) = (weights.clone(), checkpoint.clone());
                async move { read_piece(&weights, &checkpoint, piece, part).await }
            })
            .try_flatten()
            .boxed()
    }
}

async fn read_piece(
    weights: &Weights,
    checkpoint: &CheckpointId,
    piece: Piece,
    part: Range<u64>,
) -> Result<ByteStream, Error> {
    match piece {
        Piece::Plain(bytes) => {
            let bytes = bytes.slice(part.start as usize..part.end as usize);
            Ok(stream::once(async move { Ok(bytes) }).boxed())
        }
        Piece::File(path, _) => {
            let missing = || Error::Corrupt(format!("{path} of {checkpoint} is missing from the object store"));
            weights.read(checkpoint, &path, part).await?.ok_or_else(missing)
        }
    }
}

/// A ustar header: regular file (`0`) or pax header (`x`), mode 0644, no owner, no time.
fn header(path: &str, size: u64, kind: u8) -> Bytes {
    let mut block = [0u8; BLOCK as usize];
    let name = &path.as_bytes()[..path.len().min(NAME)];
    block[..name.len()].copy_from_slice(name);
    block[100..108].copy_from_slice(b"0000644\0");
    block[108..116].copy_from_slice(b"0000000\0");
    block[116..124].copy_from_slice(b"0000000\0");
    if size < OCTAL_SIZES {
        block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    } else {
        block[128..136].copy_from_slice(&size.to_be_bytes());
        block[124] = 0x80;
    }
    block[136..148].copy_from_slice(b"00000000000\0");
    block[148..156].copy_from_slice(b"        ");
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar\x0000");
    // The sum is taken with its own field as spaces.
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Bytes::copy_from_slice(&block)
}

/// A pax record says its own length, in digits that count too.
fn pax_path(path: &str) -> Vec<u8> {
    let rest = format!(" path={path}\n");
    let mut length = rest.len() + 1;
    while length != rest.len() + length.to_string().len() {
        length = rest.len() + length.to_string().len();
    }
    format!("{length}{rest}").into_bytes()
}

fn padded(mut bytes: Vec<u8>) -> Bytes {
    bytes.resize((bytes.len() as u64).next_multiple_of(BLOCK) as usize, 0);
    bytes.into()
}

fn zeros(count: u64) -> Bytes {
    vec![0; count as usize].into()
}
