//! Where gradients of weights add up, and how they wait for the step's norm.
//!
//! Every sum is made in the wide type. With one sequence a step the sums of a layer are complete when its backward is done;
//! they may then be rounded to storage and their memory serve the next layer: 2 bytes a parameter instead of 4.

use super::params::{LayerParams, Params};
use crate::engine::{
    Result,
    backend::{Backend, Tensor},
    layers::loss,
};

/// Gradients of all parameters.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// What the update reads: wide, or storage when there are `sums`.
    pub kept: Params,
    pub sums: Option<Sums>,
}

/// Wide memory for the part of the model whose backward runs.
#[derive(Debug, Clone, Copy)]
pub struct Sums {
    /// One layer's parameters, flat.
    pub layer: Tensor,
    /// `[V, h]`, for the head and then for the embedding; for both at once when they are tied.
    pub vocabulary: Tensor,
    /// `[1, h]`
    pub norm: Tensor,
}

impl Gradients {
    /// Where the loss adds gradients of the last norm and the head; cleared first.
    pub fn begin_loss<B: Backend>(&self, b: &mut B) -> Result<loss::Weights> {
        let Some(sums) = &self.sums else {
            return Ok(loss::Weights { norm: self.kept.norm, head: self.kept.head });
        };
        b.fill(sums.norm, 0.0)?;
        b.fill(sums.vocabulary, 0.0)?;
        Ok(loss::Weights { norm: sums.norm, head: sums.vocabulary })
    }

    /// The loss is done.
    pub fn end_loss<B: Backend>(&self, b: &mut B) -> Result {
        let Some(sums) = &self.sums else { return Ok(()) };
        b.cast(self.kept.norm, sums.norm)?;
        if self.kept.head == self.kept.embedding {
            return Ok(()); // the embedding adds its part to the same sums
        }
        b.cast(self.kept.head, sums.vocabulary)?;
        b.fill(sums.vocabulary, 0.0)
    }

    /// Where a layer's backward adds; cleared first.
    pub fn begin_layer<B: Backend>(&self, b: &mut B, layer: u64) -> Result<LayerParams> {
        let kept = self.kept.layers[layer as usize];
        let Some(sums) = &self.sums else { return Ok(kept) };
        b.fill(sums.layer, 0.0)?;
        Ok(kept.over(sums.layer))
    }

    /// A layer's backward is done.
    pub fn end_layer<B: Backend>(&self, b: &mut B, layer: u64) -> Result {
        let Some(sums) = &self.sums else { return Ok(()) };
        b.cast(self.kept.layers[layer as usize].flat(), sums.layer)
    }

    /// Where the embedding's backward adds.
    pub fn embedding(&self) -> Tensor {
        self.sums.map_or(self.kept.embedding, |sums| sums.vocabulary)
    }

    /// The embedding's backward is done.
    pub fn end_embedding<B: Backend>(&self, b: &mut B) -> Result {
        let Some(sums) = &self.sums else { return Ok(()) };
        b.cast(self.kept.embedding, sums.vocabulary)
    }
}
