//! A run that is killed in the middle of its steps, on any device: its checkpoint brings back every bit of its state, and what
//! follows is what would have followed. `gpu::resume` takes it to a GPU.
//!
//! The run that dies is this binary once more, asked for the same test; the environment tells it to train until it is killed.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
};

use longhaul::{
    cli::model::{Args, init},
    domain::ModelConfig,
    engine::{
        backend::Backend,
        checkpoint::huggingface,
        train::{Progress, saved, session::Session},
    },
    plan::Forced,
};
use serde_json::{Value, json};

use super::small_model;
use crate::support::{
    Sandbox,
    model::{Tokens, read_bytes},
    stage::{OnCpu, Stage, hyper},
};

/// Set in the process that is to be killed: the folder of the model and of what it writes.
const DOOMED: &str = "LONGHAUL_TEST_DOOMED_RUN";
const TOKENS: u64 = 768;
const STEPS: u64 = 10;
/// Step whose state is kept, and the last one that is waited for.
const KEPT: u64 = 4;
const KILLED: u64 = 6;

/// Four heads of 64 and a small vocabulary, as `longhaul model init` makes them.
fn make_model(folder: &Path) {
    let sizes = Args { vocab_size: 304, hidden_size: 256, intermediate_size: 384, ..small_model(folder, "model") };
    init(&sizes).unwrap();
}

fn config(folder: &Path) -> ModelConfig {
    ModelConfig::from_config_text(&huggingface::config_text(&folder.join("model")).unwrap()).unwrap()
}

fn step<B: Backend>(session: &mut Session<B>, step: u64) -> f64 {
    let tokens = Tokens::chain(session.config().vocab_size, TOKENS, step);
    session.step(&[tokens.batch()], &hyper(step), 1.0).unwrap().mean_loss()
}

/// Every byte that a run carries from step to step.
fn state<B: Backend>(session: &mut Session<B>) -> Vec<u8> {
    let (w, state) = (session.flat_weights(), *session.optimizer());
    let splits = [Some(w), state.low, Some(state.m), Some(state.v)].into_iter().flatten();
    let tensors = splits.flat_map(|split| [split.host, split.device]);
    tensors.flat_map(|tensor| read_bytes(&mut session.backend, tensor)).collect()
}

/// Trains until the process is killed; a line a step.
fn train_until_killed<S: Stage>(stage: &mut S, folder: &Path) {
    let config = config(folder);
    let plan = stage.plan(&config, TOKENS, Forced::default());
    let mut session = stage.session(&config, &plan);
    saved::load_base(&mut session, &folder.join("model")).unwrap();
    for n in 1.. {
        let loss = step(&mut session, n);
        if n == KEPT {
            std::fs::write(folder.join("state"), state(&mut session)).unwrap();
            let progress = Progress { step: n, tokens_seen: n * TOKENS, train_loss: Some(loss), valid_loss: None };
            saved::write(&mut session, progress, &folder.join("model"), folder).unwrap();
        }
        let line = json!({ "step": n, "loss": loss.to_bits() });
        let mut out = std::io::stdout().lock();
        writeln!(out, "\n{line}").and_then(|()| out.flush()).unwrap();
    }
}

/// Starts the run, kills it after some steps; losses of the steps it told.
fn losses_until_killed(test: &str, folder: &Path) -> Vec<f64> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--include-ignored", "--nocapture"])
        .env(DOOMED, folder)
        // Where the sandbox's watcher finds it, should this process end first.
        .current_dir(folder)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut losses = Vec::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        let told: Value = serde_json::from_str(&line).unwrap_or_default();
        let Some(bits) = told["loss"].as_u64() else { continue };
        losses.push(f64::from_bits(bits));
        if told["step"] == KILLED {
            break;
        }
    }
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert!(losses.len() as u64 == KILLED && status.code().is_none(), "it trained until it was killed: {status}");
    losses
}

/// The proof. `test` is the caller's full name; `floor` what a loss may differ beyond the spread of undisturbed runs, of itself.
pub fn a_killed_run_continues<S: Stage>(stage: &mut S, test: &str, floor: f64, mut figures: impl FnMut(Value)) {
    if let Some(folder) = std::env::var_os(DOOMED) {
        return train_until_killed(stage, Path::new(&folder));
    }
    let sandbox = Sandbox::new("killed");
    make_model(sandbox.path());
    let config = config(sandbox.path());
    let plan = stage.plan(&config, TOKENS, Forced::default());
    let mut undisturbed = Vec::new();
    for _ in 0..3 {
        let mut session = stage.session(&config, &plan);
        saved::load_base(&mut session, &sandbox.join("model")).unwrap();
        undisturbed.push((1..=STEPS).map(|n| step(&mut session, n)).collect::<Vec<f64>>());
        stage.end(session, &plan);
    }
    let before = losses_until_killed(test, sandbox.path());

    let mut session = stage.session(&config, &plan);
    let progress = saved::resume(&mut session, &sandbox.join(format!("step-{KEPT}"))).unwrap();
    assert_eq!((progress.step, progress.tokens_seen), (KEPT, KEPT * TOKENS));
    let kept = std::fs::read(sandbox.join("state")).unwrap();
    assert!(state(&mut session) == kept, "weights, low halves and moments come back bit for bit");
    let after: Vec<f64> = (KEPT + 1..=STEPS).map(|n| step(&mut session, n)).collect();
    stage.end(session, &plan);
    // Of the same state and the same sequence: the forward pass has no spread.
    assert_eq!(after[0].to_bits(), before[KEPT as usize].to_bits(), "the first loss after the resume");

    let at = |n: usize| undisturbed.iter().map(move |losses| losses[n]);
    let spread = |n: usize| at(n).fold(f64::MIN, f64::max) - at(n).fold(f64::MAX, f64::min);
    let spreads: Vec<f64> = (0..STEPS as usize).map(spread).collect();
    let widest = spreads.iter().copied().fold(0.0, f64::max);
    let continued: Vec<f64> = before[..KEPT as usize].iter().chain(&after).copied().collect();
    let distance = |n: usize| at(n).map(|loss| (loss - continued[n]).abs()).fold(f64::MAX, f64::min);
    let distances: Vec<f64> = (0..STEPS as usize).map(distance).collect();
    figures(json!({
        "state_bytes_equal": kept.len(), "undisturbed": undisturbed[0], "killed_and_resumed": continued,
        "spread_of_three": spreads, "distance_to_nearest": distances,
    }));
    assert!(continued[STEPS as usize - 1] < 0.95 * continued[0], "it learns: {continued:?}");
    for (n, distance) in distances.iter().enumerate() {
        let allowed = 3.0 * widest + floor * continued[n];
        assert!(*distance <= allowed, "loss of step {} is {distance} away from every undisturbed run", n + 1);
    }
}

#[test]
fn a_killed_run_continues_in_bf16() {
    let test = "training::killed::a_killed_run_continues_in_bf16";
    a_killed_run_continues(&mut OnCpu, test, 0.0, |values| eprintln!("{values}"));
}
