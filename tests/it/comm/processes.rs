//! Ranks as processes: the test binary starts itself once for each, and kills and stops some.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        mpsc::{self, Receiver},
    },
    thread,
    time::Duration,
};

use longhaul::engine::{
    Error,
    comm::{HostComm, rendezvous, tcp::Heartbeat, tcp::Tcp},
};
use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest, Sha256};

use super::{NO_HANG, collectives, lost, nccl, tcp::meeting};
use crate::{
    support::{self, Sandbox},
    together,
};

/// What a rank is told: its number, how many there are, where rank 0 listens ("" for rank 0 itself), what to do.
const RANK: &str = "LONGHAUL_TEST_COMM_RANK";
/// Patience in these tests: short, so that they are; long enough for a machine that is busy.
const HEARTBEAT: Heartbeat = Heartbeat { interval: Duration::from_millis(200), patience: Duration::from_secs(5) };

/// A process that is a rank, and what it says.
pub struct Rank {
    process: Child,
    lines: Receiver<String>,
    /// Where it works, so that it ends with the test even if it is stopped and the test is killed.
    sandbox: Arc<Sandbox>,
}

impl Rank {
    fn start(sandbox: &Arc<Sandbox>, rank: usize, n_ranks: usize, address: &str, work: &str) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["comm::processes::rank", "--exact", "--ignored", "--nocapture"])
            .env(RANK, format!("{rank} {n_ranks} {work} {address}"))
            .env("LONGHAUL_TEST_DATA", support::tree().canonicalize().unwrap())
            .current_dir(sandbox.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (tell, lines) = mpsc::channel();
        let stdout = BufReader::new(process.stdout.take().unwrap());
        thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
        Self { process, lines, sandbox: Arc::clone(sandbox) }
    }

    /// The rest of the next line that begins so.
    pub fn says(&self, what: &str) -> String {
        loop {
            let line =
                self.lines.recv_timeout(NO_HANG).unwrap_or_else(|error| panic!("waiting for \"{what}\": {error}"));
            if let Some(rest) = line.strip_prefix(what) {
                return rest.trim().to_owned();
            }
        }
    }

    /// Where all ranks work.
    pub fn folder(&self) -> &Path {
        self.sandbox.path()
    }

    pub fn send(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A world of processes that do this.
pub fn start(n_ranks: usize, work: &str) -> Vec<Rank> {
    let sandbox = Arc::new(Sandbox::new("ranks"));
    let mut ranks = vec![Rank::start(&sandbox, 0, n_ranks, "", work)];
    let address = ranks[0].says("address");
    ranks.extend((1..n_ranks).map(|rank| Rank::start(&sandbox, rank, n_ranks, &address, work)));
    ranks
}

pub fn say(what: &str) {
    // The test harness writes to the same stream: a line of its own may have begun.
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n{what}").and_then(|()| out.flush()).unwrap();
}

#[test]
#[ignore = "one rank of the tests here, which start it"]
fn rank() {
    let Ok(told) = std::env::var(RANK) else { return };
    let told: Vec<&str> = told.split(' ').collect();
    let [rank, n_ranks, work, address] = told[..] else { panic!("{told:?}") };
    let mut meeting = meeting(address, rank.parse().unwrap(), n_ranks.parse().unwrap());
    meeting.heartbeat = HEARTBEAT;
    let comm = if address.is_empty() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        say(&format!("address {}", listener.local_addr().unwrap()));
        rendezvous::receive(listener, &meeting)
    } else {
        rendezvous::meet(&meeting)
    };
    let comm = comm.unwrap();
    match work {
        "collectives" => {
            let digest = Sha256::digest(collectives::body(comm));
            say(&format!("received {}", digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>()));
        }
        "until-lost" | "large-until-lost" => {
            let n_counts = if work == "until-lost" { 1000 } else { LARGE };
            let (rank, message) = lost::<()>(Err(until_lost(comm, n_counts)));
            say(&format!("lost {rank} {message}"));
        }
        "nccl" => nccl::collectives(comm),
        "nccl-until-lost" => {
            let (rank, message) = lost::<()>(Err(nccl::until_lost(comm)));
            say(&format!("lost {rank} {message}"));
        }
        other => {
            let (work, device) = other.split_once('-').expect("work and a device");
            together::rank(work, device, comm);
        }
    }
}

/// More than the buffers of a connection hold: what is sent to a process that is stopped gets stuck half way.
const LARGE: usize = 2 << 20;

fn until_lost(mut comm: HostComm<Tcp>, n_counts: usize) -> Error {
    for n in 0u64.. {
        if let Err(error) = comm.all_reduce_counts(&mut vec![n; n_counts]) {
            return error;
        }
        if n == 3 {
            say("working");
        }
    }
    unreachable!("a rank is lost before")
}

#[test]
fn every_collective_is_its_definition_and_repeats() {
    let run = || start(3, "collectives").iter().map(|rank| rank.says("received")).collect::<Vec<_>>();
    assert_eq!(run(), run());
}

/// Four ranks work; one is sent the signal; what the other three say is lost.
fn without(victim: usize, signal: Signal, work: &str) -> (Vec<Rank>, Vec<String>) {
    let ranks = start(4, work);
    ranks.iter().for_each(|rank| drop(rank.says("working")));
    ranks[victim].send(signal);
    let others = ranks.iter().enumerate().filter(|(rank, _)| *rank != victim);
    let seen = others.map(|(_, rank)| rank.says("lost")).collect();
    (ranks, seen)
}

#[test]
fn a_killed_process_is_named_by_the_others() {
    for victim in [2, 0] {
        let (_ranks, seen) = without(victim, Signal::KILL, "until-lost");
        for message in seen {
            let start = format!("{victim} rank {victim} at 127.0.0.1:");
            assert!(message.starts_with(&start) && message.contains("closed its connection"), "{message}");
        }
    }
}

#[test]
fn a_stopped_process_is_named_by_the_others() {
    let (ranks, seen) = without(1, Signal::STOP, "until-lost");
    for message in seen {
        assert!(message.starts_with("1 rank 1 at 127.0.0.1:") && message.contains("silent for 5s"), "{message}");
    }
    // It learns the same when it goes on.
    ranks[1].send(Signal::CONT);
    let message = ranks[1].says("lost");
    assert!(message.starts_with("1 rank 1 (this one) has been silent"), "{message}");
}

#[test]
fn a_process_that_is_stopped_in_the_middle_of_a_message_is_named_by_the_others() {
    let (mut ranks, seen) = without(3, Signal::STOP, "large-until-lost");
    for message in seen {
        assert!(message.starts_with("3 rank 3 at 127.0.0.1:") && message.contains("silent for 5s"), "{message}");
    }
    // Nor do they wait for it when they end.
    for rank in &mut ranks[..3] {
        while rank.lines.recv_timeout(NO_HANG).is_ok() {}
        assert!(rank.process.wait().unwrap().success());
    }
}
