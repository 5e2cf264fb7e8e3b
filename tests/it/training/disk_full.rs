//! A disk that fills while a checkpoint is written: the run says so, the name stays free, the checkpoint before is whole.
//!
//! A limit on file sizes stands for the full disk. It holds for a whole process, so the run goes in one of its own: this
//! test binary again, with one ignored test.

use std::process::Command;

use longhaul::{
    domain::{RunSpec, TrainingSpec},
    engine::Error,
};

use super::{Recorder, Studio, digests, finish, folder, interrupt, names, ranks::train, spec};

/// Where the child finds its run.
const RUN: &str = "LONGHAUL_TEST_RUN";

#[test]
fn a_full_disk_leaves_the_last_checkpoint() {
    leaves_the_last_checkpoint(1);
}

/// Rank 0 writes, and ends all of them.
#[test]
fn a_full_disk_ends_every_rank() {
    leaves_the_last_checkpoint(4);
}

fn leaves_the_last_checkpoint(ranks: u32) {
    let studio = Studio::new("full");
    let files = [studio.five()];
    let spec = |steps| TrainingSpec { sequence_parallel_size: Some(ranks), ..spec(steps) };
    let first = studio.run("first", &files, spec(3));
    let before = interrupt(&first, 1);
    let from = folder(&first, &before.checkpoints[0]);
    let second = RunSpec { resume_from: Some(from), ..studio.run("second", &files, spec(3)) };
    let path = studio.sandbox.join("run.json");
    std::fs::write(&path, serde_json::to_vec(&second).unwrap()).unwrap();

    // At most 60 blocks a file: room for the tokens, not for the weights. The signal that comes with it is ignored.
    let script = "trap '' XFSZ; ulimit -f 60; exec \"$0\" --exact --ignored training::disk_full::child";
    let program = std::env::current_exe().unwrap();
    let output = Command::new("/bin/sh").args(["-c", script]).arg(program).env(RUN, &path).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");

    assert!(names(&second.work_dir.join("checkpoints")).is_empty(), "no half checkpoint");
    let whole = finish(&studio.run("whole", &files, spec(3)));
    let continued = finish(&second);
    assert_eq!(digests(&whole.checkpoints[0]), digests(&continued.checkpoints[0]));
}

#[test]
#[ignore = "runs in a process of its own, under a limit on file sizes"]
fn child() {
    let Some(path) = std::env::var_os(RUN) else { return };
    let run: RunSpec = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut recorder = Recorder::default();
    // It comes back once every rank has ended.
    let error = train(&run, &mut recorder).expect_err("the weights are larger than a file may be");
    assert!(matches!(error, Error::File { .. }), "{error}");
    assert_eq!(recorder.steps.len(), 2, "the run went to its end");
    assert!(recorder.checkpoints.is_empty());
}
