//! Kills at random moments under load: server, Postgres, executors and trainers, and executors that stop for longer than their
//! lease. Nothing that was accepted is lost, no job is lost or runs twice at once, no checkpoint is torn, and every job ends with
//! the weights of an undisturbed one.
//!
//! By hand, `it --ignored soak`: a few rounds, or `LONGHAUL_SOAK_ROUNDS=100`; `LONGHAUL_SOAK_SEED` to have the same choices again.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use longhaul::{
    client::{
        self,
        http::{Client, SHORT},
    },
    domain::{hex, ids::random_suffix},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{create, prepare, result};
use crate::support::{
    Sandbox,
    form::{self, Form},
    model::Random,
    server::{Process, Server, trainers, until},
};

/// Jobs that wait or run at a time.
const JOBS: usize = 3;
/// Longer than the lease of these tests.
const STALL: Duration = Duration::from_secs(5);
/// Between two kills, milliseconds.
const PAUSE: std::ops::Range<u64> = 200..2500;
const ENDED: [&str; 3] = ["succeeded", "failed", "cancelled"];

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().expect("a number"))
}

/// What runs, and what it has said yes to.
struct Scene {
    sandbox: Sandbox,
    address: String,
    server: Mutex<Option<Server>>,
    executors: Mutex<Vec<Process>>,
    /// No new load.
    over: AtomicBool,
    /// Nobody looks any more.
    unwatched: AtomicBool,
    /// Uploaded files and the digests of what was sent.
    files: Mutex<BTreeMap<String, String>>,
    /// Parts of the upload under way that were answered.
    parts: AtomicU64,
    jobs: Mutex<Vec<String>>,
    /// A process of each job that was ever seen.
    attempts: Mutex<BTreeSet<(String, i32)>>,
    requests: AtomicU64,
}

impl Scene {
    fn folder(&self, name: &str) -> PathBuf {
        self.sandbox.join(name)
    }

    fn serve(&self) -> Server {
        let listen = self.address.trim_start_matches("http://");
        Server::listening(&self.folder("server"), listen, &["--no-executor"])
    }

    fn executor(&self, n: usize) -> Process {
        let server = self.folder("server");
        let path = |name: &str| server.join(name).to_str().unwrap().to_owned();
        let database = format!("postgres://longhaul@localhost/longhaul?host={}", path("postgres"));
        let (models, weights) = (path("models"), path("weights"));
        let arguments = ["execute", "--database-url", &database, "--models", &models, "--weights", &weights];
        Process::start(&self.folder(&format!("executor-{n}")), &arguments)
    }

    /// Asks again until there is an answer: servers come back.
    fn ask<T>(&self, what: &str, mut request: impl FnMut(&Client) -> client::Result<T>) -> T {
        let client = Client::new(&self.address).unwrap();
        until(what, || {
            self.requests.fetch_add(1, Relaxed);
            request(&client).ok()
        })
    }

    fn send(&self, path: &str, body: &[u8]) -> Value {
        self.ask(path, |client| {
            let (content_type, length) = (form::content_type(), body.len() as u64);
            let body = Box::new(std::io::Cursor::new(body.to_vec()));
            client.post_form(path, &mut client::multipart::Form { content_type, length, body }, None)
        })
    }

    /// The key makes it one request, however often it is sent.
    fn post(&self, path: &str, body: &Value) -> Value {
        let key = random_suffix();
        self.ask(path, |client| client.post_again(path, body, &key))
    }

    /// Every trainer that lives, by job.
    fn trainers(&self) -> Vec<(String, i32)> {
        let of_job = |pid: i32| {
            let folder = fs::read_link(format!("/proc/{pid}/cwd")).ok()?;
            let job = folder.iter().find_map(|part| part.to_str().filter(|part| part.starts_with("ftjob-")))?;
            // One that was killed and not yet waited for is no more.
            let dead = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?.contains(") Z ");
            (!dead).then(|| (job.to_owned(), pid))
        };
        trainers(self.sandbox.path()).into_iter().filter_map(of_job).collect()
    }

    /// Uploads files as they come and in parts, one after another.
    fn upload(&self, seed: u64) {
        let mut random = Random(seed);
        while !self.over.load(Relaxed) {
            let length = 1 + (random.next() % 2_500_000) as usize;
            let content: Vec<u8> = (0..length).map(|i| (i as u64 ^ random.0) as u8).collect();
            let digest = hex(&Sha256::digest(&content));
            let file = if random.next().is_multiple_of(2) { self.whole(&content) } else { self.in_parts(&content) };
            self.files.lock().unwrap().insert(file["id"].as_str().unwrap().to_owned(), digest);
        }
    }

