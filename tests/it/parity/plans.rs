//! Steps in bf16 under every kind of plan, on any device: bit for bit where neither the order of sums nor the shape of a product
//! changes, else as near as bf16 allows. `gpu::parity` takes it to a GPU, where the backward of attention alone has a spread.

use std::collections::BTreeMap;

use longhaul::{
    domain::{
        ModelConfig,
        model::{Rope, RopeScaling},
    },
    plan::{Forced, Gradients},
};
use serde_json::{Value, json};

use super::{
    checkpoint_offload::{host_rows, kept_sets, slots_and_places},
    plain,
    zero3::weights_in_host_memory,
};
use crate::support::{
    model::{Tokens, gradients, relative_error},
    stage::{OnCpu, Stage, hyper, scatter},
};

const STEPS: u64 = 3;
const BLOCK: u64 = 128;
/// Largest relative difference of a gradient in another order of sums: what bf16 costs (`golden::bf16`).
const GRADIENT: f64 = 1e-2;
/// The same of a first loss, and of one after updates.
const FIRST_LOSS: f64 = 1e-4;
const LATER_LOSS: f64 = 1e-3;

/// Five layers, so that segments of several lengths fit; heads that the attention of GPUs takes.
pub fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 256,
        hidden_size: 64,
        intermediate_size: 128,
        n_layers: 5,
        n_heads: 2,
        n_kv_heads: 1,
        head_dim: 64,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::Default },
        max_position_embeddings: 2048,
    }
}

/// Documents of a step, padded to blocks: several chunks long, of one chunk, of a few tokens.
fn tokens(config: &ModelConfig, step: u64) -> Tokens {
    let documents: Vec<Vec<i32>> =
        [130, 300, 9].map(|length| Tokens::random(config.vocab_size, &[length], 31 * step + length).ids).to_vec();
    Tokens::padded(&documents, BLOCK as usize)
}

/// What a few steps under a plan came to.
struct Run {
    losses: Vec<f64>,
    /// Of the first step.
    gradients: BTreeMap<String, Vec<f64>>,
}

fn run<S: Stage>(stage: &mut S, forced: Forced) -> Run {
    let config = config();
    let all: Vec<Tokens> = (1..=STEPS).map(|step| tokens(&config, step)).collect();
    let plan = stage.plan(&config, all[0].ids.len() as u64, forced);
    let mut session = stage.session(&config, &plan);
    scatter(&mut session, 0.1, 17);
    let (_, gradients) = gradients(&mut session, &[all[0].batch()]);
    let losses = all
        .iter()
        .zip(1..)
        .map(|(tokens, step)| session.step(&[tokens.batch()], &hyper(step), 1.0).unwrap().mean_loss());
    let losses = losses.collect();
    stage.end(session, &plan);
    Run { losses, gradients: gradients.into_iter().collect() }
}

/// Gradients that no backward of attention has touched: the head's, and the last layer's down to its attention output.
fn before_attention(name: &str) -> bool {
    let parts = ["mlp.", "post_attention_layernorm", "o_proj"];
    after_the_layers(name) || (name.starts_with("model.layers.4.") && parts.iter().any(|part| name.contains(part)))
}

/// Gradients that follow from the forward pass alone.
fn after_the_layers(name: &str) -> bool {
    ["lm_head.weight", "model.norm.weight"].contains(&name)
}

fn bits(values: &[f64]) -> Vec<u64> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The largest relative difference of a gradient, of a later loss, and whether the first loss has other bits.
fn distance(run: &Run, base: &Run) -> (f64, f64, bool) {
    let gradients = base.gradients.iter().map(|(name, values)| relative_error(&run.gradients[name], values));
    let losses = run.losses.iter().zip(&base.losses).map(|(a, b)| (a - b).abs() / b);
    let moved = run.losses[0].to_bits() != base.losses[0].to_bits();
    (gradients.fold(0.0, f64::max), losses.fold(0.0, f64::max), moved)
}

/// What a plan may change.
#[derive(Clone, Copy, PartialEq)]
enum Same {
    /// Every product has its shape and every sum its order.
    Everything,
    /// Some products of the backward have other shapes.
    Forward,
    /// The same sums, but rounded to storage where they wait.
    ButRounded,
    /// Shapes of products in the forward pass too.
    Nothing,
}

