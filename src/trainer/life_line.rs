//! The hold that an executor has on its trainer: orders on standard input, and a lease with a deadline.
//!
//! A trainer must never outlive its right to train. It exits when its orders end (the executor is gone), and when its lease
//! is over by its own monotonic clock (the executor is stopped, or cut off from the database).

use std::{
    io::{self, BufRead, Read},
    process,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    protocol::{ALIVE_INTERVAL, MAX_LINE_BYTES, Order, Report},
    reports::Reports,
};
use crate::engine::train::Stop;

/// A trainer that has not heard of its lease after this long gives up.
const FIRST_LEASE: Duration = Duration::from_secs(30);
/// How exactly the deadline is kept.
const LOOK: Duration = Duration::from_millis(100);
/// Exit status of a trainer that lost its executor or its lease: nobody is left to read a report.
const ABANDONED: i32 = 75;

const GO_ON: u8 = 0;
const STOP: u8 = 1;
const STOP_AFTER_CHECKPOINT: u8 = 2;

/// What the executor wants at the moment, readable between steps.
#[derive(Debug)]
pub(super) struct LifeLine {
    stop: AtomicU8,
    /// Milliseconds after `start` at which the lease ends.
    deadline_ms: AtomicU64,
    start: Instant,
}

impl LifeLine {
    /// The executor's wish to end the run early.
    pub(super) fn stop_wanted(&self) -> Option<Stop> {
        match self.stop.load(Ordering::Relaxed) {
            GO_ON => None,
            wish => Some(Stop { checkpoint: wish == STOP_AFTER_CHECKPOINT }),
        }
    }

    fn obey(&self, order: &Order) -> Result<(), &'static str> {
        match order {
            Order::Start { .. } => return Err("ordered to start a second time"),
            Order::Lease { remaining_ms } => {
                let now = self.start.elapsed().as_millis() as u64;
                self.deadline_ms.store(now.saturating_add(*remaining_ms), Ordering::Relaxed);
            }
            Order::Stop { checkpoint } => {
                self.stop.store(if *checkpoint { STOP_AFTER_CHECKPOINT } else { STOP }, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        self.start.elapsed().as_millis() as u64 > self.deadline_ms.load(Ordering::Relaxed)
    }
}

/// Starts the threads that follow orders and keep the deadline.
pub(super) fn hold(orders: impl BufRead + Send + 'static, reports: Arc<Reports>) -> io::Result<Arc<LifeLine>> {
    let life = Arc::new(LifeLine {
        stop: AtomicU8::new(GO_ON),
        deadline_ms: AtomicU64::new(FIRST_LEASE.as_millis() as u64),
        start: Instant::now(),
    });
    let (follower, keeper) = (Arc::clone(&life), Arc::clone(&life));
    thread::Builder::new().name("orders".into()).spawn(move || follow(orders, &follower))?;
    thread::Builder::new().name("lease".into()).spawn(move || keep(&keeper, &reports))?;
    Ok(life)
}

fn follow(mut orders: impl BufRead, life: &LifeLine) {
    let why = loop {
        let read = line(&mut orders);
        let order = match &read {
            Ok(Some(line)) => serde_json::from_str(line),
            Ok(None) => break "the executor is gone".to_owned(),
            Err(error) => break format!("orders cannot be read: {error}"),
        };
        match order.map_err(|error| error.to_string()).and_then(|order| life.obey(&order).map_err(str::to_owned)) {
            Ok(()) => {}
            Err(why) => break why,
        }
    };
    abandon(&why);
}

fn keep(life: &LifeLine, reports: &Reports) {
    let mut told = Instant::now();
    while !life.is_over() {
        if told.elapsed() >= ALIVE_INTERVAL {
            reports.send(&Report::Alive);
            told = Instant::now();
        }
        thread::sleep(LOOK);
    }
    abandon("the lease is over");
}

fn abandon(why: &str) -> ! {
    tracing::error!(why, "the trainer ends");
    process::exit(ABANDONED)
}

/// The next line of bounded length; `None` at the end. A last line without its newline was cut off and counts as the end.
pub(super) fn line(from: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    from.take(MAX_LINE_BYTES as u64 + 1).read_until(b'\n', &mut line)?;
    if line.len() > MAX_LINE_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a line is too long"));
    }
    if line.pop() != Some(b'\n') {
        return Ok(None);
    }
    String::from_utf8(line).map(Some).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
