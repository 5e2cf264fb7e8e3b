//! Writes what a trainer reports into the store, under the lease's epoch.

use std::time::Duration;

use serde_json::json;

use super::{Context, devices::Seat, prepare};
use crate::{
    domain::{
        CheckpointId, Event,
        progress::{DataSummary, HeldOut, WrittenCheckpoint},
    },
    store::{
        Error,
        checkpoints::{NewCheckpoint, Recorded},
        events::Writer,
        queue::{Claim, Work},
    },
    trainer::protocol::Report,
};

/// Pause before a write is tried again while the database is away. The lease bounds how long.
const AGAIN: Duration = Duration::from_millis(500);

/// Repeats a write for as long as the database cannot be reached. Whoever calls it gives up when the lease is lost.
pub(super) async fn insist<T, F: Future<Output = Result<T, Error>>>(write: impl Fn() -> F) -> Result<T, Error> {
    loop {
        match write().await {
            Err(Error::Unavailable(cause)) => {
                tracing::warn!(%cause, "the database is away; a write waits for it");
                tokio::time::sleep(AGAIN).await;
            }
            done => return done,
        }
    }
}

/// Writes one report that does not end the run. False when the epoch is stale.
pub(super) async fn tell(context: &Context, claim: &Claim, seat: &Seat, report: &Report) -> Result<bool, Error> {
    let (store, job, epoch) = (&context.store, &claim.job, claim.epoch);
    match report {
        Report::Event { event } => insist(|| store.append_event(job, Writer::Holder(epoch), event)).await,
        // Told once, when the data was validated; a trainer that starts counts it again only for itself.
        Report::Data { .. } if claim.work == Work::Train => Ok(true),
        Report::Data { summary } => {
            let event = counted(summary);
            insist(|| store.append_event(job, Writer::Holder(epoch), &event)).await
        }
        Report::Step { metrics } => insist(|| store.record_step(job, epoch, metrics)).await,
        Report::Evaluation { evaluation } => insist(|| store.record_evaluation(job, epoch, evaluation)).await,
        Report::Checkpoint { checkpoint } => keep(context, claim, seat, checkpoint).await,
        Report::Meeting { address } if !seat.others.is_empty() => {
            insist(|| store.tell_meeting(job, epoch, address)).await
        }
        Report::Alive
        | Report::Meeting { .. }
        | Report::Finished { .. }
        | Report::Stopped { .. }
        | Report::Refused { .. }
        | Report::Broken { .. } => Ok(true),
    }
}

/// What was found in the data, for the job's story.
fn counted(summary: &DataSummary) -> Event {
    let s = summary;
    let mut message = format!(
        "{} documents, {} tokens ({} counted by the loss, {} of padding) in {} sequences of up to {} tokens; {} steps",
        s.documents, s.tokens, s.valid_labels, s.padding, s.sequences, s.sequence_length, s.total_steps
    );
    let fates = [("split", s.split_documents), ("cut short", s.truncated_documents), ("empty", s.empty_documents)];
    for (fate, count) in fates.into_iter().filter(|(_, count)| *count > 0) {
        message = format!("{message}; {count} documents {fate}");
    }
    if s.untrained_pieces > 0 {
        message = format!("{message}; {} pieces left out, of which no token is trained", s.untrained_pieces);
    }
    if let Some(held_out) = &s.validation {
        let HeldOut { documents, tokens, valid_labels, .. } = held_out;
        message = format!(
            "{message}; for validation {documents} documents, {tokens} tokens ({valid_labels} counted by the loss)"
        );
    }
    Event::info(message, json!(summary))
}

/// Brings a checkpoint into the object store and then on record, and clears what it replaces.
async fn keep(context: &Context, claim: &Claim, seat: &Seat, written: &WrittenCheckpoint) -> Result<bool, Error> {
    let store = &context.store;
    let folder = prepare::folder(context, &claim.job).join("checkpoints").join(&written.folder);
    let id = CheckpointId::random();
    for file in &written.files {
        store.weights().put(&id, file, &folder.join(&file.path)).await?;
    }
    let precision = claim.training.precision_on(seat.machine.device);
    let new = NewCheckpoint { id: id.clone(), job: &claim.job, epoch: claim.epoch, precision, written };
    let recorded = insist(|| store.record_checkpoint(&new)).await?;
    if !matches!(recorded, Recorded::New(_)) {
        store.weights().delete(&id).await?;
    }
    let replaced = async {
        store.drop_replaced_state(&claim.job).await?;
        tokio::fs::remove_dir_all(&folder).await?;
        Ok::<_, Error>(())
    };
    if let Err(error) = replaced.await {
        tracing::warn!(job = %claim.job, %error, "what a checkpoint replaces was left behind");
    }
    Ok(recorded != Recorded::Stale)
}
