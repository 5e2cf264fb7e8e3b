//! What the service tells Prometheus of itself.

use axum::{
    body::{Body, to_bytes},
    http::Request,
};
use longhaul::api::{Settings, metrics};
use tower::ServiceExt;

use crate::support::{form::Form, service::Service};

/// The value of a line that begins so.
fn value(text: &str, begin: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(begin));
    let line = line.unwrap_or_else(|| panic!("no {begin} in {text}"));
    line.trim().parse().unwrap()
}

#[tokio::test]
async fn requests_and_what_there_is_are_counted() {
    let settings = Settings::default();
    let metrics = settings.metrics.clone();
    let service = Service::with("metrics", settings).await;
    let page = metrics::router(service.store.clone(), metrics);
    let look = async || {
        let told = page.clone().oneshot(Request::get("/metrics").body(Body::empty()).unwrap()).await.unwrap();
        assert_eq!(told.status(), 200);
        assert!(told.headers()["content-type"].to_str().unwrap().starts_with("application/openmetrics-text"));
        String::from_utf8(to_bytes(told.into_body(), 1 << 20).await.unwrap().to_vec()).unwrap()
    };
    let before = look().await;
    assert_eq!((value(&before, "longhaul_database_up "), value(&before, "longhaul_files ")), (1.0, 0.0));
    assert!(before.ends_with("# EOF\n"), "{before}");

    assert_eq!(service.send(Form::training("a.txt", b"some text").request()).await.status, 200);
    for id in ["file-aaaaaaaaaaaaaaaaaaaaaaaa", "file-bbbbbbbbbbbbbbbbbbbbbbbb"] {
        assert_eq!(service.get(&format!("/v1/files/{id}")).await.status, 404);
    }
    assert_eq!(service.get("/nowhere").await.status, 404);
    let after = look().await;
    let answers = |method: &str, route: &str, status: u16| {
        let labels = format!("{{method=\"{method}\",route=\"{route}\",status=\"{status}\"}} ");
        value(&after, &format!("longhaul_answers_total{labels}"))
    };
    assert_eq!(answers("POST", "/v1/files", 200), 1.0);
    assert_eq!(answers("GET", "/v1/files/{file_id}", 404), 2.0, "by pattern, whatever the id");
    assert_eq!(answers("GET", "none", 404), 1.0);
    let begun = "longhaul_request_duration_seconds_count{method=\"POST\",route=\"/v1/files\"} ";
    assert_eq!(value(&after, begun), 1.0);
    assert_eq!((value(&after, "longhaul_files "), value(&after, "longhaul_file_bytes ")), (1.0, 9.0));
    assert_eq!(value(&after, "longhaul_requests_under_way "), 0.0);

    // Without a database it tells what it can.
    service.store.close().await;
    let down = look().await;
    assert_eq!(value(&down, "longhaul_database_up "), 0.0);
    assert!(!down.contains("longhaul_files"), "{down}");
}
