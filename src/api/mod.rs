//! HTTP by noun: one file holds types and handlers; all routes stand in the table below.
//!
//! Out of it come the running service and its contract, `openapi.yaml`, from the same lines. Knows the store, the planner
//! and the domain; of executors only what they write into Postgres.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::DefaultBodyLimit,
    middleware::{from_fn, from_fn_with_state},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::store::{Error, Store, files::ORPHAN_AGE};

pub mod access;
pub mod checkpoints;
mod contract;
pub mod download;
pub mod error;
pub mod events;
pub mod extract;
pub mod files;
pub mod fit;
pub mod health;
pub mod hub;
pub mod job_object;
pub mod jobs;
pub mod layers;
pub mod metrics;
pub mod models;
pub mod pace;
pub mod page;
pub mod permissions;
pub mod plans;
pub mod tar;
pub mod upload;
pub mod uploads;
pub mod webhooks;

pub use error::{ApiError, ErrorEnvelope};
use pace::Pace;

/// Largest JSON body.
pub const MAX_JSON_BODY: usize = 1 << 20;
/// Longest that a handler may take which is not a transfer.
const TIME_LIMIT: Duration = Duration::from_secs(30);
/// How long transfers may go on after the server was asked to stop.
const DRAIN: Duration = Duration::from_secs(30);
/// Pause between sweeps of expired files and abandoned uploads.
const SWEEP_PAUSE: Duration = Duration::from_mins(10);

/// What an operator may set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Largest uploaded file.
    pub max_upload_bytes: u64,
    /// Where requests are counted.
    pub metrics: metrics::Metrics,
    /// Ask for a key although none was ever made.
    pub require_keys: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { max_upload_bytes: 64 << 30, metrics: metrics::Metrics::default(), require_keys: false }
    }
}

/// What every handler works with. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Api {
    store: Store,
    settings: Arc<Settings>,
    stop: CancellationToken,
    pace: Pace,
}

/// Serves until `stop` is cancelled, then lets requests under way finish, but no longer than half a minute.
pub async fn serve(
    listener: TcpListener,
    store: Store,
    settings: Settings,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let sweeper = tokio::spawn(sweep(store.clone(), stop.clone()));
    let app = router(store, settings, stop.clone());
    let stopped = stop.clone();
    let serving = axum::serve(listener, app).with_graceful_shutdown(async move { stopped.cancelled().await });
    let too_late = async {
        stop.cancelled().await;
        tokio::time::sleep(DRAIN).await;
    };
    let ended = tokio::select! {
        ended = serving => ended,
        () = too_late => Ok(()),
    };
    stop.cancel();
    // The sweep ends by itself at the latest after one statement.
    let _ = sweeper.await;
    ended
}

/// The service, ready to be called.
pub fn router(store: Store, settings: Settings, stop: CancellationToken) -> Router {
    let (router, _) = table().split_for_parts();
    let counted = settings.metrics.clone();
    let api = Api { store, settings: Arc::new(settings), stop, pace: Pace::default() };
    router
        .merge(page::routes())
        .fallback(layers::no_route)
        .method_not_allowed_fallback(layers::no_method)
        .layer(from_fn_with_state(api.clone(), access::authorize))
        .layer(CatchPanicLayer::custom(layers::panicked))
        .layer(from_fn_with_state(counted, metrics::count))
        .layer(from_fn(layers::identify))
        .with_state(api)
}

/// The contract, as YAML.
///
/// # Panics
/// Never: the document is made of strings and numbers.
pub fn openapi_yaml() -> String {
    contract().to_yaml().expect("a document of strings and numbers is YAML")
}

/// The contract, as JSON.
///
/// # Panics
/// Never: see [`openapi_yaml`].
pub fn openapi_json() -> String {
    contract().to_json().expect("a document of strings and numbers is JSON")
}

/// The routes as a document. What the router calls `{*path}`, the rest of a path, has no word of its own there.
fn contract() -> utoipa::openapi::OpenApi {
    let mut contract = table().into_openapi();
    let paths = std::mem::take(&mut contract.paths.paths);
    contract.paths.paths = paths.into_iter().map(|(path, item)| (path.replace("{*", "{"), item)).collect();
    contract
}

/// Every route.
fn table() -> OpenApiRouter<Api> {
    let small = OpenApiRouter::new()
        .routes(routes!(files::list_files))
        .routes(routes!(files::retrieve_file, files::delete_file))
        .routes(routes!(uploads::create_upload, uploads::list_uploads))
        .routes(routes!(uploads::retrieve_upload))
        .routes(routes!(uploads::list_parts))
        .routes(routes!(uploads::cancel_upload))
        .routes(routes!(jobs::create_job, jobs::list_jobs))
        .routes(routes!(jobs::retrieve_job))
        .routes(routes!(jobs::cancel_job))
        .routes(routes!(plans::create_plan))
        .routes(routes!(plans::retrieve_plan))
        .routes(routes!(jobs::pause_job))
        .routes(routes!(jobs::resume_job))
        .routes(routes!(events::list_events))
        .routes(routes!(checkpoints::list_checkpoints))
        .routes(routes!(checkpoints::list_checkpoint_files))
        .routes(routes!(models::list_models))
        .routes(routes!(models::retrieve_model, models::delete_model))
        .routes(routes!(permissions::create_permissions, permissions::list_permissions))
        .routes(routes!(permissions::delete_permission))
        .routes(routes!(webhooks::create_webhook, webhooks::list_webhooks))
        .routes(routes!(webhooks::retrieve_webhook, webhooks::delete_webhook))
        .routes(routes!(hub::repository))
        .routes(routes!(hub::repository_revision))
        .routes(routes!(hub::repository_tree))
        .routes(routes!(hub::repository_folder))
        .routes(routes!(health::healthz))
        .routes(routes!(health::readyz))
        .layer(DefaultBodyLimit::max(MAX_JSON_BODY))
        .layer(from_fn_with_state(TIME_LIMIT, layers::time_limit));
    // Transfers take as long as they take; upload.rs and the client's own patience bound them.
    let transfers = OpenApiRouter::new()
        .routes(routes!(files::create_file))
        .routes(routes!(files::file_content))
        .routes(routes!(uploads::add_part))
        .routes(routes!(checkpoints::checkpoint_file))
        .routes(routes!(checkpoints::checkpoint_archive))
        .routes(routes!(hub::repository_file))
        .layer(DefaultBodyLimit::disable());
    // Reads the whole upload, as long as that takes.
    let long =
        OpenApiRouter::new().routes(routes!(uploads::complete_upload)).layer(DefaultBodyLimit::max(MAX_JSON_BODY));
    let mut table = OpenApiRouter::with_openapi(contract::head()).merge(small).merge(transfers).merge(long);
    contract::ask_for_keys(table.get_openapi_mut());
    table
}

async fn sweep(store: Store, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(SWEEP_PAUSE) => {}
        }
        let swept = async {
            let forgotten = store.sweep_messages().await?;
            tracing::debug!(forgotten, "old webhook messages");
            Ok::<_, Error>(store.sweep_uploads().await? + store.sweep_files(ORPHAN_AGE).await?)
        };
        match swept.await {
            Ok(0) => {}
            Ok(gone) => tracing::info!(gone, "expired files and abandoned uploads deleted"),
            Err(error) => tracing::warn!(%error, "the sweep of files failed; it is tried again"),
        }
    }
}
