//! Whole models against PyTorch and transformers: losses, every gradient, and the weights after five AdamW steps.
//!
//! `tests/reference/make_golden.py` wrote the files, in float64 from weights that f32 holds. The engine runs in f32 and
//! must agree tensor by tensor, whatever the plan.

pub mod bf16;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use longhaul::{
    domain::{
        ModelConfig,
        training::{Moments, Precision},
    },
    engine::{
        backend::{AdamW, Backend, cpu::Cpu},
        checkpoint::safetensors::Weights,
        model::params::Named,
        train::{saved, session::Session},
    },
    plan::{self, Forced, Place},
};
use serde::Deserialize;

use crate::support::{
    self,
    model::{self, Tokens, relative_error},
};

const NAMES: [&str; 2] = ["grouped_tied", "llama3_rope_untied"];
/// Largest `||a - b|| / ||b||` of a tensor in f32.
const TOLERANCE: f64 = 1e-5;

/// `steps.json`.
#[derive(Deserialize)]
struct Golden {
    learning_rate: f64,
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
    max_grad_norm: f64,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    loss: f64,
    grad_norm: f64,
    /// Documents of each sequence, as token ids.
    sequences: Vec<Vec<Vec<i32>>>,
}

impl Golden {
    fn hyper(&self, step: usize) -> AdamW {
        AdamW {
            learning_rate: self.learning_rate,
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            weight_decay: self.weight_decay,
            step: step as u64,
            seed: 0,
            first_index: 0,
        }
    }
}

impl Step {
    fn tokens(&self) -> Vec<Tokens> {
        self.sequences.iter().map(|documents| Tokens::of(documents)).collect()
    }
}

pub fn folder(name: &str) -> PathBuf {
    support::tree().join("tests/reference/golden").join(name)
}

fn golden(name: &str) -> Golden {
    serde_json::from_str(&std::fs::read_to_string(folder(name).join("steps.json")).unwrap()).unwrap()
}

