//! From documents to sequences of tokens: read, tokenize once, pack, and hand out sequence by sequence.
//!
//! `documents` reads files and `examples` their lines; `template` and `chat` turn conversations into text of which a part is
//! trained; `tokenizer` turns text into tokens, `corpus` keeps them in a memory-mapped file and `preview` shows the first;
//! `pack` decides which pieces of which documents make a sequence, `sequence` cuts one out with its labels and positions.

mod chat;
pub mod corpus;
mod dates;
pub mod documents;
pub mod examples;
pub mod pack;
pub mod preview;
pub mod sequence;
pub mod template;
pub mod tokenizer;

pub use corpus::{Corpus, Token};
pub use sequence::{Dataset, Sequence};
pub use tokenizer::Tokenizer;
