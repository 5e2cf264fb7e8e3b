//! A trained model in the hands of Hugging Face's clients: found by name, loaded by name, every byte what was written.
//!
//! Needs a Python with transformers, named by `LONGHAUL_REFERENCE_PYTHON`; says so where there is none.

use std::{collections::BTreeSet, path::Path, process::Command};

use longhaul::client::http::SHORT;
use serde_json::Value;

use super::{create, prepare, result};
use crate::support::{Sandbox, reference_python, server::Server};

#[test]
fn fine_tuned_models_load_by_name() {
    let Some(python) = reference_python() else { return };
    let sandbox = Sandbox::new("hub");
    let mut server = Server::start(&sandbox.join("server"), &[]);
    let key = server.make_key(&["--scope", "read"]);
    // One that may train besides: the clients come with the one that may only look.
    server.make_key(&[]);
    let job = create(&server, &prepare(&server));
    let files = result(&server, &job);

    let page = server.client.get(&format!("/v1/fine_tuning/jobs/{job}/checkpoints"), SHORT, |_| ()).unwrap();
    let earlier = &page["data"][2];
    let (repository, revision) = (&earlier["hub"]["repository"], &earlier["hub"]["revision"]);
    let model = &page["data"][0]["fine_tuned_model_checkpoint"];
    let model = server.client.get(&format!("/v1/models/{}", model.as_str().unwrap()), SHORT, |_| ()).unwrap();
    assert_eq!(&model["hub"]["repository"], repository);

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/hub.py");
    let output = Command::new(python)
        .arg(script)
        .args([repository.as_str().unwrap(), revision.as_str().unwrap()])
        .env("HF_ENDPOINT", format!("{}/hf", server.address))
        .env("HF_HOME", sandbox.join("cache"))
        .env("HF_TOKEN", &key)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();

    // What the state for continuing is made of is no part of the model.
    let expected: Value = files
        .iter()
        .filter(|(path, _)| !path.starts_with("resume/"))
        .map(|(path, sha)| (path.clone(), Value::from(sha.clone())))
        .collect();
    assert_eq!((&found["main"], &found["commit"]), (&expected, &expected));
    let names = |of: &Value| of.as_object().unwrap().keys().cloned().collect::<BTreeSet<String>>();
    assert_eq!(names(&found["revision"]), names(&expected));
    assert_ne!(found["revision"]["model.safetensors"], expected["model.safetensors"]);
    assert_eq!((&found["same"], &found["differ"]), (&true.into(), &true.into()));
    let listed = found["listed"].as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned()).collect();
    assert_eq!((names(&expected), names(&found["sizes"])), (listed, names(&expected)));
    assert_eq!(found["vocabulary"][0], 300);
    let errors = ["EntryNotFoundError", "RevisionNotFoundError", "RepositoryNotFoundError"];
    let told: Vec<&str> = found["errors"].as_array().unwrap().iter().map(|e| e.as_str().unwrap_or("none")).collect();
    assert!(told.iter().zip(errors).all(|(told, error)| told.ends_with(error)), "{told:?}");
}
