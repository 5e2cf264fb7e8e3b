//! One server, spoken to in JSON over HTTP: time-outs, retries, and the error envelope turned into a [`Failure`].
//!
//! Reads are tried again, for as long as the caller has patience, when the server cannot be reached or is in trouble:
//! servers restart. A write is tried again only where the server can tell that it is the same one.

use std::{
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use ureq::{
    Agent, Body, RequestBuilder, SendBody,
    http::Response,
    typestate::{WithBody, WithoutBody},
};

use super::{Failure, Result, multipart::Form};

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest silence in the middle of a body, either way.
const SILENCE: Duration = Duration::from_mins(1);
/// Longest wait for an answer to begin: a large upload is hashed and committed before it is answered.
const ANSWER: Duration = Duration::from_mins(10);
/// First pause before another try; doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Patience of a command that a person waits for.
pub const SHORT: Duration = Duration::from_secs(3);
/// Patience of a command that follows a job: a server may be restarted or moved meanwhile.
pub const LONG: Duration = Duration::from_mins(15);
/// Largest JSON answer that is read.
const MAX_ANSWER_BYTES: u64 = 64 << 20;

/// A connection to one server.
#[derive(Clone)]
pub struct Client {
    agent: Agent,
    /// `http://host:port`, without a slash at its end.
    server: String,
    /// What `Authorization` says, where there is a key.
    bearer: Option<String>,
}

impl Client {
    /// A client of the server at this URL. Nothing is sent yet.
    pub fn new(server: &str) -> Result<Self> {
        let server = server.trim_end_matches('/').trim_end_matches("/v1");
        if server.starts_with("https://") {
            let way_out = "use a tunnel or a local proxy and give its http:// address";
            return Err(Failure::Usage(format!("{server}: this client does not speak https; {way_out}")));
        }
        let plausible = server.strip_prefix("http://").is_some_and(|rest| !rest.is_empty());
        if !plausible {
            return Err(Failure::Usage(format!("--server must look like http://127.0.0.1:8080, not {server}")));
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(Some(SILENCE))
            .timeout_per_write(Some(SILENCE))
            .timeout_recv_response(Some(ANSWER))
            .user_agent(concat!("longhaul/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Self { agent: config.into(), server: server.to_owned(), bearer: None })
    }

    /// The same with a key, which goes with every request.
    pub fn with_key(self, key: Option<&str>) -> Result<Self> {
        let plain = |key: &&str| !key.is_empty() && key.bytes().all(|b| b.is_ascii_graphic());
        if key.is_some_and(|key| !plain(&key)) {
            return Err(Failure::Usage("--api-key must be a key as `longhaul keys create` prints it".to_owned()));
        }
        Ok(Self { bearer: key.map(|key| format!("Bearer {key}")), ..self })
    }

    /// The address as it is shown to people.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// `GET path`, tried again for up to `patience`. `waiting` is told once for each failed try.
    pub fn get(&self, path: &str, patience: Duration, mut waiting: impl FnMut(&Failure)) -> Result<Value> {
        let deadline = Instant::now() + patience;
        let mut pause = FIRST_PAUSE;
        loop {
            let answer = self.open(path, |request| request).and_then(|answer| self.json(answer));
            match answer {
                Err(failure @ Failure::Server { .. }) if Instant::now() + pause < deadline => waiting(&failure),
                answer => return answer,
            }
            thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// `GET path` once, for its body. `with` adds headers.
    pub fn open(
        &self,
        path: &str,
        with: impl FnOnce(RequestBuilder<WithoutBody>) -> RequestBuilder<WithoutBody>,
    ) -> Result<Response<Body>> {
        let request = self.agent.get(format!("{}{path}", self.server));
        let request = match &self.bearer {
            Some(bearer) => request.header("authorization", bearer),
            None => request,
        };
        self.accepted(with(request).call())
    }

    /// `POST path` with a JSON body, tried again for up to [`SHORT`]: `key` tells the server that it is the same request.
    pub fn post_again(&self, path: &str, body: &Value, key: &str) -> Result<Value> {
        self.post_for(path, body, key, SHORT)
    }

    /// As [`Self::post_again`], for up to `patience`.
    pub fn post_for(&self, path: &str, body: &Value, key: &str, patience: Duration) -> Result<Value> {
        let deadline = Instant::now() + patience;
        let mut pause = FIRST_PAUSE;
        loop {
            let request = self.request(path).header("idempotency-key", key);
            let answer = self.accepted(request.send_json(body)).and_then(|answer| self.json(answer));
            match answer {
                Err(Failure::Server { .. }) if Instant::now() + pause < deadline => {}
                answer => return answer,
            }
            thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// `POST path` without a body, once.
    pub fn post_empty(&self, path: &str) -> Result<Value> {
        self.json(self.accepted(self.request(path).send_empty())?)
    }

    /// `POST path` with a form, once. `digest` is told to the server, which refuses other bytes.
    pub fn post_form(&self, path: &str, form: &mut Form, digest: Option<&str>) -> Result<Value> {
        let request = self.request(path).content_type(&form.content_type);
        let mut request = request.header("content-length", form.length.to_string());
        if let Some(digest) = digest {
            request = request.header("x-content-sha256", digest);
        }
        self.json(self.accepted(request.send(SendBody::from_reader(&mut *form.body)))?)
    }

    fn request(&self, path: &str) -> RequestBuilder<WithBody> {
        let request = self.agent.post(format!("{}{path}", self.server));
        match &self.bearer {
            Some(bearer) => request.header("authorization", bearer),
            None => request,
        }
    }

    /// Failures of the wire and refusals, out of the way.
    fn accepted(&self, answer: std::result::Result<Response<Body>, ureq::Error>) -> Result<Response<Body>> {
        let mut answer = answer.map_err(|error| self.unreachable(&error))?;
        let status = answer.status().as_u16();
        if answer.status().is_success() {
            return Ok(answer);
        }
        let text = answer.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_string().unwrap_or_default();
        let envelope: Option<Value> = serde_json::from_str(&text).ok();
        let message = envelope.as_ref().and_then(|e| e["error"]["message"].as_str());
        match (status, message) {
            (400..=499, Some(message)) if status != 408 && status != 429 => {
                Err(Failure::Refused { status, message: one_line(message) })
            }
            (_, Some(message)) => Err(self.failed(format!("{status}: {}", one_line(message)))),
            // Not our envelope: something else answers at this address.
            (400..=499, None) => Err(Failure::Refused { status, message: one_line(&text) }),
            (_, None) => Err(self.failed(format!("{status} {}", one_line(&text)))),
        }
    }

    fn json(&self, mut answer: Response<Body>) -> Result<Value> {
        let text = answer.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_string();
        let text = text.map_err(|error| self.unreachable(&error))?;
        serde_json::from_str(&text).map_err(|_| self.failed(format!("not a JSON answer: {}", one_line(&text))))
    }

    fn failed(&self, cause: String) -> Failure {
        Failure::Server { server: self.server.clone(), cause }
    }

    fn unreachable(&self, error: &ureq::Error) -> Failure {
        let cause = match error {
            ureq::Error::Io(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                "no server answers there; start one with `longhaul serve`, or name another with --server".to_owned()
            }
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => return Failure::Usage(format!("--server: {error}")),
            error => error.to_string(),
        };
        self.failed(cause)
    }
}

/// Whatever a server says, in one line of bounded length.
fn one_line(text: &str) -> String {
    let mut line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.truncate(line.floor_char_boundary(2000));
    line
}

/// One path segment (or with `/`, several), percent-encoded.
pub fn encoded(path: &str) -> String {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"-_.~/".contains(b);
    let part = |b: u8| if plain(&b) { char::from(b).to_string() } else { format!("%{b:02X}") };
    path.bytes().map(part).collect()
}
