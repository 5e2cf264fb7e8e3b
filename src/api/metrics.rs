//! What the service counts of itself, in the text format of Prometheus, on an address of its own: whoever watches it needs no key,
//! and what it tells is nobody else's business.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::{MatchedPath, Request, State},
    http::{StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::store::{Store, gauges::Gauges};

/// Upper bounds of the times that answers take to begin, seconds.
const SECONDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];
/// Longest look at the database. A watcher would rather hear nothing than wait.
const PATIENCE: Duration = Duration::from_secs(5);
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Counters of the requests that a process answered. Clones count together.
#[derive(Debug, Clone)]
pub struct Metrics {
    answers: Family<Answer, Counter>,
    seconds: Family<Route, Histogram, fn() -> Histogram>,
    under_way: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            answers: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(SECONDS)),
            under_way: Gauge::default(),
        }
    }
}

/// By the pattern of a path: paths hold ids.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Route {
    method: String,
    route: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answer {
    method: String,
    route: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Status {
    status: String,
}

/// Counts one request. Inside of what makes errors answers.
pub async fn count(State(metrics): State<Metrics>, request: Request, next: Next) -> Response {
    let method = request.method().as_str().to_owned();
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let begun = Instant::now();
    metrics.under_way.inc();
    let _under_way = Ends(&metrics.under_way);
    let response = next.run(request).await;
    let route = Route { method, route };
    metrics.seconds.get_or_create(&route).observe(begun.elapsed().as_secs_f64());
    let Route { method, route } = route;
    metrics.answers.get_or_create(&Answer { method, route, status: response.status().as_u16() }).inc();
    response
}

/// A client that goes away drops its request in the middle.
struct Ends<'a>(&'a Gauge);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Answers `GET /metrics` until `stop` is cancelled.
pub async fn serve(
    listener: TcpListener,
    store: Store,
    metrics: Metrics,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let stopped = async move { stop.cancelled().await };
    axum::serve(listener, router(store, metrics)).with_graceful_shutdown(stopped).await
}

/// The address for metrics, ready to be called.
pub fn router(store: Store, metrics: Metrics) -> Router {
    Router::new().route("/metrics", get(tell)).with_state((store, Arc::new(metrics)))
}

async fn tell(State((store, metrics)): State<(Store, Arc<Metrics>)>) -> Response {
    // Without a database what is counted here is told all the same: it may show why.
    let gauges = tokio::time::timeout(PATIENCE, store.gauges()).await.ok().and_then(Result::ok);
    let mut text = String::new();
    match encode(&mut text, &registry(&metrics, gauges.as_ref())) {
        Ok(()) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

fn registry(metrics: &Metrics, gauges: Option<&Gauges>) -> Registry {
    let mut registry = Registry::with_prefix("longhaul");
    registry.register("answers", "Requests answered", metrics.answers.clone());
    registry.register_with_unit("request_duration", "Until an answer began", Unit::Seconds, metrics.seconds.clone());
    registry.register("requests_under_way", "Requests without an answer yet", metrics.under_way.clone());
    let mut number = |name: &str, help: &str, value: f64| {
        let gauge: Gauge<f64, std::sync::atomic::AtomicU64> = Gauge::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    };
    number("database_up", "1 where the database answered in time", if gauges.is_some() { 1.0 } else { 0.0 });
    let Some(gauges) = gauges else { return registry };
    for (name, help, value) in [
        ("longest_wait_seconds", "Of a job that no executor has taken", gauges.longest_wait),
        ("overdue_leases", "Jobs whose executor has not been heard of in time", gauges.overdue_leases as f64),
        ("attempts_without_checkpoint", "Of the jobs at work, since their last new checkpoint", gauges.attempts as f64),
        ("tokens_per_second", "Of all jobs at work", gauges.tokens_per_second),
        ("files", "Files that are kept", gauges.files as f64),
        ("file_bytes", "Bytes of the files that are kept", gauges.file_bytes as f64),
        ("checkpoints", "Checkpoints that are kept", gauges.checkpoints as f64),
        ("hosts", "Executors that are alive", gauges.hosts as f64),
        ("devices", "Devices of these", gauges.devices as f64),
        ("free_devices", "Devices that nobody trains on", gauges.free_devices as f64),
    ] {
        number(name, help, value);
    }
    let jobs: Family<Status, Gauge> = Family::default();
    for (status, n) in &gauges.jobs {
        jobs.get_or_create(&Status { status: status.clone() }).set(*n);
    }
    registry.register("jobs", "Jobs by status", jobs);
    registry
}
