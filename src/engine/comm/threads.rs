//! A world of threads in one process: a message is handed over, not copied.

use std::{sync::Arc, thread};

use super::{
    HostComm, Lost, Message, Transport,
    inbox::{Inbox, Refused},
};
use crate::engine::error::{Error, Result};

/// One thread's end. A thread that panics while it holds its end is lost to the others at once; one that drops its end has
/// left, and is lost to those who still wait for it.
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    /// Of every rank.
    inboxes: Arc<[Inbox]>,
}

/// A world of `n` ranks in the order of ranks, each to be moved into its thread.
pub fn group(n: usize) -> Vec<HostComm<Threads>> {
    let inboxes: Arc<[Inbox]> = (0..n).map(|_| Inbox::new(n)).collect();
    (0..n).map(|rank| HostComm::world(Threads { rank, inboxes: Arc::clone(&inboxes) })).collect()
}

impl Threads {
    fn own(&self) -> &Inbox {
        &self.inboxes[self.rank]
    }

    fn lose(&self, rank: usize, cause: String) {
        let lost = Lost { rank, peer: format!("rank {rank}"), cause };
        for inbox in &*self.inboxes {
            inbox.lose(lost.clone(), || ());
        }
    }

    fn left_early(&self, rank: usize) -> Error {
        self.give_up(rank, "ended before the others were done".into())
    }
}

impl Transport for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn n_ranks(&self) -> usize {
        self.inboxes.len()
    }

    fn send(&self, to: usize, message: Message) -> Result {
        self.check()?;
        if self.own().has_left(to) {
            return Err(self.left_early(to));
        }
        self.inboxes[to].put(self.rank, message);
        Ok(())
    }

    fn receive(&self, from: usize) -> Result<Message> {
        self.own().take(from).map_err(|refused| match refused {
            Refused::Lost(lost) => lost.into(),
            Refused::Left => self.left_early(from),
        })
    }

    fn check(&self) -> Result {
        self.own().lost().map_or(Ok(()), |lost| Err(lost.into()))
    }

    fn give_up(&self, rank: usize, cause: String) -> Error {
        self.lose(rank, cause);
        self.own().lost().expect("a rank was just lost").into()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if thread::panicking() {
            self.lose(self.rank, "panicked".into());
        }
        // Whoever goes because of a loss is no loss itself: the others may just be about to hear of the first.
        if self.own().lost().is_some() {
            return;
        }
        for inbox in &*self.inboxes {
            inbox.leave(self.rank);
        }
    }
}
