//! The engine from files to checkpoint folders, on a model of a few thousand weights: `engine::train::train` as a trainer
//! process calls it.

mod data;
mod disk_full;
pub mod killed;
pub mod ranks;
mod resume;
mod saved;
pub mod steps;

use std::path::{Path, PathBuf};

use longhaul::{
    cli::model::{Args, init},
    domain::{
        Event, JobId, RunSpec, TrainingSpec,
        progress::{DataSummary, Evaluation, StepMetrics, WrittenCheckpoint},
        run::{DataFile, Place, Ranks},
        training::Schedule,
    },
    engine::{
        self,
        train::{Observer, Outcome, Stop},
    },
};

use self::ranks::train;
use crate::support::{
    Sandbox,
    model::{Random, machine},
};

/// Two layers, heads of 8 and about 300 tokens of vocabulary, as `longhaul model init` makes them: in `folder` under `name`,
/// its words beside it.
pub fn small_model(folder: &Path, name: &str) -> Args {
    let words = folder.join("words.txt");
    std::fs::write(&words, story(1, 400)).unwrap();
    Args {
        folder: folder.join(name),
        document: vec![words],
        vocab_size: 300,
        layers: 2,
        hidden_size: 32,
        intermediate_size: 48,
        heads: 4,
        kv_heads: 2,
        max_position_embeddings: 4096,
        seed: 3,
    }
}

/// A base model and a place for its runs.
pub struct Studio {
    pub sandbox: Sandbox,
}

impl Studio {
    pub fn new(name: &str) -> Self {
        let sandbox = Sandbox::new(name);
        init(&small_model(sandbox.path(), "model")).unwrap();
        Self { sandbox }
    }

    pub fn model(&self) -> PathBuf {
        self.sandbox.join("model")
    }

    /// Writes a file of the run's data.
    pub fn file(&self, filename: &str, content: impl AsRef<[u8]>) -> DataFile {
        let path = self.sandbox.join(format!("data-{filename}"));
        std::fs::write(&path, content).unwrap();
        DataFile { path, filename: filename.to_owned() }
    }

    /// A file of documents, one a line.
    pub fn documents(&self, filename: &str, texts: &[String]) -> DataFile {
        let lines: Vec<String> = texts.iter().map(|text| serde_json::json!({ "text": text }).to_string()).collect();
        self.file(filename, lines.join("\n"))
    }

    /// A run over these files in a folder of its own.
    pub fn run(&self, name: &str, files: &[DataFile], training: TrainingSpec) -> RunSpec {
        let size = |asked: Option<u32>| u64::from(asked.unwrap_or(1));
        let ranks = Ranks { sequence: size(training.sequence_parallel_size), data: size(training.data_parallel_size) };
        RunSpec {
            job: JobId::random(),
            epoch: 1,
            model: self.model(),
            model_name: "small".into(),
            created_at: 1_700_000_000,
            training_files: files.to_vec(),
            validation_files: Vec::new(),
            training,
            sequence_length: None,
            machine: machine(1 << 30),
            ranks,
            place: Place::first(),
            gpu: 0,
            libraries: Vec::new(),
            work_dir: self.sandbox.join(name),
            resume_from: None,
            inspect_only: false,
        }
    }

    /// Five documents of unequal length.
    pub fn five(&self) -> DataFile {
        self.documents("five.jsonl", &[60, 25, 90, 10, 45].map(|words| story(words, words)))
    }
}

/// Text of so many words that (seed) alone decides.
pub fn story(seed: u64, words: u64) -> String {
    const WORDS: [&str; 12] =
        ["river", "stone", "evening", "the", "and", "carried", "slowly", "under", "old", "bridge", "light", "a"];
    let mut random = Random(seed + 77);
    (0..words).map(|_| WORDS[(random.next() % 12) as usize]).collect::<Vec<_>>().join(" ")
}

/// Settings under which every part of a step shows in the weights.
pub fn spec(steps: u64) -> TrainingSpec {
    TrainingSpec {
        n_epochs: None,
        max_steps: Some(steps),
        learning_rate: 2e-3,
        schedule: Schedule::Cosine,
        warmup_steps: 2,
        packing: false,
        seed: 4,
        ..TrainingSpec::default()
    }
}

/// Remembers everything, and stops the run after so many steps.
#[derive(Default)]
pub struct Recorder {
    pub events: Vec<Event>,
    pub summary: Option<DataSummary>,
    pub steps: Vec<StepMetrics>,
    pub evaluations: Vec<Evaluation>,
    pub checkpoints: Vec<WrittenCheckpoint>,
    pub stop_after: Option<usize>,
}

impl Observer for Recorder {
    fn event(&mut self, event: Event) {
        self.events.push(event);
    }

    fn data(&mut self, summary: &DataSummary) {
        self.summary = Some(summary.clone());
    }

    fn step(&mut self, metrics: &StepMetrics) {
        self.steps.push(metrics.clone());
    }

    fn evaluation(&mut self, evaluation: &Evaluation) {
        self.evaluations.push(evaluation.clone());
    }

    fn checkpoint(&mut self, checkpoint: &WrittenCheckpoint) {
        self.checkpoints.push(checkpoint.clone());
    }

    fn stop_wanted(&self) -> Option<Stop> {
        (self.stop_after == Some(self.steps.len())).then_some(Stop { checkpoint: true })
    }
}

/// Runs to the end.
pub fn finish(run: &RunSpec) -> Recorder {
    let mut recorder = Recorder::default();
    let outcome = train(run, &mut recorder).unwrap();
    assert!(matches!(outcome, Outcome::Finished { trained_tokens } if trained_tokens > 0));
    recorder
}

/// Runs until so many steps are done.
pub fn interrupt(run: &RunSpec, after: usize) -> Recorder {
    let mut recorder = Recorder { stop_after: Some(after), ..Recorder::default() };
    let outcome = train(run, &mut recorder).unwrap();
    assert_eq!(outcome, Outcome::Stopped { step: after as u64 });
    recorder
}

/// What a run is refused with.
pub fn refusal(run: &RunSpec) -> longhaul::domain::Invalid {
    let mut recorder = Recorder::default();
    let error = train(run, &mut recorder).expect_err("the run is refused");
    assert!(recorder.steps.is_empty(), "refused before the first step");
    match error {
        engine::Error::Input(invalid) => invalid,
        other => panic!("not the customer's fault: {other}"),
    }
}

/// Digests of a checkpoint's files by path.
pub fn digests(checkpoint: &WrittenCheckpoint) -> Vec<(String, String)> {
    checkpoint.files.iter().map(|file| (file.path.clone(), file.sha256.clone())).collect()
}

/// The folder of a run's checkpoint.
pub fn folder(run: &RunSpec, checkpoint: &WrittenCheckpoint) -> PathBuf {
    run.work_dir.join("checkpoints").join(&checkpoint.folder)
}

/// Names in a folder, sorted.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
