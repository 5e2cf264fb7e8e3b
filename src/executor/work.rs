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
    allot::{self, Other, Situation},
    attempt,
    devices::{Devices, Free, Looker, Seat},
    help,
    models::{self, Located},
    span,
};
use crate::{
    domain::{JobId, machine::DeviceKind},
    store::{
        Error,
        calls::Call,
        hosts::Host,
        queue::{Claim, Claimant, Queued, Settlement, Work},
    },
};

/// Pause between two looks for work where no hint comes.
pub(super) const POLL: Duration = Duration::from_secs(2);
/// How long a GPU on which an attempt failed is left alone while others train and nobody can look at it: one that is broken
/// would go through the queue in minutes.
const REST: Duration = Duration::from_mins(10);

/// A claim, where it is worked on, and when it was asked for.
struct Taken {
    claim: Claim,
    seat: Seat,
    asked: std::time::Instant,
}

/// What a host's devices are taken for.
enum Training {
    /// A claim, on this host alone.
    Claimed(Box<Taken>),
    /// A job to be claimed once other hosts have taken their ranks of it.
    Leading(JobId, Box<Seat>),
    /// Ranks of a job that another host leads, since when.
    Helping(Box<Call>, Box<Seat>, std::time::Instant),
}

impl Training {
    fn seat(&self) -> &Seat {
        match self {
            Self::Claimed(taken) => &taken.seat,
            Self::Leading(_, seat) | Self::Helping(_, seat, _) => seat,
        }
    }

    /// False when it failed for a reason that may lie with the devices.
    async fn run(self, context: &Arc<Context>) -> bool {
        match self {
            Self::Claimed(taken) => attempt::run(context, &taken.claim, &taken.seat, taken.asked).await,
            Self::Leading(job, mut seat) => match span::gather(context, &job, &mut seat).await {
                Some((claim, asked)) => attempt::run(context, &claim, &seat, asked).await,
                None => true,
            },
            Self::Helping(call, seat, taken) => help::run(context, &call, &seat, taken).await,
        }
    }
}

