//! Messages that have arrived at one rank and not been taken yet, and what is known of the ranks they come from.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::transport::{Lost, Message};

/// Filled by the ranks' threads or by the readers of their connections, emptied by the rank itself.
#[derive(Debug)]
pub(super) struct Inbox {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// By sender.
    queues: Vec<VecDeque<Message>>,
    /// Ranks that went in good order. What they sent before is still good.
    left: Vec<bool>,
    /// The first rank that was lost. One is enough: nothing goes on without it.
    lost: Option<Lost>,
    /// This rank itself has left.
    closed: bool,
}

/// Why there is no message.
#[derive(Debug)]
pub(super) enum Refused {
    Lost(Lost),
    /// The sender left without sending it.
    Left,
}

/// Who is gone.
#[derive(Debug)]
pub(super) enum Departure {
    /// This rank itself.
    Own,
    Lost(Lost),
    /// A rank that went in good order.
    Left(usize),
}

impl Inbox {
    /// An empty one for messages of `n_ranks` senders.
    pub(super) fn new(n_ranks: usize) -> Self {
        let queues = (0..n_ranks).map(|_| VecDeque::new()).collect();
        let state = State { queues, left: vec![false; n_ranks], lost: None, closed: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// The state is whole between any two statements, so a panic elsewhere does not spoil it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.notify_all();
    }

    pub(super) fn put(&self, from: usize, message: Message) {
        self.change(|state| state.queues[from].push_back(message));
    }

    /// Records that a rank went in good order.
    pub(super) fn leave(&self, rank: usize) {
        self.change(|state| state.left[rank] = true);
    }

    /// Records that a rank is lost, unless one was before. Runs `tell` for the first, before anyone who waits here hears of it:
    /// once they do, this rank may leave.
    pub(super) fn lose(&self, lost: Lost, tell: impl FnOnce()) {
        self.change(|state| {
            if state.lost.is_none() {
                tell();
                state.lost = Some(lost);
            }
        });
    }

    /// Records that this rank leaves.
    pub(super) fn close(&self) {
        self.change(|state| state.closed = true);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state().closed
    }

    pub(super) fn lost(&self) -> Option<Lost> {
        self.state().lost.clone()
    }

    pub(super) fn has_left(&self, rank: usize) -> bool {
        self.state().left[rank]
    }

    /// The next message of a sender; waits for it.
    pub(super) fn take(&self, from: usize) -> Result<Message, Refused> {
        let taken = self.wait(None, |state| match (&state.lost, state.queues[from].pop_front()) {
            (Some(lost), _) => Some(Err(Refused::Lost(lost.clone()))),
            (None, Some(message)) => Some(Ok(message)),
            (None, None) => state.left[from].then_some(Err(Refused::Left)),
        });
        taken.expect("a wait without end ends with an answer")
    }

    /// Waits until this rank leaves, so long at most; true when it does.
    pub(super) fn wait_until_closed(&self, patience: Duration) -> bool {
        self.wait(Some(patience), |state| state.closed.then_some(())).is_some()
    }

    /// Waits until another rank is gone or this one leaves.
    pub(super) fn wait_for_departure(&self) -> Departure {
        let departure = self.wait(None, |state| {
            let left = || state.left.iter().position(|left| *left).map(Departure::Left);
            let closed = state.closed.then_some(Departure::Own);
            closed.or_else(|| state.lost.clone().map(Departure::Lost)).or_else(left)
        });
        departure.expect("a wait without end ends with an answer")
    }

    /// The rank that was lost, if one is within this time or before this rank leaves.
    pub(super) fn wait_for_loss(&self, patience: Duration) -> Option<Lost> {
        self.wait(Some(patience), |state| {
            let lost = state.lost.clone();
            (state.closed || lost.is_some()).then_some(lost)
        })?
    }

    /// Waits until `ready` has an answer; `None` when patience ends first.
    fn wait<R>(&self, patience: Option<Duration>, mut ready: impl FnMut(&mut State) -> Option<R>) -> Option<R> {
        let end = patience.map(|patience| Instant::now() + patience);
        let mut state = self.state();
        loop {
            if let Some(answer) = ready(&mut state) {
                return Some(answer);
            }
            let rest = end.map(|end| end.saturating_duration_since(Instant::now()));
            state = match rest {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return None,
                Some(rest) => self.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
    }
}
