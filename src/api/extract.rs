//! Path, query, paging and body of a request, with our errors instead of the framework's.

use std::str::FromStr;

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Path, Query, Request, rejection::BytesRejection},
    http::{StatusCode, request::Parts},
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Api, ApiError, access::Caller, error::excerpt};
use crate::{
    domain::{CheckpointId, FileId, Invalid, JobId, PermissionId, PlanId, UploadId, WebhookId},
    store::{Order, Page, projects::Kind},
};

/// Something that is named in a path.
pub trait Named: FromStr {
    /// What it is, for "No such ...".
    const WHAT: &'static str;
}

impl Named for FileId {
    const WHAT: &'static str = "file";
}

impl Named for JobId {
    const WHAT: &'static str = "fine-tuning job";
}

impl Named for PlanId {
    const WHAT: &'static str = "plan";
}

impl Named for UploadId {
    const WHAT: &'static str = "upload";
}

impl Named for PermissionId {
    const WHAT: &'static str = "permission";
}

impl Named for WebhookId {
    const WHAT: &'static str = "webhook";
}

impl Named for CheckpointId {
    const WHAT: &'static str = "checkpoint";
}

/// Something that belongs to a project.
pub trait Owned: Named + std::fmt::Display {
    /// Where its owner is looked up.
    const KIND: Kind;
}

impl Owned for FileId {
    const KIND: Kind = Kind::File;
}

impl Owned for JobId {
    const KIND: Kind = Kind::Job;
}

impl Owned for PlanId {
    const KIND: Kind = Kind::Plan;
}

impl Owned for UploadId {
    const KIND: Kind = Kind::Upload;
}

impl Owned for WebhookId {
    const KIND: Kind = Kind::Webhook;
}

/// Reads an id. What cannot be an id names nothing, so it is not found rather than invalid.
pub fn named<T: Named>(text: &str) -> Result<T, ApiError> {
    text.parse().map_err(|_| ApiError::not_found(T::WHAT, text))
}

/// The one id in a path, of something that belongs to the caller's project. What belongs to another is not there.
#[derive(Debug)]
pub struct Id<T>(pub T);

impl<T: Owned + Send> FromRequestParts<Api> for Id<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, ApiError> {
        let Segments(text) = Segments::<String>::from_request_parts(parts, api).await?;
        let caller = Caller::from_request_parts(parts, api).await?;
        let id: T = named(&text)?;
        if !api.store.owns(&caller.project, T::KIND, &id.to_string()).await? {
            return Err(ApiError::not_found(T::WHAT, &text));
        }
        Ok(Self(id))
    }
}

/// The parts of a path, percent-decoded after it was cut at its slashes.
#[derive(Debug)]
pub struct Segments<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Segments<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Path::<T>::from_request_parts(parts, state).await {
            Ok(Path(segments)) => Ok(Self(segments)),
            Err(_) => Err(ApiError::not_found("path", parts.uri.path())),
        }
    }
}

/// The pairs of a query string. Pairs that nobody asks for are ignored.
#[derive(Debug, Default)]
pub struct Pairs(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Pairs {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Ok(Query(pairs)) = Query::<Vec<(String, String)>>::from_request_parts(parts, state).await else {
            return Err(ApiError::bad_request("invalid_query", "the query string cannot be read"));
        };
        // The database holds no zero byte in text.
        match pairs.iter().find(|(key, value)| key.contains('\0') || value.contains('\0')) {
            Some((key, _)) => Err(Invalid::new(excerpt(key), "a query parameter may hold no zero character").into()),
            None => Ok(Self(pairs)),
        }
    }
}

impl Pairs {
    /// The value of `key`, the last one where it comes twice.
    pub fn find(&self, key: &str) -> Option<&str> {
        self.0.iter().rev().find(|(k, _)| k == key).map(|(_, value)| value.as_str())
    }

    /// Pairs written as `object[key]=value`.
    pub fn members<'a>(&'a self, object: &str) -> Vec<(&'a str, &'a str)> {
        let pair = |(key, value): &'a (String, String)| {
            let member = key.strip_prefix(object)?.strip_prefix('[')?.strip_suffix(']')?;
            Some((member, value.as_str()))
        };
        self.0.iter().filter_map(pair).collect()
    }

    /// `after`, `limit` and `order`. Ids of the kind `T` are the cursors.
    pub fn page<T: FromStr>(&self, default: u32, most: u32) -> Result<Page, ApiError> {
        let limit = match self.find("limit") {
            None => default,
            Some(text) => match text.parse() {
                Ok(limit) if (1..=most).contains(&limit) => limit,
                _ => {
                    let message = format!("limit must be a whole number between 1 and {most}, not {}", excerpt(text));
                    return Err(Invalid::new("limit", message).into());
                }
            },
        };
        let order = match self.find("order") {
            None | Some("desc" | "descending") => Order::NewestFirst,
            Some("asc" | "ascending") => Order::OldestFirst,
            Some(other) => {
                let message = format!("order must be asc or desc, not {}", excerpt(other));
                return Err(Invalid::new("order", message).into());
            }
        };
        let after = self.find("after").filter(|after| !after.is_empty()).map(str::to_owned);
        match after {
            Some(after) if after.parse::<T>().is_err() => Err(no_such_cursor(&after)),
            after => Ok(Page { after, limit, order }),
        }
    }
}

/// The refusal of a cursor that names nothing in the list.
pub fn no_such_cursor(after: &str) -> ApiError {
    let message = format!("after must be the id of an entry of this list; there is no {}", excerpt(after));
    Invalid::with_code("invalid_cursor", "after", message).into()
}

/// A JSON body and its bytes as they came. The content type is not asked for: clients send many, and the bytes speak.
#[derive(Debug)]
pub struct JsonBody {
    pub value: Value,
    pub bytes: Bytes,
}

impl<S: Send + Sync> FromRequest<S> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| unread(&rejection))?;
        let value = serde_json::from_slice(&bytes).map_err(|error| {
            let message = format!("the body is not JSON that can be read: {error}");
            ApiError::bad_request("invalid_json", message).with_param("body")
        })?;
        Ok(Self { value, bytes })
    }
}

fn unread(rejection: &BytesRejection) -> ApiError {
    let status = rejection.status();
    if status == StatusCode::PAYLOAD_TOO_LARGE {
        return ApiError::too_large("the body", super::MAX_JSON_BODY as u64, "MAX_JSON_BODY").with_param("body");
    }
    ApiError::bad_request("incomplete_body", "the body did not come in whole").with_param("body")
}
