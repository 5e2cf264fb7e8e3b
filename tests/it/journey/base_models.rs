//! Base models by name: another server is the hub that they come from, over a line that can be slow and that counts requests.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use longhaul::{client::http::SHORT, domain::ids::random_suffix};
use rustix::process::Signal;
use serde_json::json;

use super::{create, prepare, result};
use crate::support::{
    Sandbox,
    server::{Server, trainers, until},
};

/// What a slow line passes on at once, and its pause after that.
const SIP: usize = 1 << 11;
const PAUSE: Duration = Duration::from_millis(40);

/// A line to a server.
struct Line {
    address: String,
    slow: Arc<AtomicBool>,
    /// Heads of requests, as they came.
    asked: Arc<Mutex<Vec<String>>>,
}

impl Line {
    fn to(server: &str) -> Self {
        let upstream = server.trim_start_matches("http://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/hf", listener.local_addr().unwrap());
        let (slow, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (is_slow, heard) = (Arc::clone(&slow), Arc::clone(&asked));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let server = TcpStream::connect(&upstream).unwrap();
                let (from, into) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                let heard = Arc::clone(&heard);
                thread::spawn(move || {
                    pass(from, into, &AtomicBool::new(false), |bytes| {
                        heard.lock().unwrap().push(String::from_utf8_lossy(bytes).to_lowercase());
                    });
                });
                let is_slow = Arc::clone(&is_slow);
                thread::spawn(move || pass(server, client, &is_slow, |_| ()));
            }
        });
        Self { address, slow, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn pass(mut from: TcpStream, mut into: TcpStream, slow: &AtomicBool, mut seen: impl FnMut(&[u8])) {
    let mut buffer = [0; 1 << 14];
    loop {
        let most = if slow.load(Ordering::Relaxed) { SIP } else { buffer.len() };
        match from.read(&mut buffer[..most]) {
            Ok(n @ 1..) if into.write_all(&buffer[..n]).is_ok() => seen(&buffer[..n]),
            _ => break,
        }
        if slow.load(Ordering::Relaxed) {
            thread::sleep(PAUSE);
        }
    }
    let _ = (from.shutdown(Shutdown::Both), into.shutdown(Shutdown::Both));
}

/// Bytes of the largest file of a cache that is on its way.
fn on_its_way(cache: &Path) -> u64 {
    let folders = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let blobs = folders(cache).flat_map(|repository| folders(&repository.join("blobs")).collect::<Vec<_>>());
    let incomplete = blobs.filter(|blob| blob.extension().is_some_and(|end| end == "incomplete"));
    incomplete.filter_map(|blob| fs::metadata(blob).ok()).map(|facts| facts.len()).max().unwrap_or_default()
}

#[test]
fn a_base_model_comes_from_a_hub_by_name_though_the_server_is_killed_meanwhile() {
    let sandbox = Sandbox::new("base-models");
    let hub = Server::start(&sandbox.join("hub"), &[]);
    let trained = create(&hub, &prepare(&hub));
    result(&hub, &trained);
    let list = format!("/v1/fine_tuning/jobs/{trained}/checkpoints");
    let checkpoints = hub.client.get(&list, SHORT, |_| ()).unwrap();
    let repository = checkpoints["data"][0]["hub"]["repository"].as_str().unwrap().to_owned();

    let line = Line::to(&hub.address);
    let arguments = ["--hub-endpoint", &line.address];
    let mut server = Server::start(&sandbox.join("server"), &arguments);
    let mut body = prepare(&server);
    body["model"] = json!(repository);
    body["training"]["max_steps"] = json!(4);
    line.slow.store(true, Ordering::Relaxed);
    let job = create(&server, &body);
    assert_eq!(server.job(&job)["status"], "validating_files");
    let cache = server.folder.join("hub");
    until("a part of the weights", || (on_its_way(&cache) > 4 * SIP as u64).then_some(()));
    server.process.signal(Signal::KILL);
    server.process.kill();
    until("no trainer", || trainers(&server.folder).is_empty().then_some(()));
    assert!(on_its_way(&cache) > 0, "the kill came in the middle");
    line.slow.store(false, Ordering::Relaxed);
    server = Server::start(&sandbox.join("server"), &arguments);
    result(&server, &job);
    let story = server.story(&job);
    assert!(story.iter().any(|line| line.starts_with("Fetching the base model longhaul/")), "{story:?}");
    assert!(story.iter().any(|line| line.contains("fetched") && line.contains("verified")), "{story:?}");
    assert!(line.asked().iter().any(|head| head.contains("range: bytes=")), "it went on where it was");
    let snapshots = fs::read_dir(cache.join(format!("models--{}/snapshots", repository.replace('/', "--")))).unwrap();
    let snapshot = snapshots.flatten().next().unwrap().path();
    let name = snapshot.file_name().unwrap().to_str().unwrap().to_owned();
    let main = fs::read_to_string(snapshot.join("../../refs/main")).unwrap();
    assert_eq!(main, name);
    assert!(fs::read_link(snapshot.join("model.safetensors")).unwrap().starts_with("../../blobs"));

    // It is in the cache: nobody asks for it again.
    let before = line.asked().len();
    result(&server, &create(&server, &body));
    assert_eq!(line.asked().len(), before);
    let models = server.client.get("/v1/models", SHORT, |_| ()).unwrap();
    let listed = models["data"].as_array().unwrap().iter().filter(|model| model["id"] == repository.as_str()).count();
    assert_eq!(listed, 1, "{models}");

    // At a revision of its own, first for a plan.
    body["model"] = json!(format!("{repository}@step-8"));
    let mut plan = server.client.post_again("/v1/fine_tuning/plans", &body, &random_suffix()).unwrap();
    let path = format!("/v1/fine_tuning/plans/{}", plan["id"].as_str().unwrap());
    plan = until("the plan", || {
        plan = server.client.get(&path, SHORT, |_| ()).unwrap();
        (plan["status"] != "queued").then(|| plan.clone())
    });
    assert_eq!((&plan["status"], &plan["hosts"][0]["fits"]), (&"ready".into(), &true.into()), "{plan}");
    result(&server, &create(&server, &body));

    // What is not there is told at the job, with what to do.
    body["model"] = json!("longhaul/nothing-here");
    let ended = server.ends(&create(&server, &body));
    assert_eq!((&ended["status"], &ended["error"]["code"]), (&"failed".into(), &"model_not_found".into()), "{ended}");
    assert_eq!(ended["error"]["param"], "model");
    assert!(ended["error"]["message"].as_str().unwrap().contains("check the name"), "{ended}");
}
