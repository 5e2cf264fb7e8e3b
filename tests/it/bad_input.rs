//! Models and files that cannot be trained on: each is refused before the first step, with what is wrong and where.

use std::path::Path;

use longhaul::{
    domain::{
        Machine, RunSpec, TrainingSpec,
        run::DataFile,
        training::{LongDocuments, Precision},
    },
    engine::train::{Outcome, train},
};
use serde_json::{Value, json};

use crate::{
    support::model::gpu,
    training::{Recorder, Studio, finish, refusal, spec, story},
};

fn refused(studio: &Studio, file: DataFile) -> longhaul::domain::Invalid {
    refusal(&studio.run("refused", &[file], spec(1)))
}

fn assert_says(invalid: &longhaul::domain::Invalid, code: &str, words: &[&str]) {
    assert_eq!(invalid.code, code, "{}", invalid.message);
    for word in words {
        assert!(invalid.message.contains(word), "{word:?} is not in: {}", invalid.message);
    }
}

#[test]
fn broken_files_are_named_with_their_line() {
    let studio = Studio::new("broken");
    let cases: [(&str, &[u8], &[&str]); 9] = [
        ("a.jsonl", b"{\"text\": \"one\"}\n\n{\"text\": \"two\"\n", &["a.jsonl line 3", "JSON"]),
        ("b.jsonl", b"{\"text\": \"one\"}\n[1]\n", &["b.jsonl line 2", "object"]),
        ("c.jsonl", b"{\"text\": 5}\n", &["c.jsonl line 1", "string"]),
        ("d.jsonl", b"{\"body\": \"x\"}\n", &["d.jsonl line 1", "has no text"]),
        ("e.jsonl", b"{\"text\": \"one\"}\n{\"text\": \"\xff\"}\n", &["e.jsonl line 2", "UTF-8"]),
        ("f.txt", b"one\ntwo\n\xc3(\n", &["f.txt line 3", "UTF-8"]),
        ("g.txt", b"", &["g.txt is empty"]),
        ("h.jsonl", b"{\"text\": \"\"}\n\n", &["h.jsonl", "no document with any text"]),
        ("i.pdf", b"%PDF", &["i.pdf", ".jsonl, .txt nor .md"]),
    ];
    for (name, content, words) in cases {
        let invalid = refused(&studio, studio.file(name, content));
        assert_says(&invalid, "invalid_training_file", words);
        assert_eq!(invalid.param, "training_file");
    }
    let held_out = studio.file("held.jsonl", "{\"text\": \"one\"}\nno\n");
    let run = RunSpec { validation_files: vec![held_out], ..studio.run("held", &[studio.five()], spec(1)) };
    let invalid = refusal(&run);
    assert_says(&invalid, "invalid_validation_file", &["held.jsonl line 2"]);
    assert_eq!(invalid.param, "validation_file");
}

#[test]
fn a_data_set_that_trains_no_token_is_refused() {
    let studio = Studio::new("no-labels");
    std::fs::write(studio.model().join("tokenizer_config.json"), "{}").unwrap();
    let invalid = refused(&studio, studio.documents("letters.jsonl", &["a".into(), "b".into()]));
    assert_says(&invalid, "invalid_training_file", &["no token to train on"]);
}

/// Changes the model's config.
fn reconfigure(studio: &Studio, change: impl FnOnce(&mut Value)) {
    let path = studio.model().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(&path, config.to_string()).unwrap();
}

#[test]
fn a_tokenizer_beyond_the_vocabulary_is_refused() {
    let studio = Studio::new("vocabulary");
    reconfigure(&studio, |config| config["vocab_size"] = json!(280));
    assert_says(&refused(&studio, studio.five()), "invalid_tokenizer", &["does not match", "279"]);
    std::fs::write(studio.model().join("tokenizer.json"), "{\"model\": ").unwrap();
    assert_says(&refused(&studio, studio.five()), "invalid_tokenizer", &["tokenizer.json"]);
    std::fs::remove_file(studio.model().join("tokenizer.json")).unwrap();
    assert_says(&refused(&studio, studio.five()), "invalid_tokenizer", &["tokenizer.json"]);
}

