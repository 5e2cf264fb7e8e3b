//! Every failure of a request: one type, one promised body.
//!
//! The body is OpenAI's envelope, `{"error": {"message", "type", "param", "code"}}` with all four keys. What went wrong
//! inside is logged with the request's id and never shown; the id is, so that the two can be matched.

use std::time::Duration;

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::access::CHALLENGE;
use crate::{
    domain::Invalid,
    store::{self, quotas::Exceeded},
};

/// Seconds after which a client should ask again when the service cannot answer now.
const RETRY_AFTER_SECONDS: u16 = 2;

/// Longest that stock clients wait because they are told to.
const LONGEST_WAIT_SECONDS: u64 = 60;

/// A request that did not succeed.
#[derive(Debug, Clone)]
pub struct ApiError {
    status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<String>,
    retry: Retry,
    /// For the log only.
    cause: Option<String>,
}

/// What a client that repeats by itself is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Retry {
    /// Nothing: its own rules hold.
    Unsaid,
    /// The same request will fail again. Stock clients would repeat a 409.
    Never,
    /// A little later.
    Later,
    /// After so many seconds.
    After(u64),
}

/// OpenAI's error envelope.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorEnvelope {
    error: ErrorBody,
}

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    /// For people: what is wrong and what would do.
    message: String,
    /// Kind of error: `invalid_request_error`, `not_found_error`, `server_error`, ...
    #[serde(rename = "type")]
    kind: &'static str,
    /// JSON path or name of the field at fault.
    #[schema(required)]
    param: Option<String>,
    /// Machine-readable reason, stable across versions.
    #[schema(required)]
    code: Option<String>,
}

