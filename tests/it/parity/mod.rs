//! Any choice the planner may make gives the same losses and gradients as the plainest one: one chunk, one tile, every
//! layer input in memory, nothing else kept. Bitwise where the order of arithmetic is unchanged.

pub mod checkpoint_offload;
mod chunks;
mod gradients;
mod optimizer_offload;
pub mod plans;
mod ranks;
mod streams;
mod tiled_loss;
mod tiled_mlp;
mod zero3;

use longhaul::{domain::ModelConfig, engine::model::Batch, plan::Forced};

use crate::support::model::{self, Tokens};

/// Loss and gradients by name.
type Run = (f64, Vec<(String, Vec<f64>)>);

/// One chunk, one tile, all inputs kept, nothing else.
pub fn plain(tokens: u64, config: &ModelConfig) -> Forced {
    Forced {
        chunk_tokens: Some(tokens),
        checkpoint_slots: Some(config.n_layers),
        place: Some(longhaul::plan::Place::Memory),
        kept_attention_layers: Some(0),
        kept_qkv_layers: Some(0),
        kept_gate_up_layers: Some(0),
        mlp_tile_rows: Some(tokens),
        loss_tile_rows: Some(tokens),
        ..Forced::default()
    }
}

/// Gradients in f64 under these choices, arena poisoned first.
fn run(config: &ModelConfig, forced: Forced, batches: &[Batch]) -> Run {
    let tokens = batches.iter().map(|b| b.ids.len() as u64).max().unwrap();
    let plan = model::plan_f64(config, tokens, forced);
    let mut session = model::session_f64(config, &plan, 7);
    model::gradients(&mut session, batches)
}

/// The documents every parity test runs on: uneven, one longer than any chunk, one of a single token.
fn documents(config: &ModelConfig) -> Tokens {
    Tokens::random(config.vocab_size, &[17, 41, 1, 5], 3)
}

fn assert_same_bits(a: &Run, b: &Run, what: &str) {
    assert!(b.0.is_finite() && b.0 > 0.0);
    assert_eq!(a.0.to_bits(), b.0.to_bits(), "{what}: loss {} against {}", a.0, b.0);
    for ((name, x), (_, y)) in a.1.iter().zip(&b.1) {
        assert!(y.iter().any(|v| *v != 0.0), "{name} has a gradient");
        assert!(x.iter().zip(y).all(|(x, y)| x.to_bits() == y.to_bits()), "{what}: {name} differs");
    }
}

fn assert_close(a: &Run, b: &Run, tolerance: f64, what: &str) {
    assert!((a.0 - b.0).abs() <= tolerance * b.0, "{what}: loss {} against {}", a.0, b.0);
    for ((name, x), (_, y)) in a.1.iter().zip(&b.1) {
        let error = model::relative_error(x, y);
        assert!(error <= tolerance, "{what}: {name} differs by {error}");
    }
}
