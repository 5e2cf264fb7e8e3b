//! Limits of projects and keys: what is refused, what a client is told about asking again, and that it is true.

use axum::http::Method;
use longhaul::{
    domain::{ProjectId, Scope, access::Secret},
    store::{keys::NewKey, quotas::Limits},
};
use serde_json::json;
use sqlx::Executor;

use super::checkpoints::finished;
use crate::support::{
    form::Form,
    service::{Answer, Service, body},
};

const JOBS: &str = "/v1/fine_tuning/jobs";

/// A refusal that asking again soon does not help.
fn for_now(answer: &Answer, code: &str) {
    assert_eq!(answer.error(429, "")["code"], code);
    assert_eq!(answer.header("x-should-retry"), Some("false"));
}

#[tokio::test]
async fn a_project_stores_as_much_as_it_may() {
    let service = Service::new("bytes").await;
    let project = ProjectId::default_project();
    service.store.set_limits(&project, &Limits { stored_bytes: Some(20), ..Limits::default() }).await.unwrap();
    let upload = async |bytes: usize| service.send(Form::training("a.txt", &vec![b'a'; bytes]).request()).await;
    let first = upload(9).await.json()["id"].as_str().unwrap().to_owned();
    for_now(&upload(12).await, "insufficient_quota");
    assert_eq!((service.count("files").await, service.count("blobs").await), (1, 1), "nothing stays of it");
    // An upload in parts counts with what it promised, until it ends.
    let promise =
        |bytes: u64| json!({"filename": "b.txt", "purpose": "fine-tune", "bytes": bytes, "mime_type": "text/plain"});
    for_now(&service.post("/v1/uploads", &promise(12)).await, "insufficient_quota");
    let pending = service.post("/v1/uploads", &promise(11)).await.json()["id"].as_str().unwrap().to_owned();
    for_now(&upload(1).await, "insufficient_quota");
    service.post(&format!("/v1/uploads/{pending}/cancel"), &json!({})).await.json();
    upload(11).await.json();
    service.delete(&format!("/v1/files/{first}")).await.json();
    upload(9).await.json();
    // Another project has room of its own.
    let other = service.project("other").await;
    let key = service.key(&other, Scope::Write).await;
    let mut request = Form::training("a.txt", &[b'a'; 30]).request();
    request.headers_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    assert_eq!(service.send(request).await.status, 200);
}

#[tokio::test]
async fn a_project_has_as_many_jobs_as_it_may() {
    let service = Service::new("jobs").await;
    service.host(8 << 30).await;
    let file = service.upload("a.txt", b"some text").await;
    let project = ProjectId::default_project();
    service.store.set_limits(&project, &Limits { jobs: Some(3), ..Limits::default() }).await.unwrap();
    // Side by side: no two take the last place.
    let creates = (0..10).map(|seed| {
        let request = body(&file, json!({"seed": seed}));
        let service = &service;
        async move { service.post(JOBS, &request).await }
    });
    let answers = futures_util::future::join_all(creates).await;
    let (made, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer.status == 200);
    assert_eq!((made.len(), refused.len(), service.count("jobs").await), (3, 7, 3));
    refused.iter().for_each(|answer| for_now(answer, "rate_limit_exceeded"));
    assert_eq!(refused[0].header("retry-after"), None, "nobody knows when a job ends");
    let one = made[0].json()["id"].as_str().unwrap().to_owned();
    service.post(&format!("{JOBS}/{one}/cancel"), &json!({})).await.json();
    let again = [("idempotency-key", "k")];
    let request = body(&file, json!({"seed": 11}));
    let fresh = service.post_with(JOBS, &request, &again).await.json();
    // Sent again it finds its job, though there is no room for another.
    assert_eq!(service.post_with(JOBS, &request, &again).await.json()["id"], fresh["id"]);
}

#[tokio::test]
async fn a_project_trains_as_many_tokens_as_it_may() {
    let service = Service::new("tokens").await;
    service.host(8 << 30).await;
    let (job, _) = finished(&service).await;
    let file = service.upload("a.txt", b"some text").await;
    let project = ProjectId::default_project();
    let limited = async |limits: Limits, seed: u64| {
        service.store.set_limits(&project, &limits).await.unwrap();
        service.post(JOBS, &body(&file, json!({"seed": seed}))).await
    };
    assert_eq!(limited(Limits { tokens: Some(513), ..Limits::default() }, 1).await.status, 200);
    for_now(&limited(Limits { tokens: Some(512), ..Limits::default() }, 2).await, "insufficient_quota");
    let day = Limits { tokens_per_day: Some(512), ..Limits::default() };
    let refused = limited(day, 3).await;
    for_now(&refused, "rate_limit_exceeded");
    let wait = refused.header("retry-after").unwrap().parse::<u64>().unwrap();
    assert!((86_000..=86_400).contains(&wait), "{wait}");
    // Soon enough that a client may wait for it.
    let mut connection = service.database.connection().await;
    let begun = |ago: &str| {
        sqlx::AssertSqlSafe(format!("UPDATE jobs SET started_at = now() - interval '{ago}' WHERE id = '{job}'"))
    };
    connection.execute(begun("23 hours 59 minutes 30 seconds")).await.unwrap();
    let refused = limited(day, 4).await;
    refused.error(429, "");
    let wait = refused.header("retry-after").unwrap().parse::<u64>().unwrap();
    assert!((1..=30).contains(&wait) && refused.header("x-should-retry").is_none(), "{refused:?}");
    connection.execute(begun("24 hours 1 second")).await.unwrap();
    assert_eq!(limited(day, 5).await.status, 200);
}

#[tokio::test]
async fn a_key_asks_as_often_as_it_may() {
    let service = Service::new("pace").await;
    let (secret, project) = (Secret::random(), ProjectId::default_project());
    let new = NewKey { project: &project, name: "", scope: Scope::Read, life: None, requests_per_minute: Some(4) };
    service.store.create_key(&secret, &new).await.unwrap();
    let free = service.key(&project, Scope::Read).await;
    let ask = async |method: Method, path: &str| service.ask_as(secret.reveal(), method, path).await;
    // Whatever the answer is.
    for (method, path, status, left) in [
        (Method::GET, "/v1/files", 200, "3"),
        (Method::GET, "/v1/files/file-none", 404, "2"),
        (Method::POST, "/v1/uploads", 403, "1"),
        (Method::GET, "/hf/api/models/longhaul/none-x", 404, "0"),
    ] {
        let answer = ask(method, path).await;
        let header = |name: &str| answer.header(&format!("x-ratelimit-{name}-requests")).map(str::to_owned);
        assert_eq!(
            (answer.status, header("limit").as_deref(), header("remaining").as_deref()),
            (status, Some("4"), Some(left))
        );
        let reset = header("reset").unwrap().strip_suffix('s').unwrap().parse::<u64>().unwrap();
        assert!((1..=60).contains(&reset), "{reset}");
    }
    let refused = ask(Method::GET, "/v1/files").await;
    assert_eq!(refused.error(429, "")["code"], "rate_limit_exceeded");
    let wait = refused.header("retry-after").unwrap().parse::<u64>().unwrap();
    assert!((1..=15).contains(&wait) && refused.header("x-should-retry").is_none(), "{refused:?}");
    let unhindered = service.ask_as(&free, Method::GET, "/v1/files").await;
    assert_eq!((unhindered.status, unhindered.header("x-ratelimit-limit-requests")), (200, None));
    assert_eq!(ask(Method::GET, "/healthz").await.status, 200);
}
