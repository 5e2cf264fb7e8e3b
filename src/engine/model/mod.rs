//! The transformer, written out: which weights there are, one streamed layer, and the walk over all layers.

pub mod block;
pub mod gradients;
pub mod params;
mod pieces;
mod pipeline;
pub mod share;
pub mod transformer;

pub use params::{LayerParams, Params};
pub use transformer::{Batch, MemoryProof, Transformer};
