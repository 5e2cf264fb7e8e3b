//! The client commands against a listening server: what they print, what they leave on disk, how they end.

use std::fs;

use longhaul::{
    api::{self, Settings},
    client::{self, Failure, create, download, http::Client, jobs, upload, watch},
    domain::Invalid,
    store::queue::{Settlement, Work},
};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::support::{
    form::Form,
    rows::{self, LONG},
    service::Service,
};

/// A service that listens, until it is dropped.
struct Listening {
    service: Service,
    server: String,
    stop: CancellationToken,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn listening(name: &str) -> Listening {
    let service = Service::new(name).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = format!("http://{}", listener.local_addr().unwrap());
    let stop = CancellationToken::new();
    tokio::spawn(api::serve(listener, service.store.clone(), Settings::default(), stop.clone()));
    Listening { service, server, stop }
}

/// Runs a command as its process would; answers what it printed and how it ended.
async fn run<A: Clone + Send + 'static>(
    server: &str,
    args: A,
    command: fn(&A, &Client, &mut dyn std::io::Write) -> client::Result,
) -> (String, client::Result) {
    let server = server.to_owned();
    let work = move || {
        let mut out = Vec::new();
        let ended = Client::new(&server).and_then(|client| command(&args, &client, &mut out));
        (String::from_utf8(out).unwrap(), ended)
    };
    tokio::task::spawn_blocking(work).await.unwrap()
}

fn status(ended: client::Result) -> (u8, String) {
    ended.map_or_else(|failure| (failure.exit_status(), failure.to_string()), |()| (0, String::new()))
}

