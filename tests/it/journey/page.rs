//! The page in a real browser, by keyboard: what the script there does, and what it leaves on the server.

use std::{path::Path, process::Command};

use serde_json::Value;

use super::{prepare, published};
use crate::support::{Sandbox, reference_node, server::Server};

/// Names a Chromium without a screen.
const BROWSER: &str = "LONGHAUL_BROWSER";

#[test]
fn the_page_in_a_browser_by_keyboard() {
    let Some(modules) = reference_node() else { return };
    let Some(browser) = std::env::var_os(BROWSER) else {
        eprintln!("SKIPPED: {BROWSER} names no Chromium; the page was not opened");
        return;
    };
    let sandbox = Sandbox::new("page");
    let server = Server::start(&sandbox.join("server"), &[]);
    prepare(&server);
    published(&server);
    // Node looks for packages from the script's own folder upwards.
    let script = modules.join(format!("page-{}.mjs", std::process::id()));
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/page.mjs"), &script).unwrap();
    let output = Command::new("node")
        .arg(&script)
        .args([&server.address, "small"])
        .arg(server.folder.join("document.txt"))
        .env(BROWSER, browser)
        .output()
        .unwrap();
    std::fs::remove_file(script).unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}\n{}", server.process.log());
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    let id = told["job"].as_str().unwrap();
    let job = server.job(id);
    assert_eq!((&job["status"], &job["model"]), (&"cancelled".into(), &"small".into()));
    let training = &job["training"];
    assert_eq!((&training["sequence_length"], &training["long_documents"]), (&256.into(), &"split".into()));
    assert_eq!((&training["learning_rate"], &training["checkpoint_interval"]), (&3e-3.into(), &20.into()));
    assert!(told["archive"].as_u64().unwrap() > 100_000, "{told}");
    let story = server.story(id);
    assert!(story.iter().any(|line| line == "Fine-tuning job resumed"), "{story:?}");
}
