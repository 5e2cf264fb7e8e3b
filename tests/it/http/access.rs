//! Who is let in: every route of the contract times every kind of key, and what becomes of keys over their life.
//!
//! The routes are read from the contract, so that a new one is tried as soon as it is there.

use std::{collections::BTreeMap, time::Duration};

use axum::http::Method;
use longhaul::{
    api::{Settings, openapi_json},
    domain::{ProjectId, Scope, access::Secret},
};
use serde_json::{Value, json};
use sqlx::Executor;

use super::checkpoints::finished;
use crate::support::service::{Answer, Service};

/// Routes that are for whoever comes.
const OPEN: [&str; 2] = ["/healthz", "/readyz"];
const WRONG_KEY: &str = "Invalid credentials in Authorization header";

/// Every route and method of the contract.
fn routes() -> Vec<(String, Method)> {
    let contract: Value = serde_json::from_str(&openapi_json()).unwrap();
    let mut routes = Vec::new();
    for (path, operations) in contract["paths"].as_object().unwrap() {
        for method in operations.as_object().unwrap().keys() {
            routes.push((path.clone(), method.to_uppercase().parse().unwrap()));
        }
    }
    assert!(routes.len() > 40, "only {} routes", routes.len());
    routes
}

/// One of everything that a path can name, of the default project.
async fn everything(service: &Service) -> BTreeMap<&'static str, String> {
    let (job, checkpoints) = finished(service).await;
    service.host(8 << 30).await;
    let file = service.upload("a.txt", b"some text").await;
    let model = service.get(&format!("/v1/fine_tuning/jobs/{job}")).await.json()["fine_tuned_model"].clone();
    let model = model.as_str().unwrap().to_owned();
    let hub = service.get(&format!("/v1/models/{model}")).await.json()["hub"]["repository"].clone();
    let (namespace, name) = hub.as_str().unwrap().split_once('/').unwrap();
    let upload = json!({"filename": "b.txt", "purpose": "fine-tune", "bytes": 9, "mime_type": "text/plain"});
    let upload = service.post("/v1/uploads", &upload).await.json();
    let webhook = json!({"name": "w", "url": "http://127.0.0.1:9/hook"});
    let webhook = service.post("/v1/webhook_endpoints", &webhook).await.json();
    let plan = json!({"model": "tiny", "training_file": file});
    let plan = service.post_with("/v1/fine_tuning/plans", &plan, &[("prefer", "wait=0")]).await.json();
    let permissions = format!("/v1/fine_tuning/checkpoints/{model}/permissions");
    let permission = service.post(&permissions, &json!({"project_ids": ["proj_nobody"]})).await.ids();
    let id = |object: &Value| object["id"].as_str().unwrap().to_owned();
    BTreeMap::from([
        ("file_id", file),
        ("upload_id", id(&upload)),
        ("job_id", job.to_string()),
        ("checkpoint_id", checkpoints[1].to_string()),
        ("plan_id", id(&plan)),
        ("model", model),
        ("permission_id", permission[0].clone()),
        ("webhook_endpoint_id", id(&webhook)),
        ("namespace", namespace.to_owned()),
        ("name", name.to_owned()),
        ("revision", "main".to_owned()),
        ("path", "config.json".to_owned()),
    ])
}

/// A path with its parameters filled in. One that `values` does not know ends the test: it must learn about it.
fn filled(path: &str, values: &BTreeMap<&'static str, String>) -> String {
    let segment = |segment: &str| match segment.strip_prefix('{').and_then(|name| name.strip_suffix('}')) {
        None => segment.to_owned(),
        Some(name) => {
            let name = name.trim_start_matches('*');
            if (name, path.contains("/tree/")) == ("path", true) {
                return "folder".to_owned();
            }
            values.get(name).unwrap_or_else(|| panic!("{path}: what is a {name}? Give the test one")).clone()
        }
    };
    path.split('/').map(segment).collect::<Vec<_>>().join("/")
}

/// The refusal of a key: 401, and in the words of whoever asks.
fn refused(answer: &Answer, path: &str) {
    assert_eq!(answer.error(401, "")["code"], "invalid_api_key", "{path}");
    assert_eq!(answer.header("www-authenticate"), Some("Bearer"), "{path}");
    assert_eq!(answer.header("x-error-message").is_some(), path.starts_with("/hf/"), "{path}");
}