fn index(folder: &Path, shard: &str) {
    let index = json!({ "metadata": {}, "weight_map": { "model.norm.weight": shard } });
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn missing_and_broken_shards_are_named() {
    let studio = Studio::new("shards");
    let folder = studio.model();
    let weights = folder.join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    for broken in [&whole[..whole.len() - 1], &whole[..100], &[][..], &[0xff; 64][..]] {
        std::fs::write(&weights, broken).unwrap();
        assert_says(&refused(&studio, studio.five()), "invalid_model", &["model.safetensors", "sound"]);
    }
    std::fs::remove_file(&weights).unwrap();
    assert_says(&refused(&studio, studio.five()), "invalid_model", &["model.safetensors is missing"]);
    index(&folder, "model-00001-of-00002.safetensors");
    assert_says(&refused(&studio, studio.five()), "invalid_model", &["model-00001-of-00002.safetensors is missing"]);
    index(&folder, "../model.safetensors");
    assert_says(&refused(&studio, studio.five()), "invalid_model", &["not a plain file name"]);
}

#[test]
fn weights_that_are_not_the_configs_are_refused() {
    let studio = Studio::new("shapes");
    reconfigure(&studio, |config| config["intermediate_size"] = json!(56));
    assert_says(&refused(&studio, studio.five()), "invalid_model", &["mlp", "[48, 32]", "[56, 32]"]);
    reconfigure(&studio, |config| {
        config["intermediate_size"] = json!(48);
        config["num_hidden_layers"] = json!(1);
    });
    assert_says(&refused(&studio, studio.five()), "invalid_model", &["model.layers.1.", "does not have"]);
    reconfigure(&studio, |config| config["num_hidden_layers"] = json!(3));
    assert_says(&refused(&studio, studio.five()), "invalid_model", &["model.layers.2.", "missing"]);
}

#[test]
fn a_sequence_beyond_memory_names_the_longest_that_fits() {
    let studio = Studio::new("memory");
    let with = |tokens: u64| {
        let training = TrainingSpec {
            sequence_length: Some(tokens),
            long_documents: LongDocuments::Split,
            packing: true,
            ..spec(1)
        };
        let run = studio.run(&format!("run-{tokens}"), &[studio.five()], training);
        RunSpec { machine: Machine { device_bytes: 8 << 20, disk_bytes: 1 << 20, ..run.machine.clone() }, ..run }
    };
    let invalid = refusal(&with(1 << 20));
    assert_says(&invalid, "sequence_too_long", &["1048576 tokens", "host memory", "longest sequence that fits is"]);
    let longest = invalid.message.split("that fits is ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    let longest: u64 = longest.parse().unwrap();
    assert!(longest >= 256, "{}", invalid.message);
    finish(&with(longest));
    assert_says(&refusal(&with(longest + 128)), "sequence_too_long", &[&format!("fits is {longest} tokens")]);
}

#[test]
fn documents_that_may_be_cut_take_the_longest_sequence_that_fits() {
    let studio = Studio::new("cut");
    let long = studio.file("long.txt", story(9, 30_000));
    let training = TrainingSpec { long_documents: LongDocuments::Split, ..spec(1) };
    let run = studio.run("run", &[long], training);
    let run = RunSpec { machine: Machine { device_bytes: 8 << 20, disk_bytes: 1 << 20, ..run.machine.clone() }, ..run };
    let mut recorder = Recorder::default();
    train(&run, &mut recorder).unwrap();
    let summary = recorder.summary.unwrap();
    assert!(summary.sequence_length < summary.longest_document, "{summary:?}");
    assert!(recorder.events.iter().any(|e| e.message.contains("are the longest that fit")));
}

#[test]
fn a_gpu_that_is_not_here_is_no_fault_of_the_input() {
    if Path::new("/dev/nvidia0").exists() {
        return;
    }
    let studio = Studio::new("absent");
    let here = studio.run("run", &[studio.five()], spec(1));
    let libraries = vec![studio.sandbox.join("libraries")];
    let run = RunSpec { machine: gpu(1 << 30), libraries, ..here };
    let mut recorder = Recorder::default();
    let error = train(&run, &mut recorder).expect_err("there is no GPU");
    assert!(matches!(&error, longhaul::engine::Error::Missing(_)), "{error}");
    assert!(recorder.summary.is_some() && recorder.steps.is_empty());
    // The same data is inspected for a GPU on a host without one.
    finish_inspection(&RunSpec { inspect_only: true, ..run.clone() });
    let training = TrainingSpec { precision: Some(Precision::F32), ..run.training.clone() };
    let invalid = refusal(&RunSpec { training, ..run });
    assert_eq!(invalid.param, "training.precision");
}

fn finish_inspection(run: &RunSpec) {
    let mut recorder = Recorder::default();
    assert_eq!(train(run, &mut recorder).unwrap(), Outcome::Finished { trained_tokens: 0 });
    assert!(recorder.events.iter().all(|event| !event.message.contains("planned on")));
}
