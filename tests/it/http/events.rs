//! A job's story over HTTP: its events, newest first, with the numbers of every step.

use axum::{
    body::Body,
    http::{Method, Request},
};
use longhaul::{api, domain::progress::Evaluation, store::queue::Settlement};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::support::{
    rows::{self, LONG},
    service::{Answer, Service, answer},
};

#[tokio::test]
async fn steps_and_evaluations_become_metrics_events() {
    let service = Service::new("metrics").await;
    let held = rows::running(&service.store, LONG).await;
    let evaluation = Evaluation { step: 2, valid_loss: 1.5, valid_mean_token_accuracy: 0.75, valid_labels: 99 };
    for step in 1..=2 {
        assert!(service.store.record_step(&held.job, held.epoch, &rows::step(step, 4)).await.unwrap());
    }
    assert!(service.store.record_evaluation(&held.job, held.epoch, &evaluation).await.unwrap());
    let path = format!("/v1/fine_tuning/jobs/{}", held.job);
    let page = service.get(&format!("{path}/events")).await.json();
    let events = page["data"].as_array().unwrap();
    assert_eq!(page["has_more"], false);
    let told: Vec<&str> = events.iter().map(|event| event["message"].as_str().unwrap()).collect();
    let created = format!("Created fine-tuning job: {}", held.job);
    let expected = [
        "Step 2: validation loss=1.5000",
        "Step 2/4: training loss=1.2500",
        "Step 1/4: training loss=2.5000",
        "Fine-tuning job started",
        "Files validated, moving job to queued state",
        &created,
    ];
    assert_eq!(told, expected);
    for event in events {
        assert_eq!((&event["object"], &event["level"]), (&json!("fine_tuning.job.event"), &json!("info")));
        assert!(event["created_at"].is_i64() && event["data"].is_object());
    }
    let kinds: Vec<&Value> = events.iter().map(|event| &event["type"]).collect();
    assert_eq!(kinds, ["metrics", "metrics", "metrics", "message", "message", "message"]);
    let data = &events[1]["data"];
    for (name, expected) in [
        ("step", json!(2)),
        ("total_steps", json!(4)),
        ("train_loss", json!(1.25)),
        ("train_mean_token_accuracy", json!(0.25)),
        ("learning_rate", json!(1e-5)),
        ("tokens_seen", json!(256)),
    ] {
        assert_eq!(data[name], expected, "{name}");
    }
    assert_eq!(events[0]["data"]["full_valid_loss"], json!(1.5));

    let job = service.get(&path).await.json();
    assert_eq!((&job["progress"]["step"], &job["trained_tokens"]), (&json!(2), &json!(256)));
    assert!(job["estimated_finish"].as_i64() > job["created_at"].as_i64());
}

#[tokio::test]
async fn events_go_page_by_page() {
    let service = Service::new("events").await;
    let held = rows::running(&service.store, LONG).await;
    for step in 1..=7 {
        assert!(service.store.record_step(&held.job, held.epoch, &rows::step(step, 7)).await.unwrap());
    }
    let path = format!("/v1/fine_tuning/jobs/{}/events", held.job);
    let whole = service.get(&path).await.ids();
    assert_eq!(whole.len(), 10);
    let mut walked: Vec<String> = Vec::new();
    loop {
        let after = walked.last().map_or_else(String::new, |id| format!("&after={id}"));
        let page = service.get(&format!("{path}?limit=3{after}")).await;
        walked.extend(page.ids());
        if page.json()["has_more"] == false {
            break;
        }
    }
    assert_eq!(walked, whole);

    let other = rows::job(&service.store).await;
    let foreign = service.get(&format!("/v1/fine_tuning/jobs/{other}/events")).await.ids();
    for (query, param) in [
        ("limit=0".to_owned(), "limit"),
        ("limit=1001".to_owned(), "limit"),
        ("after=ftevent-none".to_owned(), "after"),
        (format!("after={}", foreign[0]), "after"),
    ] {
        service.get(&format!("{path}?{query}")).await.error(400, param);
    }
    service.get("/v1/fine_tuning/jobs/ftjob-none/events").await.error(404, "");
}

