//! One attempt at one job, from claim to settled: prepare, start the trainers, listen to them, let go of the job.
//!
//! Whatever happens ends in one of two ways: the job is settled under the lease's epoch, or the lease is lost and nothing more
//! is written. The trainers are gone in both.

use std::{pin::pin, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep_until, timeout};

use super::{
    Context,
    devices::Seat,
    group::Group,
    lease::{self, Lease},
    prepare::{self, retry, with_causes},
    span, tell,
};
use crate::{
    domain::{JobId, JobStatus},
    store::queue::{Claim, Settlement, Wish, Work},
    trainer::protocol::Report,
};

/// How long a trainer whose job was cancelled may take to its next step boundary; nothing of its state is needed.
const CANCEL_GRACE: Duration = Duration::from_secs(10);
/// How long one whose job was paused may take to reach a step boundary and write a checkpoint.
const PAUSE_GRACE: Duration = Duration::from_hours(1);
/// How long a settlement is tried while the database is away. After that the lease runs out and says it all.
const SETTLE: Duration = Duration::from_mins(2);

/// Works on a claim that was asked for at `asked` until it is settled or lost. False when the attempt failed for a reason
/// that may lie with the device.
pub(super) async fn run(context: &Arc<Context>, claim: &Claim, seat: &Seat, asked: std::time::Instant) -> bool {
    let device = &seat.machine.device_name;
    tracing::info!(job = %claim.job, epoch = claim.epoch, work = ?claim.work, device, "claimed");
    let mut lease = lease::keep(context, claim, asked);
    let lost = lease.lost.clone();
    let settlement = lost.run_until_cancelled(hold(context, claim, seat, &mut lease)).await;
    // Nothing is renewed any more, so a settlement that takes too long changes nothing.
    drop(lease);
    let Some(settlement) = settlement else {
        let_go(context, claim, seat).await;
        return true;
    };
    tracing::info!(job = %claim.job, epoch = claim.epoch, ?settlement, "letting go");
    let settle = tell::insist(|| context.store.settle_job(&claim.job, claim.epoch, &settlement));
    match timeout(SETTLE, settle).await {
        Ok(Ok(true)) => {}
        Ok(Ok(false)) => tracing::warn!(job = %claim.job, "the job had another holder by then"),
        Ok(Err(error)) => tracing::error!(job = %claim.job, error = with_causes(&error), "the job was not settled"),
        Err(_) => tracing::error!(job = %claim.job, "the job was not settled: the database stayed away"),
    }
    let_go(context, claim, seat).await;
    !matches!(settlement, Settlement::Retry { .. })
}

async fn let_go(context: &Context, claim: &Claim, seat: &Seat) {
    if !seat.others.is_empty() {
        span::take_back(context, &claim.job).await;
    }
    clear(context, &claim.job).await;
}

/// Lets go of the job's folder: it is removed unless this host works on the job again already, or most likely will.
pub(super) async fn clear(context: &Context, id: &JobId) {
    let mut held = context.held.lock().await;
    if let Some(own) = held.iter().position(|job| job == id) {
        held.swap_remove(own);
    }
    let job = context.store.job(id).await;
    let goes_on = job.is_ok_and(|job| job.is_some_and(|job| job.status == JobStatus::Queued));
    if goes_on || held.contains(id) {
        return;
    }
    if let Err(error) = prepare::remove(&prepare::folder(context, id)).await {
        tracing::warn!(job = %id, %error, "the job's folder was left behind");
    }
}

