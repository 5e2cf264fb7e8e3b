//! Weights of the layers, a layer at a time on the device, one layer ahead of the work.
//!
//! Memory: two layers on the device instead of all that live elsewhere (ZeRO-Infinity, arXiv 2104.07857, streams parameters
//! from the host in the same way). Price: a layer's bytes cross the link every time a walk comes to it, beside the work of the
//! layer before. A walk names its layers in advance; where a layer is resident, coming to it costs nothing.
//! Test: `parity::zero3`.

use std::collections::VecDeque;

use crate::engine::{
    Result,
    backend::{Backend, Space, Stream, Tensor},
};

/// The room.
#[derive(Debug, Clone)]
pub struct Zero3 {
    /// Where each layer's parameters live, flat.
    pub homes: Vec<Tensor>,
    /// Room for two layers on the device, unless all of them live there.
    pub buffers: Option<[Tensor; 2]>,
}

/// One way through the layers: which are still to come, and which are in the buffers.
#[derive(Debug)]
pub struct Walk<E> {
    to_come: VecDeque<u64>,
    held: [Option<Held<E>>; 2],
    /// The buffer of the layer that was come to last, or the other one's neighbour at first.
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
    pub fn enter<B: Backend>(&self, b: &mut B, walk: &mut Walk<B::Event>, layer: u64) -> Result<Tensor> {
        assert_eq!(walk.to_come.pop_front(), Some(layer), "a walk keeps to its order");
        let here = if let Some(buffers) = self.buffers.filter(|_| self.streamed(layer)) {
            self.send_for(b, walk, layer)?;
            walk.current = walk.buffer_of(layer).expect("a layer sent for has a buffer");
            let held = walk.held[walk.current].as_ref().expect("it is there");
            b.wait(Stream::Compute, &held.arrived)?;
            buffers[walk.current]
        } else {
            self.homes[layer as usize]
        };
        if let Some(next) = walk.to_come.front().copied() {
            self.send_for(b, walk, next)?;
        }
        Ok(here)
    }

    fn streamed(&self, layer: u64) -> bool {
        self.homes[layer as usize].space == Space::Host
    }

    /// Queues a layer's way into the buffer that is not in use, behind everything that used it.
    fn send_for<B: Backend>(&self, b: &mut B, walk: &mut Walk<B::Event>, layer: u64) -> Result {
        let Some(buffers) = self.buffers.filter(|_| self.streamed(layer) && walk.buffer_of(layer).is_none()) else {
            return Ok(());
        };
        let buffer = 1 - walk.current;
        let free = b.record(Stream::Compute)?;
        b.wait(Stream::Up, &free)?;
        b.copy(Stream::Up, buffers[buffer], self.homes[layer as usize])?;
        let arrived = b.record(Stream::Up)?;
        walk.held[buffer] = Some(Held { layer, arrived });
        Ok(())
    }
}
