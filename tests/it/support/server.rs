//! The real binary as a server, its executors and its trainers, for tests that kill them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use longhaul::client::http::{Client, SHORT};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Longest wait for anything: a test that waits so long has failed.
const PATIENCE: Duration = Duration::from_mins(4);
const LOOK: Duration = Duration::from_millis(50);

/// A `longhaul` process of a role, with its log in a file. Killed when dropped.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts the binary in a folder of a sandbox, so that nothing of it outlives the test.
    pub fn start(folder: &Path, arguments: &[&str]) -> Self {
        fs::create_dir_all(folder).unwrap();
        let log = folder.join("log");
        let file = fs::File::options().create(true).append(true).open(&log).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_longhaul"))
            .args(arguments)
            .arg("--data")
            .arg(folder)
            .args(["--lease", "3"])
            .args(if arguments.contains(&"--memory") { [].as_slice() } else { &["--memory", "2000000000"] })
            .env_remove("DATABASE_URL")
            // No test asks a hub that it has not started, or finds what this host has of one.
            .envs([("HF_ENDPOINT", "http://127.0.0.1:9".into()), ("HF_HUB_CACHE", folder.join("hub"))])
            .env_remove("HF_TOKEN")
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .unwrap();
        Self { child, log }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for the exit and says whether it was a clean one.
    pub fn ended_well(&mut self) -> bool {
        self.child.wait().unwrap().success()
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A server with its private Postgres.
pub struct Server {
    pub process: Process,
    pub folder: PathBuf,
    pub client: Client,
    /// `http://host:port`
    pub address: String,
}

impl Server {
    /// Starts `serve` over this data folder and waits until it answers.
    pub fn start(folder: &Path, arguments: &[&str]) -> Self {
        Self::listening(folder, "127.0.0.1:0", arguments)
    }

    /// One in the place of this one, which is gone: over its folder, at its address, and without an executor.
    pub fn again(self) -> Self {
        Self::listening(&self.folder, self.address.trim_start_matches("http://"), &["--no-executor"])
    }

    /// The same at an address.
    pub fn listening(folder: &Path, address: &str, arguments: &[&str]) -> Self {
        let before = fs::read_to_string(folder.join("log")).unwrap_or_default().matches("serving on ").count();
        let mut process = Process::start(folder, &[&["serve", "--listen", address], arguments].concat());
        let address = until("the server's address", || {
            let log = process.log();
            assert!(process.child.try_wait().unwrap().is_none(), "the server ended: {}", tail(&log));
            let line = log.lines().filter(|line| line.contains("serving on ")).nth(before)?;
            Some(line.split_whitespace().find(|word| word.starts_with("http://"))?.to_owned())
        });
        let client = Client::new(&address).unwrap();
        Self { process, folder: folder.to_owned(), client, address }
    }

    /// Runs a command of the binary that looks into this server's database; answers what it printed, or said.
    pub fn command(&self, arguments: &[&str]) -> Result<String, String> {
        command(&self.folder, arguments)
    }

    /// Makes a key, with which the server is spoken to from now on; answers it.
    pub fn make_key(&mut self, arguments: &[&str]) -> String {
        let key = self.command(&[&["keys", "create"], arguments].concat()).unwrap().trim().to_owned();
        self.client = self.client.clone().with_key(Some(&key)).unwrap();
        key
    }

    /// Address of its private database, for executors of their own.
    pub fn database_url(&self) -> String {
        format!("postgres://longhaul@localhost/longhaul?host={}", self.folder.join("postgres").display())
    }

    pub fn job(&self, id: &str) -> Value {
        self.client.get(&format!("/v1/fine_tuning/jobs/{id}"), SHORT, |_| ()).unwrap()
    }

    /// Messages of a job's events, oldest first.
    pub fn story(&self, id: &str) -> Vec<String> {
        let page = self.client.get(&format!("/v1/fine_tuning/jobs/{id}/events?limit=1000"), SHORT, |_| ()).unwrap();
        let events = page["data"].as_array().unwrap();
        events.iter().rev().map(|event| event["message"].as_str().unwrap().to_owned()).collect()
    }

    /// Waits until so many steps of a job are done and it still runs.
    pub fn reaches_step(&self, id: &str, step: u64) {
        until("a step", || {
            let job = self.job(id);
            assert_ne!(job["status"], "failed", "{job}");
            assert_ne!(job["status"], "succeeded", "the job ended before the test could disturb it");
            (job["progress"]["step"].as_u64() >= Some(step)).then_some(())
        });
    }

    /// Waits for the job's end and gives it.
    pub fn ends(&self, id: &str) -> Value {
        until("the job's end", || {
            let job = self.job(id);
            let ended = ["succeeded", "failed", "cancelled"].contains(&job["status"].as_str().unwrap());
            ended.then_some(job)
        })
    }
}

/// The last lines of a log.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// Runs a command of the binary over a data folder; answers what it printed, or said.
pub fn command(folder: &Path, arguments: &[&str]) -> Result<String, String> {
    let done = Command::new(env!("CARGO_BIN_EXE_longhaul"))
        .args(arguments)
        .arg("--data")
        .arg(folder)
        .env_remove("DATABASE_URL")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    if done.status.success() { Ok(text(done.stdout)) } else { Err(text(done.stderr)) }
}

/// Process ids of the trainers that work in this folder.
pub fn trainers(folder: &Path) -> Vec<i32> {
    let folder = folder.canonicalize().unwrap();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let works = fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(&folder));
        works && command.split(|byte| *byte == 0).nth(1) == Some(b"train")
    })
    .collect()
}

/// The one trainer of this folder.
pub fn trainer(folder: &Path) -> Pid {
    Pid::from_raw(until("a trainer", || trainers(folder).first().copied())).unwrap()
}

/// Waits until there is something.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "waited for {what} in vain");
        std::thread::sleep(LOOK);
    }
}
