//! The same road over two hosts: a job that neither carries alone, and whichever executor dies, the job goes on when there are two
//! again. The hosts are executors with folders of their own; their ranks are processes on the CPU that talk over TCP.

use longhaul::{domain::ids::random_suffix, store::Store};
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

use super::{
    create, prepare,
    ranks::{assert_same_losses, losses},
    result,
};
use crate::support::{
    Sandbox,
    database::store_settings,
    server::{Process, Server, trainer, trainers, until},
};

/// Memory of a small host: of the model below it carries one rank of two.
const SMALL: &str = "67108864";

/// An executor that shares the server's database, models and weights.
struct Host {
    process: Process,
    folder: std::path::PathBuf,
}

impl Host {
    fn start(sandbox: &Sandbox, server: &Server, name: &str, memory: &str) -> Self {
        let folder = sandbox.join(name);
        let path = |name: &str| server.folder.join(name).to_str().unwrap().to_owned();
        let (database, models, weights) = (server.database_url(), path("models"), path("weights"));
        let places = ["--database-url", &database, "--models", &models, "--weights", &weights];
        let process = Process::start(
            &folder,
            &[&["execute"][..], &places, &["--address", "127.0.0.1", "--memory", memory]].concat(),
        );
        Self { process, folder }
    }

    fn trains(&self) -> bool {
        !trainers(&self.folder).is_empty()
    }

    /// Ends in good order, so that nobody counts on it.
    fn stop(mut self) {
        self.process.signal(Signal::TERM);
        assert!(self.process.ended_well(), "{}", self.process.log());
    }
}

/// Waits until so many executors are published.
fn published(sandbox: &Sandbox, server: &Server, n: usize) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let settings = store_settings(server.database_url(), sandbox.path());
    let store = runtime.block_on(Store::connect(&settings)).unwrap();
    until("the hosts to be published", || (runtime.block_on(store.live_hosts()).unwrap().len() == n).then_some(()));
    runtime.block_on(store.close());
}

/// A model of which two ranks take more memory than a small host has, and the job on them.
fn wide(server: &Server) -> Value {
    let mut body = prepare(server);
    let path = |name: &str| server.folder.join(name).to_str().unwrap().to_owned();
    let made = std::process::Command::new(env!("CARGO_BIN_EXE_longhaul"))
        .args(["model", "init", &path("models/wide"), "--document", &path("document.txt"), "--vocab-size", "300"])
        .args([
            "--layers",
            "6",
            "--hidden-size",
            "256",
            "--intermediate-size",
            "640",
            "--heads",
            "4",
            "--kv-heads",
            "2",
        ])
        .status()
        .unwrap();
    assert!(made.success());
    body["model"] = json!("wide");
    body["training"]["sequence_parallel_size"] = json!(2);
    body["training"]["learning_rate"] = json!(1e-3);
    body
}

/// Whether the host led the job that it worked on last, or was called.
fn leads(host: &Host) -> bool {
    let log = host.process.log();
    log.rfind(" claimed ") > log.rfind("ranks of a job that another host leads")
}

/// Waits until the job has come so far with a rank on each of these.
fn reaches(server: &Server, job: &str, step: u64, hosts: [&Host; 2]) {
    server.reaches_step(job, step);
    for host in hosts {
        assert_eq!(trainers(&host.folder).len(), 1, "a rank on each host: {}", host.process.log());
    }
}

#[test]
fn a_job_that_no_host_carries_alone_trains_on_two_and_outlives_either() {
    let sandbox = Sandbox::new("hosts");
    let server = Server::start(&sandbox.join("server"), &["--no-executor"]);
    let body = wide(&server);

    let large = Host::start(&sandbox, &server, "large", "2000000000");
    let one = create(&server, &body);
    result(&server, &one);
    large.stop();

    let alone = Host::start(&sandbox, &server, "first", SMALL);
    published(&sandbox, &server, 1);
    let answer = server.client.post_again("/v1/fine_tuning/jobs", &body, &random_suffix());
    let refused = answer.expect_err("one host is not enough").to_string();
    assert!(refused.contains("host memory"), "{refused}");

    let (first, second) = (alone, Host::start(&sandbox, &server, "second", SMALL));
    published(&sandbox, &server, 2);
    let job = create(&server, &body);
    reaches(&server, &job, 2, [&first, &second]);
    let undisturbed = result(&server, &job);
    assert_same_losses(&losses(&server, &job), &losses(&server, &one));

    // A rank dies on the host that was called: it is named, and the job goes on.
    let job = create(&server, &body);
    reaches(&server, &job, 6, [&first, &second]);
    let (leader, called) = if leads(&first) { (&first, &second) } else { (&second, &first) };
    kill_process(trainer(&called.folder), Signal::KILL).unwrap();
    until("the leader to tell why", || leader.process.log().contains("rank 1 of 2 died: signal: 9").then_some(()));
    assert_eq!(result(&server, &job), undisturbed);

    // One executor dies, then the one that is left of these two: once a host that was called, once the one that leads.
    let job = create(&server, &body);
    reaches(&server, &job, 6, [&first, &second]);
    let (mut dies, stays) = if leads(&first) { (second, first) } else { (first, second) };
    dies.process.kill();
    until("its rank to end", || (!dies.trains()).then_some(()));
    until("the rank that is left to end", || (!stays.trains()).then_some(()));
    let third = Host::start(&sandbox, &server, "third", SMALL);
    reaches(&server, &job, 14, [&stays, &third]);
    let (mut dies, stays) = if leads(&third) { (third, stays) } else { (stays, third) };
    dies.process.kill();
    until("the ranks to end", || (!dies.trains() && !stays.trains()).then_some(()));
    let _fourth = Host::start(&sandbox, &server, "fourth", SMALL);
    assert_eq!(result(&server, &job), undisturbed);
    let interruptions = server.story(&job).iter().filter(|line| line.contains("was interrupted")).count();
    assert_eq!(interruptions, 2);
}