/// Id and data of each message of a stream, and what else was said.
fn messages(answer: &Answer) -> (Vec<(String, Value)>, bool) {
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(answer.header("content-type").unwrap().starts_with("text/event-stream"));
    assert_eq!(answer.header("x-accel-buffering"), Some("no"));
    let text = std::str::from_utf8(&answer.bytes).unwrap();
    let field = |message: &str, name: &str| {
        message.lines().find_map(|line| Some(line.strip_prefix(name)?.trim_start_matches([':', ' ']).to_owned()))
    };
    let mut told = Vec::new();
    for message in text.split("\n\n").filter(|message| message.contains("data:")) {
        let (id, data) = (field(message, "id"), field(message, "data").unwrap());
        if let Some(id) = id {
            told.push((id, serde_json::from_str(&data).unwrap()));
        } else {
            assert_eq!((field(message, "event").as_deref(), &*data), (Some("done"), "[DONE]"));
        }
    }
    (told, text.contains("event: done"))
}

const STREAM: (&str, &str) = ("accept", "text/event-stream");

#[tokio::test]
async fn a_stream_tells_all_events_as_they_happen_and_ends_with_the_job() {
    let service = Service::new("stream").await;
    let held = rows::running(&service.store, LONG).await;
    for step in 1..=150 {
        assert!(service.store.record_step(&held.job, held.epoch, &rows::step(step, 300)).await.unwrap());
    }
    let path = format!("/v1/fine_tuning/jobs/{}/events", held.job);
    let headers = [STREAM];
    let (answer, ()) = tokio::join!(service.ask(Method::GET, &path, &headers), async {
        for step in 151..=300 {
            assert!(service.store.record_step(&held.job, held.epoch, &rows::step(step, 300)).await.unwrap());
        }
        rows::checkpoint(&service.store, &service.sandbox, &held, 300, true, &[("config.json", b"{}")]).await;
        let done = Settlement::Succeeded { trained_tokens: Some(512) };
        assert!(service.store.settle_job(&held.job, held.epoch, &done).await.unwrap());
    });
    let (told, done) = messages(&answer);
    assert!(done);
    let mut listed = service.get(&format!("{path}?limit=1000")).await.json()["data"].as_array().unwrap().clone();
    listed.reverse();
    assert_eq!(
        told.iter().map(|(_, event)| event.clone()).collect::<Vec<_>>(),
        listed,
        "the same events, each once, in order"
    );
    assert!(told.iter().all(|(id, event)| event["id"] == **id));

    // Whoever comes again goes on where the stream broke off, by header or by query.
    let (middle, last) = (&told[120].0, &told[told.len() - 1].0);
    let headers = [STREAM, ("last-event-id", middle.as_str())];
    let again = service.ask(Method::GET, &path, &headers).await;
    assert_eq!(messages(&again), (told[121..].to_vec(), true));
    let again = service.ask(Method::GET, &format!("{path}?after={middle}"), &[STREAM]).await;
    assert_eq!(messages(&again), (told[121..].to_vec(), true));
    let nothing = service.ask(Method::GET, &path, &[STREAM, ("last-event-id", last.as_str())]).await;
    assert_eq!((nothing.status, nothing.bytes.len()), (204, 0));
    let strange = service.ask(Method::GET, &path, &[STREAM, ("last-event-id", "17")]).await;
    assert_eq!(strange.error(400, "after")["code"], "invalid_cursor");
}

#[tokio::test]
async fn a_server_that_stops_ends_its_streams() {
    let service = Service::new("stream-stops").await;
    let held = rows::running(&service.store, LONG).await;
    let path = format!("/v1/fine_tuning/jobs/{}/events", held.job);
    let stop = CancellationToken::new();
    let router = api::router(service.store.clone(), api::Settings::default(), stop.clone());
    let request = Request::get(&path).header(STREAM.0, STREAM.1).body(Body::empty()).unwrap();
    let (answer, ()) = tokio::join!(answer(&router, request), async { stop.cancel() });
    let (told, done) = messages(&answer);
    assert_eq!((told.len(), done), (3, false));
}
