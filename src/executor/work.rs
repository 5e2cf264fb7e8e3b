//! Claims what this host's devices can do, and has each claim worked on.
//!
//! Inspections are short and go one after another. Trainings share the devices: which job takes which is settled with each claim.

use std::{collections::HashMap, panic, sync::Arc, time::Duration};

use tokio::{
    task::{Id, JoinError, JoinSet, spawn_blocking},
    time::Instant,
};

use super::{
    Context,
    allot::{self, Situation},
    attempt,
    devices::{Looker, Seat},
    models,
};
use crate::{
    domain::{JobId, machine::DeviceKind},
    store::{
        Error,
        queue::{Claim, Claimant, Queued, Settlement, Work},
    },
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

/// Inspects one job's data after another, each for the devices that could train it. None is opened for that.
pub(super) async fn inspect(context: Arc<Context>) {
    while !context.stop.is_cancelled() {
        let hinted = context.hints.notified();
        if let Some(Taken { claim, seat, asked }) = take_inspection(&context).await {
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
    let mut in_vain = None;
    while !context.stop.is_cancelled() {
        let hinted = context.hints.notified();
        let gpus_train = seats.values().any(|seat| seat.machine.device == DeviceKind::Cuda);
        if !gpus_train && looker.is_due() {
            looker.look(&context).await;
            resting.clear();
        }
        resting.retain(|_, end| Instant::now() < *end);
        if let Some(taken) = take_training(&context, seats.values(), &resting, &mut in_vain).await {
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
                    let until = Instant::now() + REST;
                    resting.extend(seat.into_iter().flat_map(|seat| seat.gpus).map(|gpu| (gpu, until)));
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

/// Claims the next job whose data this host can inspect, if there is any.
async fn take_inspection(context: &Context) -> Option<Taken> {
    let devices = context.devices.borrow().clone();
    let wishes = devices.wishes(&devices.free([]));
    let (claim, asked) = claim(context, Work::Inspect, &wishes, None).await?;
    if let Some(seat) = devices.desk(claim.training.wanted_device()) {
        return Some(Taken { claim, seat, asked });
    }
    // The wishes were those of these devices, so this is a job of a newer version's making.
    tracing::error!(job = %claim.job, "a claim that no device here can work on; it is given back");
    context.held.lock().await.retain(|job| *job != claim.job);
    if let Err(error) = context.store.settle_job(&claim.job, claim.epoch, &Settlement::Released).await {
        tracing::warn!(job = %claim.job, %error, "the claim was not given back; its lease runs out");
    }
    None
}

/// Claims the next job that can train beside those in these seats, if there is any. What was looked through `in_vain` is not looked
/// through again.
async fn take_training(
    context: &Context,
    seats: impl Iterator<Item = &Seat>,
    resting: &HashMap<usize, Instant>,
    in_vain: &mut Option<(Situation, Vec<Queued>)>,
) -> Option<Taken> {
    let devices = context.devices.borrow().clone();
    let mut free = devices.free(seats);
    free.gpus.retain(|gpu| !resting.contains_key(gpu));
    let wishes = devices.wishes(&free);
    if wishes.is_empty() {
        return None;
    }
    let models = models::found(&context.settings.models_folder);
    let names: Vec<String> = models.iter().map(|model| model.name.clone()).collect();
    let looked = async {
        let by = claimant(context, &names, &wishes, None);
        let queued = context.store.queued_jobs(&by).await?;
        let hosts = if queued.is_empty() { Vec::new() } else { context.store.live_hosts().await? };
        Ok::<_, Error>((queued, hosts))
    };
    let (queued, hosts) =
        looked.await.map_err(|error| tracing::warn!(%error, "no work could be looked for; it is tried again")).ok()?;
    let hosts = hosts.into_iter().filter(|host| host.executor != context.id).map(|host| (host.machines, host.models));
    let mut resting: Vec<usize> = resting.keys().copied().collect();
    resting.sort_unstable();
    let situation = Situation { devices, free, resting, models, hosts: hosts.collect() };
    if queued.is_empty() || in_vain.as_ref().is_some_and(|(old, jobs)| *old == situation && *jobs == queued) {
        return None;
    }
    // Planning is arithmetic, but a good deal of it.
    let choose = move || (allot::next(&situation, &queued), situation, queued);
    let (chosen, situation, queued) =
        spawn_blocking(choose).await.unwrap_or_else(|error| panic::resume_unwind(error.into_panic()));
    let Some((place, seat)) = chosen else {
        *in_vain = Some((situation, queued));
        return None;
    };
    let (claim, asked) = claim(context, Work::Train, &wishes, Some(&queued[place].job)).await?;
    Some(Taken { claim, seat, asked })
}

/// Claims a job, and says when it was asked for.
async fn claim(
    context: &Context,
    work: Work,
    wishes: &[String],
    only: Option<&JobId>,
) -> Option<(Claim, std::time::Instant)> {
    if wishes.is_empty() {
        return None;
    }
    let models: Vec<String> =
        models::found(&context.settings.models_folder).into_iter().map(|model| model.name).collect();
    let asked = std::time::Instant::now();
    let mut held = context.held.lock().await;
    match context.store.claim_job(work, &claimant(context, &models, wishes, only)).await {
        Ok(claim) => {
            let claim = claim?;
            held.push(claim.job.clone());
            Some((claim, asked))
        }
        Err(error) => {
            tracing::warn!(%error, "no work could be claimed; it is tried again");
            None
        }
    }
}

fn claimant<'a>(
    context: &'a Context,
    models: &'a [String],
    devices: &'a [String],
    only: Option<&'a JobId>,
) -> Claimant<'a> {
    Claimant { executor: &context.id, lease: context.settings.lease, models, devices, only }
}
