//! Ranks of a job that another host leads: taken under a lease of their own, trained as a group, and ended when either side ends.

use std::sync::Arc;

use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{
    Context, attempt,
    devices::{Devices, Free, Seat},
    group::Group,
    prepare::{self, with_causes},
    tell::insist,
    work::POLL,
};
use crate::{
    domain::{
        machine::DeviceKind,
        run::{Part, Place},
    },
    store::{
        Error,
        calls::{Call, Told},
    },
    trainer::protocol::Report,
};

/// Pause between two looks at what the leader tells, until it has told everything.
const LOOK: std::time::Duration = std::time::Duration::from_millis(300);

/// The seat for a part on these devices, if they are free.
pub(super) fn seat(devices: &Devices, free: &Free, part: &Part) -> Option<Seat> {
    let wanted = &part.machine;
    let suits = |gpu: &usize| {
        let machine = &devices.gpus[*gpu];
        machine.device_name == wanted.device_name && machine.device_bytes >= wanted.device_bytes
    };
    let gpus: Vec<usize> = match wanted.device {
        DeviceKind::Cpu if free.cpu && devices.cpu.device_bytes >= wanted.device_bytes => Vec::new(),
        DeviceKind::Cpu => return None,
        DeviceKind::Cuda => free.gpus.iter().copied().filter(suits).take(part.n as usize).collect(),
    };
    let place = Place { rank: part.first, address: String::new(), token: part.token.clone() };
    let enough = wanted.device == DeviceKind::Cpu || gpus.len() as u64 == part.n;
    enough.then(|| Seat {
        machine: wanted.clone(),
        ranks: part.of,
        here: part.first..part.first + part.n,
        gpus,
        others: Vec::new(),
        place: Some(place),
    })
}

/// Works on a call that was taken at `taken` until its ranks have ended or it holds no more. False when they failed for a reason that
/// may lie with the devices.
pub(super) async fn run(context: &Arc<Context>, call: &Call, seat: &Seat, taken: std::time::Instant) -> bool {
    let (first, n) = (call.part.first, call.part.n);
    tracing::info!(job = %call.job, first, n, "ranks of a job that another host leads");
    let lost = CancellationToken::new();
    let (deadline, deadline_seen) = watch::channel(Instant::from_std(taken) + context.settings.lease);
    let (tell, told) = watch::channel(Told::default());
    let keeper = tokio::spawn(keep(Arc::clone(context), call.id, lost.clone(), deadline, tell));
    let report = tokio::select! {
        report = lost.run_until_cancelled(serve(context, call, seat, told, deadline_seen)) => report,
        () = context.stop.cancelled() => Some(broken("the executor of these ranks was asked to stop")),
    };
    tracing::info!(job = %call.job, first, n, ?report, "ranks ended");
    if let Some(report) = &report {
        let ended = serde_json::json!(report);
        let told = insist(|| context.store.end_call(call.id, &ended));
        if !matches!(lost.run_until_cancelled(told).await, Some(Ok(())) | None) {
            tracing::warn!(job = %call.job, "how the ranks ended was not told");
        }
    }
    keeper.abort();
    attempt::clear(context, &call.job).await;
    !matches!(report, Some(Report::Broken { lost: None, .. }))
}

/// Everything between the call and the end of its ranks.
async fn serve(
    context: &Context,
    call: &Call,
    seat: &Seat,
    mut told: watch::Receiver<Told>,
    deadline: watch::Receiver<Instant>,
) -> Report {
    let Some(epoch) = wait(&mut told, |told| told.epoch).await else { return broken("the leader is gone") };
    let claim = match insist(|| context.store.called_claim(&call.job, epoch)).await {
        Ok(Some(claim)) => claim,
        Ok(None) => return broken("the job has another leader"),
        Err(error) => return broken(with_causes(&error)),
    };
    let prepared = async {
        let run = prepare::prepare(context, &claim, seat).await?;
        insist(|| context.store.ready_call(call.id)).await?;
        Ok::<_, prepare::Error>(run)
    };
    let mut run = match prepared.await {
        Ok(run) => run,
        Err(prepare::Error::Invalid(error)) => return Report::Refused { error },
        Err(error) => return broken(with_causes(&error)),
    };
    let Some(address) = wait(&mut told, |told| told.address.clone()).await else { return broken("the leader is gone") };
    run.place.address = address;
    let ranks = (seat.here.clone(), seat.gpus.clone());
    let mut trainers = match Group::start(context.settings.program.clone(), run, ranks, deadline) {
        Ok(trainers) => trainers,
        Err(error) => return broken(format!("no trainer could be started: {error}")),
    };
    // Ranks after the first report nothing but their end.
    let report = trainers.report().await;
    trainers.end().await;
    report
}

fn broken(message: impl Into<String>) -> Report {
    Report::Broken { message: message.into(), lost: None }
}

/// Waits until the leader has told this.
async fn wait<T>(told: &mut watch::Receiver<Told>, what: impl Fn(&Told) -> Option<T>) -> Option<T> {
    told.wait_for(|told| what(told).is_some()).await.ok().and_then(|told| what(&told))
}

/// Renews the hold on the call, and passes on what the leader tells; until it holds no more, by this process's clock at the latest.
async fn keep(
    context: Arc<Context>,
    id: i64,
    lost: CancellationToken,
    deadline: watch::Sender<Instant>,
    tell: watch::Sender<Told>,
) {
    let lease = context.settings.lease;
    loop {
        let pause = if tell.borrow().address.is_some() { lease / 3 } else { LOOK };
        sleep(pause).await;
        let (sent, over) = (Instant::now(), *deadline.borrow());
        let why = match timeout_at(over, context.store.renew_call(id, lease)).await {
            Ok(Ok(Some(told))) => {
                deadline.send_replace(sent + lease);
                tell.send_if_modified(|old| std::mem::replace(old, told.clone()) != told);
                continue;
            }
            Ok(Err(Error::Unavailable(cause))) if sent < over => {
                tracing::warn!(%cause, "a call could not be renewed; it is tried again");
                continue;
            }
            Ok(Ok(None)) => "the leader has ended it, or is gone".to_owned(),
            Ok(Err(error)) => with_causes(&error),
            Err(_) => "the database did not answer in time".to_owned(),
        };
        tracing::info!(call = id, why, "ranks are held no more");
        lost.cancel();
        return;
    }
}

/// An executor looks for calls at least so often, well within the time that they are open.
const _: () = assert!(POLL.as_secs() < 15);
