//! Claims what this host's devices can do, and has each claim worked on.
//!
//! Inspections are short and go one after another. Trainings go one to a device; which device is chosen with each claim.

use std::{collections::HashMap, panic, sync::Arc, time::Duration};

use tokio::task::{Id, JoinError, JoinSet};

use super::{
    Context, attempt,
    devices::{Looker, Seat, seat_for},
    models,
};
use crate::store::queue::{Claim, Claimant, Settlement, Work};

/// Pause between two looks for work where no hint comes.
const POLL: Duration = Duration::from_secs(2);

/// A claim, where it is worked on, and when it was asked for.
struct Taken {
    claim: Claim,
    seat: Seat,
    asked: std::time::Instant,
}

/// Inspects one job's data after another, each for the device that would train it. None is opened for that.
pub(super) async fn inspect(context: Arc<Context>) {
    while !context.stop.is_cancelled() {
        let hinted = context.hints.notified();
        let seats = context.devices.borrow().free(&[]);
        if let Some(Taken { claim, seat, asked }) = take(&context, Work::Inspect, &seats).await {
            attempt::run(&context, &claim, &seat, asked).await;
            continue;
        }
        tokio::select! {
            () = hinted => {}
            _ = context.pause(POLL) => {}
        }
    }
}

/// Trains on every device that is free, and looks for GPUs while none is in use.
pub(super) async fn train(context: Arc<Context>, mut looker: Looker) {
    let mut running = JoinSet::new();
    let mut seats: HashMap<Id, Seat> = HashMap::new();
    while !context.stop.is_cancelled() {
        let hinted = context.hints.notified();
        if seats.is_empty() && looker.is_due() {
            looker.look(&context).await;
        }
        let busy: Vec<Seat> = seats.values().cloned().collect();
        let free = context.devices.borrow().free(&busy);
        if let Some(taken) = take(&context, Work::Train, &free).await {
            let (seat, context) = (taken.seat.clone(), Arc::clone(&context));
            let work = async move { attempt::run(&context, &taken.claim, &taken.seat, taken.asked).await };
            seats.insert(running.spawn(work).id(), seat);
            continue;
        }
        tokio::select! {
            () = hinted => {}
            _ = context.pause(POLL) => {}
            Some(ended) = running.join_next_with_id(), if !running.is_empty() => {
                let (id, went_well) = finished(ended);
                seats.remove(&id);
                if !went_well {
                    looker.doubt();
                }
            }
        }
    }
    while let Some(ended) = running.join_next_with_id().await {
        finished(ended);
    }
}

/// The outcome of an attempt. A panic in it is ours, and goes on.
fn finished<T>(ended: Result<(Id, T), JoinError>) -> (Id, T) {
    ended.unwrap_or_else(|error| panic::resume_unwind(error.into_panic()))
}

/// Claims the next work that one of these seats can do, if there is any.
async fn take(context: &Context, work: Work, seats: &[Seat]) -> Option<Taken> {
    if seats.is_empty() {
        return None;
    }
    let models: Vec<String> =
        models::found(&context.settings.models_folder).into_iter().map(|model| model.name).collect();
    let devices = context.devices.borrow().wishes(seats);
    let claimant =
        Claimant { executor: &context.id, lease: context.settings.lease, models: &models, devices: &devices };
    let asked = std::time::Instant::now();
    let claim = match context.store.claim_job(work, &claimant).await {
        Ok(claim) => claim?,
        Err(error) => {
            tracing::warn!(%error, "no work could be claimed; it is tried again");
            return None;
        }
    };
    if let Some(seat) = seat_for(seats, claim.training.wanted_device()) {
        return Some(Taken { claim, seat, asked });
    }
    // The wishes were those of these seats, so this is a job of a newer version's making.
    tracing::error!(job = %claim.job, "a claim that no device here can work on; it is given back");
    if let Err(error) = context.store.settle_job(&claim.job, claim.epoch, &Settlement::Released).await {
        tracing::warn!(job = %claim.job, %error, "the claim was not given back; its lease runs out");
    }
    None
}
