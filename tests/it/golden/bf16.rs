//! A whole model in bf16 against float64, beside what PyTorch makes of the same weights in bf16: the engine may be no worse.
//!
//! The measure and the bounds are here, for every backend that stores bf16; `gpu::golden` takes them to a GPU.

use std::collections::BTreeMap;

use longhaul::{
    domain::training::Precision,
    engine::{
        backend::{Backend, cpu::Cpu},
        comm::Comm,
        train::session::Session,
    },
    plan::{Forced, Gradients},
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Golden, config, folder, golden, read_all, session};
use crate::support::model::{self, Tokens, relative_error};

pub const NAME: &str = "heads_of_64";
/// How much larger than PyTorch's a gradient's error may be. Rounding errors of single tensors scatter by so much.
const FACTOR: f64 = 1.25;
/// Largest relative error of the first loss, over hundreds of labels; PyTorch's is 5e-5.
const LOSS: f64 = 2e-4;
/// The same after a few updates in bf16.
const LATER_LOSS: f64 = 5e-3;

/// `bf16.json`: PyTorch's errors against float64.
#[derive(Deserialize)]
struct Theirs {
    loss: f64,
    gradients: BTreeMap<String, f64>,
}

/// What the engine's errors came to.
pub struct Errors {
    pub loss: f64,
    pub gradients: Vec<(String, f64)>,
}

/// The golden model's documents of every step, padded as the device wants them.
pub fn sequences(pad_to: usize) -> Vec<Tokens> {
    let steps = golden(NAME).steps;
    steps.iter().map(|step| Tokens::padded(&step.sequences[0], pad_to)).collect()
}

/// Errors of loss and gradients of the first step, in a session that holds the golden weights.
pub fn errors<B: Backend>(session: &mut Session<B>, tokens: &Tokens) -> Errors {
    let (loss, ours) = model::gradients(session, &[tokens.batch()]);
    let exact = read_all(&folder(NAME).join("gradients.safetensors"), &session.grads());
    let gradients = ours.into_iter().map(|(name, values)| (name.clone(), relative_error(&values, &exact[&name])));
    let theirs = golden(NAME).steps[0].loss;
    Errors { loss: (loss - theirs).abs() / theirs, gradients: gradients.collect() }
}

/// What one of several ranks knows of them: the loss, and of its part of each gradient the squares of the error and of the values.
#[derive(Serialize, Deserialize)]
pub struct OwnErrors {
    loss: f64,
    squares: BTreeMap<String, (f64, f64)>,
}

/// Errors of this rank's part, as [`errors`].
pub fn own_errors<B: Backend, C: Comm<B>>(session: &mut Session<B, C>, tokens: &Tokens) -> OwnErrors {
    session.gradients(&[tokens.batch()]).unwrap();
    let loss = session.totals().unwrap().mean_loss();
    let (parameters, grads) = (session.parameters().to_vec(), session.flat_grads());
    let exact = read_all(&folder(NAME).join("gradients.safetensors"), &parameters);
    let mut squares = BTreeMap::new();
    for parameter in parameters {
        let exact = &exact[&parameter.name];
        let (error, norm) = squares.entry(parameter.name.clone()).or_insert((0.0, 0.0));
        for (first, place) in session.owned(&parameter, grads) {
            let values = model::read(&mut session.backend, place);
            for (ours, exact) in values.iter().zip(&exact[first as usize..]) {
                *error += (ours - exact).powi(2);
                *norm += exact.powi(2);
            }
        }
    }
    OwnErrors { loss, squares }
}

impl Errors {
    /// Of the whole model, from what every rank knows.
    pub fn of_ranks(ranks: Vec<OwnErrors>) -> Self {
        let theirs = golden(NAME).steps[0].loss;
        let loss = ranks[0].loss;
        assert!(ranks.iter().all(|rank| rank.loss.to_bits() == loss.to_bits()), "every rank knows the loss");
        let gradients = ranks[0].squares.keys().map(|name| {
            let sum = |a: (f64, f64), b: (f64, f64)| (a.0 + b.0, a.1 + b.1);
            let (error, norm) = ranks.iter().map(|rank| rank.squares[name]).fold((0.0, 0.0), sum);
            (name.clone(), (error / norm).sqrt())
        });
        Self { loss: (loss - theirs).abs() / theirs, gradients: gradients.collect() }
    }
}

