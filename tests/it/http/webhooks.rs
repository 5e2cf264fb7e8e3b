//! Webhooks: the end of a job is told once it is so, signed, again after a failure, past a receiver that hangs, and by
//! whoever comes next when a sender dies.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode},
    routing::post,
};
use longhaul::{store::queue::Settlement, webhooks};
use serde_json::{Value, json};
use sqlx::Executor;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::support::{
    rows::{self, LONG},
    service::Service,
};

/// What a receiver got, and how many of the first it refuses.
#[derive(Clone, Default)]
struct Receiver {
    got: Arc<Mutex<Vec<(HeaderMap, String)>>>,
    refuses: usize,
}

async fn receive(State(receiver): State<Receiver>, headers: HeaderMap, body: String) -> StatusCode {
    let mut got = receiver.got.lock().unwrap();
    got.push((headers, body));
    if got.len() <= receiver.refuses { StatusCode::INTERNAL_SERVER_ERROR } else { StatusCode::NO_CONTENT }
}

/// Starts a receiver; answers its address.
async fn listen(receiver: Receiver) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = Router::new().route("/hook", post(receive)).with_state(receiver);
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    format!("http://{address}/hook")
}

/// Waits until the receiver has so many messages.
async fn received(receiver: &Receiver, count: usize) -> Vec<(HeaderMap, String)> {
    for _ in 0..1200 {
        let got = receiver.got.lock().unwrap().clone();
        if got.len() >= count {
            return got;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("waited for a webhook in vain");
}

/// A job that is cancelled; its id.
async fn cancelled(service: &Service) -> String {
    let job = rows::job(&service.store).await;
    service.post(&format!("/v1/fine_tuning/jobs/{job}/cancel"), &Value::Null).await.json();
    job.to_string()
}

#[test]
fn signatures_are_those_of_the_specification() {
    let (secret, body) = ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "{\"test\": 2432232314}");
    let signature = webhooks::sign(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, body);
    assert_eq!(signature.as_deref(), Some("v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="));
    assert_eq!(webhooks::sign("no secret of ours", "msg", 1, body), None);
}

#[tokio::test]
async fn the_end_of_a_job_is_told_signed_and_again_after_a_failure() {
    let service = Service::new("webhooks").await;
    let receiver = Receiver { refuses: 1, ..Receiver::default() };
    let url = listen(receiver.clone()).await;
    let made = service.post("/v1/webhook_endpoints", &json!({"url": url})).await.json();
    let secret = made["signing_secret"].as_str().unwrap();
    assert!(secret.starts_with("whsec_"));
    let listed = service.get("/v1/webhook_endpoints").await.json()["data"][0].clone();
    assert_eq!(
        (&listed["id"], &listed["url"], listed.get("signing_secret")),
        (&made["id"], &json!(url), None),
        "shown once"
    );
    assert_eq!(service.get(&format!("/v1/webhook_endpoints/{}", made["id"].as_str().unwrap())).await.json(), listed);
    assert!(secret.ends_with(listed["signing_secret_hint"].as_str().unwrap().trim_start_matches("whsec_...")));
    // Only for what it asked for.
    let other = Receiver::default();
    let body = json!({"url": listen(other.clone()).await, "event_types": ["fine_tuning.job.failed"]});
    service.post("/v1/webhook_endpoints", &body).await.json();

    let stop = CancellationToken::new();
    let sender = tokio::spawn(webhooks::run(service.store.clone(), stop.clone()));
    let job = cancelled(&service).await;
    received(&receiver, 1).await;
    // It waits for its time, and the operator sees why.
    let shown = loop {
        let shown = service.get("/v1/webhook_endpoints").await.json()["data"][1].clone();
        if !shown["last_error"].is_null() {
            break shown;
        }
    };
    assert_eq!(shown["pending"], 1);
    assert!(shown["last_error"].as_str().unwrap().contains("500"), "{shown}");
    let now = "UPDATE webhook_messages SET next_try = now() WHERE next_try IS NOT NULL";
    service.database.connection().await.execute(now).await.unwrap();
    let got = received(&receiver, 2).await;
    for (headers, body) in &got {
        let header = |name: &str| headers[name].to_str().unwrap().to_owned();
        let event: Value = serde_json::from_str(body).unwrap();
        assert_eq!((&event["type"], &event["object"]), (&json!("fine_tuning.job.cancelled"), &json!("event")));
        assert_eq!((&event["data"], &event["id"]), (&json!({"id": job}), &json!(header("webhook-id"))));
        let signature =
            webhooks::sign(secret, &header("webhook-id"), header("webhook-timestamp").parse().unwrap(), body);
        assert_eq!(Some(header("webhook-signature")), signature);
    }
    assert_eq!(got[0].0["webhook-id"], got[1].0["webhook-id"], "the same message");

    let held = rows::running(&service.store, LONG).await;
    let error = longhaul::domain::Invalid::new("", "it broke");
    service.store.settle_job(&held.job, held.epoch, &Settlement::Failed { error }).await.unwrap();
    let told = received(&other, 1).await;
    assert!(told[0].1.contains("fine_tuning.job.failed") && told[0].1.contains(held.job.as_str()));
    assert_eq!(other.got.lock().unwrap().len(), 1);
    stop.cancel();
    sender.await.unwrap();
}

#[tokio::test]
async fn a_receiver_that_hangs_holds_up_nobody_else() {
    let service = Service::new("hangs").await;
    // It takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", silent.local_addr().unwrap());
    service.post("/v1/webhook_endpoints", &json!({"url": url})).await.json();
    let receiver = Receiver::default();
    service.post("/v1/webhook_endpoints", &json!({"url": listen(receiver.clone()).await})).await.json();
    let stop = CancellationToken::new();
    let sender = tokio::spawn(webhooks::run(service.store.clone(), stop.clone()));
    let mut jobs = Vec::new();
    for _ in 0..3 {
        jobs.push(cancelled(&service).await);
        let got = received(&receiver, jobs.len()).await;
        assert!(got.last().unwrap().1.contains(jobs.last().unwrap()));
    }
    stop.cancel();
    sender.await.unwrap();
}

#[tokio::test]
async fn messages_of_a_sender_that_died_go_to_the_next() {
    let service = Service::new("died").await;
    let receiver = Receiver::default();
    service.post("/v1/webhook_endpoints", &json!({"url": listen(receiver.clone()).await})).await.json();
    cancelled(&service).await;
    // One takes the message and is gone; while its lease lasts nobody else has it.
    let taken = service.store.due_messages(&[], Duration::from_mins(1)).await.unwrap();
    assert_eq!(taken.len(), 1);
    assert_eq!(service.store.due_messages(&[], Duration::from_mins(1)).await.unwrap(), []);
    let over = "UPDATE webhook_messages SET next_try = now()";
    service.database.connection().await.execute(over).await.unwrap();
    assert_eq!(service.store.due_messages(&[taken[0].webhook.to_string()], LONG).await.unwrap(), [], "it is busy");
    let stop = CancellationToken::new();
    let sender = tokio::spawn(webhooks::run(service.store.clone(), stop.clone()));
    assert_eq!(received(&receiver, 1).await[0].0["webhook-id"].to_str().unwrap(), taken[0].id);
    stop.cancel();
    sender.await.unwrap();
}

#[tokio::test]
async fn receivers_are_checked_counted_and_removed() {
    let service = Service::new("receivers").await;
    for (body, param) in [
        (json!({}), "url"),
        (json!({"url": "ftp://host/x"}), "url"),
        (json!({"url": "host/x"}), "url"),
        (json!({"url": "https://name:password@host/x"}), "url"),
        (json!({"url": "https://host/x", "event_types": ["batch.completed"]}), "event_types[0]"),
        (json!({"url": "https://host/x", "secret": "mine"}), "secret"),
    ] {
        service.post("/v1/webhook_endpoints", &body).await.error(400, param);
    }
    for _ in 0..16 {
        service.post("/v1/webhook_endpoints", &json!({"url": "http://127.0.0.1:9/x"})).await.json();
    }
    let full = service.post("/v1/webhook_endpoints", &json!({"url": "http://127.0.0.1:9/x"})).await;
    assert_eq!(full.error(409, "")["code"], "too_many_webhooks");
    let ids = service.get("/v1/webhook_endpoints").await.ids();
    let page = service.get("/v1/webhook_endpoints?limit=7").await;
    assert_eq!((page.ids().as_slice(), &page.json()["has_more"]), (&ids[..7], &json!(true)));
    let rest = service.get(&format!("/v1/webhook_endpoints?after={}", ids[6])).await;
    assert_eq!((rest.ids().as_slice(), &rest.json()["has_more"]), (&ids[7..], &json!(false)));
    service.get("/v1/webhook_endpoints?after=whe_none").await.error(400, "after");
    cancelled(&service).await;
    assert_eq!(service.count("webhook_messages").await, 16);
    for id in service.get("/v1/webhook_endpoints").await.ids() {
        let gone = service.delete(&format!("/v1/webhook_endpoints/{id}")).await.json();
        assert_eq!(gone, json!({"id": id, "object": "webhook_endpoint.deleted", "deleted": true}));
        service.delete(&format!("/v1/webhook_endpoints/{id}")).await.error(404, "");
    }
    assert_eq!(service.count("webhook_messages").await, 0);
    service.delete("/v1/webhook_endpoints/none").await.error(404, "");
}
