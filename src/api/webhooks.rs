//! Webhooks: receivers that are told of the end of jobs, signed as Standard Webhooks are. What sends is `crate::webhooks`.

use axum::{Json, extract::State, http::Uri};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    Api, ApiError, ErrorEnvelope,
    access::Caller,
    error::excerpt,
    extract::{Id, JsonBody, Pairs, no_such_cursor},
};
use crate::{
    domain::{Invalid, WebhookId, fields::Fields},
    store::webhooks::{MAX_WEBHOOKS, Webhook},
};

/// What can be told.
pub const EVENTS: [&str; 3] = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"];
const MAX_URL: usize = 2048;
const MAX_NAME: usize = 256;
/// Most receivers of one page, and how many there are when nobody says.
const MAX_PAGE: u32 = 100;
const DEFAULT_PAGE: u32 = 20;
/// Bytes of a secret, as many as the digest that it keys.
const SECRET_BYTES: usize = 32;

/// A receiver to be added.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "describes the body in the contract; create_webhook reads it field by field")]
pub struct CreateWebhook {
    /// For people.
    #[schema(required = false, max_length = 256)]
    name: Option<String>,
    /// Where messages are posted, `http://` or `https://`.
    #[schema(max_length = 2048)]
    url: String,
    /// Some of `fine_tuning.job.succeeded`, `fine_tuning.job.failed`, `fine_tuning.job.cancelled`; all if absent.
    #[schema(required = false)]
    event_types: Option<Vec<String>>,
}

/// A receiver of messages.
#[derive(Debug, Serialize, ToSchema)]
pub struct WebhookObject {
    id: String,
    /// Always `webhook_endpoint`.
    object: &'static str,
    /// Unix seconds.
    created_at: i64,
    name: String,
    url: String,
    event_types: Vec<String>,
    /// The secret's last characters.
    signing_secret_hint: String,
    /// Messages that wait to be delivered (an extension).
    pending: u64,
    /// How the newest try failed, while its message waits (an extension).
    #[schema(required)]
    last_error: Option<String>,
    /// What signatures are made with, `whsec_...`; only in the answer that creates the receiver.
    #[serde(skip_serializing_if = "Option::is_none")]
    signing_secret: Option<String>,
}

/// All receivers.
#[derive(Debug, Serialize, ToSchema)]
pub struct WebhookList {
    /// Always `list`.
    object: &'static str,
    data: Vec<WebhookObject>,
    #[schema(required)]
    first_id: Option<String>,
    #[schema(required)]
    last_id: Option<String>,
    has_more: bool,
}

/// The word that a receiver is gone.
#[derive(Debug, Serialize, ToSchema)]
pub struct WebhookDeleted {
    id: String,
    /// Always `webhook_endpoint.deleted`.
    object: &'static str,
    /// Always true.
    deleted: bool,
}

/// Adds a receiver of webhooks; the answer alone holds its secret.
///
/// Messages are those of Standard Webhooks: `{id, object: "event", created_at, type, data: {id}}` with the headers
/// `webhook-id`, `webhook-timestamp` and `webhook-signature`. One that is not answered with 2xx within 15 seconds is sent again, with
/// the same id, ten times over three days; one may come twice.
#[utoipa::path(post, path = "/v1/webhook_endpoints", tag = "webhooks", request_body = CreateWebhook,
    responses((status = 200, body = WebhookObject), (status = 400, body = ErrorEnvelope), (status = 409, body = ErrorEnvelope)))]
pub async fn create_webhook(
    State(api): State<Api>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<WebhookObject>, ApiError> {
    let fields = Fields::root(&body.value)?;
    fields.only(&["name", "url", "event_types"])?;
    let name = fields.text("name", 0..=MAX_NAME)?.unwrap_or_default();
    let (url, events) = (url(&fields)?, events(&fields)?);
    let secret = secret();
    let Some(webhook) = api.store.create_webhook(&caller.project, name, url, &events, &secret).await? else {
        let message = format!("there are {MAX_WEBHOOKS} webhooks, as many as may be: delete one first");
        return Err(ApiError::conflict("too_many_webhooks", message));
    };
    Ok(Json(WebhookObject { signing_secret: Some(secret), ..webhook.into() }))
}

/// Lists the receivers, newest first.
#[utoipa::path(get, path = "/v1/webhook_endpoints", tag = "webhooks",
    params(
        ("after" = Option<String>, Query, description = "Id of the last receiver already seen."),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 100, description = "Most receivers of the page; 20 if absent.")),
    responses((status = 200, body = WebhookList), (status = 400, body = ErrorEnvelope)))]