#[tokio::test]
async fn upload_create_list_show_and_cancel() {
    let at = listening("commands").await;
    let content: Vec<u8> = (0..3_000_001u32).map(|i| (i >> 7) as u8).collect();
    let (first, second) = (at.service.sandbox.join("a \"b\".txt"), at.service.sandbox.join("c.jsonl"));
    fs::write(&first, &content).unwrap();
    fs::write(&second, "{\"text\": \"x\"}").unwrap();
    let args = |files, json| upload::Args { files, json, ..upload::Args::default() };
    let (out, ended) = run(&at.server, args(vec![first, second], false), upload::run).await;
    assert_eq!(ended, Ok(()));
    let ids: Vec<String> = out.lines().map(str::to_owned).collect();
    assert_eq!(ids.len(), 2, "{out}");
    assert!(at.service.get(&format!("/v1/files/{}/content", ids[0])).await.bytes == content);
    // In parts, of which some hold the same bytes and are there already, from a client that is gone.
    let alike = at.service.sandbox.join("alike.txt");
    fs::write(&alike, [[b'x'; 1000].repeat(5), b"the end".to_vec()].concat()).unwrap();
    let new = json!({"filename": "alike.txt", "purpose": "fine-tune", "bytes": 5007, "mime_type": "text/plain"});
    let upload = at.service.post("/v1/uploads", &new).await.json()["id"].as_str().unwrap().to_owned();
    for _ in 0..2 {
        let form = Form::part(&[b'x'; 1000]);
        at.service.send(form.request_to(&format!("/v1/uploads/{upload}/parts"))).await.json();
    }
    let in_parts = upload::Args { part_bytes: 1000, at_once: 3, ..args(vec![alike.clone()], true) };
    let (out, ended) = run(&at.server, in_parts, upload::run).await;
    assert_eq!(ended, Ok(()));
    let file: Value = serde_json::from_str(&out).unwrap();
    let path = format!("/v1/files/{}/content", file["id"].as_str().unwrap());
    assert!(at.service.get(&path).await.bytes == fs::read(&alike).unwrap());
    let done = at.service.get(&format!("/v1/uploads/{upload}")).await.json();
    assert_eq!((&done["status"], &done["file"]["id"]), (&"completed".into(), &file["id"]));
    let png = at.service.sandbox.join("d.png");
    fs::write(&png, "x").unwrap();
    let (_, ended) = run(&at.server, args(vec![png], true), upload::run).await;
    assert_eq!(status(ended).0, 4, "the server refuses it");
    let (_, ended) = run(&at.server, args(vec![at.service.sandbox.join("none.txt")], true), upload::run).await;
    assert_eq!(status(ended).0, 1);

    let asked = create::Args {
        model: Some("tiny".into()),
        training_files: ids.clone(),
        settings: vec!["training.schedule=linear".into(), "training.max_steps=3".into()],
        ..create::Args::default()
    };
    let jobs = async |command| run(&at.server, jobs::Args { command }, jobs::run).await;
    let (out, ended) = jobs(jobs::Command::Create(asked.clone())).await;
    assert_eq!(ended, Ok(()));
    let id = out.trim().to_owned();
    let job = at.service.get(&format!("/v1/fine_tuning/jobs/{id}")).await.json();
    assert_eq!((&job["training"]["schedule"], &job["training"]["max_steps"]), (&"linear".into(), &3.into()));
    assert_eq!(job["training"]["additional_training_files"][0], ids[1]);
    let wrong = create::Args { settings: vec!["training.max_steps=0".into()], ..asked };
    let (out, ended) = jobs(jobs::Command::Create(wrong)).await;
    let (code, message) = status(ended);
    assert_eq!((out.as_str(), code), ("", 4));
    assert!(message.contains("training.max_steps"), "{message}");

    let (out, _) = jobs(jobs::Command::List { limit: 5, json: false }).await;
    assert!(out.starts_with(&id) && out.contains("validating_files") && out.lines().count() == 1, "{out}");
    let (out, _) = jobs(jobs::Command::Show { job: id.clone(), json: true }).await;
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap(), job);
    let steer = || jobs::Steer { job: id.clone(), json: false };
    let (out, _) = jobs(jobs::Command::Pause(steer())).await;
    assert_eq!(out, format!("{id} paused\n"));
    let (out, _) = jobs(jobs::Command::Resume(steer())).await;
    assert_eq!(out, format!("{id} validating_files\n"));
    let (out, _) = jobs(jobs::Command::Cancel(steer())).await;
    assert_eq!(out, format!("{id} cancelled\n"));
    let (_, ended) = jobs(jobs::Command::Show { job: "ftjob-none".into(), json: false }).await;
    assert_eq!(status(ended).0, 4);
    let (_, ended) = jobs(jobs::Command::Show { job: "../files".into(), json: false }).await;
    assert_eq!(status(ended).0, 2);
    let (_, ended) = run(&at.server, watch::Args { job: id.clone(), json: false }, watch::run).await;
    assert_eq!(ended, Err(Failure::JobCancelled(id)));
    let (_, ended) = run("http://127.0.0.1:1", watch::Args { job: "ftjob-x".into(), json: false }, watch::run).await;
    assert_eq!(status(ended).0, 3, "no server answers there");
}

#[tokio::test]
async fn watching_ends_as_the_job_does() {
    let at = listening("watch").await;
    let store = &at.service.store;
    let held = rows::running(store, LONG).await;
    assert!(store.record_step(&held.job, held.epoch, &rows::step(1, 1)).await.unwrap());
    let watching = run(&at.server, watch::Args { job: held.job.to_string(), json: false }, watch::run);
    let training = async {
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        rows::checkpoint(store, &at.service.sandbox, &held, 1, true, &[("config.json", b"{}")]).await;
        let done = Settlement::Succeeded { trained_tokens: None };
        assert!(store.settle_job(&held.job, held.epoch, &done).await.unwrap());
    };
    let ((out, ended), ()) = tokio::join!(watching, training);
    assert_eq!(ended, Ok(()));
    for part in ["Fine-tuning job started", "step 1/1", "loss 2.5000", "succeeded: ft:tiny:longhaul::"] {
        assert!(out.contains(part), "{part} is missing: {out}");
    }
    assert_eq!(out.matches("Fine-tuning job started").count(), 1, "nothing is told twice: {out}");

    rows::queued(store).await;
    let held = rows::claim(store, Work::Train, LONG).await.unwrap();
    let error = Invalid::new("training_file", "line 3 is no document");
    assert!(store.settle_job(&held.job, held.epoch, &Settlement::Failed { error }).await.unwrap());
    let (out, ended) = run(&at.server, watch::Args { job: held.job.to_string(), json: true }, watch::run).await;
    let failure = ended.unwrap_err();
    assert_eq!(failure.exit_status(), 5);
    assert!(failure.to_string().contains("line 3"), "{failure}");
    for line in out.lines() {
        assert_eq!(serde_json::from_str::<Value>(line).unwrap()["object"], "fine_tuning.job.event");
    }
}

