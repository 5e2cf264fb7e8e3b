//! Brings the base model of a claim here: from a folder, from the cache, or from a hub, telling the job's owner how far it is.

use std::path::PathBuf;

use tokio::{sync::mpsc, task::spawn_blocking};
use tokio_util::sync::CancellationToken;

use super::{
    Context,
    hub::{self, Failure, Watcher},
    models::{self, Located},
    prepare::Error,
    tell::insist,
};
use crate::{
    domain::{Event, HubName},
    store::{events::Writer, queue::Claim},
};

/// The folder of the claim's model. Dropping the future ends a fetch; what has come is kept.
pub(super) async fn model(context: &Context, claim: &Claim) -> Result<PathBuf, Error> {
    match models::locate(&context.settings, &claim.model)? {
        Located::Here(folder) => Ok(folder),
        Located::OnHub(name) => {
            let Ok(_permit) = context.fetching.acquire().await else {
                return Err(Error::Hub("the executor stops".into()));
            };
            // Whoever fetched before may have brought it.
            match models::locate(&context.settings, &claim.model)? {
                Located::Here(folder) => Ok(folder),
                Located::OnHub(_) => fetch(context, claim, name).await,
            }
        }
    }
}

async fn fetch(context: &Context, claim: &Claim, name: HubName) -> Result<PathBuf, Error> {
    let (events, mut heard) = mpsc::unbounded_channel();
    let stop = CancellationToken::new();
    let _ended = stop.clone().drop_guard();
    let (settings, watcher) = (context.settings.hub.clone(), Watcher { events, stop });
    let fetching = spawn_blocking(move || hub::fetch(&settings, &name, &watcher));
    // The sender is gone once the fetch has ended.
    while let Some(event) = heard.recv().await {
        tell(context, claim, &event).await?;
    }
    match fetching.await {
        Ok(Ok(folder)) => {
            // The API plans with what hosts show.
            context.show().await;
            Ok(folder)
        }
        Ok(Err(Failure::Invalid(invalid))) => Err(invalid.into()),
        Ok(Err(failure)) => Err(Error::Hub(failure.to_string())),
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Tells the job's owner. A plan is no job and has no story; for it this says nothing.
async fn tell(context: &Context, claim: &Claim, event: &Event) -> Result<(), Error> {
    tracing::info!(job = %claim.job, message = event.message, "model");
    insist(|| context.store.append_event(&claim.job, Writer::Holder(claim.epoch), event)).await?;
    Ok(())
}
