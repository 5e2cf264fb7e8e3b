//! Collectives between ranks: the same body on every transport, and what the others see when a rank goes.

mod collectives;
pub mod nccl;
pub mod processes;
mod rendezvous;
mod tcp;
mod threads;

use std::{
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use longhaul::engine::{
    Error,
    comm::{HostComm, Transport},
};

/// Nothing here may hang: this long after it began, a test fails. No bound on speed, so far above any slow machine.
pub const NO_HANG: Duration = Duration::from_mins(2);

/// Runs a rank on a thread for each end; the answers in the order of ranks. A rank that panics is the test's failure.
pub fn on_threads<T, R>(ends: Vec<HostComm<T>>, rank: impl Fn(HostComm<T>) -> R + Send + Sync + 'static) -> Vec<R>
where
    T: Transport + 'static,
    R: Send + 'static,
{
    within(NO_HANG, move || {
        thread::scope(|scope| {
            let ranks: Vec<_> = ends.into_iter().map(|end| scope.spawn(|| rank(end))).collect();
            ranks.into_iter().map(|rank| rank.join().expect("a rank")).collect()
        })
    })
}

/// What `f` answers, or a failure when it takes longer.
pub fn within<R: Send + 'static>(bound: Duration, f: impl FnOnce() -> R + Send + 'static) -> R {
    let (tell, told) = mpsc::channel();
    let thread = thread::spawn(move || tell.send(f()));
    match told.recv_timeout(bound) {
        Ok(answer) => answer,
        Err(RecvTimeoutError::Timeout) => panic!("still waiting after {bound:?}"),
        Err(RecvTimeoutError::Disconnected) => std::panic::resume_unwind(thread.join().unwrap_err()),
    }
}

/// The rank that an error says is lost, with its message.
pub fn lost<T>(result: Result<T, Error>) -> (usize, String) {
    match result {
        Err(error @ Error::PeerLost { rank, .. }) => (rank, error.to_string()),
        Err(error) => panic!("another error: {error}"),
        Ok(_) => panic!("no error"),
    }
}
