//! Against a hub of one thread: resumption, digests, redirects and the token, refusals in words, the cache's layout.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use longhaul::{
    domain::{Event, HubName, hex},
    executor::hub::{Failure, Settings, Watcher, fetch, found},
};
use serde_json::{Value, json};
use sha1::{Digest, Sha1};
use sha2::Sha256;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::support::Sandbox;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const CONFIG: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","vocab_size":300,"hidden_size":32,
    "intermediate_size":64,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":8,
    "rms_norm_eps":1e-5,"rope_theta":10000.0,"max_position_embeddings":512,"tie_word_embeddings":false,"hidden_act":"silu",
    "torch_dtype":"float32"}"#;

/// A request as it came.
#[derive(Debug, Clone)]
struct Asked {
    verb: String,
    path: String,
    range: Option<String>,
    authorization: Option<String>,
}

struct Hub {
    address: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

type Answer = (u16, Vec<(String, String)>, Vec<u8>);

impl Hub {
    fn start(answer: impl Fn(&Asked) -> Answer + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&asked);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let Some(request) = read(&stream) else { continue };
                heard.lock().unwrap_or_else(PoisonError::into_inner).push(request.clone());
                write(stream, &request, answer(&request));
            }
        });
        Self { address, asked }
    }

    fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn read(stream: &TcpStream) -> Option<Asked> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next()?;
    let mut words = first.split(' ').map(str::to_owned);
    let mut asked = Asked { verb: words.next()?, path: words.next()?, range: None, authorization: None };
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ")?;
        match name.to_ascii_lowercase().as_str() {
            "range" => asked.range = Some(value.to_owned()),
            "authorization" => asked.authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    Some(asked)
}

/// A length in the headers stands; bytes may be fewer, as where a connection breaks.
fn write(mut stream: TcpStream, asked: &Asked, (status, mut headers, body): Answer) {
    if !headers.iter().any(|(name, _)| name == "content-length") {
        headers.push(("content-length".into(), body.len().to_string()));
    }
    let head: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let _ = write!(stream, "HTTP/1.1 {status} Said\r\nconnection: close\r\n{head}\r\n");
    if asked.verb != "HEAD" {
        let _ = stream.write_all(&body);
    }
}

fn header(name: &str, value: impl ToString) -> (String, String) {
    (name.to_owned(), value.to_string())
}