/// Everything between the claim and the settlement.
async fn hold(context: &Arc<Context>, claim: &Claim, seat: &Seat, lease: &mut Lease) -> Settlement {
    let prepared = async {
        let run = prepare::prepare(context, claim, seat).await?;
        span::ready(context, claim, seat).await?;
        Ok(run)
    };
    let prepared = tokio::select! {
        prepared = prepared => prepared,
        () = context.stop.cancelled() => return Settlement::Released,
        _ = lease.wished() => return Settlement::Released,
    };
    let run = match prepared {
        Ok(run) => run,
        Err(settlement) => return settlement,
    };
    let ranks = (seat.here.clone(), seat.gpus.clone());
    match Group::start(context.settings.program.clone(), run, ranks, lease.deadline.clone()) {
        Ok(trainers) => {
            Conversation { context, claim, seat, trainers, sequence_length: None, until: None }.listen(lease).await
        }
        Err(error) => retry(format!("no trainer could be started: {error}")),
    }
}

/// The trainers and what was said to them.
struct Conversation<'a> {
    context: &'a Context,
    claim: &'a Claim,
    seat: &'a Seat,
    trainers: Group,
    /// What an inspection settled.
    sequence_length: Option<u64>,
    /// Set once they were asked to stop: when they are ended by force.
    until: Option<Instant>,
}

impl Conversation<'_> {
    /// Listens until the trainers have said their last word, or are ended.
    async fn listen(mut self, lease: &mut Lease) -> Settlement {
        let mut gone = pin!(span::gone(self.context, self.claim, self.seat));
        loop {
            let stopping = self.until.is_some();
            tokio::select! {
                biased;
                () = sleep_until(self.until.unwrap_or_else(Instant::now)), if stopping => {
                    self.trainers.kill().await;
                    return Settlement::Released;
                }
                // Before the reports: a trainer of short steps always has one ready, and what is behind it would never be heard.
                wish = lease.wished(), if !stopping => {
                    let (checkpoint, grace) = match wish {
                        Wish::Pause => (true, PAUSE_GRACE),
                        Wish::Cancel => (false, CANCEL_GRACE),
                    };
                    self.ask_to_stop(checkpoint, grace).await;
                }
                () = self.context.stop.cancelled(), if !stopping => {
                    self.ask_to_stop(true, self.context.settings.grace).await;
                }
                report = self.trainers.report() => {
                    if let Some(settlement) = self.heard(report).await {
                        return settlement;
                    }
                }
                why = &mut gone => {
                    self.trainers.kill().await;
                    return retry(why);
                }
            }
        }
    }

    async fn ask_to_stop(&mut self, checkpoint: bool, grace: Duration) {
        self.trainers.stop(checkpoint).await;
        self.until = Some(Instant::now() + grace);
    }

    /// Acts on what came.
    async fn heard(&mut self, report: Report) -> Option<Settlement> {
        let report = span::nearest(self.context, self.claim, self.seat, report).await;
        match tell::tell(self.context, self.claim, self.seat, &report).await {
            Ok(true) => {}
            Ok(false) => {
                // The lease's keeper finds out as well, at the latest with its next renewal.
                self.trainers.kill().await;
                return Some(Settlement::Released);
            }
            Err(error) => {
                self.trainers.kill().await;
                return Some(retry(format!("a report could not be stored: {}", with_causes(&error))));
            }
        }
        if let Report::Data { summary } = &report {
            self.sequence_length = Some(summary.sequence_length);
        }
        let settlement = self.last_word(report)?;
        self.trainers.end().await;
        Some(settlement)
    }

    /// What a report that ends the run means for the job.
    fn last_word(&self, report: Report) -> Option<Settlement> {
        match report {
            Report::Finished { trained_tokens } => Some(match self.claim.work {
                Work::Inspect => Settlement::Validated { sequence_length: self.sequence_length },
                Work::Train => Settlement::Succeeded { trained_tokens: Some(trained_tokens) },
            }),
            Report::Stopped { .. } if self.until.is_some() => Some(Settlement::Released),
            Report::Stopped { step } => {
                Some(retry(format!("the trainer stopped at step {step} without being asked to")))
            }
            Report::Refused { error } => Some(Settlement::Failed { error }),
            Report::Broken { message, .. } => Some(retry(message)),
            _ => None,
        }
    }
}
