//! Reads the data of plans: what an inspection does, for jobs that nobody has made.
//!
//! A trainer counts, as for a job; no device is opened and nothing of it stays on this host.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, interval},
};

use super::{
    Context,
    group::Group,
    prepare::{self, with_causes},
    work::{self, POLL},
};
use crate::{
    domain::{Invalid, JobId, RunSpec, progress::DataSummary},
    store::{
        Error,
        plans::TakenPlan,
        queue::{Claim, Work},
    },
    trainer::protocol::Report,
};

/// Renewals within the life of a hold.
const RENEWALS: u32 = 3;

/// Reads the data of one plan after another.
pub(super) async fn plans(context: Arc<Context>) {
    while !context.stop.is_cancelled() {
        let hinted = context.hints.notified();
        let models = work::model_names(&context);
        match context.store.take_plan(&models, work::fetches(&context), context.settings.lease).await {
            Ok(Some(plan)) => {
                read(&context, &plan).await;
                continue;
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "no plan could be looked for; it is tried again"),
        }
        tokio::select! {
            () = hinted => {}
            _ = context.pause(POLL) => {}
        }
    }
}

/// Reads the data of a plan and answers it. One whose trainer breaks is tried again once its hold is over.
async fn read(context: &Context, plan: &TakenPlan) {
    let claim = claim(plan);
    tracing::info!(plan = %plan.id, model = claim.model, "reading data for a plan");
    let Some(prepared) = held(context, plan, prepared(context, &claim)).await else { return };
    let answer = match prepared {
        Ok(run) => counted(context, plan, run).await,
        Err(prepare::Error::Invalid(invalid)) => Some(Err(invalid)),
        Err(error) => {
            tracing::warn!(plan = %plan.id, error = with_causes(&error), "data for a plan could not be had");
            None
        }
    };
    if let Err(error) = prepare::remove(&prepare::folder(context, &claim.job)).await {
        tracing::warn!(plan = %plan.id, error = with_causes(&error), "a plan's folder was left behind");
    }
    let Some(answer) = answer else { return };
    match context.store.answer_plan(&plan.id, plan.epoch, answer.as_ref()).await {
        Ok(true) => {}
        Ok(false) => tracing::warn!(plan = %plan.id, "the plan had another holder by then"),
        Err(error) => tracing::warn!(plan = %plan.id, error = with_causes(&error), "the plan was not answered"),
    }
}

/// Renews the hold while something is prepared: a model may be fetched for it. `None` when the hold was lost or the executor stops.
async fn held<T>(context: &Context, plan: &TakenPlan, prepared: impl Future<Output = T>) -> Option<T> {
    let lease = context.settings.lease;
    let mut renewal = interval((lease / RENEWALS).max(Duration::from_millis(10)));
    let mut prepared = std::pin::pin!(prepared);
    loop {
        tokio::select! {
            prepared = &mut prepared => return Some(prepared),
            _ = renewal.tick() => if !renewed(context.store.renew_plan(&plan.id, plan.epoch, lease).await) {
                return None;
            },
            () = context.stop.cancelled() => return None,
        }
    }
}

async fn prepared(context: &Context, claim: &Claim) -> Result<RunSpec, prepare::Error> {
    let Some(seat) = work::desk(context, claim).await else {
        let message = "no device of this kind is on any host that has the model; leave training.device out";
        return Err(Invalid::with_code("no_such_device", "training.device", message).into());
    };
    prepare::prepare(context, claim, &seat).await
}

/// The plan in the form in which an inspection is claimed, under a name that no job has.
fn claim(plan: &TakenPlan) -> Claim {
    let inner = plan.plan.clone();
    Claim {
        job: JobId::random(),
        work: Work::Inspect,
        epoch: plan.epoch,
        attempts: 1,
        model: inner.model,
        created_at: plan.created_at.max(0) as u64,
        training_files: inner.training_files,
        validation_files: inner.validation_files,
        training: inner.training,
        sequence_length: None,
    }
}

/// What a trainer counts; `None` when it broke, was not needed any more, or the executor stops.
async fn counted(context: &Context, plan: &TakenPlan, run: RunSpec) -> Option<Result<DataSummary, Invalid>> {
    let lease = context.settings.lease;
    let (extend, deadline) = watch::channel(Instant::now() + lease);
    let started = Group::start(context.settings.program.clone(), run, (0..1, Vec::new()), deadline);
    let mut trainer = started.inspect_err(|error| tracing::error!(%error, "no trainer could be started")).ok()?;
    let mut renewal = interval((lease / RENEWALS).max(Duration::from_millis(10)));
    let mut summary = None;
    loop {
        tokio::select! {
            report = trainer.report() => match report {
                Report::Data { summary: counted } => summary = Some(counted),
                Report::Finished { .. } => {
                    trainer.end().await;
                    return summary.map(Ok);
                }
                Report::Refused { error } => {
                    trainer.end().await;
                    return Some(Err(error));
                }
                Report::Broken { message, .. } => {
                    tracing::warn!(plan = %plan.id, message, "a trainer broke while it read data for a plan");
                    trainer.end().await;
                    return None;
                }
                _ => {}
            },
            _ = renewal.tick() => {
                let asked = Instant::now();
                if !renewed(context.store.renew_plan(&plan.id, plan.epoch, lease).await) {
                    trainer.kill().await;
                    return None;
                }
                extend.send_replace(asked + lease);
            }
            () = context.stop.cancelled() => {
                trainer.kill().await;
                return None;
            }
        }
    }
}

/// False when the plan is somebody else's, or nobody can tell.
fn renewed(answer: Result<bool, Error>) -> bool {
    answer.unwrap_or_else(|error| {
        tracing::warn!(%error, "the hold on a plan could not be renewed; it is given up");
        false
    })
}
