//! The API in process over a database of its own: requests in, answers out, and the promises that every answer keeps.

use std::time::Duration;

use axum::{
    Router,
    body::{Body, Bytes},
    http::{HeaderMap, Method, Request, header},
};
use longhaul::{
    api::{self, Settings},
    domain::{BaseModel, ExecutorId, Machine, ProjectId, Scope, access::Secret},
    store::{Store, hosts::NewHost, keys::NewKey},
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::{
    Database, Sandbox, database,
    form::Form,
    model::{config, machine},
};

/// One service of one test.
pub struct Service {
    pub router: Router,
    pub store: Store,
    pub database: Database,
    pub sandbox: Sandbox,
}

/// What came back, whole.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub bytes: Bytes,
}

impl Service {
    pub async fn new(name: &str) -> Self {
        Self::with(name, Settings::default()).await
    }

    pub async fn with(name: &str, settings: Settings) -> Self {
        let (database, sandbox) = (database().await, Sandbox::new(name));
        let store = database.store(&sandbox).await;
        let router = api::router(store.clone(), settings, CancellationToken::new());
        Self { router, store, database, sandbox }
    }

    /// A key of a project, as text.
    pub async fn key(&self, project: &ProjectId, scope: Scope) -> String {
        self.key_for(project, scope, None).await
    }

    /// A key that lives so long.
    pub async fn key_for(&self, project: &ProjectId, scope: Scope, life: Option<Duration>) -> String {
        let secret = Secret::random();
        self.store
            .create_key(&secret, &NewKey { project, name: "test", scope, life, requests_per_minute: None })
            .await
            .unwrap();
        secret.reveal().to_owned()
    }

    /// A project besides the default one.
    pub async fn project(&self, name: &str) -> ProjectId {
        self.store.create_project(name).await.unwrap().unwrap().id
    }

    /// A request with a key and without a body.
    pub async fn ask_as(&self, key: &str, method: Method, path: &str) -> Answer {
        self.ask(method, path, &[("authorization", &format!("Bearer {key}"))]).await
    }

    /// A POST of JSON with a key.
    pub async fn post_as(&self, key: &str, path: &str, body: &Value) -> Answer {
        self.post_with(path, body, &[("authorization", &format!("Bearer {key}"))]).await
    }

    pub async fn send(&self, request: Request<Body>) -> Answer {
        answer(&self.router, request).await
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.ask(Method::GET, path, &[]).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        self.ask(Method::DELETE, path, &[]).await
    }

    /// A request without a body.
    pub async fn ask(&self, method: Method, path: &str, headers: &[(&str, &str)]) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send(request.body(Body::empty()).unwrap()).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_with(path, body, &[]).await
    }

    pub async fn post_with(&self, path: &str, body: &Value, headers: &[(&str, &str)]) -> Answer {
        let mut request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send(request.body(body.to_string().into()).unwrap()).await
    }

    /// Uploads a file for training, as it should be, and answers its id.
    pub async fn upload(&self, filename: &str, content: &[u8]) -> String {
        self.send(Form::training(filename, content).request()).await.json()["id"].as_str().unwrap().to_owned()
    }

    /// A live host with the model `tiny` and so many bytes of memory.
    pub async fn host(&self, bytes: u64) -> ExecutorId {
        self.host_with(&[machine(bytes)]).await
    }

    /// A live host with the model `tiny` and these devices.
    pub async fn host_with(&self, machines: &[Machine]) -> ExecutorId {
        let executor = ExecutorId::random();
        let tiny = BaseModel { name: "tiny".into(), config: Some(config(true)), problem: None };
        let broken = BaseModel { name: "broken".into(), config: None, problem: Some("it is of another family".into()) };
        let models = [tiny, broken];
        let host =
            NewHost { executor: &executor, hostname: "host", machines, free: &[], models: &models, fetches: false };
        self.store.publish_host(&host).await.unwrap();
        executor
    }

    /// A job on a fresh file, with these fields over the two that every job needs; answers the object.
    pub async fn job(&self, changes: Value) -> Value {
        let file = self.upload("a.txt", b"some text").await;
        let answer = self.post("/v1/fine_tuning/jobs", &body(&file, changes)).await;
        answer.json()
    }

    /// How many rows a query counts.
    pub async fn count(&self, what: &str) -> i64 {
        let sql = sqlx::AssertSqlSafe(format!("SELECT count(*) FROM {what}"));
        sqlx::query_scalar(sql).fetch_one(&mut self.database.connection().await).await.unwrap()
    }
}

/// The body of a create, with `changes` laid over it.
pub fn body(file: &str, changes: Value) -> Value {
    let mut body = json!({"model": "tiny", "training_file": file});
    let Value::Object(changes) = changes else { panic!("fields come as an object") };
    for (key, value) in changes {
        body[key] = value;
    }
    body
}

/// Calls a router and reads the answer whole.
pub async fn answer(router: &Router, request: Request<Body>) -> Answer {
    let response = router.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    let answer = Answer { status: parts.status.as_u16(), headers: parts.headers, bytes };
    assert!(answer.header("x-request-id").is_some_and(|id| !id.is_empty()), "an answer without an id: {answer:?}");
    answer
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The JSON of an answer that succeeded.
    pub fn json(&self) -> Value {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.bytes));
        serde_json::from_slice(&self.bytes).unwrap()
    }

    /// The error of an answer that must be OpenAI's envelope with all four keys; `param` empty stands for null.
    pub fn error(&self, status: u16, param: &str) -> Value {
        let text = String::from_utf8_lossy(&self.bytes);
        assert_eq!(self.status, status, "{text}");
        let envelope: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("not an envelope: {text}"));
        assert_eq!(envelope.as_object().unwrap().len(), 1, "{text}");
        let error = envelope["error"].clone();
        let mut keys: Vec<&str> = error.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["code", "message", "param", "type"], "{text}");
        assert!(error["message"].as_str().is_some_and(|message| message.len() > 10), "{text}");
        let kind = match status {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        assert_eq!(error["type"], kind, "{text}");
        assert_eq!(error["param"].as_str().unwrap_or_default(), param, "{text}");
        error
    }

    /// The ids of a page.
    pub fn ids(&self) -> Vec<String> {
        let page = self.json();
        assert_eq!(page["object"], "list");
        page["data"].as_array().unwrap().iter().map(|entry| entry["id"].as_str().unwrap().to_owned()).collect()
    }
}
