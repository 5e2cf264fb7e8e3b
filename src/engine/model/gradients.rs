//! Where gradients of weights add up, and how they wait for the step's norm.
//!
//! Every sum is made in the wide type. The sums of a layer are complete when its backward is done; with one sequence a step they
//! may then be rounded to storage and their memory serve the next layer: 2 bytes a parameter instead of 4. With several ranks
//! each keeps its own part of the sums over all of them (ZeRO-3): they are summed beside what the next layer's backward rebuilds, and
//! kept when their memory is needed again.

use super::params::{LayerParams, Params};
use crate::engine::{
    Result,
    backend::{Backend, Stream, Tensor},
    comm::{Comm, queue},
    layers::loss,
};

/// Gradients of all parameters.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// What the update reads of each unit, flat: wide or storage.
    pub kept: Units,
    /// None where everything is kept wide and whole.
    pub sums: Option<Sums>,
    /// Shapes of the parameters.
    pub shapes: Params,
}

/// Parameters that are dealt to ranks together: each unit's part, flat.
#[derive(Debug, Clone)]
pub struct Units {
    pub embedding: Tensor,
    pub layers: Vec<Tensor>,
    pub norm: Tensor,
    /// None when it is the embedding.
    pub head: Option<Tensor>,
}

/// Wide memory for the part of the model whose backward runs: whole units, flat.
#[derive(Debug, Clone, Copy)]
pub struct Sums {
    /// One layer's parameters.
    pub layer: Tensor,
    /// `V h`, for the head and then for the embedding; for both at once when they are tied.
    pub vocabulary: Tensor,
    /// `h`
    pub norm: Tensor,
}

/// Sums on their way to their owners: nothing may touch them but [`Gradients`], which keeps this rank's part when they are done.
#[derive(Debug)]
pub struct Leaving<E> {
    kept: Tensor,
    own: Tensor,
    done: E,
}

impl Units {
    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = Tensor> {
        [self.embedding].into_iter().chain(self.layers.iter().copied()).chain([self.norm]).chain(self.head)
    }
}

impl Gradients {
    /// Where the loss adds gradients of the last norm and the head; cleared first.
    pub fn begin_loss<B: Backend>(&self, b: &mut B) -> Result<loss::Weights> {
        let (norm, head) = if let Some(sums) = &self.sums {
            b.fill(sums.norm, 0.0)?;
            b.fill(sums.vocabulary, 0.0)?;
            (sums.norm, sums.vocabulary)
        } else {
            (self.kept.norm, self.kept.head.unwrap_or(self.kept.embedding))
        };
        Ok(loss::Weights { norm: like(norm, self.shapes.norm), head: like(head, self.shapes.head) })
    }

    /// The loss is done.
    pub fn end_loss<B: Backend, C: Comm<B>>(
        &self,
        (b, comm): (&mut B, &mut C),
        leaving: &mut Vec<Leaving<B::Event>>,
    ) -> Result {
        let Some(sums) = &self.sums else { return Ok(()) };
        leave((b, comm), self.kept.norm, sums.norm, leaving)?;
        // A tied embedding adds its part to the same sums.
        self.kept.head.map_or(Ok(()), |head| leave((b, comm), head, sums.vocabulary, leaving))
    }

    /// Where a layer's backward adds; cleared first. What was leaving is kept.
    pub fn begin_layer<B: Backend>(
        &self,
        b: &mut B,
        layer: u64,
        leaving: &mut Vec<Leaving<B::Event>>,
    ) -> Result<LayerParams> {
        keep(b, leaving)?;
        let shapes = self.shapes.layers[layer as usize];
        let Some(sums) = &self.sums else { return Ok(shapes.over(self.kept.layers[layer as usize])) };
        b.fill(sums.layer, 0.0)?;
        Ok(shapes.over(sums.layer))
    }

    /// A layer's backward is done.
    pub fn end_layer<B: Backend, C: Comm<B>>(
        &self,
        (b, comm): (&mut B, &mut C),
        layer: u64,
        leaving: &mut Vec<Leaving<B::Event>>,
    ) -> Result {
        self.sums.map_or(Ok(()), |sums| leave((b, comm), self.kept.layers[layer as usize], sums.layer, leaving))
    }

    /// Where the embedding's backward adds `[V, h]`; cleared first, unless a tied head has added to it. What was leaving is kept.
    pub fn begin_embedding<B: Backend>(&self, b: &mut B, leaving: &mut Vec<Leaving<B::Event>>) -> Result<Tensor> {
        keep(b, leaving)?;
        if let (Some(sums), Some(_)) = (&self.sums, self.kept.head) {
            b.fill(sums.vocabulary, 0.0)?;
        }
        Ok(like(self.sums.map_or(self.kept.embedding, |sums| sums.vocabulary), self.shapes.embedding))
    }

    /// The embedding's backward is done, and with it that of the model: all is kept.
    pub fn end_embedding<B: Backend, C: Comm<B>>(&self, (b, comm): (&mut B, &mut C)) -> Result {
        let Some(sums) = self.sums else { return Ok(()) };
        let mut leaving = Vec::new();
        leave((b, comm), self.kept.embedding, sums.vocabulary, &mut leaving)?;
        keep(b, &mut leaving)
    }
}

/// A flat tensor's first elements in the shape of another.
fn like(flat: Tensor, shape: Tensor) -> Tensor {
    flat.shaped(shape.rows, shape.cols)
}

/// Sends a unit's sums to their owners, behind the operations that made them. With one rank its own are kept at once.
fn leave<B: Backend, C: Comm<B>>(
    (b, comm): (&mut B, &mut C),
    kept: Tensor,
    sums: Tensor,
    leaving: &mut Vec<Leaving<B::Event>>,
) -> Result {
    let n = kept.elements();
    let own = sums.part(comm.rank() as u64 * n, n);
    if comm.n_ranks() == 1 {
        return add(b, kept, own);
    }
    let done = queue((b, comm), |b, comm| comm.reduce_scatter(b, own, sums))?;
    leaving.push(Leaving { kept, own, done });
    Ok(())
}

/// Keeps this rank's parts of the sums over all ranks; their memory may be written again.
fn keep<B: Backend>(b: &mut B, leaving: &mut Vec<Leaving<B::Event>>) -> Result {
    leaving.drain(..).try_for_each(|Leaving { kept, own, done }| {
        b.wait(Stream::Compute, &done)?;
        add(b, kept, own)
    })
}

/// Adds to what is kept in the wide type, or rounds to storage.
fn add<B: Backend>(b: &mut B, kept: Tensor, own: Tensor) -> Result {
    if kept.dtype == own.dtype { b.accumulate(kept, own) } else { b.cast(kept, own) }
}
