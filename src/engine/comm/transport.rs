//! What [`HostComm`](super::HostComm) needs of a network: ordered, reliable messages of bytes between ranks.

use std::sync::Arc;

use crate::engine::error::{Error, Result};

/// Bytes on their way. Shared, so that one message can go to many ranks.
pub type Message = Arc<Vec<u8>>;

/// Point to point messages between the ranks of a world. Between two ranks they arrive once each, in the order they were
/// sent. Dropping it is leaving: what was sent before still arrives, and the others are told.
pub trait Transport: Send + Sync {
    /// This rank, in `0..n_ranks`.
    fn rank(&self) -> usize;
    /// Ranks in the world.
    fn n_ranks(&self) -> usize;
    /// Sends to another rank without waiting for it: ranks that all send before they receive get through, whatever the sizes.
    /// What is under way is held in memory, so protocols on top bound how far a rank runs ahead.
    fn send(&self, to: usize, message: Message) -> Result;
    /// The next message from another rank; waits for it. Fails with [`Error::PeerLost`] as soon as any rank is lost.
    fn receive(&self, from: usize) -> Result<Message>;
    /// Fails if a rank is lost.
    fn check(&self) -> Result;
    /// Declares a rank lost, here and at every other rank, and answers why the world is lost: this, or what came before it.
    fn give_up(&self, rank: usize, cause: String) -> Error;
}

/// A rank that is gone, and with it the world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    pub rank: usize,
    /// What the rank is called in messages: "rank 3 at 10.0.0.5:4242".
    pub peer: String,
    /// What happened, after the name: "closed its connection".
    pub cause: String,
}

impl From<Lost> for Error {
    fn from(Lost { rank, peer, cause }: Lost) -> Self {
        Self::PeerLost { rank, peer, cause }
    }
}