/// What an answer says, whatever the ids in it.
fn without(answer: &Answer, values: &BTreeMap<&'static str, String>) -> (u16, String) {
    let mut text = String::from_utf8_lossy(&answer.bytes).into_owned();
    for value in values.values() {
        text = text.replace(value, "-");
    }
    (answer.status, text)
}

#[tokio::test]
async fn every_route_lets_in_whom_it_should_and_nobody_else() {
    let service = Service::new("access").await;
    let own = everything(&service).await;
    // Ids of the same kinds that name nothing.
    let ghosts: BTreeMap<&str, String> = own
        .iter()
        .map(|(name, value)| match *name {
            "namespace" | "revision" | "path" => (*name, value.clone()),
            _ => (*name, format!("{}{}", &value[..value.len() - 1], if value.ends_with('x') { 'y' } else { 'x' })),
        })
        .collect();
    let tables = ["files", "uploads", "jobs", "checkpoints", "plans", "webhooks", "checkpoint_permissions"];
    let mut before = Vec::new();
    for table in tables {
        before.push(service.count(table).await);
    }

    let (mine, other) = (ProjectId::default_project(), service.project("other").await);
    let reads = service.key(&mine, Scope::Read).await;
    let writes = service.key(&mine, Scope::Write).await;
    let admin = service.key(&mine, Scope::Admin).await;
    let others = service.key(&other, Scope::Admin).await;
    let expired = service.key_for(&mine, Scope::Admin, Some(Duration::ZERO)).await;
    let revoked = service.key(&mine, Scope::Admin).await;
    let last = service.store.keys().await.unwrap().pop().unwrap();
    assert!(service.store.revoke_key(&last.id).await.unwrap());
    let (unknown, malformed) = (Secret::random(), &admin[..admin.len() - 1]);

    for (route, method) in routes() {
        let path = filled(&route, &own);
        let what = format!("{method} {path}");
        let ask = async |key: &str| service.ask_as(key, method.clone(), &path).await;
        if OPEN.contains(&route.as_str()) {
            assert_eq!(service.get(&path).await.status, 200, "{what}");
            continue;
        }
        // Nobody without a key that holds.
        refused(&service.ask(method.clone(), &path, &[]).await, &path);
        for key in [&expired, &revoked, unknown.reveal(), malformed, "sk-12345", ""] {
            let answer = ask(key).await;
            refused(&answer, &path);
            if path.starts_with("/hf/") {
                assert_eq!(answer.header("x-error-message"), Some(WRONG_KEY), "{what}");
            }
        }
        // Nothing beyond the scope.
        let administers = route.contains("/permissions");
        let looks = method == Method::GET;
        for (key, may) in [(&reads, looks && !administers), (&writes, !administers), (&admin, true)] {
            if may && !looks {
                // Changing things is for other tests; of an empty body it is enough that the scope is not what is refused.
                continue;
            }
            let answer = ask(key).await;
            if may {
                assert_eq!(answer.status, 200, "{what}: {}", String::from_utf8_lossy(&answer.bytes));
            } else {
                assert_eq!(answer.error(403, "")["code"], "insufficient_permissions", "{what}");
            }
        }
        // Nothing of another project, not even whether it is there.
        let answer = ask(&others).await;
        if route.contains('{') {
            let ghost = service.ask_as(&others, method.clone(), &filled(&route, &ghosts)).await;
            // A body that cannot be read may be refused before anything is looked for.
            let unread = method == Method::POST && answer.status == 400;
            assert!(answer.status == 404 || unread, "{what}: {}", String::from_utf8_lossy(&answer.bytes));
            assert_eq!(without(&answer, &own), without(&ghost, &ghosts), "{what}");
            assert_eq!(answer.header("x-error-code"), ghost.header("x-error-code"), "{what}");
        } else if looks {
            let text = String::from_utf8_lossy(&answer.bytes).into_owned();
            assert_eq!(answer.status, 200, "{what}: {text}");
            let ids = ["file_id", "upload_id", "job_id", "webhook_endpoint_id", "checkpoint_id"];
            assert!(ids.iter().all(|id| !text.contains(&own[id])), "{what}: {text}");
        } else {
            assert_eq!(answer.status, 400, "an empty body: {what}");
        }
    }
    for (table, before) in tables.iter().zip(before) {
        assert_eq!(service.count(table).await, before, "{table}");
    }
    // A cursor of another project names nothing either.
    for (path, id) in [
        ("/v1/files", &own["file_id"]),
        ("/v1/uploads", &own["upload_id"]),
        ("/v1/fine_tuning/jobs", &own["job_id"]),
        ("/v1/webhook_endpoints", &own["webhook_endpoint_id"]),
    ] {
        service.ask_as(&others, Method::GET, &format!("{path}?after={id}")).await.error(400, "after");
        assert_eq!(service.ask_as(&reads, Method::GET, &format!("{path}?after={id}")).await.status, 200);
    }
}

