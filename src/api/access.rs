//! Who calls: the key of a request, the project that it acts for, and what it may do.
//!
//! Everything but the probes of load balancers passes here, also what names no route. A server on which no key was ever made
//! asks for none, unless it was told to: whoever reaches it acts for the default project. Whose a thing is, is asked
//! where its id is read ([`super::extract::Id`]).

use std::time::{Duration, Instant};

use axum::{
    body::Body,
    extract::{FromRequestParts, MatchedPath, Request, State},
    http::{HeaderMap, HeaderValue, Method, header, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures_util::StreamExt;

use super::{Api, ApiError, hub, pace::Standing};
use crate::{
    domain::{KeyId, ProjectId, Scope, access::Secret},
    store::keys::Known,
};

/// Routes that nobody needs a key for.
pub(super) const OPEN: [&str; 2] = ["/healthz", "/readyz"];
/// Routes below this are for administrators.
const ADMIN: &str = "/v1/fine_tuning/checkpoints/";
/// Routes of Hugging Face's clients, which read headers of their own.
const HUB: &str = "/hf/";
/// Of a body that is refused unread so much is read all the same, and for so long: a client that is writing sees the answer only
/// when it has finished.
const DRAIN: usize = 32 << 20;
const DRAIN_TIME: Duration = Duration::from_secs(5);

/// On whose behalf a request is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    pub project: ProjectId,
    pub scope: Scope,
    /// The key; none where none is asked for.
    pub key: Option<KeyId>,
    /// How often the key may be used, where that is limited.
    requests_per_minute: Option<u32>,
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let caller = parts.extensions.get::<Self>().cloned();
        caller.ok_or_else(|| ApiError::internal("a route that asks who calls does not pass the check of keys"))
    }
}

/// Lets a request in as what its key is, or refuses it.
pub async fn authorize(State(api): State<Api>, mut request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str).to_owned();
    if OPEN.contains(&route.as_str()) {
        return next.run(request).await;
    }
    let known = caller(&api, request.headers()).await;
    let standing = known.as_ref().ok().and_then(|caller| standing(&api, caller));
    let allowed = known
        .and_then(|caller| in_time(standing).map(|()| caller))
        .and_then(|caller| permitted(caller, request.method(), &route));
    let mut response = match allowed {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(refusal) => {
            let (hub, key_given) =
                (request.uri().path().starts_with(HUB), request.headers().contains_key(header::AUTHORIZATION));
            drain(request.into_body()).await;
            if hub { hub::refused(refusal, key_given) } else { refusal.into_response() }
        }
    };
    if let Some(standing) = standing {
        standing.tell(response.headers_mut());
    }
    response
}

/// Counts the request of a key that may make only so many.
fn standing(api: &Api, caller: &Caller) -> Option<Standing> {
    let (key, limit) = (caller.key.as_ref()?, caller.requests_per_minute?);
    Some(api.pace.take(key, limit, Instant::now()))
}

fn in_time(standing: Option<Standing>) -> Result<(), ApiError> {
    match standing {
        Some(standing) if !standing.allowed => {
            let message = "this key has made all requests that it may make in a minute: ask again a little later";
            Err(ApiError::too_many(message, Some(standing.wait())))
        }
        _ => Ok(()),
    }
}

async fn caller(api: &Api, headers: &HeaderMap) -> Result<Caller, ApiError> {
    let known = match secret(headers) {
        Some(secret) => api.store.known_key(&secret).await?,
        None => Known::No,
    };
    match known {
        Known::Valid(grant) => {
            return Ok(Caller {
                project: grant.project,
                scope: grant.scope,
                key: Some(grant.key),
                requests_per_minute: grant.requests_per_minute,
            });
        }
        Known::Revoked => return Err(ApiError::unauthorized("this key was revoked: use another one")),
        Known::Expired => return Err(ApiError::unauthorized("this key has expired: use another one")),
        Known::No => {}
    }
    if !api.settings.require_keys && !api.store.has_keys().await? {
        let project = ProjectId::default_project();
        return Ok(Caller { project, scope: Scope::Admin, key: None, requests_per_minute: None });
    }
    Err(ApiError::unauthorized(if headers.contains_key(header::AUTHORIZATION) {
        "the key is none of this server: give one that `longhaul keys create` printed, as `Authorization: Bearer lhk_...`"
    } else {
        "you must provide a key, as `Authorization: Bearer lhk_...`; `longhaul keys create` makes one"
    }))
}

/// The key of a request that carries exactly one.
fn secret(headers: &HeaderMap) -> Option<Secret> {
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(only), None) = (given.next(), given.next()) else { return None };
    let (scheme, key) = only.to_str().ok()?.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") { Secret::parse(key.trim()) } else { None }
}

fn permitted(caller: Caller, method: &Method, route: &str) -> Result<Caller, ApiError> {
    let needed = match *method {
        _ if route.starts_with(ADMIN) => Scope::Admin,
        Method::GET | Method::HEAD => Scope::Read,
        _ => Scope::Write,
    };
    if caller.scope >= needed {
        return Ok(caller);
    }
    let message = format!(
        "this key may {} and no more, and this needs a key with the scope {}: make one with `longhaul keys create --scope {}`",
        caller.scope.as_str(),
        needed.as_str(),
        needed.as_str()
    );
    Err(ApiError::forbidden(message))
}

async fn drain(body: Body) {
    let read = async {
        let (mut stream, mut left) = (body.into_data_stream(), DRAIN);
        while let Some(Ok(bytes)) = stream.next().await {
            left = left.saturating_sub(bytes.len());
            if left == 0 {
                break;
            }
        }
    };
    // Whoever is slower than that sees a closed connection.
    let _ = tokio::time::timeout(DRAIN_TIME, read).await;
}

/// What a client is told to identify itself with.
pub(super) const CHALLENGE: (header::HeaderName, HeaderValue) =
    (header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
