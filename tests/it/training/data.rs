//! Documents longer than a sequence, and what an inspection of the data reports.

use longhaul::{
    domain::{RunSpec, TrainingSpec, training::LongDocuments},
    engine::train::{Outcome, train},
};

use super::{Recorder, Studio, finish, refusal, spec};

fn with_long(long_documents: LongDocuments) -> TrainingSpec {
    TrainingSpec { long_documents, sequence_length: Some(64), n_epochs: Some(1), max_steps: None, ..spec(1) }
}

#[test]
fn long_documents_are_refused_by_file_and_line() {
    let studio = Studio::new("refuses");
    let invalid = refusal(&studio.run("run", &[studio.five()], with_long(LongDocuments::Refuse)));
    assert_eq!((invalid.code.as_str(), invalid.param.as_str()), ("document_too_long", "training.sequence_length"));
    assert!(invalid.message.contains("five.jsonl line "), "{}", invalid.message);
    assert!(invalid.message.contains("split or truncate"), "{}", invalid.message);
}

#[test]
fn split_documents_lose_no_label() {
    let studio = Studio::new("splits");
    let recorder = finish(&studio.run("run", &[studio.five()], with_long(LongDocuments::Split)));
    let summary = recorder.summary.unwrap();
    assert!(summary.split_documents > 0 && summary.longest_document > 64, "{summary:?}");
    assert_eq!(summary.valid_labels, summary.tokens - summary.documents, "every token but the first is a label once");
    assert_eq!(recorder.steps.iter().map(|s| s.valid_labels).sum::<u64>(), summary.valid_labels);
}

#[test]
fn truncated_documents_are_counted() {
    let studio = Studio::new("truncates");
    let whole = finish(&studio.run("split", &[studio.five()], with_long(LongDocuments::Split))).summary.unwrap();
    let cut = finish(&studio.run("cut", &[studio.five()], with_long(LongDocuments::Truncate))).summary.unwrap();
    assert_eq!(cut.truncated_documents, whole.split_documents);
    assert_eq!(cut.sequences, 5);
    assert!(cut.valid_labels < whole.valid_labels && cut.tokens == whole.tokens);
}

#[test]
fn an_inspection_counts_and_trains_nothing() {
    let studio = Studio::new("inspects");
    let run = RunSpec { inspect_only: true, ..studio.run("run", &[studio.five()], spec(7)) };
    let mut recorder = Recorder::default();
    assert_eq!(train(&run, &mut recorder).unwrap(), Outcome::Finished { trained_tokens: 0 });
    let summary = recorder.summary.unwrap();
    assert_eq!((summary.documents, summary.sequences, summary.total_steps), (5, 5, 7));
    assert!(recorder.steps.is_empty() && recorder.checkpoints.is_empty());
}