/// A repository of small files, named as git names them, and weights, named by their SHA-256.
struct Files(Vec<(&'static str, Vec<u8>)>);

impl Files {
    fn whole() -> Self {
        let weights = (0..3 * BLOCK).map(|i| (i * 31 % 251) as u8).collect();
        Self(vec![("config.json", CONFIG.into()), ("tokenizer.json", b"{}".to_vec()), ("model.safetensors", weights)])
    }

    fn tag(name: &str, content: &[u8]) -> String {
        if name.ends_with(".safetensors") {
            return hex(&Sha256::digest(content));
        }
        hex(&Sha1::new().chain_update(format!("blob {}\0", content.len())).chain_update(content).finalize())
    }

    fn answer(&self, asked: &Asked) -> Answer {
        if asked.path.starts_with("/api/models/") {
            let siblings: Vec<Value> = self.0.iter().map(|(name, _)| json!({"rfilename": name})).collect();
            return (200, Vec::new(), json!({"sha": COMMIT, "siblings": siblings}).to_string().into());
        }
        let name = asked.path.rsplit('/').next().unwrap_or_default();
        let Some((name, content)) = self.0.iter().find(|(known, _)| *known == name) else {
            return (404, vec![header("x-error-code", "EntryNotFound")], Vec::new());
        };
        let tag = header("etag", format!("\"{}\"", Self::tag(name, content)));
        let from = asked.range.as_ref().and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        match from {
            Some(from) => (206, vec![tag], content[from..].to_vec()),
            None => (200, vec![tag, header("content-length", content.len())], content.clone()),
        }
    }
}

const BLOCK: usize = 1 << 16;

struct Kitchen {
    _folder: Sandbox,
    settings: Settings,
    told: mpsc::UnboundedReceiver<Event>,
    watcher: Watcher,
}

fn kitchen(endpoint: &str) -> Kitchen {
    let folder = Sandbox::new("hub-fetch");
    let (events, told) = mpsc::unbounded_channel();
    let cache = folder.join("hub");
    let settings = Settings { endpoint: endpoint.to_owned(), token: Some("hf_secret".into()), cache, fetch: true };
    Kitchen { _folder: folder, settings, told, watcher: Watcher { events, stop: CancellationToken::new() } }
}

fn name(text: &str) -> HubName {
    text.parse().expect("a name")
}

fn message(failure: &Failure) -> (String, String) {
    match failure {
        Failure::Invalid(invalid) => (invalid.code.clone(), invalid.message.clone()),
        other => (String::new(), other.to_string()),
    }
}

#[test]
fn a_model_comes_whole_in_the_layout_of_other_tools_and_goes_on_where_it_broke_off() {
    let files = Files::whole();
    let weights = files.0[2].1.clone();
    let hub = Hub::start(move |asked| {
        let (status, mut headers, mut body) = files.answer(asked);
        // The first time the connection breaks in the middle.
        if asked.verb == "GET" && asked.path.ends_with(".safetensors") && asked.range.is_none() {
            headers.push(header("content-length", body.len()));
            headers.dedup_by(|a, b| a.0 == b.0);
            body.truncate(BLOCK);
        }
        (status, headers, body)
    });
    let mut kitchen = kitchen(&hub.address);
    let folder = fetch(&kitchen.settings, &name("org/small"), &kitchen.watcher).expect("the model");
    assert_eq!(fs::read(folder.join("model.safetensors")).expect("weights"), weights);
    let ranges: Vec<String> = hub.asked().into_iter().filter_map(|asked| asked.range).collect();
    assert_eq!(ranges, [format!("bytes={BLOCK}-")]);
    let repository = kitchen.settings.cache.join("models--org--small");
    assert_eq!(folder, repository.join("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(repository.join("refs/main")).expect("a ref"), COMMIT);
    let link = fs::read_link(folder.join("model.safetensors")).expect("a link");
    assert_eq!(link, Path::new("../../blobs").join(hex(&Sha256::digest(&weights))));
    let names: Vec<String> = found(&kitchen.settings.cache).into_iter().map(|cached| cached.name).collect();
    assert_eq!(names, ["org/small".to_owned(), format!("org/small@{COMMIT}")]);
    let told = [kitchen.told.try_recv(), kitchen.told.try_recv()].map(|event| event.expect("an event").message);
    assert!(told[0].starts_with("Fetching the base model org/small") && told[1].contains("is here"), "{told:?}");
}

#[test]
fn bytes_of_another_content_are_never_given_the_name() {
    let files = Files::whole();
    let hub = Hub::start(move |asked| {
        let (status, headers, mut body) = files.answer(asked);
        if asked.verb == "GET" && asked.path.ends_with(".safetensors") {
            body[17] ^= 1;
        }
        (status, headers, body)
    });
    let kitchen = kitchen(&hub.address);
    let failure = fetch(&kitchen.settings, &name("org/small"), &kitchen.watcher).expect_err("a wrong digest");
    assert!(matches!(failure, Failure::Refused(_)), "{failure}");
    let blobs = fs::read_dir(kitchen.settings.cache.join("models--org--small/blobs")).expect("blobs");
    let whole = blobs.flatten().filter(|blob| !blob.file_name().to_string_lossy().ends_with(".incomplete")).count();
    assert_eq!(whole, 2, "config and tokenizer");
}

#[test]
fn the_token_goes_to_the_hub_and_to_nobody_it_redirects_to() {
    let files = Files::whole();
    let elsewhere = Hub::start(move |asked| files.answer(asked));
    let (files, other) = (Files::whole(), elsewhere.address.clone());
    let hub = Hub::start(move |asked| {
        if !asked.path.ends_with(".safetensors") {
            return files.answer(asked);
        }
        let content = &files.0[2].1;
        let linked = header("x-linked-etag", format!("\"{}\"", hex(&Sha256::digest(content))));
        let at = header("location", format!("{other}/somewhere/model.safetensors"));
        (302, vec![linked, header("x-linked-size", content.len()), at], Vec::new())
    });
    let kitchen = kitchen(&hub.address);
    fetch(&kitchen.settings, &name("org/small@v1"), &kitchen.watcher).expect("the model");
    assert!(hub.asked().iter().all(|asked| asked.authorization.as_deref() == Some("Bearer hf_secret")));
    let there = elsewhere.asked();
    assert!(!there.is_empty() && there.iter().all(|asked| asked.authorization.is_none()), "{there:?}");
    assert!(hub.asked()[0].path.ends_with("/revision/v1"));
}

#[test]
fn refusals_say_what_to_do() {
    for (status, code, told, words) in [
        (403, "GatedRepo", "model_gated", "accept its conditions"),
        (401, "RepoNotFound", "model_not_found", "check the name"),
        (401, "", "model_forbidden", "a token that may read it"),
        (404, "RevisionNotFound", "model_not_found", "after the @"),
        (404, "", "model_not_found", "check the name"),
    ] {
        let hub = Hub::start(move |_| (status, vec![header("x-error-code", code)], Vec::new()));
        let kitchen = kitchen(&hub.address);
        let failure = fetch(&kitchen.settings, &name("org/small@v1"), &kitchen.watcher).expect_err("a refusal");
        let (found, message) = message(&failure);
        assert_eq!(found, told, "{message}");
        assert!(message.contains(words) && !message.contains("hf_secret"), "{message}");
        assert_eq!(hub.asked().len(), 1, "a refusal is not asked for again");
    }
}

#[test]
fn what_cannot_be_trained_is_refused_before_its_weights_are_fetched() {
    let mut files = Files::whole();
    files.0[0].1 = br#"{"model_type":"gpt2","architectures":["GPT2LMHeadModel"]}"#.to_vec();
    let hub = Hub::start(move |asked| files.answer(asked));
    let kitchen = kitchen(&hub.address);
    let failure = fetch(&kitchen.settings, &name("org/other"), &kitchen.watcher).expect_err("another family");
    assert_eq!(message(&failure).0, "model_not_trainable");
    assert!(hub.asked().iter().all(|asked| !asked.path.ends_with(".safetensors")));
}

#[test]
fn a_disk_without_room_is_told_before_the_weights_come() {
    let files = Files::whole();
    let hub = Hub::start(move |asked| {
        let (status, mut headers, body) = files.answer(asked);
        if asked.verb == "HEAD" && asked.path.ends_with(".safetensors") {
            headers.push(header("x-linked-size", 1_u64 << 60));
        }
        (status, headers, body)
    });
    let kitchen = kitchen(&hub.address);
    let failure = fetch(&kitchen.settings, &name("org/large"), &kitchen.watcher).expect_err("no room");
    let (code, message) = message(&failure);
    assert!(code == "disk_full" && message.contains("free space there"), "{message}");
}

#[test]
fn a_fetch_that_nobody_wants_any_more_ends() {
    let hub = Hub::start(|_| (503, Vec::new(), Vec::new()));
    let kitchen = kitchen(&hub.address);
    let stop = kitchen.watcher.stop.clone();
    let fetching = thread::spawn(move || fetch(&kitchen.settings, &name("org/small"), &kitchen.watcher));
    while hub.asked().is_empty() {
        thread::yield_now();
    }
    stop.cancel();
    let ended = fetching.join().expect("no panic");
    assert!(matches!(ended, Err(Failure::Stopped)), "{ended:?}");
}
