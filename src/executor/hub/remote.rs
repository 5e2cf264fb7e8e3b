//! The hub over HTTP: what a repository holds, what a file is, a file's bytes from somewhere on.
//!
//! Redirects are followed by hand, so that the token goes to the hub's own host only. What may pass is tried again.

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio_util::sync::CancellationToken;
use ureq::{
    Agent, Body,
    http::{Response, Uri},
};

use super::{Failure, Settings, failure::Result};
use crate::domain::{HubName, Invalid};

/// Longest wait for a connection, for an answer, and for the next bytes of one.
const CONNECT: Duration = Duration::from_secs(10);
const SILENCE: Duration = Duration::from_secs(30);
/// Tries in a row without anything new, and the pauses between them.
const MOST_TRIES: u32 = 7;
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
const MOST_REDIRECTS: usize = 8;
/// Largest listing that is read.
const MAX_LISTING_BYTES: u64 = 32 << 20;
/// How often a wait looks whether it is wanted any more.
const LOOK: Duration = Duration::from_millis(100);

/// A repository at a revision, on its hub.
#[derive(Debug)]
pub(super) struct Remote {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    name: HubName,
    stop: CancellationToken,
}

/// What the revision is.
#[derive(Debug)]
pub(super) struct Listing {
    pub commit: String,
    pub files: BTreeSet<String>,
}

/// A file before it is fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RemoteFile {
    /// Names the content: its SHA-256 where it is large, else the digest that git has of it.
    pub tag: String,
    pub bytes: u64,
}

impl Remote {
    pub(super) fn new(settings: &Settings, name: &HubName, stop: CancellationToken) -> Result<Self> {
        let endpoint = settings.endpoint.trim_end_matches('/').to_owned();
        if origin(&endpoint).is_none() {
            return Err(Failure::Invalid(Invalid::with_code(
                "hub_not_reachable",
                "model",
                format!("HF_ENDPOINT of the executor is no address of a hub: {endpoint}"),
            )));
        }
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(Some(SILENCE))
            .timeout_recv_response(Some(SILENCE))
            .user_agent(concat!("longhaul/", env!("CARGO_PKG_VERSION")))
            .build()
            .into();
        Ok(Self { agent, endpoint, token: settings.token.clone(), name: name.clone(), stop })
    }

    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The files of the revision.
    pub(super) fn listing(&self) -> Result<Listing> {
        let url = format!("{}/api/models/{}/revision/{}", self.endpoint, self.name.repository(), self.name.revision);
        let mut tries = Tries::default();
        let answer: Value = loop {
            let text = self.ask(Verb::Get, &url, None).and_then(|mut answer| {
                answer
                    .body_mut()
                    .with_config()
                    .limit(MAX_LISTING_BYTES)
                    .read_to_string()
                    .map_err(|error| self.away(error))
            });
            match text {
                Ok(text) => break serde_json::from_str(&text).map_err(|error| self.away(error))?,
                Err(failure) => tries.again(failure, &self.stop)?,
            }
        };
        let commit = answer["sha"].as_str().filter(|sha| sha.len() == 40 && sha.bytes().all(|b| b.is_ascii_hexdigit()));
        let commit = commit.ok_or_else(|| self.away("its listing names no commit"))?.to_owned();
        let siblings = answer["siblings"].as_array().into_iter().flatten();
        let files = siblings.filter_map(|file| file["rfilename"].as_str()).map(str::to_owned).collect();
        Ok(Listing { commit, files })
    }