    fn whole(&self, content: &[u8]) -> Value {
        self.send("/v1/files", &Form::training("soak.txt", content).bytes())
    }

    fn in_parts(&self, content: &[u8]) -> Value {
        let upload =
            json!({"filename": "soak.txt", "purpose": "fine-tune", "bytes": content.len(), "mime_type": "text/plain"});
        let upload = self.post("/v1/uploads", &upload);
        let path = format!("/v1/uploads/{}", upload["id"].as_str().unwrap());
        let send = |piece| {
            let part = self.send(&format!("{path}/parts"), &Form::part(piece).bytes());
            self.parts.fetch_add(1, Relaxed);
            part["id"].clone()
        };
        let ids: Vec<Value> = content.chunks(400_000).map(send).collect();
        self.post(&format!("{path}/complete"), &json!({"part_ids": ids}))["file"].clone()
    }

    /// Keeps jobs in the queue.
    fn post_jobs(&self, body: &Value) {
        let unfinished = |job: &&String| {
            let path = format!("/v1/fine_tuning/jobs/{job}");
            let job = self.ask(&path, |client| client.get(&path, SHORT, |_| ()));
            !ENDED.contains(&job["status"].as_str().unwrap())
        };
        while !self.over.load(Relaxed) {
            let jobs = self.jobs.lock().unwrap().clone();
            if jobs.iter().filter(unfinished).count() >= JOBS {
                thread::sleep(Duration::from_millis(200));
                continue;
            }
            let made = self.post("/v1/fine_tuning/jobs", body);
            self.jobs.lock().unwrap().push(made["id"].as_str().unwrap().to_owned());
        }
    }

    /// Looks for two trainers of one job. One look may catch a process that is just gone: two in turn may not.
    fn watch(&self) {
        let mut before = BTreeSet::new();
        while !self.unwatched.load(Relaxed) {
            let seen: BTreeSet<(String, i32)> = self.trainers().into_iter().collect();
            let twice = |(job, pid): &(String, i32)| seen.iter().any(|(other, p)| other == job && p != pid);
            let now: BTreeSet<_> = seen.iter().filter(|one| twice(one)).cloned().collect();
            assert!(now.intersection(&before).next().is_none(), "a job runs twice at once: {now:?}");
            before = now;
            self.attempts.lock().unwrap().extend(seen);
            thread::sleep(Duration::from_millis(40));
        }
    }

    /// One blow; what it hit.
    fn strike(&self, random: &mut Random) -> &'static str {
        let kill = |pid: i32| kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).is_ok();
        match random.next() % 10 {
            0 | 1 => {
                let mut server = self.server.lock().unwrap();
                server.as_mut().unwrap().process.kill();
                *server = None;
                *server = Some(self.serve());
                "server"
            }
            2 | 3 => {
                let pid = fs::read_to_string(self.folder("server/postgres/cluster/postmaster.pid")).unwrap_or_default();
                let pid = pid.lines().next().and_then(|pid| pid.parse().ok());
                if pid.is_some_and(kill) { "Postgres" } else { "nothing: Postgres was down" }
            }
            4 | 5 => {
                let n = (random.next() % 2) as usize;
                let mut executors = self.executors.lock().unwrap();
                executors[n].kill();
                executors[n] = self.executor(n);
                "executor"
            }
            6 => {
                let executors = self.executors.lock().unwrap();
                let stopped = &executors[(random.next() % 2) as usize];
                stopped.signal(Signal::STOP);
                thread::sleep(STALL);
                stopped.signal(Signal::CONT);
                "executor, stopped for longer than its lease"
            }
            _ => match self.trainers().first() {
                Some((_, pid)) if kill(*pid) => "trainer",
                _ => "nothing: no trainer was there",
            },
        }
    }
}

/// Every file of every checkpoint is what its digest says.
fn checkpoints_are_whole(server: &Server, job: &str) -> usize {
    let list = format!("/v1/fine_tuning/jobs/{job}/checkpoints");
    let checkpoints = server.client.get(&format!("{list}?limit=100"), SHORT, |_| ()).unwrap();
    let checkpoints = checkpoints["data"].as_array().unwrap();
    for checkpoint in checkpoints {
        let files = format!("{list}/{}/files", checkpoint["id"].as_str().unwrap());
        let manifest = server.client.get(&format!("{files}?include=all"), SHORT, |_| ()).unwrap();
        for file in manifest["data"].as_array().unwrap() {
            let path = file["path"].as_str().unwrap();
            let mut answer = server.client.open(&format!("{files}/{path}"), |request| request).unwrap();
            let bytes = answer.body_mut().read_to_vec().unwrap();
            assert_eq!(file["sha256"], hex(&Sha256::digest(&bytes)), "{path} of {checkpoint}");
        }
    }
    checkpoints.len()
}

fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

fn say(line: &str) {
    // Past the test harness: rounds by hand take minutes.
    writeln!(std::io::stdout().lock(), "{line}").unwrap();
}

#[test]
#[ignore = "minutes of kills at random: run by hand"]
fn nothing_is_lost_whatever_dies() {
    let rounds = setting("LONGHAUL_SOAK_ROUNDS", 8);
    let seed = setting("LONGHAUL_SOAK_SEED", u64::from(std::process::id()));
    let scene = &Scene {
        sandbox: Sandbox::new("soak"),
        address: free_address(),
        server: Mutex::new(None),
        executors: Mutex::new(Vec::new()),
        over: AtomicBool::new(false),
        unwatched: AtomicBool::new(false),
        files: Mutex::default(),
        parts: AtomicU64::new(0),
        jobs: Mutex::default(),
        attempts: Mutex::default(),
        requests: AtomicU64::new(0),
    };
    let server = scene.serve();
    let mut body = prepare(&server);
    body["training"]["checkpoint_interval"] = json!(1);
    scene.executors.lock().unwrap().extend([scene.executor(0), scene.executor(1)]);
    let undisturbed = result(&server, &create(&server, &body));
    *scene.server.lock().unwrap() = Some(server);

    let (mut random, mut hits) = (Random(seed), BTreeMap::<&str, u64>::new());
    let start = Instant::now();
    thread::scope(|scope| {
        let (load_ends, watch_ends) = (End(&scene.over), End(&scene.unwatched));
        let load = [
            scope.spawn(|| scene.upload(seed + 1)),
            scope.spawn(|| scene.upload(seed + 2)),
            scope.spawn(|| scene.post_jobs(&body)),
        ];
        let watch = scope.spawn(|| scene.watch());
        for _ in 0..rounds {
            thread::sleep(Duration::from_millis(PAUSE.start + random.next() % (PAUSE.end - PAUSE.start)));
            *hits.entry(scene.strike(&mut random)).or_default() += 1;
            assert!(!watch.is_finished(), "the watch has seen a job run twice");
        }
        drop(load_ends);
        load.into_iter().for_each(|thread| thread.join().unwrap());
        // The last jobs end in peace, watched.
        let server = scene.server.lock().unwrap();
        let server = server.as_ref().unwrap();
        for job in scene.jobs.lock().unwrap().iter() {
            let ended = server.ends(job);
            assert_eq!(ended["status"], "succeeded", "seed {seed}: {ended} {:?}", server.story(job));
        }
        drop(watch_ends);
        watch.join().unwrap();
    });

    let server = scene.server.lock().unwrap().take().unwrap();
    let jobs = scene.jobs.lock().unwrap().clone();
    assert!(!jobs.is_empty());
    let mut checkpoints = 0;
    for job in &jobs {
        assert_eq!(result(&server, job), undisturbed, "seed {seed}: {job}");
        checkpoints += checkpoints_are_whole(&server, job);
    }
    let listed = server.client.get("/v1/fine_tuning/jobs?limit=1000", SHORT, |_| ()).unwrap();
    let listed = listed["data"].as_array().unwrap().len();
    assert_eq!(listed, jobs.len() + 1, "every accepted job is there, and none twice");
    let files = scene.files.lock().unwrap();
    assert!(!files.is_empty());
    for (file, digest) in files.iter() {
        let mut answer = server.client.open(&format!("/v1/files/{file}/content"), |request| request).unwrap();
        assert_eq!(&hex(&Sha256::digest(answer.body_mut().read_to_vec().unwrap())), digest, "{file}");
    }
    say(&format!(
        "{rounds} rounds in {:.0} s, seed {seed}: {hits:?}; {} jobs in {} attempts, {checkpoints} checkpoints, {} files, {} parts, \
         {} requests",
        start.elapsed().as_secs_f64(),
        jobs.len(),
        scene.attempts.lock().unwrap().len(),
        files.len(),
        scene.parts.load(Relaxed),
        scene.requests.load(Relaxed),
    ));
}

/// Ends threads, also when an assertion fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}
