//! Weights where they are needed, one layer ahead of the work: gathered from the ranks that own parts of them, or brought from
//! host memory, or both.
//!
//! Memory: two layers on the device instead of all (ZeRO-3, arXiv 1910.02054, deals each layer's parameters to all ranks;
//! ZeRO-Infinity, arXiv 2104.07857, streams them from the host), and what lies outside the layers. Price: a layer's bytes travel
//! every time a walk comes to it, beside the work of the layer before. A walk names its layers in advance, so all ranks gather in
//! the same order; where a layer is resident and whole, coming to it costs nothing. Test: `parity::zero3`.

use std::collections::VecDeque;

use crate::engine::{
    Result,
    backend::{Backend, Space, Stream, Tensor},
    comm::{Comm, in_turn},
};

/// The room.
#[derive(Debug, Clone)]
pub struct Zero3 {
    /// The rank's part of each layer's parameters, flat.
    pub layers: Vec<Tensor>,
    /// Room for two whole layers on the device, unless all of them live there.
    pub buffers: Option<[Tensor; 2]>,
    /// Only with several ranks.
    pub outside: Option<Outside>,
}

/// Parameters outside the layers: the rank's part, and room for the whole.
#[derive(Debug, Clone, Copy)]
pub struct Outside {
    pub embedding: Gathered,
    pub norm: Gathered,
    /// In the embedding's room; none when it is the embedding.
    pub head: Option<Gathered>,
}

/// A rank's part and what the parts make.
#[derive(Debug, Clone, Copy)]
pub struct Gathered {
    pub part: Tensor,
    pub whole: Tensor,
}

/// One way through the layers: which are still to come, and which are in the buffers.
#[derive(Debug)]
pub struct Walk<E> {
    to_come: VecDeque<u64>,
    held: [Option<Held<E>>; 2],
    /// The buffer of the layer that was come to last.
    current: usize,
}

/// A layer in a buffer, or on its way there.
#[derive(Debug)]
struct Held<E> {
    layer: u64,
    arrived: E,
}

impl<E> Walk<E> {
    fn buffer_of(&self, layer: u64) -> Option<usize> {
        self.held.iter().position(|held| held.as_ref().is_some_and(|held| held.layer == layer))
    }
}

impl Zero3 {
    /// A walk over layers in this order.
    pub fn walk<E>(&self, order: Vec<u64>) -> Walk<E> {
        Walk { to_come: order.into(), held: [None, None], current: 1 }
    }

    /// Comes to the next layer of the walk: its parameters, flat, for operations queued on the compute stream until the walk
    /// comes to another. Sends for the layer after it.
    ///
    /// # Panics
    /// When the walk's next layer is another.
    pub fn enter<B: Backend, C: Comm<B>>(
        &self,
        (b, comm): (&mut B, &mut C),
        walk: &mut Walk<B::Event>,
        layer: u64,
    ) -> Result<Tensor> {
        assert_eq!(walk.to_come.pop_front(), Some(layer), "a walk keeps to its order");
        let here = if let Some(buffers) = self.buffers.filter(|_| self.travels(layer, comm.n_ranks())) {
            self.send_for((b, comm), walk, layer)?;
            walk.current = walk.buffer_of(layer).expect("a layer sent for has a buffer");
            let held = walk.held[walk.current].as_ref().expect("it is there");
            b.wait(Stream::Compute, &held.arrived)?;
            buffers[walk.current]
        } else {
            self.layers[layer as usize]
        };
        if let Some(next) = walk.to_come.front().copied() {
            self.send_for((b, comm), walk, next)?;
        }
        Ok(here)
    }

    /// Makes the embedding whole.
    pub fn gather_embedding<B: Backend, C: Comm<B>>(&self, (b, comm): (&mut B, &mut C)) -> Result {
        self.outside.map_or(Ok(()), |outside| gather((b, comm), outside.embedding))
    }

    /// Makes the last norm and the head whole. The embedding is whole no more, unless it is the head.
    pub fn gather_head<B: Backend, C: Comm<B>>(&self, (b, comm): (&mut B, &mut C)) -> Result {
        let Some(Outside { norm, head, .. }) = self.outside else { return Ok(()) };
        gather((b, comm), norm)?;
        head.map_or(Ok(()), |head| gather((b, comm), head))
    }

    fn travels(&self, layer: u64, n_ranks: usize) -> bool {
        n_ranks > 1 || self.layers[layer as usize].space == Space::Host
    }

    /// Queues a layer's way into the buffer that is not in use, behind everything that used it.
    fn send_for<B: Backend, C: Comm<B>>(
        &self,
        (b, comm): (&mut B, &mut C),
        walk: &mut Walk<B::Event>,
        layer: u64,
    ) -> Result {
        let needed = self.travels(layer, comm.n_ranks()) && walk.buffer_of(layer).is_none();
        let Some(buffers) = self.buffers.filter(|_| needed) else { return Ok(()) };
        let (buffer, mut part) = (1 - walk.current, self.layers[layer as usize]);
        let whole = buffers[buffer];
        let mut there = b.record(Stream::Compute)?;
        if part.space == Space::Host {
            let own = whole.part(comm.rank() as u64 * part.elements(), part.elements());
            b.wait(Stream::Up, &there)?;
            b.copy(Stream::Up, own, part)?;
            there = b.record(Stream::Up)?;
            part = own;
        }
        if comm.n_ranks() > 1 {
            b.wait(comm.stream(), &there)?;
            comm.all_gather(b, whole, part)?;
            there = b.record(comm.stream())?;
        }
        walk.held[buffer] = Some(Held { layer, arrived: there });
        Ok(())
    }
}

fn gather<B: Backend, C: Comm<B>>((b, comm): (&mut B, &mut C), gathered: Gathered) -> Result {
    in_turn((b, comm), |b, comm| comm.all_gather(b, gathered.whole, gathered.part))
}
