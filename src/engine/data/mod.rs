//! From documents to sequences of tokens: read, tokenize once, pack, and hand out sequence by sequence.
//!
//! `documents` reads files, `tokenizer` turns text into ids, `corpus` keeps the ids in a memory-mapped file, `pack` decides
//! which pieces of which documents make a sequence, `sequence` cuts one out with its labels and positions.

pub mod corpus;
pub mod documents;
pub mod pack;
pub mod sequence;
pub mod tokenizer;

pub use corpus::Corpus;
pub use sequence::{Dataset, Sequence};
pub use tokenizer::Tokenizer;
