//! The page for people at `/`: files that the binary carries, which know nothing but the public API.
//!
//! No key is needed to read it, since it holds nothing; what it asks of the API goes by the rules of the API. Scripts, styles and
//! requests are its own alone: the policy that is sent with it lets a browser take nothing else.

use axum::{
    Router,
    http::{HeaderMap, HeaderName, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use sha2::{Digest, Sha256};

use super::{Api, ApiError, extract::Segments};
use crate::domain::hex;

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// What a browser may do with the page: run and fetch what this server sends, and nothing else.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      form-action 'none'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'";

/// A file of the page.
struct Asset {
    name: &'static str,
    content_type: &'static str,
    content: &'static str,
}

macro_rules! asset {
    ($name:literal, $content_type:expr) => {
        Asset { name: $name, content_type: $content_type, content: include_str!(concat!("page/", $name)) }
    };
}

const INDEX: Asset = asset!("index.html", HTML);

/// Everything that the index leads to.
const ASSETS: &[Asset] = &[
    asset!("style.css", CSS),
    asset!("icon.svg", SVG),
    asset!("api.js", SCRIPT),
    asset!("app.js", SCRIPT),
    asset!("chart.js", SCRIPT),
    asset!("checkpoints.js", SCRIPT),
    asset!("dom.js", SCRIPT),
    asset!("download.js", SCRIPT),
    asset!("fields.js", SCRIPT),
    asset!("file_field.js", SCRIPT),
    asset!("format.js", SCRIPT),
    asset!("job.js", SCRIPT),
    asset!("jobs.js", SCRIPT),
    asset!("ledger.js", SCRIPT),
    asset!("new_job.js", SCRIPT),
    asset!("plan.js", SCRIPT),
    asset!("preview.js", SCRIPT),
    asset!("steering.js", SCRIPT),
    asset!("story.js", SCRIPT),
    asset!("stream.js", SCRIPT),
    asset!("upload.js", SCRIPT),
];

/// The page's routes. They are for people and their browsers, and so no part of the contract.
pub(super) fn routes() -> Router<Api> {
    Router::new().route("/", get(index)).route("/page/{name}", get(asset))
}

async fn index(headers: HeaderMap) -> Response {
    INDEX.answer(&headers)
}

async fn asset(Segments(name): Segments<String>, headers: HeaderMap) -> Result<Response, ApiError> {
    let found = ASSETS.iter().find(|asset| asset.name == name);
    found.map(|asset| asset.answer(&headers)).ok_or_else(|| ApiError::not_found("file of the page", &name))
}

impl Asset {
    /// The file, or the word that the browser's copy is current: it asks each time, so that a new server's page is never mixed with
    /// an old one's.
    fn answer(&self, headers: &HeaderMap) -> Response {
        let tag = format!("\"{}\"", hex(&Sha256::digest(self.content)));
        let known = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok());
        let is_current = known.is_some_and(|tags| {
            tags.split(',').map(|one| one.trim().trim_start_matches("W/")).any(|one| one == tag || one == "*")
        });
        let always = [
            (header::ETAG, tag.as_str()),
            (header::CACHE_CONTROL, "no-cache"),
            (header::CONTENT_SECURITY_POLICY, POLICY),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::REFERRER_POLICY, "no-referrer"),
            (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        ];
        if is_current {
            return (StatusCode::NOT_MODIFIED, always).into_response();
        }
        (always, [(header::CONTENT_TYPE, self.content_type)], self.content).into_response()
    }
}
