//! The groups that a rank trains in, and how their collectives are ordered with its work.

use super::{Alone, Comm};
use crate::engine::{
    backend::{Backend, Stream},
    error::{Error, Result},
};

/// A rank's groups: all ranks, among which weights, gradients and states are dealt, and those that share its sequence. Each has
/// its stream, and with NCCL its communicator, also where both are the same ranks: an exchange of heads, which attention waits for,
/// does not queue behind the weights of the next layer. Every rank queues the collectives of both in one order, and each waits
/// only for work that was queued before it, so the first that is not done can always go on: no two ranks wait for each other's
/// later one.
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

/// Queues a group's collectives behind everything on the compute stream so far. The compute stream may touch what they read and write
/// once it has waited for the event.
pub fn queue<B: Backend, C: Comm<B>>(
    (b, comm): (&mut B, &mut C),
    collectives: impl FnOnce(&mut B, &mut C) -> Result,
) -> Result<B::Event> {
    let (stream, ready) = (comm.stream(), b.record(Stream::Compute)?);
    b.wait(stream, &ready)?;
    collectives(b, comm)?;
    b.record(stream)
}

/// The same, and the compute stream waits.
pub fn in_turn<B: Backend, C: Comm<B>>(
    (b, comm): (&mut B, &mut C),
    collectives: impl FnOnce(&mut B, &mut C) -> Result,
) -> Result {
    let done = queue((b, comm), collectives)?;
    b.wait(Stream::Compute, &done)
}