    /// What a file is, before a byte of it is asked for.
    pub(super) fn about(&self, commit: &str, file: &str) -> Result<RemoteFile> {
        let mut tries = Tries::default();
        let answer = loop {
            match self.ask(Verb::Head, &self.address(commit, file), None) {
                Ok(answer) => break answer,
                Err(failure) => tries.again(failure, &self.stop)?,
            }
        };
        let text = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok());
        let tag = text("x-linked-etag").or_else(|| text("etag")).unwrap_or_default();
        let tag = tag.trim_start_matches("W/").trim_matches('"').to_owned();
        let bytes = text("x-linked-size").or_else(|| text("content-length")).and_then(|bytes| bytes.parse().ok());
        // It becomes a file's name.
        let sound = [40, 64].contains(&tag.len()) && tag.bytes().all(|b| b.is_ascii_hexdigit());
        match bytes {
            Some(bytes) if sound => Ok(RemoteFile { tag: tag.to_ascii_lowercase(), bytes }),
            _ => Err(self.away(format!("it does not say the size and the digest of {file}"))),
        }
    }

    /// A file's content from this byte on, and whether it really begins there or at its begin. Asked once.
    pub(super) fn content(&self, commit: &str, file: &str, from: u64) -> Result<(Response<Body>, bool)> {
        let answer = self.ask(Verb::Get, &self.address(commit, file), Some(from).filter(|from| *from > 0))?;
        let goes_on = answer.status().as_u16() == 206;
        Ok((answer, goes_on))
    }

    fn address(&self, commit: &str, file: &str) -> String {
        format!("{}/{}/resolve/{commit}/{file}", self.endpoint, self.name.repository())
    }

    /// One request, through its redirects, to an answer that is a success. A HEAD ends where the content is named.
    fn ask(&self, verb: Verb, url: &str, from: Option<u64>) -> Result<Response<Body>> {
        let mut place = url.to_owned();
        for _ in 0..MOST_REDIRECTS {
            if self.stop.is_cancelled() {
                return Err(Failure::Stopped);
            }
            let request = match verb {
                Verb::Get => self.agent.get(&place),
                Verb::Head => self.agent.head(&place),
            };
            let mut request = request.header("accept-encoding", "identity");
            if let Some(token) = self.token.as_ref().filter(|_| origin(&place) == origin(&self.endpoint)) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            if let Some(from) = from {
                request = request.header("range", format!("bytes={from}-"));
            }
            let answer = request.call().map_err(|error| self.away(error))?;
            let status = answer.status().as_u16();
            let named = matches!(verb, Verb::Head) && answer.headers().contains_key("x-linked-etag");
            if answer.status().is_success() || named {
                return Ok(answer);
            }
            let next = answer.headers().get("location").and_then(|value| value.to_str().ok());
            match next.filter(|_| (300..400).contains(&status)) {
                Some(next) => place = joined(&place, next).ok_or_else(|| self.away("it redirects to no address"))?,
                None => return Err(self.refused(&answer)),
            }
        }
        Err(self.away("it redirects in circles"))
    }

    fn away(&self, cause: impl std::fmt::Display) -> Failure {
        Failure::Away(format!("the hub {} could not be used: {cause}", self.endpoint))
    }

    /// What the customer or the operator can do about a refusal; what may pass is no refusal.
    fn refused(&self, answer: &Response<Body>) -> Failure {
        let header = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let (name, hub, status) = (&self.name, &self.endpoint, answer.status().as_u16());
        let token = if self.token.is_some() { "the one in HF_TOKEN" } else { "there is none in HF_TOKEN" };
        let (code, message) = match (status, header("x-error-code")) {
            (_, "GatedRepo") => (
                "model_gated",
                format!(
                    "the model {name} is gated: somebody must accept its conditions at {hub}/{}, and the executor needs that \
                     account's token ({token})",
                    name.repository()
                ),
            ),
            (404, "RevisionNotFound") => (
                "model_not_found",
                format!(
                    "the model {} has no revision {} on {hub}; name another after the @",
                    name.repository(),
                    name.revision
                ),
            ),
            (_, "RepoNotFound") | (404, _) => (
                "model_not_found",
                format!(
                    "there is no model {} on {hub}, or it is private: check the name; a private one needs a token that may \
                     read it ({token})",
                    name.repository()
                ),
            ),
            (401 | 403, _) => (
                "model_forbidden",
                format!("{hub} does not give out the model {name}: a token that may read it is needed ({token})"),
            ),
            (416 | 408 | 425 | 429 | 500..=599, _) => return self.away(format!("it answers with {status}")),
            _ => ("model_not_found", format!("{hub} answers the request for the model {name} with {status}")),
        };
        Failure::Invalid(Invalid::with_code(code, "model", message))
    }
}

#[derive(Debug, Clone, Copy)]
enum Verb {
    Get,
    Head,
}

/// Counts tries in a row that brought nothing, and waits between them.
#[derive(Debug, Default)]
pub(super) struct Tries(u32);

impl Tries {
    /// Something came: from the beginning.
    pub(super) fn forget(&mut self) {
        self.0 = 0;
    }

    /// Waits before another try; gives the failure back where none is left, or none would help.
    pub(super) fn again(&mut self, failure: Failure, stop: &CancellationToken) -> Result<()> {
        self.0 += 1;
        if self.0 >= MOST_TRIES || !matches!(failure, Failure::Away(_)) {
            return Err(failure);
        }
        tracing::warn!(cause = %failure, tries = self.0, "the hub is tried again");
        let end = Instant::now() + (FIRST_PAUSE * 2_u32.pow(self.0 - 1)).min(LONGEST_PAUSE);
        while Instant::now() < end {
            if stop.is_cancelled() {
                return Err(Failure::Stopped);
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }
}

/// Scheme, host and port.
fn origin(url: &str) -> Option<(String, String)> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str().filter(|scheme| ["http", "https"].contains(scheme))?;
    Some((scheme.to_owned(), uri.authority()?.as_str().to_ascii_lowercase()))
}

/// Where a redirect leads: an address of its own, or a path on the same host.
fn joined(place: &str, next: &str) -> Option<String> {
    if origin(next).is_some() {
        return Some(next.to_owned());
    }
    let (scheme, authority) = origin(place)?;
    next.starts_with('/').then(|| format!("{scheme}://{authority}{next}"))
}
