//! A job's story: list of its events, or a stream of them as they happen (server-sent events, WHATWG HTML 9.2).

use std::{convert::Infallible, time::Duration};

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{
        IntoResponse, Response,
        sse::{self, KeepAlive, Sse},
    },
};
use futures_util::{Stream, StreamExt, stream};
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
/// Events of a stream that are read at once, and the pause between two looks for new ones.
const STREAM_PAGE: u32 = 100;
const STREAM_PAUSE: Duration = Duration::from_millis(500);
/// Pause after which a silent stream shows that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// What a client that comes again has seen last.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Asks proxies of nginx's kind to pass events on at once.
const NOT_BUFFERED: (HeaderName, HeaderValue) =
    (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));

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

/// Lists a job's events, newest first; or, where `text/event-stream` is accepted, streams them, oldest first and from then on
/// as they happen (an extension).
///
/// The `id` of a message is its event's, the `data` the event as in the list. A client that comes again with `Last-Event-ID` (or
/// `after`) misses nothing and gets nothing twice. The stream ends with the job, with a message named `done`; whoever has seen
/// the last event of an ended job gets 204, at which browsers stop coming.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{job_id}/events", tag = "fine-tuning",
    params(
        ("job_id" = String, Path),
        ("after" = Option<String>, Query, description = "Id of the last event already seen."),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Most events of the page; 20 if absent."),
        ("Last-Event-ID" = Option<String>, Header, description = "Of a stream: id of the last event already seen.")),
    responses(
        (status = 200, content((EventList = "application/json"), (String = "text/event-stream"))),
        (status = 204, description = "a stream that has ended"),
        (status = 400, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope)))]
pub async fn list_events(
    State(api): State<Api>,
    Id(id): Id<JobId>,
    headers: HeaderMap,
    pairs: Pairs,
) -> Result<Response, ApiError> {
    let page = pairs.page::<EventId>(DEFAULT_PAGE, MAX_PAGE)?;
    if api.store.job(&id).await?.is_none() {
        return Err(ApiError::not_found("fine-tuning job", id.as_str()));
    }
    if accepts_stream(&headers) {
        return stream_events(api, id, &headers, page.after).await;
    }
    let listed = api.store.list_events(&id, &page).await?;
    let listed = listed.ok_or_else(|| no_such_cursor(page.after.as_deref().unwrap_or_default()))?;
    let data = listed.rows.into_iter().map(Into::into).collect();
    Ok(Json(EventList { object: "list", data, has_more: listed.has_more }).into_response())
}

fn accepts_stream(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT).into_iter().filter_map(|value| value.to_str().ok());
    accepted
        .flat_map(|value| value.split(','))
        .any(|kind| kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("text/event-stream")))
}

async fn stream_events(api: Api, job: JobId, headers: &HeaderMap, after: Option<String>) -> Result<Response, ApiError> {
    let last = headers.get(LAST_EVENT_ID).and_then(|id| id.to_str().ok()).filter(|id| !id.is_empty());
    let seen = match last.or(after.as_deref()) {
        None => 0,
        Some(id) => api.store.event_position(&job, id).await?.ok_or_else(|| no_such_cursor(id))?,
    };
    let mut tail = Tail { api, job, seen };
    let (first, ended) = tail.look().await?;
    if first.is_empty() && ended && seen > 0 {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let stream = Sse::new(tail.stream(first, ended)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE));
    Ok(([NOT_BUFFERED], stream).into_response())
}

/// Reads a job's story to its end.
struct Tail {
    api: Api,
    job: JobId,
    /// Position of the last event read.
    seen: i64,
}

impl Tail {
    /// The next events, and whether none will follow them.
    async fn look(&mut self) -> Result<(Vec<StoredEvent>, bool), ApiError> {
        // The state first: the last event is written with the state that ends the job, or before it.
        let ended = self.api.store.job(&self.job).await?.is_none_or(|job| job.status.is_terminal());
        let events = self.api.store.events_after(&self.job, self.seen, STREAM_PAGE).await?;
        let whole = events.len() < STREAM_PAGE as usize;
        self.seen = events.last().map_or(self.seen, |event| event.seq);
        Ok((events, ended && whole))
    }

    /// Every event from these on, until the job ends or the server does. A database that is away ends the stream too: the client
    /// comes again, with what it has seen.
    fn stream(self, first: Vec<StoredEvent>, ended: bool) -> impl Stream<Item = Result<sse::Event, Infallible>> {
        let looks = stream::unfold(Some((self, Some((first, ended)))), |state| async {
            let (mut tail, found) = state?;
            let (events, ended) = match found {
                Some(found) => found,
                None => tail.wait().await?,
            };
            let mut messages: Vec<_> = events.into_iter().filter_map(message).collect();
            messages.extend(ended.then(done));
            Some((stream::iter(messages.into_iter().map(Ok)), (!ended).then_some((tail, None))))
        });
        looks.flatten()
    }

    /// The next look that finds something. `None` where the server stops or cannot look.
    async fn wait(&mut self) -> Option<(Vec<StoredEvent>, bool)> {
        loop {
            let stop = self.api.stop.clone();
            stop.run_until_cancelled(tokio::time::sleep(STREAM_PAUSE)).await?;
            match self.look().await {
                Ok((events, false)) if events.is_empty() => {}
                found => return found.ok(),
            }
        }
    }
}

fn message(event: StoredEvent) -> Option<sse::Event> {
    let event = EventObject::from(event);
    sse::Event::default().id(&event.id).json_data(&event).ok()
}

/// The last message of an ended job; it has no id, so that a client's place stays where it was.
fn done() -> sse::Event {
    sse::Event::default().event("done").data("[DONE]")
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
