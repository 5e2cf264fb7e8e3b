//! Alive, ready: for load balancers and for people.

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa::ToSchema;

use super::{Api, ApiError, ErrorEnvelope};

/// A service that answers.
#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    /// Always `ok`; anything else is an error.
    status: &'static str,
    /// Version of this binary.
    version: &'static str,
}

const OK: Health = Health { status: "ok", version: env!("CARGO_PKG_VERSION") };

/// The process is alive. Asks nothing of the database.
#[utoipa::path(get, path = "/healthz", tag = "service", responses((status = 200, body = Health)))]
pub async fn healthz() -> Json<Health> {
    Json(OK)
}

/// The service can do its work: the database answers.
#[utoipa::path(get, path = "/readyz", tag = "service",
    responses((status = 200, body = Health), (status = 503, body = ErrorEnvelope)))]
pub async fn readyz(State(api): State<Api>) -> Result<Json<Health>, ApiError> {
    if api.stop.is_cancelled() {
        return Err(ApiError::unavailable("the server is stopping", "asked to stop"));
    }
    api.store.ping().await.map_err(|error| ApiError::unavailable("the database does not answer", error))?;
    Ok(Json(OK))
}
