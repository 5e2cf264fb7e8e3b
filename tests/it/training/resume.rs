//! Stopped after any step and continued elsewhere == never stopped, to the last bit of weights, moments and losses.

use longhaul::{
    domain::{RunSpec, TrainingSpec, training::Precision},
    engine::checkpoint::staging::hex,
};
use sha2::{Digest, Sha256};

use super::{Studio, digests, finish, folder, interrupt, spec};

#[test]
fn stopped_at_any_step_is_never_stopped() {
    let studio = Studio::new("resume");
    let files = [studio.five()];
    for precision in [Precision::F32, Precision::Bf16] {
        let training = TrainingSpec { precision: Some(precision), gradient_accumulation_steps: 2, ..spec(5) };
        let name = |part: &str| format!("{precision:?}-{part}");
        let whole = finish(&studio.run(&name("whole"), &files, training.clone()));
        assert_eq!(whole.steps.len(), 5);
        for after in 1..5 {
            let first = studio.run(&name(&format!("first-{after}")), &files, training.clone());
            let stopped = interrupt(&first, after);
            let from = folder(&first, &stopped.checkpoints[0]);
            let second = studio.run(&name(&format!("second-{after}")), &files, training.clone());
            let continued = finish(&RunSpec { resume_from: Some(from), ..second });
            let (a, b) = (whole.checkpoints.last().unwrap(), continued.checkpoints.last().unwrap());
            assert_eq!(digests(a), digests(b), "{precision:?}, stopped after {after}");
            assert!(a.last && b.last && a.trained_tokens == b.trained_tokens);
            let losses = stopped.steps.iter().chain(&continued.steps).map(|s| (s.step, s.train_loss.to_bits()));
            assert!(losses.eq(whole.steps.iter().map(|s| (s.step, s.train_loss.to_bits()))));
        }
    }
}

#[test]
fn a_stop_before_the_first_step_writes_nothing() {
    let studio = Studio::new("early");
    let run = studio.run("run", &[studio.five()], spec(2));
    let stopped = interrupt(&run, 0);
    assert!(stopped.checkpoints.is_empty());
    assert!(super::names(&run.work_dir.join("checkpoints")).is_empty());
}

#[test]
fn checkpoints_come_at_their_interval_and_hold_a_model() {
    let studio = Studio::new("interval");
    let training = TrainingSpec { checkpoint_interval: Some(2), ..spec(5) };
    let run = studio.run("run", &[studio.five()], training);
    let recorder = finish(&run);
    let steps: Vec<_> = recorder.checkpoints.iter().map(|c| (c.step, c.last)).collect();
    assert_eq!(steps, [(2, false), (4, false), (5, true)]);
    for checkpoint in &recorder.checkpoints {
        let folder = folder(&run, checkpoint);
        for file in &checkpoint.files {
            let bytes = std::fs::read(folder.join(&file.path)).unwrap();
            let digest = hex(&Sha256::digest(&bytes));
            assert_eq!((bytes.len() as u64, digest), (file.bytes, file.sha256.clone()), "{}", file.path);
        }
        for needed in ["config.json", "model.safetensors", "tokenizer.json", "resume/optimizer.safetensors"] {
            assert!(checkpoint.files.iter().any(|f| f.path == needed), "{needed}");
        }
        assert_eq!(checkpoint.metrics["step"].to_bits(), (checkpoint.step as f64).to_bits());
    }
    let sums: Vec<_> = recorder.checkpoints.iter().map(digests).collect();
    assert!(sums[0] != sums[1] && sums[1] != sums[2], "weights move");
}
