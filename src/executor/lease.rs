//! Keeps a claim's lease alive, and says when it is lost or when the job's owner wants something.
//!
//! The deadline is counted on this process's monotonic clock from before each renewal was sent, so it is never later than the
//! database's own. Past it the lease counts as lost, whatever the database would say.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use super::Context;
use crate::{
    domain::JobId,
    store::queue::{Claim, Wish},
};

/// Renewals within the life of a lease.
const RENEWALS: u32 = 3;
/// Pause before another try when the database did not answer.
const AGAIN: Duration = Duration::from_secs(1);

/// A lease that is being kept. Dropping it stops the renewals.
#[derive(Debug)]
pub(super) struct Lease {
    /// Cancelled once the job is no longer ours: from then on nothing may be written for it.
    pub(super) lost: CancellationToken,
    /// When it ends unless renewed.
    pub(super) deadline: watch::Receiver<Instant>,
    wish: watch::Receiver<Option<Wish>>,
    keeper: JoinHandle<()>,
}

impl Lease {
    /// Waits until the job's owner wants something.
    pub(super) async fn wished(&mut self) -> Wish {
        loop {
            if let Some(wish) = *self.wish.borrow_and_update() {
                return wish;
            }
            if self.wish.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

/// Keeps the lease of a claim that was asked for at `asked`.
pub(super) fn keep(context: &Arc<Context>, claim: &Claim, asked: std::time::Instant) -> Lease {
    let lost = CancellationToken::new();
    let (deadline, deadline_seen) = watch::channel(Instant::from_std(asked) + context.settings.lease);
    let (wish, wish_seen) = watch::channel(None);
    let keeper = Keeper { job: claim.job.clone(), epoch: claim.epoch, lost: lost.clone(), deadline, wish };
    let keeper = tokio::spawn(keeper.run(Arc::clone(context)));
    Lease { lost, deadline: deadline_seen, wish: wish_seen, keeper }
}

struct Keeper {
    job: JobId,
    epoch: i64,
    lost: CancellationToken,
    deadline: watch::Sender<Instant>,
    wish: watch::Sender<Option<Wish>>,
}

impl Keeper {
    async fn run(self, context: Arc<Context>) {
        let lease = context.settings.lease;
        let mut pause = lease / RENEWALS;
        loop {
            let hinted = context.hints.notified();
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = hinted => {}
            }
            let sent = Instant::now();
            let over = *self.deadline.borrow();
            if sent >= over {
                return self.lose("it ran out");
            }
            let renewal = context.store.renew_lease(&self.job, self.epoch, lease);
            pause = match tokio::time::timeout_at(over, renewal).await {
                Err(_) => return self.lose("the database did not answer in time"),
                Ok(Ok(None)) => return self.lose("another holder has the job, or nobody"),
                Ok(Ok(Some(wish))) => {
                    self.deadline.send_replace(sent + lease);
                    self.wish.send_if_modified(|old| std::mem::replace(old, wish) != wish);
                    lease / RENEWALS
                }
                Ok(Err(error)) => {
                    tracing::warn!(job = %self.job, %error, "the lease could not be renewed; it is tried again");
                    AGAIN
                }
            };
        }
    }

    fn lose(&self, why: &str) {
        tracing::warn!(job = %self.job, epoch = self.epoch, why, "lease lost");
        self.lost.cancel();
    }
}