#[tokio::test]
async fn a_download_goes_on_where_it_stopped_and_refuses_what_is_wrong() {
    let at = listening("download").await;
    let (store, sandbox) = (&at.service.store, &at.service.sandbox);
    let held = rows::running(store, LONG).await;
    let weights: Vec<u8> = (0..900_001u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let files: [(&str, &[u8]); 3] = [("a/config.json", b"{}"), ("model.safetensors", &weights), ("resume/state", b"s")];
    let (id, _) = rows::checkpoint(store, sandbox, &held, 1, true, &files).await;
    let args = |what: &str, to: &str, all| download::Args {
        what: what.to_owned(),
        to: Some(sandbox.join(to)),
        all,
        json: false,
    };
    let get = async |args| run(&at.server, args, download::run).await;

    let model = store.checkpoint(&id).await.unwrap().unwrap().model_name;
    for (n, what) in [held.job.as_str(), id.as_str(), &model].into_iter().enumerate() {
        let folder = format!("whole-{n}");
        let (out, ended) = get(args(what, &folder, n == 0)).await;
        assert_eq!(ended, Ok(()), "{what}");
        assert_eq!(out.trim(), sandbox.join(&folder).to_str().unwrap());
        assert!(fs::read(sandbox.join(&folder).join("model.safetensors")).unwrap() == weights);
        assert_eq!(sandbox.join(&folder).join("resume/state").exists(), n == 0);
    }

    let (out, ended) = get(download::Args { json: true, ..args(id.as_str(), "whole-0", false) }).await;
    assert_eq!(ended, Ok(()));
    let told: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&told["checkpoint"], &told["job"]), (&id.as_str().into(), &held.job.as_str().into()));
    assert_eq!((&told["files"][1]["path"], &told["files"][1]["bytes"]), (&"model.safetensors".into(), &900_001.into()));

    // The first half is right on this disk and wrong on the server's: only a download that goes on can be right.
    let object = sandbox.join(format!("weights/checkpoints/{id}/model.safetensors"));
    let mut damaged = weights.clone();
    damaged[..400_000].fill(0);
    fs::write(&object, &damaged).unwrap();
    fs::create_dir(sandbox.join("part")).unwrap();
    fs::write(sandbox.join("part/model.safetensors.part"), &weights[..450_000]).unwrap();
    assert_eq!(get(args(id.as_str(), "part", false)).await.1, Ok(()));
    assert!(fs::read(sandbox.join("part/model.safetensors")).unwrap() == weights);
    assert!(!sandbox.join("part/model.safetensors.part").exists());

    let (_, ended) = get(args(id.as_str(), "wrong", false)).await;
    let (code, message) = status(ended);
    assert_eq!(code, 1);
    assert!(message.contains("checksum"), "{message}");
    assert!(!sandbox.join("wrong/model.safetensors").exists(), "a wrong file never has the name of a right one");

    // What lies here is of another file: thrown away, and fetched from the beginning.
    fs::write(&object, &weights).unwrap();
    fs::create_dir(sandbox.join("other")).unwrap();
    fs::write(sandbox.join("other/model.safetensors.part"), vec![9; 450_000]).unwrap();
    assert_eq!(get(args(id.as_str(), "other", false)).await.1, Ok(()));
    assert!(fs::read(sandbox.join("other/model.safetensors")).unwrap() == weights);
    for (what, code) in [("nonsense", 2), ("ft:none", 4), ("ftckpt_none", 2), ("ftjob-none", 4)] {
        assert_eq!(status(get(args(what, "none", false)).await.1).0, code, "{what}");
    }
}