/// Holds a run to the base; its figures.
fn hold(what: &str, run: &Run, base: &Run, same: Same) -> Value {
    let (gradient, loss, moved) = distance(run, base);
    assert!(run.losses.iter().all(|loss| loss.is_finite()) && gradient.is_finite(), "{what}");
    let first = (run.losses[0] - base.losses[0]).abs() / base.losses[0];
    assert!(first <= FIRST_LOSS && loss <= LATER_LOSS, "{what}: losses {:?}, {:?}", run.losses, base.losses);
    assert!(gradient <= GRADIENT, "{what}: a gradient differs by {gradient}");
    assert!(!moved || same == Same::Nothing, "{what}: first loss {} against {}", run.losses[0], base.losses[0]);
    for (name, values) in &base.gradients {
        assert!(values.iter().any(|value| *value != 0.0), "{name} has a gradient");
        let rounded = |value: &f64| f64::from(half::bf16::from_f32(*value as f32));
        let (held, values) = match same {
            Same::Everything => (before_attention(name), values.clone()),
            Same::Forward => (after_the_layers(name), values.clone()),
            Same::ButRounded => (before_attention(name), values.iter().map(rounded).collect()),
            Same::Nothing => (false, Vec::new()),
        };
        assert!(!held || bits(&run.gradients[name]) == bits(&values), "{what}: the gradient of {name} has other bits");
    }
    json!({ "plan": what, "gradient_difference": gradient, "loss_difference": loss, "first_loss_same_bits": !moved })
}

/// Layer inputs, state of parameters, and weights in host memory, all of them or a part.
pub fn in_host_memory(base: Forced, config: &ModelConfig, tokens: u64) -> Vec<(String, Forced)> {
    let mut plans: Vec<_> = host_rows(base, config.n_layers, tokens).into_iter().skip(1).step_by(4).collect();
    plans.extend([1, config.n_params() / 2, config.n_params()].map(|hosted| {
        let forced = Forced { optimizer_host_elements: Some(hosted), staged_elements: Some(10_000), ..base };
        (format!("state of {hosted} parameters in host memory"), forced)
    }));
    plans.extend(weights_in_host_memory(base, config));
    plans
}

/// Every kind of plan against the plainest; a line of figures for each.
pub fn every_plan_is_the_plainest<S: Stage>(stage: &mut S, mut figures: impl FnMut(Value)) {
    let config = config();
    let n = tokens(&config, 1).ids.len() as u64;
    let base = Forced { chunk_tokens: Some(2 * BLOCK), gradients: Some(Gradients::Wide), ..plain(n, &config) };
    let plainest = run(stage, base);
    assert!(plainest.losses[0].to_bits() != plainest.losses[1].to_bits());
    figures(json!({ "plan": "the plainest", "losses": plainest.losses }));
    // The same again: what differs is the spread of the device.
    for again in 1..=3 {
        figures(hold(&format!("the plainest, again {again}"), &run(stage, base), &plainest, Same::Everything));
    }
    for (what, forced) in slots_and_places(base, config.n_layers) {
        figures(hold(&what, &run(stage, forced), &plainest, Same::Everything));
    }
    for (what, forced) in in_host_memory(base, &config, n) {
        figures(hold(&what, &run(stage, forced), &plainest, Same::Everything));
    }
    for (what, forced) in kept_sets(base) {
        figures(hold(&what, &run(stage, forced), &plainest, Same::Forward));
    }
    let stored = run(stage, Forced { gradients: Some(Gradients::Storage), ..base });
    figures(hold("gradients in storage", &stored, &plainest, Same::ButRounded));
    for chunk in [BLOCK, 3 * BLOCK, n] {
        let chunks = run(stage, Forced { chunk_tokens: Some(chunk), ..base });
        figures(hold(&format!("chunks of {chunk}"), &chunks, &plainest, Same::Nothing));
    }
    for rows in [BLOCK / 2, 200] {
        let mlp = run(stage, Forced { mlp_tile_rows: Some(rows), ..base });
        figures(hold(&format!("feed-forward tiles of {rows}"), &mlp, &plainest, Same::Nothing));
        let loss = run(stage, Forced { loss_tile_rows: Some(rows), ..base });
        figures(hold(&format!("loss tiles of {rows}"), &loss, &plainest, Same::Nothing));
    }
}

#[test]
fn every_plan_is_the_plainest_in_bf16() {
    every_plan_is_the_plainest(&mut OnCpu, |values| eprintln!("{values}"));
}
