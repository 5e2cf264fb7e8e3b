//! What belongs to whom: two projects that share a server and see nothing of one another, but for what one opens.

use axum::http::Method;
use longhaul::domain::{ProjectId, Scope};
use serde_json::{Value, json};

use super::checkpoints::finished;
use crate::support::{form::Form, service::Service};

/// A file of whoever holds the key.
async fn upload(service: &Service, key: &str) -> String {
    let mut request = Form::training("a.txt", b"some text").request();
    request.headers_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    service.send(request).await.json()["id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn jobs_take_files_and_keys_of_their_own_project_only() {
    let service = Service::new("two-projects").await;
    service.host(8 << 30).await;
    let (mine, other) = (ProjectId::default_project(), service.project("other").await);
    let (a, b) = (service.key(&mine, Scope::Write).await, service.key(&other, Scope::Write).await);
    let (file_a, file_b) = (upload(&service, &a).await, upload(&service, &b).await);
    let jobs = "/v1/fine_tuning/jobs";
    let body = |file: &str| json!({"model": "tiny", "training_file": file, "seed": 1});

    // A file of another project is as good as none, for jobs and for plans.
    for path in [jobs, "/v1/fine_tuning/plans"] {
        let foreign = service.post_as(&b, path, &body(&file_a)).await.error(400, "training_file");
        let absent = service.post_as(&b, path, &body("file-none")).await.error(400, "training_file");
        let message = |error: &Value| error["message"].as_str().unwrap().replace(&file_a, "file-none");
        assert_eq!((message(&foreign), &foreign["code"]), (message(&absent), &absent["code"]), "{path}");
    }

    // The same key and the same body in two projects make two jobs; again in one, the same job.
    let post = async |key: &str, file: &str, extra: (&str, &str)| {
        let bearer = format!("Bearer {key}");
        let answer = service.post_with(jobs, &body(file), &[("authorization", &bearer), extra]).await;
        answer.json()["id"].as_str().unwrap().to_owned()
    };
    let idempotent = ("idempotency-key", "one");
    let (job_a, job_b) = (post(&a, &file_a, idempotent).await, post(&b, &file_b, idempotent).await);
    assert_ne!(job_a, job_b);
    assert_eq!(post(&a, &file_a, idempotent).await, job_a);
    assert_eq!(post(&b, &file_b, idempotent).await, job_b);
    // A create that is sent again finds the job of its own project.
    let first = post(&a, &file_a, ("x-stainless-retry-count", "0")).await;
    assert_eq!(post(&a, &file_a, ("x-stainless-retry-count", "1")).await, first);

    for (key, own, foreign) in [(&a, &job_a, &job_b), (&b, &job_b, &job_a)] {
        let ids = service.ask_as(key, Method::GET, jobs).await.ids();
        assert!(ids.contains(own) && !ids.contains(foreign), "{ids:?}");
        let object = service.ask_as(key, Method::GET, &format!("{jobs}/{own}")).await.json();
        let project = if key == &a { &mine } else { &other };
        assert_eq!(object["organization_id"], project.as_str());
        for verb in ["cancel", "pause", "resume"] {
            service.ask_as(key, Method::POST, &format!("{jobs}/{foreign}/{verb}")).await.error(404, "");
        }
    }
}

#[tokio::test]
async fn webhooks_hear_of_their_own_project_only() {
    let service = Service::new("webhook-projects").await;
    let other = service.project("other").await;
    let hook = json!({"name": "w", "url": "http://127.0.0.1:9/hook"});
    let mine = service.post("/v1/webhook_endpoints", &hook).await.json()["id"].clone();
    let key = service.key(&other, Scope::Write).await;
    service.post_as(&key, "/v1/webhook_endpoints", &hook).await.json();
    finished(&service).await;
    let mut connection = service.database.connection().await;
    let told: Vec<String> =
        sqlx::query_scalar("SELECT webhook_id FROM webhook_messages").fetch_all(&mut connection).await.unwrap();
    assert_eq!(told, [mine.as_str().unwrap()]);
}

#[tokio::test]
async fn a_permission_opens_one_model_until_it_is_taken_back() {
    let service = Service::new("opened").await;
    let (job, checkpoints) = finished(&service).await;
    let (mine, other) = (ProjectId::default_project(), service.project("other").await);
    let (admin, reads) = (service.key(&mine, Scope::Admin).await, service.key(&other, Scope::Admin).await);
    let own = async |path: &str| service.ask_as(&admin, Method::GET, path).await;
    let theirs = async |path: &str| service.ask_as(&reads, Method::GET, path).await;
    let model = own(&format!("/v1/fine_tuning/jobs/{job}")).await.json()["fine_tuned_model"].clone();
    let model = model.as_str().unwrap().to_owned();
    let hub = own(&format!("/v1/models/{model}")).await.json()["hub"]["repository"].as_str().unwrap().to_owned();
    let checkpoint = format!("/v1/fine_tuning/jobs/{job}/checkpoints/{}", checkpoints[1]);
    let opened = [
        format!("/v1/models/{model}"),
        format!("{checkpoint}/files"),
        format!("{checkpoint}/files/model.safetensors"),
        format!("{checkpoint}/archive"),
        format!("/hf/api/models/{hub}"),
        format!("/hf/api/models/{hub}/revision/step-4"),
        format!("/hf/api/models/{hub}/tree/main"),
        format!("/hf/{hub}/resolve/main/model.safetensors"),
    ];
    let closed = async |why: &str| {
        for path in &opened {
            let answer = theirs(path).await;
            answer.error(404, "");
            let code = path.starts_with("/hf/").then_some("RepoNotFound");
            assert_eq!(answer.header("x-error-code"), code, "{why}: {path}");
        }
        assert!(theirs("/v1/models").await.ids().is_empty(), "{why}");
    };
    closed("before").await;

    let permissions = format!("/v1/fine_tuning/checkpoints/{model}/permissions");
    let permit = json!({"project_ids": [other.as_str()]});
    // Only the project that trained it opens it.
    service.post_as(&reads, &permissions, &permit).await.error(404, "");
    let made = service.post_as(&admin, &permissions, &permit).await.ids();
    for path in &opened {
        let (here, there) = (own(path).await, theirs(path).await);
        assert_eq!((here.status, there.status, &here.bytes), (200, 200, &there.bytes), "{path}");
    }
    assert_eq!(theirs("/v1/models").await.ids(), [model.as_str()]);
    assert_eq!(theirs(&format!("/hf/api/models/{hub}")).await.json()["private"], true);

    // What was not opened stays shut: the job, the other checkpoint, the state for continuing, and every change.
    for path in [
        format!("/v1/fine_tuning/jobs/{job}"),
        format!("/v1/fine_tuning/jobs/{job}/checkpoints"),
        format!("/v1/fine_tuning/jobs/{job}/events"),
        format!("/v1/fine_tuning/jobs/{job}/checkpoints/{}/files", checkpoints[0]),
        format!("/v1/models/{model}:ckpt-step-2"),
        format!("/hf/{hub}/resolve/step-2/config.json"),
        format!("{checkpoint}/files/resume/state"),
        permissions.clone(),
    ] {
        theirs(&path).await.error(404, "");
    }
    let listed = |answer: &Value| {
        let files = answer["data"].as_array().unwrap().iter();
        files.map(|file| file["path"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let all = format!("{checkpoint}/files?include=all");
    assert!(listed(&own(&all).await.json()).contains(&"resume/state".to_owned()));
    assert!(!listed(&theirs(&all).await.json()).contains(&"resume/state".to_owned()));
    service.ask_as(&reads, Method::DELETE, &format!("/v1/models/{model}")).await.error(404, "");

    let gone = format!("{permissions}/{}", made[0]);
    service.ask_as(&reads, Method::DELETE, &gone).await.error(404, "");
    service.ask_as(&admin, Method::DELETE, &gone).await.json();
    closed("after").await;
}