/// Asserts the bounds; says in numbers how the engine stands beside PyTorch.
pub fn assert_as_good_as_pytorch(what: &str, errors: &Errors) -> serde_json::Value {
    let text = std::fs::read_to_string(folder(NAME).join("bf16.json")).unwrap();
    let theirs: Theirs = serde_json::from_str(&text).unwrap();
    assert!(errors.loss <= LOSS, "{what}: loss is off by {}", errors.loss);
    let mut ratios: Vec<(f64, &str)> = Vec::new();
    for (name, error) in &errors.gradients {
        let ratio = error / theirs.gradients[name];
        assert!(ratio <= FACTOR, "{what}: gradient of {name} differs by {error}, PyTorch's by {}", error / ratio);
        ratios.push((ratio, name));
    }
    ratios.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (worst, tensor) = ratios[ratios.len() - 1];
    let largest = errors.gradients.iter().map(|(_, error)| *error).fold(0.0, f64::max);
    json!({
        "plan": what, "loss_error": errors.loss, "pytorch_loss_error": theirs.loss, "largest_gradient_error": largest,
        "error_beside_pytorch_median": ratios[ratios.len() / 2].0, "error_beside_pytorch_worst": worst, "worst_tensor": tensor,
    })
}

/// Trains the golden steps; the largest relative error of a loss, which is asserted.
pub fn trained<B: Backend, C: Comm<B>>(what: &str, session: &mut Session<B, C>, sequences: &[Tokens]) -> f64 {
    let golden: Golden = golden(NAME);
    let mut worst = 0f64;
    for (i, (step, tokens)) in golden.steps.iter().zip(sequences).enumerate() {
        let totals = session.step(&[tokens.batch()], &golden.hyper(i + 1), golden.max_grad_norm).unwrap();
        let error = (totals.mean_loss() - step.loss).abs() / step.loss;
        assert!(error <= LATER_LOSS, "{what}, step {}: loss is off by {error}", i + 1);
        worst = worst.max(error);
    }
    worst
}

/// Plans that differ in everything that a plan can choose, chunks and tiles in multiples of `block` rows.
pub fn plans(block: u64) -> [(&'static str, Forced); 4] {
    let whole = Forced { chunk_tokens: Some(4 * block), gradients: Some(Gradients::Wide), ..Forced::default() };
    let bare = Forced { kept_attention_layers: Some(0), kept_qkv_layers: Some(0), ..whole };
    let bare = Forced { kept_gate_up_layers: Some(0), checkpoint_slots: Some(1), ..bare };
    [
        ("one chunk", whole),
        ("one block a chunk, nothing kept", Forced { chunk_tokens: Some(block), ..bare }),
        (
            "two blocks a chunk, tiles",
            Forced { chunk_tokens: Some(2 * block), mlp_tile_rows: Some(96), loss_tile_rows: Some(200), ..bare },
        ),
        ("gradients in storage", Forced { gradients: Some(Gradients::Storage), ..whole }),
    ]
}

#[test]
fn the_engine_in_f32_agrees_with_the_file() {
    let tokens = &sequences(1)[0];
    let mut session = session(NAME, Cpu::<f32>::new(2).unwrap(), Precision::F32, Forced::default());
    let errors = errors(&mut session, tokens);
    assert!(errors.loss <= super::TOLERANCE, "loss is off by {}", errors.loss);
    for (name, error) in errors.gradients {
        assert!(error <= super::TOLERANCE, "gradient of {name} differs by {error}");
    }
}

#[test]
fn gradients_are_as_near_as_pytorchs_in_bf16() {
    assert_eq!(config(NAME).head_dim, 64);
    for pad_to in [1, 128] {
        let sequences = sequences(pad_to);
        for (what, forced) in plans(128) {
            let mut session = session(NAME, Cpu::<half::bf16>::new(2).unwrap(), Precision::Bf16, forced);
            let errors = errors(&mut session, &sequences[0]);
            eprintln!("{}", assert_as_good_as_pytorch(what, &errors));
            trained(what, &mut session, &sequences);
        }
    }
}