/// Inspects one job's data after another, each for the devices that could train it. None is opened for that.
pub(super) async fn inspect(context: Arc<Context>) {
    // Those whose models are on their way; the others do not wait for that.
    let mut fetching = JoinSet::new();
    while !context.stop.is_cancelled() {
        let hinted = context.hints.notified();
        if let Some(Taken { claim, seat, asked }) = take_inspection(&context).await {
            if matches!(models::locate(&context.settings, &claim.model), Ok(Located::OnHub(_))) {
                let context = Arc::clone(&context);
                fetching.spawn(async move { Box::pin(attempt::run(&context, &claim, &seat, asked)).await });
            } else {
                attempt::run(&context, &claim, &seat, asked).await;
            }
            continue;
        }
        tokio::select! {
            () = hinted => {}
            _ = context.pause(POLL) => {}
            Some(ended) = fetching.join_next_with_id(), if !fetching.is_empty() => drop(finished(ended)),
        }
    }
    while let Some(ended) = fetching.join_next_with_id().await {
        finished(ended);
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
        let mut free = context.devices.borrow().free(seats.values());
        free.gpus.retain(|gpu| !resting.contains_key(gpu));
        context.free.send_if_modified(|old| std::mem::replace(old, free.clone()) != free);
        let training = match take_call(&context, &free).await {
            None => take_training(&context, free, &resting, &mut in_vain).await,
            call => call,
        };
        if let Some(training) = training {
            let (seat, context) = (training.seat().clone(), Arc::clone(&context));
            seats.insert(running.spawn(async move { Box::pin(training.run(&context)).await }).id(), seat);
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
    let free = devices.free([]);
    let (claim, asked) = claim(context, Work::Inspect, &devices.wishes(&free), (None, 1)).await?;
    if let Some(seat) = desk(context, &claim).await {
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

/// Where the data of a claim is inspected; `None` without a device that could train it.
pub(super) async fn desk(context: &Context, claim: &Claim) -> Option<Seat> {
    let devices = context.devices.borrow().clone();
    let free = devices.free([]);
    let hosts = context.store.live_hosts().await.unwrap_or_default();
    let situation = situation(context, devices, free, Vec::new(), hosts);
    let (job, model, training) = (claim.job.clone(), claim.model.clone(), claim.training.clone());
    let queued = Queued { job, model, training, sequence_length: None };
    let desk = spawn_blocking(move || allot::desk(&situation, &queued)).await;
    desk.unwrap_or_else(|error| panic::resume_unwind(error.into_panic()))
}

/// Takes ranks of a job that another host leads, if one calls for what is free here.
async fn take_call(context: &Context, free: &Free) -> Option<Training> {
    let unheard = |error: Error| tracing::warn!(%error, "calls for ranks could not be looked for; it is tried again");
    let call = context.store.next_call(&context.id).await.map_err(unheard).ok()??;
    let seat = help::seat(&context.devices.borrow(), free, &call.part)?;
    let taken = std::time::Instant::now();
    let mut held = context.held.lock().await;
    if !context.store.take_call(call.id, context.settings.lease).await.map_err(unheard).ok()? {
        return None;
    }
    held.push(call.job.clone());
    Some(Training::Helping(Box::new(call), Box::new(seat), taken))
}

/// Claims the next job that can train on what is free, if there is any; or finds one that could, together with other hosts. What was
/// looked through `in_vain` is not looked through again.
async fn take_training(
    context: &Context,
    free: Free,
    resting: &HashMap<usize, Instant>,
    in_vain: &mut Option<(Situation, Vec<Queued>)>,
) -> Option<Training> {
    let devices = context.devices.borrow().clone();
    let wishes = devices.wishes(&free);
    if wishes.is_empty() {
        return None;
    }
    let names = model_names(context);
    let looked = async {
        let queued = context.store.queued_jobs(&claimant(context, &names, &wishes, (None, 1))).await?;
        let hosts = if queued.is_empty() { Vec::new() } else { context.store.live_hosts().await? };
        Ok::<_, Error>((queued, hosts))
    };
    let unheard = |error: Error| tracing::warn!(%error, "no work could be looked for; it is tried again");
    let (queued, hosts) = looked.await.map_err(unheard).ok()?;
    if queued.is_empty() {
        return None;
    }
    let mut resting: Vec<usize> = resting.keys().copied().collect();
    resting.sort_unstable();
    let situation = situation(context, devices, free, resting, hosts);
    if in_vain.as_ref().is_some_and(|(old, jobs)| *old == situation && *jobs == queued) {
        return None;
    }
    // Planning is arithmetic, but a good deal of it.
    let chosen = spawn_blocking(move || (allot::next(&situation, &queued), situation, queued)).await;
    let (chosen, situation, queued) = chosen.unwrap_or_else(|error| panic::resume_unwind(error.into_panic()));
    let Some((place, seat)) = chosen else {
        *in_vain = Some((situation, queued));
        return None;
    };
    let job = queued[place].job.clone();
    if !seat.others.is_empty() {
        return Some(Training::Leading(job, Box::new(seat)));
    }
    let (claim, asked) = claim(context, Work::Train, &wishes, (Some(&job), seat.ranks.world())).await?;
    Some(Training::Claimed(Box::new(Taken { claim, seat, asked })))
}

fn situation(context: &Context, devices: Devices, free: Free, resting: Vec<usize>, hosts: Vec<Host>) -> Situation {
    let other = |Host { executor, machines, free, models, .. }| Other { executor, machines, free, models };
    let hosts = hosts.into_iter().filter(|host| host.executor != context.id).map(other).collect();
    Situation { devices, free, resting, models: models::found(&context.settings), hosts }
}

/// Claims a job for which other hosts have taken their ranks.
pub(super) async fn claim_called(
    context: &Context,
    job: &JobId,
    devices_taken: u64,
) -> Option<(Claim, std::time::Instant)> {
    let devices = context.devices.borrow().clone();
    claim(context, Work::Train, &devices.wishes(&devices.free([])), (Some(job), devices_taken)).await
}

pub(super) fn model_names(context: &Context) -> Vec<String> {
    models::found(&context.settings).into_iter().map(|model| model.name).collect()
}

/// True while this host may fetch a model and fetches none.
pub(super) fn fetches(context: &Context) -> bool {
    context.settings.hub.fetch && context.fetching.available_permits() > 0
}

/// Claims a job, and says when it was asked for.
async fn claim(
    context: &Context,
    work: Work,
    wishes: &[String],
    only: (Option<&JobId>, u64),
) -> Option<(Claim, std::time::Instant)> {
    if wishes.is_empty() {
        return None;
    }
    let models = model_names(context);
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
    (only, takes): (Option<&'a JobId>, u64),
) -> Claimant<'a> {
    let fetches = fetches(context);
    Claimant { executor: &context.id, lease: context.settings.lease, models, fetches, devices, takes, only }
}
