//! Jobs and checkpoints put into the store directly, as the API and an executor would.

use std::{collections::BTreeMap, time::Duration};

use longhaul::{
    domain::{
        CheckpointId, ExecutorId, FileId, JobId, ProjectId, TrainingSpec, hex,
        machine::DeviceKind,
        progress::{StepMetrics, WrittenCheckpoint, WrittenFile},
    },
    store::{
        Store,
        checkpoints::{NewCheckpoint, Recorded},
        files::NewFile,
        jobs::{Attempt, Created, NewJob},
        queue::{ANY_DEVICE, Claim, Claimant, Settlement, Work},
    },
};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::Sandbox;

/// A lease that outlives every test.
pub const LONG: Duration = Duration::from_mins(10);

/// What an inspection comes to.
pub const VALIDATED: Settlement = Settlement::Validated { sequence_length: Some(2048) };

/// A stored file.
pub async fn file(store: &Store, content: &'static [u8]) -> FileId {
    let mut blob = store.begin_blob().await.unwrap();
    blob.write(content.into()).await.unwrap();
    let new = NewFile {
        project: ProjectId::default_project(),
        filename: "a.txt".into(),
        purpose: "fine-tune".into(),
        expires_after: None,
    };
    store.create_file(blob.finish().await.unwrap(), &new).await.unwrap().id
}

/// A job of the model `tiny`, with its files to be validated.
pub async fn job(store: &Store) -> JobId {
    let new = NewJob {
        project: ProjectId::default_project(),
        model: "tiny".into(),
        priority: 0,
        training_files: vec![file(store, b"text").await],
        validation_files: Vec::new(),
        request: json!({}),
        training: TrainingSpec::default(),
        suffix: None,
        metadata: None,
        notes: Vec::new(),
        attempt: Attempt { body_sha256: longhaul::domain::ids::random_suffix(), ..Attempt::default() },
    };
    match store.create_job(&new).await.unwrap() {
        Created::Job(job) => job.id,
        other => panic!("{other:?}"),
    }
}

/// Takes the next work of this kind for a host with the model `tiny` and a CPU.
pub async fn claim(store: &Store, work: Work, lease: Duration) -> Option<Claim> {
    claim_as(store, &ExecutorId::random(), work, lease).await
}

pub async fn claim_as(store: &Store, executor: &ExecutorId, work: Work, lease: Duration) -> Option<Claim> {
    let (models, devices) = (["tiny".to_owned()], ["cpu".to_owned(), ANY_DEVICE.to_owned()]);
    let by = Claimant { executor, lease, models: &models, devices: &devices, fetches: false, takes: 1, only: None };
    store.claim_job(work, &by).await.unwrap()
}

/// Jobs that a host with the model `tiny` and a CPU may choose from.
pub async fn offered(store: &Store) -> Vec<JobId> {
    let (models, devices) = (["tiny".to_owned()], ["cpu".to_owned(), ANY_DEVICE.to_owned()]);
    let by = Claimant {
        executor: &ExecutorId::random(),
        lease: LONG,
        models: &models,
        devices: &devices,
        fetches: false,
        takes: 1,
        only: None,
    };
    let queued = store.queued_jobs(&by).await.unwrap();
    queued.into_iter().map(|queued| queued.job).collect()
}

/// A job that waits for training.
pub async fn queued(store: &Store) -> JobId {
    let id = job(store).await;
    let held = claim(store, Work::Inspect, LONG).await.unwrap();
    assert_eq!(held.job, id, "the test has one job at a time in validation");
    assert!(store.settle_job(&id, held.epoch, &VALIDATED).await.unwrap());
    id
}

/// A job held for training.
pub async fn running(store: &Store, lease: Duration) -> Claim {
    queued(store).await;
    claim(store, Work::Train, lease).await.unwrap()
}

/// Numbers of one step.
pub fn step(step: u64, total_steps: u64) -> StepMetrics {
    StepMetrics {
        step,
        total_steps,
        train_loss: 2.5 / step as f64,
        train_mean_token_accuracy: 0.25,
        learning_rate: 1e-5,
        grad_norm: 0.5,
        seconds: 1.0,
        tokens_per_second: 128.0,
        valid_labels: 127,
        tokens_seen: 128 * step,
        device_peak_bytes: 1 << 20,
        estimated_seconds_left: 10.0,
    }
}

/// Stores the bytes of a checkpoint and records it.
pub async fn checkpoint(
    store: &Store,
    sandbox: &Sandbox,
    held: &Claim,
    step: u64,
    last: bool,
    files: &[(&str, &[u8])],
) -> (CheckpointId, Recorded) {
    let id = CheckpointId::random();
    let mut written = Vec::new();
    for (path, content) in files {
        let file = WrittenFile {
            path: (*path).to_owned(),
            bytes: content.len() as u64,
            sha256: hex(&Sha256::digest(content)),
        };
        let source = sandbox.join("source");
        std::fs::write(&source, content).unwrap();
        store.weights().put(&id, &file, &source).await.unwrap();
        written.push(file);
    }
    let written = WrittenCheckpoint {
        step,
        folder: format!("step-{step}"),
        files: written,
        metrics: BTreeMap::from([("train_loss".into(), 1.5), ("full_valid_loss".into(), 2.0)]),
        last,
        trained_tokens: 128 * step,
    };
    let precision = held.training.precision_on(DeviceKind::Cpu);
    let new = NewCheckpoint { id: id.clone(), job: &held.job, epoch: held.epoch, precision, written: &written };
    let recorded = store.record_checkpoint(&new).await.unwrap();
    (id, recorded)
}
