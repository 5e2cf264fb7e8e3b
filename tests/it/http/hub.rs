//! The Hub's reading side over HTTP: names, revisions, headers, and what is told about what is not there.

use axum::http::Method;

use super::checkpoints::{files, finished};
use crate::support::service::Service;

#[tokio::test]
async fn a_job_is_a_repository_and_its_checkpoints_are_revisions() {
    let service = Service::new("hub").await;
    let (job, ids) = finished(&service).await;
    let page = service.get(&format!("/v1/fine_tuning/jobs/{job}/checkpoints")).await.json();
    let name = page["data"][0]["hub"]["repository"].as_str().unwrap().to_owned();
    assert!(name.starts_with("longhaul/") && name.ends_with(job.as_str().trim_start_matches("ftjob")), "{name}");
    assert_eq!(page["data"][1]["hub"]["revision"], "step-2");

    let info = service.get(&format!("/hf/api/models/{name}")).await.json();
    assert_eq!(info["id"], name);
    let commit = info["sha"].as_str().unwrap().to_owned();
    let at = async |revision: &str| {
        let info = service.get(&format!("/hf/api/models/{name}/revision/{revision}")).await.json();
        info["sha"].as_str().unwrap().to_owned()
    };
    assert_eq!(
        (at("main").await, at("step-4").await, at(&commit).await),
        (commit.clone(), commit.clone(), commit.clone())
    );
    assert_ne!(at("step-2").await, commit);

    let tree = service.get(&format!("/hf/api/models/{name}/tree/{commit}?recursive=true&expand=false")).await.json();
    let listed: Vec<&str> = tree.as_array().unwrap().iter().map(|entry| entry["path"].as_str().unwrap()).collect();
    let model: Vec<(String, Vec<u8>)> = files().into_iter().filter(|(path, _)| !path.starts_with("resume/")).collect();
    assert_eq!(listed, model.iter().map(|(path, _)| path.as_str()).collect::<Vec<_>>());
    assert_eq!(tree[3]["lfs"]["size"], 1_300_001);
    let folder = service.get(&format!("/hf/api/models/{name}/tree/main/folder")).await.json();
    assert_eq!(folder[0]["path"], model[2].0);

    for (path, content) in &model {
        let url = format!("/hf/{name}/resolve/main/{path}");
        let (head, whole) = (service.ask(Method::HEAD, &url, &[]).await, service.get(&url).await);
        for answer in [&head, &whole] {
            assert_eq!(answer.header("x-repo-commit"), Some(&*commit));
            assert_eq!(answer.header("content-length"), Some(&*content.len().to_string()), "{path}");
            assert!(answer.header("etag").is_some());
        }
        assert!(whole.bytes == *content, "{path}");
    }
    let url = format!("/hf/{name}/resolve/{commit}/model.safetensors");
    let part = service.ask(Method::GET, &url, &[("range", "bytes=1000000-")]).await;
    assert_eq!((part.status, part.bytes.len()), (206, 300_001));
    assert_eq!(part.header("x-repo-commit"), Some(&*commit));
    assert_eq!(ids.len(), 2);
}

#[tokio::test]
async fn what_is_not_there_is_told_as_clients_read_it() {
    let service = Service::new("hub-absent").await;
    let (job, _) = finished(&service).await;
    let page = service.get(&format!("/v1/fine_tuning/jobs/{job}/checkpoints")).await.json();
    let name = page["data"][0]["hub"]["repository"].as_str().unwrap().to_owned();
    let id = job.as_str().trim_start_matches("ftjob-");
    for (path, code) in [
        (format!("/hf/{name}/resolve/main/absent.json"), "EntryNotFound"),
        // Neither the state for continuing nor anything outside.
        (format!("/hf/{name}/resolve/main/resume/state"), "EntryNotFound"),
        (format!("/hf/{name}/resolve/main/..%2f..%2fconfig.json"), "EntryNotFound"),
        (format!("/hf/api/models/{name}/tree/main/additional_chat_templates"), "EntryNotFound"),
        (format!("/hf/{name}/resolve/step-3/config.json"), "RevisionNotFound"),
        (format!("/hf/{name}/resolve/refs%2Fpr%2F1/config.json"), "RevisionNotFound"),
        (format!("/hf/api/models/{name}/revision/{}", "0".repeat(40)), "RevisionNotFound"),
        (format!("/hf/api/models/{name}x"), "RepoNotFound"),
        (format!("/hf/api/models/other{}", name.trim_start_matches("longhaul")), "RepoNotFound"),
        (format!("/hf/api/models/longhaul/wrong-{id}"), "RepoNotFound"),
        ("/hf/api/models/longhaul/%00-%ff".into(), ""),
        ("/hf/longhaul/-/resolve/main/config.json".into(), "RepoNotFound"),
    ] {
        let answer = service.get(&path).await;
        answer.error(404, "");
        assert_eq!(answer.header("x-error-code").unwrap_or_default(), code, "{path}");
        assert_eq!(answer.header("x-repo-commit").is_some(), code == "EntryNotFound", "{path}");
    }
}
