//! The whole road with the real binary: upload, train, download; and whoever is killed on the way, the same weights.

mod base_models;
mod clients;
mod hosts;
mod hub;
mod keys;
mod page;
mod plans;
mod ranks;
mod soak;
mod uploads;

use std::{fs, path::Path};

use longhaul::{
    client::{self, http::SHORT},
    domain::hex,
};
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::{
    Sandbox,
    server::{Process, Server, trainer, trainers, until},
};

const STEPS: u64 = 24;

/// Makes the model and uploads a document; gives the body of a job.
pub fn prepare(server: &Server) -> Value {
    let document = server.folder.join("document.txt");
    let text: String =
        (0..400).map(|i| format!("Line {i}: {} green bottles on the wall.\n", (i * 7919) % 100)).collect();
    fs::write(&document, text).unwrap();
    let model = server.folder.join("models/small");
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let made = std::process::Command::new(env!("CARGO_BIN_EXE_longhaul"))
        .args(["model", "init", &path(&model), "--document", &path(&document), "--vocab-size", "300", "--layers", "2"])
        .args(["--hidden-size", "32", "--intermediate-size", "64", "--heads", "4", "--kv-heads", "2"])
        .status()
        .unwrap();
    assert!(made.success());
    let mut out = Vec::new();
    let args = client::upload::Args { files: vec![document], ..client::upload::Args::default() };
    client::upload::run(&args, &server.client, &mut out).unwrap();
    let file = String::from_utf8(out).unwrap().trim().to_owned();
    json!({
        "model": "small", "training_file": file, "validation_file": file, "seed": 7,
        "training": {
            "sequence_length": 512, "long_documents": "split", "max_steps": STEPS, "learning_rate": 3e-3,
            "checkpoint_interval": 4, "evaluation_interval": 12,
        },
    })
}

/// Waits until the server knows the model: its executor looks for new ones now and then.
pub fn published(server: &Server) {
    until("the model to be published", || {
        let models = server.client.get("/v1/models", SHORT, |_| ()).unwrap();
        models["data"].as_array().unwrap().iter().any(|model| model["id"] == "small").then_some(())
    });
}

pub fn create(server: &Server, body: &Value) -> String {
    let job = until("the model to be published", || {
        server.client.post_again("/v1/fine_tuning/jobs", body, &longhaul::domain::ids::random_suffix()).ok()
    });
    job["id"].as_str().unwrap().to_owned()
}

/// Files of the job's last checkpoint by name, with what is downloaded for each checked against its digest.
pub fn result(server: &Server, job: &str) -> Vec<(String, String)> {
    let ended = server.ends(job);
    assert_eq!(ended["status"], "succeeded", "{ended}\n{}", server.process.log());
    let list = format!("/v1/fine_tuning/jobs/{job}/checkpoints");
    let checkpoints = server.client.get(&list, SHORT, |_| ()).unwrap();
    let id = checkpoints["data"][0]["id"].as_str().unwrap();
    let target = server.folder.join(format!("download-{job}"));
    let args = client::download::Args { what: job.to_owned(), to: Some(target.clone()), all: true, json: false };
    client::download::run(&args, &server.client, &mut Vec::new()).unwrap();
    let manifest = server.client.get(&format!("{list}/{id}/files?include=all"), SHORT, |_| ()).unwrap();
    let files = manifest["data"].as_array().unwrap().iter().map(|file| {
        let path = file["path"].as_str().unwrap().to_owned();
        let digest = hex(&Sha256::digest(fs::read(target.join(&path)).unwrap()));
        assert_eq!(file["sha256"], digest, "{path}");
        (path, digest)
    });
    files.collect()
}

