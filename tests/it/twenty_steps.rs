//! Twenty steps beside transformers: the same weights, sequences and settings, both in bf16 with f32 masters, on the same device.
//! The losses may differ by rounding, and may not drift apart.
//!
//! The measure is for any device; `gpu::twenty_steps` takes it to a GPU.

use std::{path::Path, process::Command};

use longhaul::{
    cli::model::{Args, init},
    domain::ModelConfig,
    engine::{backend::AdamW, checkpoint::huggingface, train::saved},
    plan::Forced,
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    support::{
        self, Sandbox,
        model::Tokens,
        reference_python,
        stage::{OnCpu, Stage, hyper},
    },
    training::small_model,
};
const STEPS: u64 = 20;
const MAX_GRAD_NORM: f64 = 1.0;
/// Largest mean of |ours - theirs| over the steps.
const MEAN: f64 = 5e-3;
/// Most that the mean of (ours - theirs) may move from the first ten steps to the last ten.
const DRIFT: f64 = 2.5e-3;

/// Sizes of a model with heads of 64, tokens of a sequence, and a learning rate at which rounding does not decide what is
/// learned: at a larger one losses of the same training in bf16 and f32 part in a few steps.
pub struct Sizes {
    pub learning_rate: f64,
    pub layers: u64,
    pub hidden: u64,
    pub intermediate: u64,
    pub heads: u64,
    pub kv_heads: u64,
    pub vocab: u64,
    pub tokens: u64,
}

#[derive(Deserialize)]
struct Theirs {
    bf16: Vec<f64>,
    f32: Vec<f64>,
    made_by: Value,
}

fn make_model(folder: &Path, sizes: &Sizes) -> ModelConfig {
    let args = Args {
        vocab_size: sizes.vocab,
        layers: sizes.layers,
        hidden_size: sizes.hidden,
        intermediate_size: sizes.intermediate,
        heads: sizes.heads,
        kv_heads: sizes.kv_heads,
        max_position_embeddings: 8192,
        seed: 5,
        ..small_model(folder, "model")
    };
    init(&args).unwrap();
    ModelConfig::from_config_text(&huggingface::config_text(&args.folder).unwrap()).unwrap()
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len() as f64;
    values.sum::<f64>() / n
}

/// Trains both and compares. `device` is what PyTorch calls the stage's.
pub fn beside_transformers<S: Stage>(stage: &mut S, device: &str, python: &Path, sizes: &Sizes) -> Value {
    let sandbox = Sandbox::new("twenty-steps");
    let config = make_model(sandbox.path(), sizes);
    assert_eq!((config.head_dim, config.vocab_size), (64, sizes.vocab));
    let sequences: Vec<Tokens> = (1..=STEPS).map(|n| Tokens::chain(config.vocab_size, sizes.tokens, n)).collect();

    let hyper = |step| AdamW { learning_rate: sizes.learning_rate, ..hyper(step) };
    let settings = hyper(1);
    let job = json!({
        "device": device, "learning_rate": settings.learning_rate, "beta1": settings.beta1, "beta2": settings.beta2,
        "epsilon": settings.epsilon, "weight_decay": settings.weight_decay, "max_grad_norm": MAX_GRAD_NORM,
        "sequences": sequences.iter().map(|tokens| &tokens.ids).collect::<Vec<_>>(),
    });
    std::fs::write(sandbox.join("steps.json"), job.to_string()).unwrap();
    let script = support::tree().join("tests/reference/twenty_steps.py");
    let output = Command::new(python)
        .arg(script)
        .args([sandbox.join("model"), sandbox.join("steps.json")])
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let theirs: Theirs = serde_json::from_slice(&output.stdout).unwrap();

    let plan = stage.plan(&config, sizes.tokens, Forced::default());
    let mut session = stage.session(&config, &plan);
    saved::load_base(&mut session, &sandbox.join("model")).unwrap();
    let steps = sequences
        .iter()
        .zip(1..)
        .map(|(tokens, n)| session.step(&[tokens.batch()], &hyper(n), MAX_GRAD_NORM).unwrap().mean_loss());
    let ours: Vec<f64> = steps.collect();
    stage.end(session, &plan);

    assert_eq!((theirs.bf16.len(), theirs.f32.len()), (ours.len(), ours.len()));
    let apart = |a: &[f64], b: &[f64]| mean(a.iter().zip(b).map(|(a, b)| (a - b).abs()));
    let differences: Vec<f64> = ours.iter().zip(&theirs.bf16).map(|(a, b)| a - b).collect();
    let (first, last) = differences.split_at(differences.len() / 2);
    let drift = mean(last.iter().copied()) - mean(first.iter().copied());
    let apart_from_theirs = apart(&ours, &theirs.bf16);
    let figures = json!({
        "with": theirs.made_by, "mean_difference": apart_from_theirs, "drift": drift,
        "ours_from_their_f32": apart(&ours, &theirs.f32), "theirs_from_their_f32": apart(&theirs.bf16, &theirs.f32),
        "ours": ours, "theirs": theirs.bf16,
    });
    let fallen = mean(ours[..5].iter().copied()) - mean(ours[ours.len() - 5..].iter().copied());
    assert!(fallen > 10.0 * MEAN, "it learns: {figures}");
    assert!(apart_from_theirs <= MEAN && drift.abs() <= DRIFT, "{figures}");
    figures
}

#[test]
fn twenty_steps_are_transformers() {
    let Some(python) = reference_python() else { return };
    let sizes = Sizes {
        learning_rate: 1e-3,
        layers: 2,
        hidden: 128,
        intermediate: 256,
        heads: 2,
        kv_heads: 1,
        vocab: 304,
        tokens: 256,
    };
    eprintln!("{}", beside_transformers(&mut OnCpu, "cpu", Path::new(&python), &sizes));
}
