//! What a run reports: losses that fall, held-out losses, sequences added up as one larger batch.

use longhaul::{
    domain::{ModelConfig, RunSpec, TrainingSpec},
    engine::{
        backend::{DType, Tensor},
        checkpoint::safetensors::Weights,
        model::Params,
    },
};

use super::{Recorder, Studio, finish, folder, spec, story};
use crate::support::model::relative_error;

#[test]
fn a_model_learns_its_documents() {
    let studio = Studio::new("learns");
    let training = TrainingSpec { learning_rate: 1e-2, evaluation_interval: Some(10), packing: true, ..spec(30) };
    let held_out = studio.documents("held.jsonl", &[story(500, 80), story(501, 30)]);
    let run = RunSpec { validation_files: vec![held_out], ..studio.run("run", &[studio.five()], training) };
    let recorder = finish(&run);
    let evaluations: Vec<_> = recorder.evaluations.iter().map(|e| e.step).collect();
    assert_eq!(evaluations, [0, 10, 20, 30]);
    let (before, after) = (&recorder.evaluations[0], &recorder.evaluations[3]);
    assert!(after.valid_loss < 0.75 * before.valid_loss, "{} to {}", before.valid_loss, after.valid_loss);
    assert!(after.valid_mean_token_accuracy > before.valid_mean_token_accuracy);
    // Before any step the model knows nothing: near the loss of equal chances.
    assert!((before.valid_loss - 300f64.ln()).abs() < 0.3, "{}", before.valid_loss);
    let last = recorder.steps.last().unwrap();
    assert!(last.train_loss < 0.75 * recorder.steps[0].train_loss);
    assert_eq!((last.step, last.total_steps, last.estimated_seconds_left), (30, 30, 0.0));
    let summary = recorder.summary.unwrap();
    assert_eq!((summary.documents, summary.valid_labels), (5, summary.tokens - 5));
    assert_eq!(recorder.checkpoints[0].metrics["valid_loss"].to_bits(), after.valid_loss.to_bits());
}

/// Every weight of a run's last checkpoint.
pub fn weights(run: &RunSpec, recorder: &Recorder) -> Vec<f64> {
    let weights = Weights::open(&folder(run, recorder.checkpoints.last().unwrap())).unwrap();
    let config = std::fs::read_to_string(run.model.join("config.json")).unwrap();
    let config = ModelConfig::from_config_text(&config).unwrap();
    let flat = Tensor::device(0, DType::F32, 1, config.n_params());
    let mut out = Vec::new();
    for parameter in Params::over(&config, flat).named(&config) {
        let sink = |_, piece: &[f32]| {
            out.extend(piece.iter().map(|v| f64::from(*v)));
            Ok(())
        };
        weights.read(&parameter.name, &parameter.shape, sink).unwrap();
    }
    out
}

#[test]
fn sequences_added_up_are_one_larger_batch() {
    let studio = Studio::new("accumulates");
    let files = [studio.five()];
    let apart = TrainingSpec { gradient_accumulation_steps: 5, warmup_steps: 0, ..spec(1) };
    let together =
        TrainingSpec { gradient_accumulation_steps: 1, packing: true, sequence_length: Some(2000), ..apart.clone() };
    let (one, other) = (studio.run("apart", &files, apart), studio.run("together", &files, together));
    let (a, b) = (finish(&one), finish(&other));
    assert_eq!((a.summary.as_ref().unwrap().sequences, b.summary.as_ref().unwrap().sequences), (5, 1));
    let (first, second) = (&a.steps[0], &b.steps[0]);
    assert_eq!(first.valid_labels, second.valid_labels);
    assert!((first.train_loss - second.train_loss).abs() <= 1e-6 * second.train_loss);
    assert!((first.grad_norm - second.grad_norm).abs() <= 1e-5 * second.grad_norm);
    let error = relative_error(&weights(&one, &a), &weights(&other, &b));
    assert!(error <= 1e-4, "weights differ by {error}");
}

#[test]
fn epochs_take_every_sequence_once() {
    let studio = Studio::new("epochs");
    let training = TrainingSpec { n_epochs: Some(2), max_steps: None, gradient_accumulation_steps: 3, ..spec(1) };
    let recorder = finish(&studio.run("run", &[studio.five()], training));
    let summary = recorder.summary.unwrap();
    assert_eq!((summary.total_steps, recorder.steps.len()), (4, 4));
    let labels: u64 = recorder.steps.iter().map(|s| s.valid_labels).sum();
    assert_eq!(labels, 2 * summary.valid_labels);
    assert_eq!(recorder.steps.last().unwrap().tokens_seen, 2 * summary.tokens);
}