#[test]
fn a_disturbed_job_ends_with_the_weights_of_an_undisturbed_one() {
    let sandbox = Sandbox::new("journey");
    let mut server = Server::start(&sandbox.join("server"), &[]);
    let body = prepare(&server);

    let job = create(&server, &body);
    let undisturbed = result(&server, &job);
    let names: Vec<&str> = undisturbed.iter().map(|(path, _)| path.as_str()).collect();
    for wanted in ["config.json", "model.safetensors", "tokenizer.json", "resume/optimizer.safetensors"] {
        assert!(names.contains(&wanted), "{names:?}");
    }
    let ended = server.job(&job);
    assert_eq!(ended["progress"]["step"], STEPS);
    assert!(ended["fine_tuned_model"].as_str().unwrap().starts_with("ft:small:"));
    let losses = server.story(&job).into_iter().filter(|line| line.contains("validation loss")).collect::<Vec<_>>();
    assert_eq!(losses.len(), 3, "before, in the middle, after: {losses:?}");

    // The trainer dies, twice, and once it is only stopped: its silence is noticed through its lease.
    let job = create(&server, &body);
    for step in [6, 14] {
        server.reaches_step(&job, step);
        kill_process(trainer(&server.folder), Signal::KILL).unwrap();
    }
    assert_eq!(result(&server, &job), undisturbed);
    let interruptions = server.story(&job).iter().filter(|line| line.contains("was interrupted")).count();
    assert_eq!(interruptions, 2);

    // It is paused, its trainer gone, and resumed.
    let job = create(&server, &body);
    server.reaches_step(&job, 6);
    server.client.post_empty(&format!("/v1/fine_tuning/jobs/{job}/pause")).unwrap();
    until("the pause", || (server.job(&job)["status"] == "paused").then_some(()));
    until("the trainer to be gone", || trainers(&server.folder).is_empty().then_some(()));
    assert_eq!(server.client.post_empty(&format!("/v1/fine_tuning/jobs/{job}/resume")).unwrap()["status"], "queued");
    assert_eq!(result(&server, &job), undisturbed);

    // The server dies; the next one goes on.
    let job = create(&server, &body);
    server.reaches_step(&job, 6);
    server.process.signal(Signal::KILL);
    server.process.kill();
    until("the trainer to follow its executor", || trainers(&server.folder).is_empty().then_some(()));
    server = Server::start(&sandbox.join("server"), &[]);
    assert_eq!(result(&server, &job), undisturbed);

    // The server is asked to stop: the trainer writes a checkpoint, the job is released without a lost step.
    let job = create(&server, &body);
    server.reaches_step(&job, 6);
    server.process.signal(Signal::TERM);
    assert!(server.process.ended_well(), "{}", server.process.log());
    server = Server::start(&sandbox.join("server"), &[]);
    assert_eq!(result(&server, &job), undisturbed);
}

#[test]
fn a_stopped_executor_loses_its_job_and_writes_nothing_more() {
    let sandbox = Sandbox::new("stopped");
    let server = Server::start(&sandbox.join("server"), &["--no-executor"]);
    let body = prepare(&server);
    let (models, weights) = (server.folder.join("models"), server.folder.join("weights"));
    let database = server.database_url();
    let arguments = |role: &'static str| {
        vec![
            role,
            "--database-url",
            &database,
            "--models",
            models.to_str().unwrap(),
            "--weights",
            weights.to_str().unwrap(),
        ]
    };
    let first = Process::start(&sandbox.join("first"), &arguments("execute"));
    let undisturbed = result(&server, &create(&server, &body));

    let job = create(&server, &body);
    server.reaches_step(&job, 6);
    first.signal(Signal::STOP);
    let _second = Process::start(&sandbox.join("second"), &arguments("execute"));
    // By its own clock, past its lease, though its executor cannot tell it anything any more.
    until("the trainer of the stopped executor to exit", || trainers(&sandbox.join("first")).is_empty().then_some(()));
    until("the second executor's trainer", || trainers(&sandbox.join("second")).first().copied());
    first.signal(Signal::CONT);
    assert_eq!(result(&server, &job), undisturbed);
    until("the first executor to notice", || first.log().contains("lease lost").then_some(()));
}

#[test]
fn a_cancelled_job_stops_and_what_cannot_be_trained_fails_with_the_field() {
    let sandbox = Sandbox::new("cancelled");
    let server = Server::start(&sandbox.join("server"), &[]);
    let body = prepare(&server);
    let job = create(&server, &body);
    server.reaches_step(&job, 2);
    server.client.post_empty(&format!("/v1/fine_tuning/jobs/{job}/cancel")).unwrap();
    assert_eq!(server.ends(&job)["status"], "cancelled");
    until("the trainer to be gone", || trainers(&server.folder).is_empty().then_some(()));

    let mut refused = body.clone();
    refused["training"]["long_documents"] = json!("refuse");
    let ended = server.ends(&create(&server, &refused));
    assert_eq!(ended["status"], "failed");
    assert!(ended["error"]["param"].is_string(), "{ended}");
    let message = ended["error"]["message"].as_str().unwrap();
    assert!(message.contains("document.txt"), "{message}");
}