/// The plainest plan, and one that uses every device of the engine at once: chunks that no document's bounds meet, a single
/// kept segment start or two, tiles, layer inputs on disk.
fn plans() -> [(&'static str, Forced); 3] {
    let whole = Forced { chunk_tokens: Some(512), checkpoint_slots: Some(2), ..Forced::default() };
    let bare = Forced { kept_attention_layers: Some(0), kept_qkv_layers: Some(0), ..Forced::default() };
    let bare = Forced { kept_gate_up_layers: Some(0), mlp_tile_rows: Some(13), loss_tile_rows: Some(29), ..bare };
    [
        ("one chunk", whole),
        ("chunks of 23", Forced { chunk_tokens: Some(23), place: Some(Place::Memory), ..bare }),
        (
            "chunks of 64, inputs on disk",
            Forced {
                chunk_tokens: Some(64),
                place: Some(Place::Disk),
                kept_attention_layers: Some(1),
                kept_qkv_layers: Some(2),
                kept_gate_up_layers: None,
                ..bare
            },
        ),
    ]
}

pub fn config(name: &str) -> ModelConfig {
    ModelConfig::from_config_text(&std::fs::read_to_string(folder(name).join("config.json")).unwrap()).unwrap()
}

fn session<B: Backend>(name: &str, backend: B, precision: Precision, forced: Forced) -> Session<B> {
    let config = config(name);
    let machine = model::machine(1 << 30);
    let (model, machine, moments) = (&config, &machine, Moments::F32);
    let request = plan::Request { model, precision, moments, tokens: 512, micro_batches: 1, machine, forced };
    let plan = plan::plan(&request).unwrap();
    let mut session = Session::new(backend, &plan, &config, &std::env::temp_dir()).unwrap();
    saved::load_base(&mut session, &folder(name)).unwrap();
    session
}

fn assert_near(what: &str, ours: f64, theirs: f64, tolerance: f64) {
    assert!((ours - theirs).abs() <= tolerance * theirs.abs(), "{what}: {ours} against {theirs}");
}

/// Values of every tensor of a safetensors file that these parameters name.
fn read_all(file: &Path, parameters: &[Named]) -> BTreeMap<String, Vec<f64>> {
    let weights = Weights::open_files([file.to_owned()]).unwrap();
    assert_eq!(weights.names().count(), parameters.len(), "{} has as many tensors as the model", file.display());
    let read = |p: &Named| {
        let mut values = Vec::new();
        let sink = |_, piece: &[f32]| {
            values.extend(piece.iter().map(|v| f64::from(*v)));
            Ok(())
        };
        weights.read(&p.name, &p.shape, sink).unwrap();
        (p.name.clone(), values)
    };
    parameters.iter().map(read).collect()
}

/// The worst tensor's error of `ours` against a golden file, by name.
fn worst<B: Backend>(session: &mut Session<B>, ours: &[Named], golden: &Path) -> (f64, String) {
    let theirs = read_all(golden, ours);
    let error = |p: &Named| {
        let values = model::read(&mut session.backend, p.tensor);
        (relative_error(&values, &theirs[&p.name]), p.name.clone())
    };
    ours.iter().map(error).max_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
}

#[test]
fn losses_and_gradients_are_pytorchs() {
    for name in NAMES {
        let step = &golden(name).steps[0];
        let tokens = step.tokens();
        let batches: Vec<_> = tokens.iter().map(Tokens::batch).collect();
        for (plan, forced) in plans() {
            let mut session = session(name, Cpu::<f32>::new(2).unwrap(), Precision::F32, forced);
            session.gradients(&batches).unwrap();
            let loss = session.totals().unwrap().mean_loss();
            assert_near(&format!("{name}, {plan}: loss"), loss, step.loss, TOLERANCE);
            let grads = session.grads();
            let (error, tensor) = worst(&mut session, &grads, &folder(name).join("gradients.safetensors"));
            assert!(error <= TOLERANCE, "{name}, {plan}: gradient of {tensor} differs by {error}");
            let evaluated = session.evaluate(batches.iter().copied()).unwrap().mean_loss();
            assert_near(&format!("{name}, {plan}: evaluation"), evaluated, step.loss, TOLERANCE);
        }
    }
}

#[test]
fn weights_after_five_steps_are_pytorchs() {
    for name in NAMES {
        let golden = golden(name);
        assert_eq!(golden.steps.len(), 5);
        for (plan, forced) in plans() {
            let mut session = session(name, Cpu::<f32>::new(2).unwrap(), Precision::F32, forced);
            let parameters = session.weights();
            let before: Vec<Vec<f64>> =
                parameters.iter().map(|p| model::read(&mut session.backend, p.tensor)).collect();
            for (i, step) in golden.steps.iter().enumerate() {
                let tokens = step.tokens();
                let batches: Vec<_> = tokens.iter().map(Tokens::batch).collect();
                let totals = session.step(&batches, &golden.hyper(i + 1), golden.max_grad_norm).unwrap();
                let what = format!("{name}, {plan}, step {}", i + 1);
                assert_near(&format!("{what}: loss"), totals.mean_loss(), step.loss, TOLERANCE);
                assert_near(&format!("{what}: gradient norm"), totals.grad_norm, step.grad_norm, TOLERANCE);
                assert!(step.grad_norm > golden.max_grad_norm, "clipping is at work");
            }
            let after = folder(name).join("after.safetensors");
            let (error, tensor) = worst(&mut session, &parameters, &after);
            assert!(error <= TOLERANCE, "{name}, {plan}: {tensor} after five steps differs by {error}");
            // The steps themselves, which are small beside the weights.
            let theirs = read_all(&after, &parameters);
            for (parameter, before) in parameters.iter().zip(&before) {
                let moved = |after: &[f64]| -> Vec<f64> { after.iter().zip(before).map(|(a, b)| a - b).collect() };
                let ours = moved(&model::read(&mut session.backend, parameter.tensor));
                let error = relative_error(&ours, &moved(&theirs[&parameter.name]));
                assert!(error <= 1e-3, "{name}, {plan}: the way of {} differs by {error}", parameter.name);
            }
        }
    }
}

#[test]
fn bf16_stays_near() {
    for name in NAMES {
        let golden = golden(name);
        let mut session = session(name, Cpu::<half::bf16>::new(2).unwrap(), Precision::Bf16, plans()[1].1);
        for (i, step) in golden.steps.iter().enumerate() {
            let tokens = step.tokens();
            let batches: Vec<_> = tokens.iter().map(Tokens::batch).collect();
            let totals = session.step(&batches, &golden.hyper(i + 1), golden.max_grad_norm).unwrap();
            assert_near(&format!("{name}, step {}: loss", i + 1), totals.mean_loss(), step.loss, 5e-3);
        }
        let parameters = session.weights();
        let (error, tensor) = worst(&mut session, &parameters, &folder(name).join("after.safetensors"));
        assert!(error <= 2e-2, "{name}: {tensor} after five steps differs by {error}");
    }
}
