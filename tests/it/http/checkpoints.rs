//! Checkpoints and models over HTTP: the list, the manifest, one file in parts, the whole as an archive that other
//! programs read.

use std::{fs, process::Command};

use axum::http::Method;
use longhaul::{
    domain::{CheckpointId, JobId, hex},
    store::queue::Settlement,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::{
    rows::{self, LONG},
    service::Service,
};

/// A path that does not fit the name field of a tar header.
fn deep() -> String {
    format!("{}/tokenizer.json", ["folder"; 20].join("/"))
}

/// Files of a checkpoint, in the order of their paths: sizes of none, one, a block and more than a block of the archive.
pub(super) fn files() -> Vec<(String, Vec<u8>)> {
    let weights = (0..1_300_001u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    vec![
        ("config.json".into(), b"{}".to_vec()),
        ("empty.txt".into(), Vec::new()),
        (deep(), vec![b'x'; 512]),
        ("model.safetensors".into(), weights),
        ("resume/state".into(), vec![7; 1000]),
    ]
}

/// A job with one checkpoint on the way and one at its end.
pub(super) async fn finished(service: &Service) -> (JobId, Vec<CheckpointId>) {
    let held = rows::running(&service.store, LONG).await;
    let files = files();
    let files: Vec<(&str, &[u8])> = files.iter().map(|(path, content)| (&**path, &**content)).collect();
    let mut ids = Vec::new();
    for (step, last) in [(2, false), (4, true)] {
        ids.push(rows::checkpoint(&service.store, &service.sandbox, &held, step, last, &files).await.0);
    }
    let done = Settlement::Succeeded { trained_tokens: Some(512) };
    assert!(service.store.settle_job(&held.job, held.epoch, &done).await.unwrap());
    (held.job, ids)
}

fn path(job: &JobId, checkpoint: &CheckpointId) -> String {
    format!("/v1/fine_tuning/jobs/{job}/checkpoints/{checkpoint}")
}

#[tokio::test]
async fn checkpoints_are_listed_with_their_numbers() {
    let service = Service::new("checkpoints").await;
    let (job, ids) = finished(&service).await;
    let list = format!("/v1/fine_tuning/jobs/{job}/checkpoints");
    let page = service.get(&list).await.json();
    assert_eq!(service.get(&list).await.ids(), [ids[1].as_str(), ids[0].as_str()]);
    assert_eq!((&page["first_id"], &page["last_id"]), (&json!(ids[1]), &json!(ids[0])));
    let name = format!("ft:tiny:longhaul::{}", &job.as_str()[job.as_str().len() - 8..]);
    for (entry, step, model) in [(0, 4, name.clone()), (1, 2, format!("{name}:ckpt-step-2"))] {
        let checkpoint = &page["data"][entry];
        assert_eq!(checkpoint["object"], "fine_tuning.job.checkpoint");
        assert_eq!((&checkpoint["step_number"], &checkpoint["metrics"]["step"]), (&json!(step), &json!(step)));
        assert_eq!(checkpoint["metrics"]["train_loss"], json!(1.5));
        assert_eq!(checkpoint["fine_tuning_job_id"], json!(job));
        assert_eq!(checkpoint["fine_tuned_model_checkpoint"], json!(model));
    }
    assert_eq!(service.get(&format!("{list}?limit=1")).await.ids(), [ids[1].as_str()]);
    assert_eq!(service.get(&format!("{list}?limit=1&after={}", ids[1])).await.ids(), [ids[0].as_str()]);
    assert_eq!(service.get(&format!("{list}?limit=1")).await.json()["has_more"], true);
    service.get(&format!("{list}?after=ftckpt_none")).await.error(400, "after");
    service.get("/v1/fine_tuning/jobs/ftjob-none/checkpoints").await.error(404, "");
}

#[tokio::test]
async fn models_are_those_of_live_hosts_and_those_that_jobs_made() {
    let service = Service::new("models").await;
    let (job, ids) = finished(&service).await;
    service.host(1 << 30).await;
    let name = service.get(&format!("/v1/fine_tuning/jobs/{job}")).await.json()["fine_tuned_model"].clone();
    let name = name.as_str().unwrap();
    assert_eq!(service.get("/v1/models").await.ids(), ["broken", "tiny", name]);
    let base = service.get("/v1/models/tiny").await.json();
    assert_eq!((&base["object"], &base["owned_by"]), (&json!("model"), &json!("longhaul")));
    assert!(base["created"].is_i64() && base.get("checkpoint_id").is_none());
    assert!(service.get("/v1/models/broken").await.json()["problem"].as_str().unwrap().contains("family"));
    let tuned = service.get(&format!("/v1/models/{name}")).await.json();
    assert_eq!((&tuned["fine_tuning_job_id"], &tuned["checkpoint_id"]), (&json!(job), &json!(ids[1])));
    let encoded = format!("/v1/models/{}:ckpt-step-2", name.replace(':', "%3A"));
    assert_eq!(service.get(&encoded).await.json()["checkpoint_id"], json!(ids[0]));
    for unknown in ["none", "ft:none", "a%2Fb", "%00"] {
        service.get(&format!("/v1/models/{unknown}")).await.error(404, "");
    }
}

#[tokio::test]
async fn the_manifest_names_every_file_with_its_digest() {
    let service = Service::new("manifest").await;
    let (job, ids) = finished(&service).await;
    let path = format!("{}/files", path(&job, &ids[1]));
    let entry = |(path, content): &(String, Vec<u8>)| json!({"path": path, "bytes": content.len(), "sha256": hex(&Sha256::digest(content))});
    let all: Vec<Value> = files().iter().map(entry).collect();
    let manifest = service.get(&format!("{path}?include=all")).await.json();
    assert_eq!(manifest, json!({"object": "list", "data": all, "has_more": false}));
    assert_eq!(service.get(&path).await.json()["data"], json!(all[..4]), "the state is no part of the model");
    service.get(&format!("{path}?include=some")).await.error(400, "include");
}

#[tokio::test]
async fn one_file_comes_whole_and_in_parts() {
    let service = Service::new("file").await;
    let (job, ids) = finished(&service).await;
    for (name, content) in files() {
        let answer = service.get(&format!("{}/files/{name}", path(&job, &ids[0]))).await;
        assert_eq!(answer.status, 200, "{name}");
        assert!(answer.bytes == content, "{name}");
        assert_eq!(answer.header("etag"), Some(&*format!("\"{}\"", hex(&Sha256::digest(&content)))));
    }
    let content = &files()[3].1;
    let weights = format!("{}/files/model.safetensors", path(&job, &ids[0]));
    let tag = format!("\"{}\"", hex(&Sha256::digest(content)));
    let rest = [("range", "bytes=600000-"), ("if-range", &*tag)];
    let part = service.ask(Method::GET, &weights, &rest).await;
    assert_eq!((part.status, part.header("content-range")), (206, Some("bytes 600000-1300000/1300001")));
    assert!(part.bytes == content[600_000..]);
    let stale = service.ask(Method::GET, &weights, &[rest[0], ("if-range", "\"other\"")]).await;
    assert_eq!((stale.status, stale.bytes.len()), (200, content.len()));
    let head = service.ask(Method::HEAD, &weights, &[]).await;
    assert_eq!((head.status, head.bytes.len(), head.header("content-length")), (200, 0, Some("1300001")));
    assert_eq!(service.ask(Method::GET, &weights, &[("if-none-match", &tag)]).await.status, 304);
    service.ask(Method::GET, &weights, &[("range", "bytes=1300001-")]).await.error(416, "");

    for name in ["none", "../x", "..%2F..%2Fsource", "%2Fetc%2Fpasswd", "folder"] {
        service.get(&format!("{}/files/{name}", path(&job, &ids[0]))).await.error(404, "");
    }
    let other = rows::job(&service.store).await;
    service.get(&format!("{}/files/config.json", path(&other, &ids[0]))).await.error(404, "");
    service.get(&format!("{}/files", path(&job, &"ftckpt_none".parse().unwrap()))).await.error(404, "");
}

#[tokio::test]
async fn the_archive_unpacks_to_the_files() {
    let service = Service::new("archive").await;
    let (job, ids) = finished(&service).await;
    let archive = format!("{}/archive", path(&job, &ids[1]));
    let whole = service.get(&archive).await;
    assert_eq!((whole.status, whole.header("content-type")), (200, Some("application/x-tar")));
    assert_eq!(whole.header("content-length"), Some(&*whole.bytes.len().to_string()));
    assert!(whole.header("content-disposition").unwrap().contains(&format!("{}.tar", ids[1])));
    for (include, expected) in [("model", &files()[..4]), ("all", &files()[..])] {
        let tar = service.get(&format!("{archive}?include={include}")).await;
        let (packed, folder) = (service.sandbox.join(format!("{include}.tar")), service.sandbox.join(include));
        fs::write(&packed, &tar.bytes).unwrap();
        fs::create_dir(&folder).unwrap();
        let unpacked = Command::new("tar").arg("-xf").arg(&packed).arg("-C").arg(&folder).output().unwrap();
        assert!(unpacked.status.success() && unpacked.stderr.is_empty(), "{unpacked:?}");
        for (name, content) in expected {
            assert!(fs::read(folder.join(name)).unwrap() == *content, "{include}: {name}");
        }
        assert_eq!(folder.join("resume/state").exists(), include == "all");
    }
    let again = service.get(&archive).await;
    assert!(again.bytes == whole.bytes && again.header("etag") == whole.header("etag"), "the same bytes, always");
    for (first, last) in [(0, 511), (500, 1600), (3000, 900_000), (1_300_000, whole.bytes.len() - 1)] {
        let part = service.ask(Method::GET, &archive, &[("range", &format!("bytes={first}-{last}"))]).await;
        assert_eq!(part.status, 206);
        assert!(part.bytes == whole.bytes[first..=last], "{first} to {last}");
    }
    let tag = whole.header("etag").unwrap();
    assert_ne!(service.get(&format!("{archive}?include=all")).await.header("etag"), Some(tag));
    assert_eq!(service.ask(Method::GET, &archive, &[("if-none-match", tag)]).await.status, 304);
}
