//! A job's story: list of its events.

use axum::{Json, extract::State};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    Api, ApiError, ErrorEnvelope,
    extract::{Id, Pairs, no_such_cursor},
};
use crate::{
    domain::{EventId, JobId},
    store::events::StoredEvent,
};

/// Most events of one page, and how many there are when nobody says.
const MAX_PAGE: u32 = 1000;
const DEFAULT_PAGE: u32 = 20;

/// One thing that happened to a job.
#[derive(Debug, Serialize, ToSchema)]
pub struct EventObject {
    id: String,
    /// Always `fine_tuning.job.event`.
    object: &'static str,
    /// Unix seconds.
    created_at: i64,
    /// `info`, `warn` or `error`.
    level: String,
    message: String,
    /// `message` or `metrics`.
    #[serde(rename = "type")]
    kind: String,
    /// Of a metrics event: `step` (a whole number), `total_steps`, `train_loss` (mean cross entropy in nats over the
    /// step's labels), `train_mean_token_accuracy`, `learning_rate`, `grad_norm`, `tokens_per_second` and more.
    data: Value,
}

/// One page of events.
#[derive(Debug, Serialize, ToSchema)]
pub struct EventList {
    /// Always `list`.
    object: &'static str,
    data: Vec<EventObject>,
    /// True when a next page exists; its `after` is the last id of this one.
    has_more: bool,
}

/// Lists a job's events, newest first.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{job_id}/events", tag = "fine-tuning",
    params(
        ("job_id" = String, Path),
        ("after" = Option<String>, Query, description = "Id of the last event already seen."),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Most events of the page; 20 if absent.")),
    responses((status = 200, body = EventList), (status = 400, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope)))]
pub async fn list_events(State(api): State<Api>, Id(id): Id<JobId>, pairs: Pairs) -> Result<Json<EventList>, ApiError> {
    let page = pairs.page::<EventId>(DEFAULT_PAGE, MAX_PAGE)?;
    if api.store.job(&id).await?.is_none() {
        return Err(ApiError::not_found("fine-tuning job", id.as_str()));
    }
    let listed = api.store.list_events(&id, &page).await?;
    let listed = listed.ok_or_else(|| no_such_cursor(page.after.as_deref().unwrap_or_default()))?;
    let data = listed.rows.into_iter().map(Into::into).collect();
    Ok(Json(EventList { object: "list", data, has_more: listed.has_more }))
}

impl From<StoredEvent> for EventObject {
    fn from(event: StoredEvent) -> Self {
        Self {
            id: event.id,
            object: "fine_tuning.job.event",
            created_at: event.created_at,
            level: event.level,
            message: event.message,
            kind: event.kind,
            data: event.data.unwrap_or_else(|| Value::Object(serde_json::Map::new())),
        }
    }
}
