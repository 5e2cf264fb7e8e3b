//! The same road with several ranks, a process each: the result of one rank, and whichever process is killed or stopped, all
//! others end with it and the job goes on.

use std::collections::BTreeMap;

use longhaul::client::http::SHORT;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::{create, prepare, result};
use crate::support::{
    Sandbox,
    server::{Server, trainers, until},
};

/// f32, sums in another order, and 24 steps in which the difference grows.
const TOLERANCE: f64 = 1e-5;

/// The job on so many ranks.
fn on(body: &Value, sequence: u64, data: u64) -> Value {
    let mut body = body.clone();
    body["training"]["gradient_accumulation_steps"] = json!(2);
    body["training"]["sequence_parallel_size"] = json!(sequence);
    body["training"]["data_parallel_size"] = json!(data);
    body
}

/// What was measured at each checkpoint, by step.
pub fn losses(server: &Server, job: &str) -> BTreeMap<u64, BTreeMap<String, f64>> {
    let page = server.client.get(&format!("/v1/fine_tuning/jobs/{job}/checkpoints"), SHORT, |_| ()).unwrap();
    let checkpoints = page["data"].as_array().unwrap().iter().map(|checkpoint| {
        let metrics = checkpoint["metrics"].as_object().unwrap().iter();
        let numbers = metrics.filter_map(|(name, value)| Some((name.clone(), value.as_f64()?)));
        (checkpoint["step_number"].as_u64().unwrap(), numbers.collect())
    });
    checkpoints.collect()
}

pub fn assert_same_losses(ours: &BTreeMap<u64, BTreeMap<String, f64>>, theirs: &BTreeMap<u64, BTreeMap<String, f64>>) {
    assert_eq!(ours.len(), theirs.len());
    for (step, metrics) in theirs {
        assert!(metrics.len() > 2, "{metrics:?}");
        for (name, value) in metrics {
            let ours = ours[step][name];
            assert!((ours - value).abs() <= TOLERANCE * value.abs(), "{name} at step {step}: {ours} and {value}");
        }
    }
}

/// The four trainers of the job, once it has come to this step: rank by rank, since one is started after another.
fn ranks_at_step(server: &Server, job: &str, step: u64) -> Vec<i32> {
    server.reaches_step(job, step);
    let mut pids = trainers(&server.folder);
    assert_eq!(pids.len(), 4, "a process for each rank");
    pids.sort_unstable();
    pids
}

fn send(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

fn gone(server: &Server, pids: &[i32]) {
    until("every rank to end", || trainers(&server.folder).iter().all(|pid| !pids.contains(pid)).then_some(()));
}

#[test]
fn ranks_are_one_and_whichever_is_lost_the_job_goes_on() {
    let sandbox = Sandbox::new("ranks-journey");
    let mut server = Server::start(&sandbox.join("server"), &[]);
    let body = prepare(&server);
    let one = create(&server, &on(&body, 1, 1));
    let alone = result(&server, &one);
    let body = on(&body, 2, 2);
    let four = create(&server, &body);
    let undisturbed = result(&server, &four);
    let names = |files: &[(String, String)]| files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&undisturbed), names(&alone));
    let (ours, theirs) = (losses(&server, &four), losses(&server, &one));
    assert_eq!(ours.keys().collect::<Vec<_>>(), [&4, &8, &12, &16, &20, &24]);
    assert_same_losses(&ours, &theirs);

    // One is killed, then one is stopped, then rank 0 is killed.
    let job = create(&server, &body);
    let disturbances = [(6, 2, Signal::KILL), (14, 1, Signal::STOP), (20, 0, Signal::KILL)];
    for (step, rank, signal) in disturbances {
        let pids = ranks_at_step(&server, &job, step);
        send(pids[rank], signal);
        gone(&server, &pids);
    }
    assert_eq!(result(&server, &job), undisturbed);
    let log = server.process.log();
    for said in
        ["rank 2 of 4 died: signal: 9", "rank 1 at 127.0.0.1:", "has been silent for 5s", "rank 0 of 4 died: signal: 9"]
    {
        assert!(log.contains(said), "{said}: {log}");
    }
    let interruptions = server.story(&job).iter().filter(|line| line.contains("was interrupted")).count();
    assert_eq!(interruptions, disturbances.len());

    // The executor is killed: no rank outlives it.
    let job = create(&server, &body);
    let pids = ranks_at_step(&server, &job, 6);
    server.process.signal(Signal::KILL);
    server.process.kill();
    gone(&server, &pids);
    server = Server::start(&sandbox.join("server"), &[]);
    assert_eq!(result(&server, &job), undisturbed);

    // It is asked to stop: a checkpoint of all ranks, and no step is lost.
    let job = create(&server, &body);
    ranks_at_step(&server, &job, 6);
    server.process.signal(Signal::TERM);
    assert!(server.process.ended_well(), "{}", server.process.log());
    server = Server::start(&sandbox.join("server"), &[]);
    assert_eq!(result(&server, &job), undisturbed);
}
