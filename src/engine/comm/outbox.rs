//! Frames that wait to be written to one peer.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use super::frame::Frame;

/// Filled by anyone, emptied by the peer's writer.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Frame>,
    /// Nothing more is taken in.
    closed: bool,
}

impl Outbox {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a frame, unless the box is closed.
    pub(super) fn put(&self, frame: Frame) {
        let mut state = self.state();
        if !state.closed {
            state.queue.push_back(frame);
            self.changed.notify_one();
        }
    }

    /// Queues a frame if nothing else waits.
    pub(super) fn put_if_empty(&self, frame: Frame) {
        if self.state().queue.is_empty() {
            self.put(frame);
        }
    }

    /// Takes nothing in any more; what is in it is still written.
    pub(super) fn close(&self) {
        self.state().closed = true;
        self.changed.notify_one();
    }

    /// The next frame and whether more wait behind it; waits for one. `None` when the box is closed and empty.
    pub(super) fn take(&self) -> Option<(Frame, bool)> {
        let mut state = self.state();
        loop {
            if let Some(frame) = state.queue.pop_front() {
                return Some((frame, !state.queue.is_empty()));
            }
            if state.closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
