//! The groups that a rank trains in, and how their collectives are ordered with its work.

use super::{Alone, Comm};
use crate::engine::{
    backend::{Backend, Stream},
    error::{Error, Result},
};

/// A rank's groups: all ranks, among which weights, gradients and states are dealt, and those that share its sequence.
#[derive(Debug)]
pub struct Groups<C> {
    pub world: C,
    pub sequence: C,
}

impl Groups<Alone> {
    /// One rank.
    pub fn alone() -> Self {
        Self { world: Alone, sequence: Alone }
    }
}

impl<C> Groups<C> {
    /// Replicas of `n_sequence_ranks` neighbouring ranks each.
    pub fn new<B: Backend>(mut world: C, n_sequence_ranks: u64) -> Result<Self>
    where
        C: Comm<B>,
    {
        let rank = world.rank() as u64;
        let sequence = world.split(rank / n_sequence_ranks, rank % n_sequence_ranks)?;
        Ok(Self { world, sequence })
    }

    /// Tells the other ranks that this one cannot go on, and why; not where it only follows another.
    pub fn give_up<B: Backend>(&self, error: &Error)
    where
        C: Comm<B>,
    {
        if !matches!(error, Error::PeerLost { .. }) {
            self.world.abort(format!("failed: {error}"));
        }
    }
}

/// Queues collectives behind everything on the compute stream, which then waits for them.
pub fn in_turn<B: Backend>(b: &mut B, collectives: impl FnOnce(&mut B) -> Result) -> Result {
    let ready = b.record(Stream::Compute)?;
    b.wait(Stream::Comm, &ready)?;
    collectives(b)?;
    let done = b.record(Stream::Comm)?;
    b.wait(Stream::Compute, &done)
}
