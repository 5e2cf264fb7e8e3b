//! Requests that miss, and a database that is away: always the same envelope, and an id to ask about.

use axum::{
    body::Body,
    http::{Method, Request, header},
};
use longhaul::{
    api,
    store::{Store, private::Postgres},
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::support::{
    Sandbox, cluster_settings,
    database::store_settings,
    form::Form,
    service::{Service, answer},
};

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let service = Service::new("absent").await;
    for path in [
        "/page",
        "/page/none.js",
        "/v1",
        "/v1/nothing",
        "/v1/files/",
        "/v1/files/file-none",
        "/v1/files/none",
        "/v1/files/file-..%2F",
        "/v1/files/%ff",
        "/v1/files/file-none/content",
        "/v1/fine_tuning/jobs/ftjob-none",
        "/v1/fine_tuning/jobs/ftjob-%00",
        "/v1/fine_tuning/jobs/ftjob-none/nothing",
        "/v1/fine_tuning/jobs/ftjob-none/checkpoints/ftckpt_none/archive",
    ] {
        service.get(path).await.error(404, "");
    }
    let missing = service.get("/v1/files/file-none").await.error(404, "");
    assert_eq!(missing["code"], "not_found");
    assert!(missing["message"].as_str().unwrap().contains("file-none"));
    service.post("/v1/fine_tuning/jobs/ftjob-none/cancel", &json!({})).await.error(404, "");
}

#[tokio::test]
async fn a_method_that_a_path_does_not_have_is_refused_with_those_it_has() {
    let service = Service::new("method").await;
    for (method, path, allowed) in [
        (Method::PUT, "/v1/files", "POST"),
        (Method::DELETE, "/v1/fine_tuning/jobs", "POST"),
        (Method::GET, "/v1/fine_tuning/jobs/ftjob-x/cancel", "POST"),
        (Method::POST, "/v1/models", "GET"),
        (Method::PATCH, "/v1/files/file-x", "DELETE"),
    ] {
        let answer = service.ask(method, path, &[]).await;
        answer.error(405, "");
        assert!(answer.header("allow").is_some_and(|allow| allow.contains(allowed)), "{path}: {answer:?}");
    }
}

#[tokio::test]
async fn a_body_that_is_no_json_is_refused() {
    let service = Service::new("json").await;
    let send = async |body: Body| service.send(Request::post("/v1/fine_tuning/jobs").body(body).unwrap()).await;
    for body in ["", "{", "{\"model\": }", "\u{feff}{}", "{} {}"] {
        assert_eq!(send(body.into()).await.error(400, "body")["code"], "invalid_json", "{body}");
    }
    send(vec![0xff, 0xfe].into()).await.error(400, "body");
    send("[".repeat(100_000).into()).await.error(400, "body");
    send("[1]".into()).await.error(400, "body");
    send("null".into()).await.error(400, "body");
    let large = json!({"model": "x".repeat(api::MAX_JSON_BODY)}).to_string();
    let answer = send(large.into()).await;
    assert_eq!(answer.error(413, "body")["code"], "too_large");
    let gone = futures_util::stream::iter([Ok("{\"model\""), Err(std::io::Error::other("gone"))]);
    send(Body::from_stream(gone)).await.error(400, "body");
    // Stock clients call their JSON many names; the bytes speak.
    let file = service.upload("a.txt", b"text").await;
    let body = json!({"model": "tiny", "training_file": file}).to_string();
    for kind in ["text/plain", "application/json; charset=utf-8", "nonsense"] {
        let request =
            Request::post("/v1/fine_tuning/jobs").header(header::CONTENT_TYPE, kind).body(body.clone().into());
        service.send(request.unwrap()).await.json();
    }
}

#[tokio::test]
async fn a_sane_request_id_comes_back_and_another_is_replaced() {
    let service = Service::new("ids").await;
    for (sent, kept) in [("my-request_1.a", true), ("with space", false), ("", false), (&"x".repeat(129), false)] {
        let answer = service.ask(Method::GET, "/healthz", &[("x-request-id", sent)]).await;
        assert_eq!(answer.header("x-request-id") == Some(sent), kept, "{sent}");
    }
}

#[tokio::test]
async fn a_database_that_goes_away_is_told_and_its_return_is_noticed() {
    let sandbox = Sandbox::new("outage");
    let settings = cluster_settings(sandbox.path());
    let start = async || {
        let settings = settings.clone();
        tokio::task::spawn_blocking(move || Postgres::start(&settings)).await.unwrap().unwrap()
    };
    let postgres = start().await;
    let store = Store::connect(&store_settings(postgres.url(), sandbox.path())).await.unwrap();
    store.migrate().await.unwrap();
    let stop = CancellationToken::new();
    let router = api::router(store.clone(), api::Settings::default(), stop.clone());
    let get = async |path: &str| answer(&router, Request::get(path).body(Body::empty()).unwrap()).await;
    assert_eq!(get("/readyz").await.json()["status"], "ok");
    let file = answer(&router, Form::training("a.txt", b"text").request()).await.json();

    tokio::task::spawn_blocking(move || postgres.stop()).await.unwrap();
    assert_eq!(get("/healthz").await.json()["status"], "ok", "the process is alive");
    for path in ["/readyz", "/v1/files", "/v1/models", "/v1/fine_tuning/jobs/ftjob-x"] {
        let answer = get(path).await;
        let error = answer.error(503, "");
        assert!(answer.header("retry-after").is_some());
        let (message, id) = (error["message"].as_str().unwrap(), answer.header("x-request-id").unwrap());
        assert!(message.contains("database") && message.contains(id), "{message}");
        assert!(!message.contains("sqlx") && !message.contains("postgres:"), "{message}");
    }
    answer(&router, Form::training("b.txt", b"text").request()).await.error(503, "");

    let postgres = start().await;
    assert_eq!(get("/readyz").await.json()["status"], "ok");
    let listed = get("/v1/files").await.json();
    assert_eq!(listed["data"], json!([file]), "what was accepted is there, what was refused is not");
    stop.cancel();
    get("/readyz").await.error(503, "");
    assert_eq!(get("/v1/files").await.status, 200, "a server that is stopping still answers");
    store.close().await;
    get("/v1/files").await.error(503, "");
    tokio::task::spawn_blocking(move || postgres.stop()).await.unwrap();
}
