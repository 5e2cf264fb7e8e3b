//! The training engine: explicit forward and backward over planned memory. No HTTP, no SQL, no async.
//!
//! Letters used in every shape: T tokens of the sequence, C chunks, c tokens of a chunk, t rows of a tile, h hidden size,
//! f feed-forward size, V vocabulary, L layers, nq and nk query and kv heads, d head size. Matrices are row-major.

pub mod alst;
pub mod backend;
pub mod checkpoint;
pub mod comm;
pub mod data;
pub mod error;
pub mod file_map;
pub mod gpus;
pub mod layers;
pub mod meter;
pub mod model;
pub mod optim;
pub mod train;

pub use error::{Error, Result};
