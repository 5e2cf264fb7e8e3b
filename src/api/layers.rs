//! What surrounds every handler: the request's id, one log line, an end to waiting, panics and errors made answers.

use std::{
    any::Any,
    time::{Duration, Instant},
};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, StatusCode},
    middleware::Next,
    response::{IntoResponse, Response},
};
use tracing::Instrument;

use super::ApiError;
use crate::domain::ids::random_suffix;

/// Header that carries a request's id, in and out.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id that is taken over from a client.
const MAX_REQUEST_ID: usize = 128;

/// Outermost: names the request, logs it, and renders an error that is on its way out.
pub async fn identify(request: Request, next: Next) -> Response {
    let id = request
        .headers()
        .get(&REQUEST_ID)
        .and_then(|id| id.to_str().ok())
        .filter(|id| is_sane(id))
        .map_or_else(|| format!("req_{}", random_suffix()), str::to_owned);
    let method = request.method().clone();
    // The pattern, not the path: paths hold ids, and logs are counted by route.
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let span = tracing::info_span!("request", request_id = id, %method, route);
    let begun = Instant::now();
    let mut response = next.run(request).instrument(span.clone()).await;
    span.in_scope(|| {
        if let Some(error) = response.extensions_mut().remove::<ApiError>() {
            let headers = std::mem::take(response.headers_mut());
            response = error.render(&id);
            for (name, value) in &headers {
                // What a handler or the router said beside the error (Allow, Content-Range) stays said.
                response.headers_mut().entry(name).or_insert_with(|| value.clone());
            }
        }
        let ms = begun.elapsed().as_millis() as u64;
        tracing::info!(status = response.status().as_u16(), ms, "answered");
    });
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// Ends a handler that takes too long. Not for transfers, which are bounded by progress instead.
pub async fn time_limit(State(limit): State<Duration>, request: Request, next: Next) -> Response {
    tokio::time::timeout(limit, next.run(request)).await.unwrap_or_else(|_| {
        ApiError::unavailable("the server did not answer in time; try again", format!("no answer within {limit:?}"))
            .into_response()
    })
}

/// A panic in a handler is our fault and one request's end, not the server's.
#[expect(clippy::needless_pass_by_value, reason = "the signature that the layer calls")]
pub fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let cause = panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
        .unwrap_or_default();
    ApiError::internal(format!("panic: {cause}")).into_response()
}

/// No such route.
pub async fn no_route(request: Request) -> ApiError {
    let message = format!("Unknown request URL: {} {}", request.method(), request.uri().path());
    ApiError::status(StatusCode::NOT_FOUND, message)
}

/// The route exists, the method does not.
pub async fn no_method(request: Request) -> ApiError {
    let message = format!("Not allowed here: {} {}", request.method(), request.uri().path());
    ApiError::status(StatusCode::METHOD_NOT_ALLOWED, message)
}

fn is_sane(id: &str) -> bool {
    (1..=MAX_REQUEST_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}
