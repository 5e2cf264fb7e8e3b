//! OpenAI's own packages, unmodified, through the life of a file, a job and a model: what people who switch bring along.
//!
//! The scripts judge what they see and end with an error where it is wrong; what they print is held against the server here.
//! They come with a real key, which the server asks for. They need a Python and a Node with the packages; each says so where there is none.

use std::{path::Path, process::Command};

use longhaul::{client::http::SHORT, domain::hex};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{prepare, published};
use crate::support::{Sandbox, reference_node, reference_python, server::Server};

const CLIENTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients");

/// Runs a script over a fresh server that asks for keys; answers what it printed.
fn run(mut command: Command, server: &mut Server, cache: &Path) -> Value {
    let key = server.make_key(&["--scope", "admin"]);
    prepare(server);
    let output = command
        .arg("small")
        .arg(server.folder.join("document.txt"))
        .env("OPENAI_BASE_URL", format!("{}/v1", server.address))
        .env("OPENAI_API_KEY", &key)
        .env("HF_TOKEN", &key)
        .env("HF_ENDPOINT", format!("{}/hf", server.address))
        .env("HF_HOME", cache)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}\n{}", server.process.log());
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What is left on the server is what the script says.
fn check(server: &Server, told: &Value) {
    let document = std::fs::read(server.folder.join("document.txt")).unwrap();
    assert_eq!(told["file_sha256"], hex(&Sha256::digest(document)));
    let job = server.job(told["job"].as_str().unwrap());
    assert_eq!((&job["status"], &job["fine_tuned_model"]), (&"succeeded".into(), &told["model"]));
    assert_eq!(server.job(told["cancelled"].as_str().unwrap())["status"], "cancelled");
    let story = server.story(told["job"].as_str().unwrap());
    for line in ["Fine-tuning job paused", "Fine-tuning job resumed", "The job has successfully completed"] {
        assert!(story.iter().any(|told| told == line), "{line}: {story:?}");
    }
    let csv = told["csv"].as_str().unwrap();
    let steps = job["progress"]["step"].as_u64().unwrap() as usize;
    assert_eq!(csv.lines().count(), steps + 2, "a head, the base model, each step: {csv}");
    assert!(csv.starts_with("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,"), "{csv}");
    let models = server.client.get("/v1/models", SHORT, |_| ()).unwrap();
    assert!(models["data"].as_array().unwrap().iter().all(|model| model["id"] != told["model"]), "it was deleted");
}

#[test]
fn the_python_package_of_openai() {
    let Some(python) = reference_python() else { return };
    let sandbox = Sandbox::new("openai-python");
    let mut server = Server::start(&sandbox.join("server"), &[]);
    let mut command = Command::new(python);
    command.arg(Path::new(CLIENTS).join("openai.py"));
    let told = run(command, &mut server, &sandbox.join("cache"));
    check(&server, &told);
    assert!(told["parameters"].as_u64().unwrap() > 10_000, "loaded by from_pretrained");
    let job = told["job"].as_str().unwrap();
    let webhook = &told["webhook"];
    assert_eq!((&webhook["type"], &webhook["data"]["id"]), (&"fine_tuning.job.succeeded".into(), &job.into()));
}

/// What the README shows to people who switch, with this server's address.
#[test]
fn the_lines_of_the_readme() {
    let Some(python) = reference_python() else { return };
    let sandbox = Sandbox::new("readme");
    let server = Server::start(&sandbox.join("server"), &[]);
    prepare(&server);
    std::fs::rename(server.folder.join("document.txt"), server.folder.join("a-long-book.txt")).unwrap();
    published(&server);
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let shown = readme.lines().skip_while(|line| *line != "    from openai import OpenAI");
    let lines: Vec<&str> = shown.map_while(|line| line.strip_prefix("    ")).collect();
    assert_eq!(lines.len(), 5);
    let script = lines.join("\n").replace("http://127.0.0.1:8080", &server.address);
    let output = Command::new(python).args(["-c", &script]).current_dir(&server.folder).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told = String::from_utf8(output.stdout).unwrap();
    let (job, event) = told.trim().split_once(' ').unwrap();
    assert!(server.story(job).iter().any(|message| message == event), "{told}");
    let ended = server.ends(job);
    assert_eq!(ended["status"], "succeeded", "{ended}");
    assert!(ended["fine_tuned_model"].as_str().unwrap().contains(":book:"), "{ended}");
}

#[test]
fn the_node_package_of_openai() {
    let Some(modules) = reference_node() else { return };
    let sandbox = Sandbox::new("openai-node");
    let mut server = Server::start(&sandbox.join("server"), &[]);
    // Node looks for packages from the script's own folder upwards.
    let script = modules.join(format!("openai-{}.mjs", std::process::id()));
    std::fs::copy(Path::new(CLIENTS).join("openai.mjs"), &script).unwrap();
    let mut command = Command::new("node");
    command.arg(&script);
    let told = run(command, &mut server, &sandbox.join("cache"));
    std::fs::remove_file(script).unwrap();
    check(&server, &told);
}