#[tokio::test]
async fn what_changes_things_wants_a_key_that_may() {
    let service = Service::new("scopes").await;
    service.host(8 << 30).await;
    let mine = ProjectId::default_project();
    let (reads, writes) = (service.key(&mine, Scope::Read).await, service.key(&mine, Scope::Write).await);
    let bearer = |key: &str| format!("Bearer {key}");
    let form = |key: &str| {
        let mut request = crate::support::form::Form::training("a.txt", b"some text").request();
        request.headers_mut().insert("authorization", bearer(key).parse().unwrap());
        request
    };
    service.send(form(&reads)).await.error(403, "");
    let file = service.send(form(&writes)).await.json()["id"].clone();
    let body = json!({"model": "tiny", "training_file": file});
    service.post_as(&reads, "/v1/fine_tuning/jobs", &body).await.error(403, "");
    assert_eq!(service.count("jobs").await, 0);
    let job = service.post_as(&writes, "/v1/fine_tuning/jobs", &body).await.json();
    assert_eq!(job["organization_id"], mine.as_str());
    let cancel = format!("/v1/fine_tuning/jobs/{}/cancel", job["id"].as_str().unwrap());
    service.ask_as(&reads, Method::POST, &cancel).await.error(403, "");
    assert_eq!(service.ask_as(&writes, Method::POST, &cancel).await.json()["status"], "cancelled");
}

#[tokio::test]
async fn the_first_key_closes_the_service_for_good() {
    let service = Service::new("first-key").await;
    // A key that somebody sends while nobody needs one is not looked at.
    assert_eq!(service.ask_as("sk-unused", Method::GET, "/v1/files").await.status, 200);
    let key = service.key(&ProjectId::default_project(), Scope::Read).await;
    service.get("/v1/files").await.error(401, "");
    service.ask_as("sk-unused", Method::GET, "/v1/files").await.error(401, "");
    assert_eq!(service.ask_as(&key, Method::GET, "/v1/files").await.status, 200);
    // Also what is no route is told to nobody.
    service.get("/v1/nothing").await.error(401, "");
    service.ask_as(&key, Method::GET, "/v1/nothing").await.error(404, "");

    // Its use is noted, once a minute.
    let used = service.store.keys().await.unwrap()[0].clone();
    assert!(used.last_used_at.is_some());
    let mut connection = service.database.connection().await;
    let noted = "SELECT xmin::text FROM api_keys";
    let version: String = sqlx::query_scalar(noted).fetch_one(&mut connection).await.unwrap();
    service.ask_as(&key, Method::GET, "/v1/files").await.json();
    assert_eq!(sqlx::query_scalar::<_, String>(noted).fetch_one(&mut connection).await.unwrap(), version);
    connection.execute("UPDATE api_keys SET last_used_at = now() - interval '61 seconds'").await.unwrap();
    service.ask_as(&key, Method::GET, "/v1/files").await.json();
    let age = "SELECT extract(epoch FROM now() - last_used_at)::bigint < 30 FROM api_keys";
    assert!(sqlx::query_scalar::<_, bool>(age).fetch_one(&mut connection).await.unwrap());

    // Revoked it fails at once, and the service stays closed.
    assert!(service.store.revoke_key(&used.id).await.unwrap() && service.store.revoke_key(&used.id).await.unwrap());
    service.ask_as(&key, Method::GET, "/v1/files").await.error(401, "");
    service.get("/v1/files").await.error(401, "");
    // The key itself is nowhere.
    let kept: String =
        sqlx::query_scalar("SELECT api_keys::text FROM api_keys").fetch_one(&mut connection).await.unwrap();
    assert!(!kept.contains(&key[4..]), "{kept}");
    assert!(kept.contains(&Secret::parse(&key).unwrap().sha256()));
}

#[tokio::test]
async fn keys_can_be_asked_for_before_there_is_one() {
    let service = Service::with("require", Settings { require_keys: true, ..Settings::default() }).await;
    service.get("/v1/models").await.error(401, "");
    assert_eq!(service.get("/readyz").await.status, 200);
    let key = service.key(&ProjectId::default_project(), Scope::Read).await;
    assert_eq!(service.ask_as(&key, Method::GET, "/v1/models").await.status, 200);
}