impl ApiError {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None, retry: Retry::Unsaid, cause: None }
    }

    /// 400: something about the request as a whole.
    pub fn bad_request(code: &str, message: impl Into<String>) -> Self {
        Self { code: Some(code.to_owned()), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    /// 401: no key, or none that holds.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self { code: Some("invalid_api_key".to_owned()), ..Self::new(StatusCode::UNAUTHORIZED, message) }
    }

    /// 403: the key holds, and may not do this.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self { code: Some("insufficient_permissions".to_owned()), ..Self::new(StatusCode::FORBIDDEN, message) }
    }

    /// 429: a limit that time does not lift.
    pub fn quota(message: impl Into<String>) -> Self {
        let code = Some("insufficient_quota".to_owned());
        Self { code, retry: Retry::Never, ..Self::new(StatusCode::TOO_MANY_REQUESTS, message) }
    }

    /// 429: a limit that time lifts; after how long, where that is known.
    pub fn too_many(message: impl Into<String>, wait: Option<Duration>) -> Self {
        let retry = wait.map_or(Retry::Never, |wait| Retry::After(wait.as_secs_f64().ceil() as u64));
        let code = Some("rate_limit_exceeded".to_owned());
        Self { code, retry, ..Self::new(StatusCode::TOO_MANY_REQUESTS, message) }
    }

    /// 404: no such thing, or none that the caller may know of.
    pub fn not_found(what: &str, id: &str) -> Self {
        let code = Some("not_found".to_owned());
        Self { code, ..Self::new(StatusCode::NOT_FOUND, format!("No such {what}: {}", excerpt(id))) }
    }

    /// 409: the thing is in a state that does not allow this, and asking again will not change that.
    pub fn conflict(code: &str, message: impl Into<String>) -> Self {
        Self { code: Some(code.to_owned()), retry: Retry::Never, ..Self::new(StatusCode::CONFLICT, message) }
    }

    /// 413: more bytes than `limit`, the value of the setting of that name.
    pub fn too_large(what: &str, limit: u64, setting: &str) -> Self {
        let message = format!("{what} is larger than the {limit} bytes that this server takes (setting {setting})");
        let code = Some("too_large".to_owned());
        Self { code, retry: Retry::Never, ..Self::new(StatusCode::PAYLOAD_TOO_LARGE, message) }
    }

    /// 416: the range asked for lies outside.
    pub fn range(bytes: u64) -> Self {
        let message = format!("the range asked for is not within the {bytes} bytes there are");
        Self { code: Some("invalid_range".to_owned()), ..Self::new(StatusCode::RANGE_NOT_SATISFIABLE, message) }
    }

    /// 412: a condition the client set does not hold.
    pub fn precondition() -> Self {
        Self::new(StatusCode::PRECONDITION_FAILED, "what is stored does not have the ETag asked for")
    }

    /// 408: the client stopped sending.
    pub fn stalled() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "no bytes of the body came for too long; send it again")
    }

    /// 503: not now.
    pub fn unavailable(message: impl Into<String>, cause: impl std::fmt::Display) -> Self {
        let cause = Some(cause.to_string());
        Self { retry: Retry::Later, cause, ..Self::new(StatusCode::SERVICE_UNAVAILABLE, message) }
    }

    /// 500: our fault.
    pub fn internal(cause: impl std::fmt::Display) -> Self {
        let message = "the server failed to answer; the cause is in its log";
        Self { cause: Some(cause.to_string()), ..Self::new(StatusCode::INTERNAL_SERVER_ERROR, message) }
    }

    /// Any other status, as the router or an extractor found it.
    pub fn status(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, message)
    }

    /// The field at fault.
    #[must_use]
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// Logs the cause and writes the envelope. Called once, by the outermost layer, which knows the request's id.
    pub(super) fn render(&self, request_id: &str) -> Response {
        let mut message = self.message.clone();
        if self.status.is_server_error() {
            let cause = self.cause.as_deref().unwrap_or("unknown");
            tracing::error!(request_id, status = self.status.as_u16(), cause, "request failed");
            message = format!("{message} (request {request_id})");
        }
        let body = ErrorBody { message, kind: self.kind(), param: self.param.clone(), code: self.code.clone() };
        let mut response = (self.status, axum::Json(ErrorEnvelope { error: body })).into_response();
        let headers = response.headers_mut();
        if self.status == StatusCode::UNAUTHORIZED {
            headers.extend([CHALLENGE]);
        }
        match self.retry {
            Retry::Unsaid => {}
            Retry::Never => drop(headers.insert("x-should-retry", HeaderValue::from_static("false"))),
            Retry::After(seconds) => {
                headers.insert(header::RETRY_AFTER, seconds.into());
                // Stock clients wait no longer than this, and ask again before it can help.
                if seconds > LONGEST_WAIT_SECONDS {
                    headers.insert("x-should-retry", HeaderValue::from_static("false"));
                }
            }
            Retry::Later => drop(headers.insert(header::RETRY_AFTER, RETRY_AFTER_SECONDS.into())),
        }
        response
    }
}

impl IntoResponse for ApiError {
    /// The status alone; the outermost layer finds the error in the response's extensions and renders it.
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

impl From<Invalid> for ApiError {
    fn from(invalid: Invalid) -> Self {
        Self::bad_request(&invalid.code, invalid.message).with_param(invalid.param)
    }
}

impl From<store::Error> for ApiError {
    fn from(error: store::Error) -> Self {
        let cause = chain(&error);
        match error {
            store::Error::Unavailable(_) => {
                Self::unavailable("the database cannot be reached at the moment; try again shortly", cause)
            }
            store::Error::Quota(exceeded) => exceeded.into(),
            _ => Self::internal(cause),
        }
    }
}

impl From<Exceeded> for ApiError {
    fn from(exceeded: Exceeded) -> Self {
        let message = exceeded.to_string();
        match exceeded {
            Exceeded::StoredBytes(_) | Exceeded::Tokens(_) => Self::quota(message),
            Exceeded::Jobs(_) => Self::too_many(message, None),
            Exceeded::TokensPerDay { wait, .. } => Self::too_many(message, Some(wait)),
        }
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line = format!("{line}: {cause}");
        source = cause.source();
    }
    line
}

/// What a client sent, cut to a length fit for a message.
pub fn excerpt(text: &str) -> String {
    const LONGEST: usize = 100;
    let mut cut: String = text.chars().take(LONGEST).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.chars().nth(LONGEST).is_some() {
        cut.push_str("...");
    }
    cut
}