pub async fn list_webhooks(
    State(api): State<Api>,
    caller: Caller,
    pairs: Pairs,
) -> Result<Json<WebhookList>, ApiError> {
    let page = pairs.page::<WebhookId>(DEFAULT_PAGE, MAX_PAGE)?;
    let all = api.store.webhooks(&caller.project).await?;
    // There are few: one query finds them all.
    let from = match &page.after {
        None => 0,
        Some(after) => 1 + all.iter().position(|w| w.id.as_str() == after).ok_or_else(|| no_such_cursor(after))?,
    };
    let has_more = all.len() > from + page.limit as usize;
    let data: Vec<WebhookObject> =
        all.into_iter().skip(from).take(page.limit as usize).map(WebhookObject::from).collect();
    let (first_id, last_id) = (data.first().map(|w| w.id.clone()), data.last().map(|w| w.id.clone()));
    Ok(Json(WebhookList { object: "list", data, first_id, last_id, has_more }))
}

/// Retrieves a receiver.
#[utoipa::path(get, path = "/v1/webhook_endpoints/{webhook_endpoint_id}", tag = "webhooks",
    params(("webhook_endpoint_id" = String, Path)),
    responses((status = 200, body = WebhookObject), (status = 404, body = ErrorEnvelope)))]
pub async fn retrieve_webhook(
    State(api): State<Api>,
    caller: Caller,
    Id(id): Id<WebhookId>,
) -> Result<Json<WebhookObject>, ApiError> {
    let found = api.store.webhooks(&caller.project).await?.into_iter().find(|webhook| webhook.id == id);
    found.map(|webhook| Json(webhook.into())).ok_or_else(|| ApiError::not_found("webhook", id.as_str()))
}

/// Removes a receiver, and the messages that wait for it.
#[utoipa::path(delete, path = "/v1/webhook_endpoints/{webhook_endpoint_id}", tag = "webhooks", params(("webhook_endpoint_id" = String, Path)),
    responses((status = 200, body = WebhookDeleted), (status = 404, body = ErrorEnvelope)))]
pub async fn delete_webhook(State(api): State<Api>, Id(id): Id<WebhookId>) -> Result<Json<WebhookDeleted>, ApiError> {
    if !api.store.delete_webhook(&id).await? {
        return Err(ApiError::not_found("webhook", id.as_str()));
    }
    Ok(Json(WebhookDeleted { id: id.to_string(), object: "webhook_endpoint.deleted", deleted: true }))
}

fn url<'a>(fields: &Fields<'a>) -> Result<&'a str, Invalid> {
    let Some(url) = fields.text("url", 1..=MAX_URL)? else {
        let message = "you must provide url: where messages are posted";
        return Err(Invalid::with_code("missing_required_parameter", "url", message));
    };
    let parsed = url.parse::<Uri>().ok();
    let sound = parsed.is_some_and(|uri| {
        let scheme = matches!(uri.scheme_str(), Some("http" | "https"));
        scheme
            && uri
                .authority()
                .is_some_and(|authority| !authority.host().is_empty() && !authority.as_str().contains('@'))
    });
    if sound { Ok(url) } else { Err(fields.refuse("url", "must look like https://host/path, without a user's name")) }
}

fn events(fields: &Fields) -> Result<Vec<String>, Invalid> {
    let list = fields.list("event_types", EVENTS.len())?;
    if list.is_empty() {
        return Ok(EVENTS.map(str::to_owned).to_vec());
    }
    let mut events = Vec::with_capacity(list.len());
    for (place, value) in list.iter().enumerate() {
        let Some(event) = value.as_str().filter(|event| EVENTS.contains(event)) else {
            let param = format!("event_types[{place}]");
            let message = format!("{param} must be one of {}, not {}", EVENTS.join(", "), excerpt(&value.to_string()));
            return Err(Invalid::new(param, message));
        };
        events.push(event.to_owned());
    }
    Ok(events)
}

/// A fresh secret from the operating system's randomness.
fn secret() -> String {
    let mut bytes = [0u8; SECRET_BYTES];
    getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
    format!("whsec_{}", STANDARD.encode(bytes))
}

impl From<Webhook> for WebhookObject {
    fn from(webhook: Webhook) -> Self {
        Self {
            id: webhook.id.to_string(),
            object: "webhook_endpoint",
            created_at: webhook.created_at,
            name: webhook.name,
            url: webhook.url,
            event_types: webhook.events,
            signing_secret_hint: format!("whsec_...{}", webhook.secret_ends),
            pending: webhook.pending,
            last_error: webhook.last_error,
            signing_secret: None,
        }
    }
}
