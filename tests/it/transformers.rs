//! A trained checkpoint in the hands of transformers: it loads whole, its tokenizer gives our ids, its logits are ours.
//!
//! Needs a Python with torch and transformers, named by `LONGHAUL_REFERENCE_PYTHON`; says so where there is none.

use std::{path::Path, process::Command};

use longhaul::{
    domain::{
        ModelConfig, TrainingSpec,
        training::{Moments, Precision},
    },
    engine::{
        backend::{Backend, DType, Tensor, cpu::Cpu},
        checkpoint::huggingface,
        data::Tokenizer,
        train::{saved, session::Session},
    },
    plan::{self, Forced, Slot},
};
use serde_json::json;

use crate::{
    support::{
        model::{Tokens, machine},
        reference_python,
    },
    training::{Studio, finish, folder, spec, story},
};

/// Token ids of a text, the engine's logits at each of them as little-endian f32, and the mean loss.
fn logits(checkpoint: &Path, text: &str) -> (Vec<i32>, Vec<u8>, f64) {
    let config = ModelConfig::from_config_text(&huggingface::config_text(checkpoint).unwrap()).unwrap();
    let ids = Tokenizer::open(checkpoint, config.vocab_size, 0).unwrap().document(text).unwrap();
    let ids: Vec<i32> = ids.into_iter().map(|id| id as i32).collect();
    let n = ids.len() as u64;
    // One tile of logits holds every row, and an evaluation leaves them there.
    let forced = Forced { loss_tile_rows: Some(n), chunk_tokens: Some(50), ..Forced::default() };
    let machine = machine(1 << 30);
    let request = plan::Request {
        model: &config,
        precision: Precision::F32,
        moments: Moments::F32,
        tokens: n,
        micro_batches: 1,
        machine: &machine,
        forced,
    };
    let plan = plan::plan(&request).unwrap();
    let mut session = Session::new(Cpu::<f32>::new(2).unwrap(), &plan, &config, &std::env::temp_dir()).unwrap();
    saved::load_base(&mut session, checkpoint).unwrap();
    let tokens = Tokens::of(&[ids]);
    let loss = session.evaluate([tokens.batch()]).unwrap().mean_loss();
    let region = plan.layout.region(Slot::Logits).unwrap();
    let tensor = Tensor::device(region.offset, DType::F32, n, config.vocab_size);
    let mut bytes = vec![0; tensor.bytes() as usize];
    session.backend.download(tensor, &mut bytes).unwrap();
    (tokens.ids, bytes, loss)
}

#[test]
fn transformers_computes_what_the_engine_does() {
    let Some(python) = reference_python() else { return };
    let studio = Studio::new("transformers");
    let training = TrainingSpec { learning_rate: 1e-2, ..spec(8) };
    let run = studio.run("run", &[studio.five()], training);
    let recorder = finish(&run);
    let checkpoint = folder(&run, &recorder.checkpoints[0]);
    let text = format!("{}\n\n  Zwölf Boxkämpfer — 12,345.67€\t{}", story(70, 60), story(71, 60));
    let (ids, bytes, loss) = logits(&checkpoint, &text);
    let (base_ids, base_bytes, _) = logits(&studio.model(), &text);
    assert!(ids == base_ids && bytes != base_bytes, "training moved the logits");

    let [text_at, logits_at, ours] = ["text.txt", "logits.f32", "ours.json"].map(|name| studio.sandbox.join(name));
    std::fs::write(&text_at, &text).unwrap();
    std::fs::write(&logits_at, bytes).unwrap();
    std::fs::write(&ours, json!({ "ids": ids, "logits": logits_at, "loss": loss }).to_string()).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/check_transformers.py");
    let output = Command::new(python)
        .arg(script)
        .args([&checkpoint, &text_at, &ours])
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{complained}");
    eprintln!("against transformers: {}", said.trim());
}
