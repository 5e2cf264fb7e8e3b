//! What is kept of checkpoints and uploads: the newest state for continuing, every model, no bytes without a row.

use std::time::Duration;

use longhaul::store::{
    checkpoints::{FileSet, Recorded},
    files::Deletion,
};
use sqlx::Executor;

use crate::support::{
    Sandbox, database,
    rows::{self, LONG},
};

const FILES: &[(&str, &[u8])] =
    &[("config.json", b"{}"), ("model.safetensors", b"weights"), ("resume/state", b"moments")];

#[tokio::test]
async fn the_state_of_a_replaced_checkpoint_goes_and_its_model_stays() {
    let (database, sandbox) = (database().await, Sandbox::new("retention"));
    let store = database.store(&sandbox).await;
    let held = rows::running(&store, LONG).await;
    let mut ids = Vec::new();
    for step in 1..=3 {
        ids.push(rows::checkpoint(&store, &sandbox, &held, step, false, FILES).await.0);
    }
    assert_eq!(store.drop_replaced_state(&held.job).await.unwrap(), 2);
    assert_eq!(store.drop_replaced_state(&held.job).await.unwrap(), 0);
    for (n, id) in ids.iter().enumerate() {
        let all: Vec<String> =
            store.checkpoint_files(id, FileSet::All).await.unwrap().into_iter().map(|f| f.path).collect();
        let mut expected = vec!["config.json", "model.safetensors"];
        if n == 2 {
            expected.push("resume/state");
        }
        assert_eq!(all, expected);
        assert_eq!(store.checkpoint_files(id, FileSet::Model).await.unwrap().len(), 2);
        let state = store.weights().read(id, "resume/state", 0..7).await.unwrap();
        assert_eq!(state.is_some(), n == 2, "bytes go with their row");
        assert!(store.weights().read(id, "model.safetensors", 0..7).await.unwrap().is_some());
    }
    // A last checkpoint without state leaves the newest state where it is: the run may still be asked to go on from it.
    rows::checkpoint(&store, &sandbox, &held, 4, true, &FILES[..2]).await;
    assert_eq!(store.drop_replaced_state(&held.job).await.unwrap(), 0);
    store.close().await;
}

#[tokio::test]
async fn bytes_that_no_row_names_are_swept() {
    let (database, sandbox) = (database().await, Sandbox::new("sweep"));
    let store = database.store(&sandbox).await;
    let held = rows::running(&store, LONG).await;
    let (kept, _) = rows::checkpoint(&store, &sandbox, &held, 1, false, FILES).await;
    let (twice, recorded) = rows::checkpoint(&store, &sandbox, &held, 1, false, FILES).await;
    assert!(matches!(recorded, Recorded::Before(_)));
    assert_eq!(store.sweep_weights(Duration::from_hours(1)).await.unwrap(), 0, "young bytes may be in the making");
    assert_eq!(store.sweep_weights(Duration::ZERO).await.unwrap(), 3);
    assert!(store.weights().read(&twice, "config.json", 0..2).await.unwrap().is_none());
    assert!(store.weights().read(&kept, "config.json", 0..2).await.unwrap().is_some());
    store.close().await;
}

#[tokio::test]
async fn uploads_past_their_end_and_abandoned_ones_are_swept() {
    let (database, sandbox) = (database().await, Sandbox::new("uploads"));
    let store = database.store(&sandbox).await;
    let (expired, kept) = (rows::file(&store, b"expired").await, rows::file(&store, b"kept").await);
    let mut abandoned = store.begin_blob().await.unwrap();
    abandoned.write(vec![b'x'; 3 << 20].into()).await.unwrap();
    let abandoned = abandoned.finish().await.unwrap();
    let past = format!("UPDATE files SET expires_at = now() - interval '1 s' WHERE id = '{expired}'");
    database.connection().await.execute(sqlx::AssertSqlSafe(past)).await.unwrap();
    assert_eq!(store.sweep_files(Duration::from_hours(1)).await.unwrap(), 1, "the expired file");
    assert_eq!(store.sweep_files(Duration::ZERO).await.unwrap(), 1, "the blob that no file was made of");
    assert_eq!(store.delete_file(&expired).await.unwrap(), Deletion::Absent);
    assert!(store.file(&kept).await.unwrap().is_some());
    let chunks: i64 = sqlx::query_scalar("SELECT count(*) FROM blob_chunks")
        .fetch_one(&mut database.connection().await)
        .await
        .unwrap();
    assert_eq!(chunks, 1);
    assert_eq!(abandoned.bytes, 3 << 20);
    store.close().await;
}

#[tokio::test]
async fn bytes_that_are_not_what_they_should_be_are_no_checkpoint() {
    let (database, sandbox) = (database().await, Sandbox::new("digest"));
    let store = database.store(&sandbox).await;
    let id = longhaul::domain::CheckpointId::random();
    let source = sandbox.join("source");
    std::fs::write(&source, b"weights").unwrap();
    let sha256 = "0".repeat(64);
    let file = longhaul::domain::progress::WrittenFile { path: "a".into(), bytes: 7, sha256 };
    let error = store.weights().put(&id, &file, &source).await.unwrap_err();
    assert!(matches!(error, longhaul::store::Error::Corrupt(_)), "{error}");
    assert!(store.weights().read(&id, "a", 0..7).await.unwrap().is_none());
    store.close().await;
}
