//! Claims what this host's devices can do, and has each claim worked on.
//!
//! Inspections are short and go one after another. Trainings go one to a device; which device is chosen with each claim.

use std::{collections::HashMap, panic, sync::Arc, time::Duration};

use tokio::{
    task::{Id, JoinError, JoinSet},
    time::Instant,
};

use super::{
    Context, attempt,
    devices::{Looker, Seat, seat_for},
    models,
};
use crate::{
    domain::machine::DeviceKind,
    store::queue::{Claim, Claimant, Settlement, Work},
};

/// Pause between two looks for work where no hint comes.
const POLL: Duration = Duration::from_secs(2);
/// How long a GPU on which an attempt failed is left alone while others train and nobody can look at it: one that is broken
/// would go through the queue in minutes.
const REST: Duration = Duration::from_mins(10);

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

/// Trains on every device that is free, and looks for GPUs while none of them is in use.
pub(super) async fn train(context: Arc<Context>, mut looker: Looker) {
    let mut running = JoinSet::new();
    let mut seats: HashMap<Id, Seat> = HashMap::new();
    let mut resting: HashMap<usize, Instant> = HashMap::new();
    while !context.stop.is_cancelled() {
        let hinted = context.hints.notified();
        let gpus_train = seats.values().any(|seat| seat.machine.device == DeviceKind::Cuda);
        if !gpus_train && looker.is_due() {
            looker.look(&context).await;
            resting.clear();
        }
        let busy: Vec<Seat> = seats.values().cloned().collect();
        let mut free = context.devices.borrow().free(&busy);
        resting.retain(|_, end| Instant::now() < *end);
        free.retain(|seat| seat.machine.device == DeviceKind::Cpu || !resting.contains_key(&seat.gpu));
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
                let seat = seats.remove(&id);
                if !went_well {
                    looker.doubt();
                    let gpu = seat.filter(|seat| seat.machine.device == DeviceKind::Cuda).map(|seat| seat.gpu);
                    resting.extend(gpu.map(|gpu| (gpu, Instant::now() + REST)));
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
    let mut held = context.held.lock().await;
    let claim = match context.store.claim_job(work, &claimant).await {
        Ok(claim) => claim?,
        Err(error) => {
            tracing::warn!(%error, "no work could be claimed; it is tried again");
            return None;
        }
    };
    if let Some(seat) = seat_for(seats, claim.training.wanted_device()) {
        held.push(claim.job.clone());
        return Some(Taken { claim, seat, asked });
    }
    // The wishes were those of these seats, so this is a job of a newer version's making.
    tracing::error!(job = %claim.job, "a claim that no device here can work on; it is given back");
    if let Err(error) = context.store.settle_job(&claim.job, claim.epoch, &Settlement::Released).await {
        tracing::warn!(job = %claim.job, %error, "the claim was not given back; its lease runs out");
    }
    None
}
