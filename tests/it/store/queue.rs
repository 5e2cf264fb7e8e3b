//! The queue: one holder at a time, leases that end, attempts that are counted, edges that the database refuses.

use std::{collections::HashSet, time::Duration};

use longhaul::{
    domain::{ExecutorId, Invalid, JobId, JobStatus, training::Precision},
    store::{
        Page, Store,
        jobs::Job,
        queue::{ANY_DEVICE, Claimant, Settlement, Wish, Work},
        steer::Steered,
    },
};
use sqlx::Executor;

use crate::support::{
    Sandbox, database,
    rows::{self, LONG},
};

/// A lease that has ended when the next statement runs.
const NONE: Duration = Duration::ZERO;
const MOST_ATTEMPTS: i32 = 3;

async fn job(store: &Store, id: &JobId) -> Job {
    store.job(id).await.unwrap().unwrap()
}

/// Numbers of the job's events, oldest first.
async fn event_numbers(store: &Store, id: &JobId) -> Vec<i64> {
    let page = Page { limit: 1000, ..Page::default() };
    let events = store.list_events(id, &page).await.unwrap().unwrap().rows;
    events.iter().rev().map(|event| event.seq).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_claimers_never_share_a_job() {
    let (database, sandbox) = (database().await, Sandbox::new("claimers"));
    let store = database.store(&sandbox).await;
    let mut all = HashSet::new();
    for _ in 0..50 {
        all.insert(rows::queued(&store).await);
    }
    let claimers = (0..8).map(|_| {
        let store = store.clone();
        tokio::spawn(async move {
            let executor = ExecutorId::random();
            let mut mine = Vec::new();
            while let Some(claim) = rows::claim_as(&store, &executor, Work::Train, LONG).await {
                assert_eq!((claim.epoch, claim.work), (2, Work::Train), "the inspection was epoch 1");
                mine.push(claim.job);
            }
            mine
        })
    });
    let mut claimed = Vec::new();
    let mut busy = 0;
    for mine in futures_util::future::join_all(claimers).await {
        let mine = mine.unwrap();
        busy += usize::from(!mine.is_empty());
        claimed.extend(mine);
    }
    assert_eq!(claimed.len(), 50, "every job once");
    assert_eq!(claimed.into_iter().collect::<HashSet<_>>(), all);
    assert!(busy > 1, "the claimers did work at once");
    store.close().await;
}

#[tokio::test]
async fn the_oldest_job_that_the_host_can_do_is_next() {
    let (database, sandbox) = (database().await, Sandbox::new("oldest"));
    let store = database.store(&sandbox).await;
    let mut ids = Vec::new();
    for _ in 0..4 {
        ids.push(rows::queued(&store).await);
    }
    let set = |id: &JobId, what: &str| sqlx::AssertSqlSafe(format!("UPDATE jobs SET {what} WHERE id = '{id}'"));
    let mut connection = database.connection().await;
    connection.execute(set(&ids[0], "model = 'another'")).await.unwrap();
    connection.execute(set(&ids[1], "training = training || '{\"device\": \"cuda\"}'")).await.unwrap();
    connection.execute(set(&ids[3], "priority = 1")).await.unwrap();
    assert_eq!(rows::claim(&store, Work::Train, LONG).await.unwrap().job, ids[3], "priority first");
    assert_eq!(rows::claim(&store, Work::Train, LONG).await.unwrap().job, ids[2], "then age");
    assert_eq!(rows::claim(&store, Work::Train, LONG).await, None);
    store.close().await;
}

#[tokio::test]
async fn a_claim_is_for_the_devices_that_it_names() {
    let (database, sandbox) = (database().await, Sandbox::new("devices"));
    let store = database.store(&sandbox).await;
    let mut connection = database.connection().await;
    let mut ids = Vec::new();
    let wishes =
        ["{}", r#"{"precision": "bf16"}"#, r#"{"precision": "f32"}"#, r#"{"device": "cpu"}"#, r#"{"device": "cuda"}"#];
    for wish in wishes {
        let id = rows::queued(&store).await;
        let set = format!("UPDATE jobs SET training = training || '{wish}' WHERE id = '{id}'");
        connection.execute(sqlx::AssertSqlSafe(set)).await.unwrap();
        ids.push(id);
    }
    for (devices, expected) in [
        (&["cpu"][..], &[2, 3][..]),
        (&["cuda"], &[4]),
        (&["cuda", ANY_DEVICE], &[0, 1, 4]),
        (&["cpu", ANY_DEVICE], &[0, 1, 2, 3]),
    ] {
        let words: Vec<String> = devices.iter().map(ToString::to_string).collect();
        let (executor, models) = (ExecutorId::random(), ["tiny".to_owned()]);
        let by = Claimant {
            executor: &executor,
            lease: LONG,
            models: &models,
            devices: &words,
            fetches: false,
            takes: 1,
            only: None,
        };
        let mut claims = Vec::new();
        while let Some(claim) = store.claim_job(Work::Train, &by).await.unwrap() {
            claims.push(claim);
        }
        let claimed: Vec<usize> =
            claims.iter().map(|claim| ids.iter().position(|id| *id == claim.job).unwrap()).collect();
        assert_eq!(claimed, expected, "{devices:?}");
        for claim in claims {
            assert!(store.settle_job(&claim.job, claim.epoch, &Settlement::Released).await.unwrap());
        }
    }
    store.close().await;
}

#[tokio::test]
async fn a_checkpoint_settles_what_its_job_goes_on_in() {
    let (database, sandbox) = (database().await, Sandbox::new("precision"));
    let store = database.store(&sandbox).await;
    let held = rows::running(&store, LONG).await;
    assert_eq!(job(&store, &held.job).await.training.precision, None);
    rows::checkpoint(&store, &sandbox, &held, 1, false, &[("config.json", b"{}")]).await;
    assert_eq!(job(&store, &held.job).await.training.precision, Some(Precision::F32));
    store.close().await;
}

#[tokio::test]
async fn an_expired_lease_goes_back_to_the_queue_under_a_new_epoch() {
    let (database, sandbox) = (database().await, Sandbox::new("expired"));
    let store = database.store(&sandbox).await;
    let held = rows::running(&store, NONE).await;
    assert_eq!(store.reap_leases(MOST_ATTEMPTS).await.unwrap(), 1);
    assert_eq!(job(&store, &held.job).await.status, JobStatus::Queued);
    assert_eq!(store.renew_lease(&held.job, held.epoch, LONG).await.unwrap(), None);
    let again = rows::claim(&store, Work::Train, LONG).await.unwrap();
    assert_eq!((again.job, again.attempts), (held.job.clone(), 2));
    assert_eq!(again.epoch, held.epoch + 2, "one for the reaping, one for the claim");
    assert_eq!(store.reap_leases(MOST_ATTEMPTS).await.unwrap(), 0, "a lease that lasts is left alone");
    assert_eq!(store.renew_lease(&held.job, again.epoch, LONG).await.unwrap(), Some(None));
    let numbers = event_numbers(&store, &held.job).await;
    assert_eq!(numbers, (1..=numbers.len() as i64).collect::<Vec<_>>(), "events are numbered without gaps");
    store.close().await;
}

#[tokio::test]
async fn attempts_without_a_checkpoint_come_to_an_end() {
    let (database, sandbox) = (database().await, Sandbox::new("attempts"));
    let store = database.store(&sandbox).await;
    let held = rows::running(&store, NONE).await;
    for attempt in 1..=MOST_ATTEMPTS {
        if attempt > 1 {
            assert_eq!(rows::claim(&store, Work::Train, NONE).await.unwrap().attempts, attempt);
        }
        assert_eq!(store.reap_leases(MOST_ATTEMPTS).await.unwrap(), 1);
    }
    let failed = job(&store, &held.job).await;
    assert_eq!(failed.status, JobStatus::Failed);
    assert!(failed.error.unwrap()["message"].as_str().unwrap().ends_with('3'));
    assert!(failed.finished_at.is_some());

    // One that reaches a checkpoint between its deaths may die as often as it likes.
    rows::queued(&store).await;
    for _ in 0..2 * MOST_ATTEMPTS {
        let held = rows::claim(&store, Work::Train, LONG).await.unwrap();
        let files: [(&str, &[u8]); 1] = [("model.safetensors", b"weights")];
        rows::checkpoint(&store, &sandbox, &held, held.epoch as u64, false, &files).await;
        let past = format!("UPDATE jobs SET lease_until = now() - interval '1 s' WHERE id = '{}'", held.job);
        database.connection().await.execute(sqlx::AssertSqlSafe(past)).await.unwrap();
        assert_eq!(store.reap_leases(MOST_ATTEMPTS).await.unwrap(), 1);
        assert_eq!(job(&store, &held.job).await.status, JobStatus::Queued);
    }
    store.close().await;
}

#[tokio::test]
async fn a_failed_attempt_is_tried_again_later_and_then_fails_with_its_reason() {
    let (database, sandbox) = (database().await, Sandbox::new("retry"));
    let store = database.store(&sandbox).await;
    let held = rows::running(&store, LONG).await;
    let retry = |most| Settlement::Retry { most_attempts: most, error: Invalid::new("", "the device was lost") };
    assert!(store.settle_job(&held.job, held.epoch, &retry(2)).await.unwrap());
    assert_eq!(job(&store, &held.job).await.status, JobStatus::Queued);
    assert_eq!(rows::claim(&store, Work::Train, LONG).await, None, "there is a pause before the next attempt");
    database.connection().await.execute("UPDATE jobs SET run_after = now()").await.unwrap();
    let again = rows::claim(&store, Work::Train, LONG).await.unwrap();
    assert!(store.settle_job(&again.job, again.epoch, &retry(2)).await.unwrap());
    let failed = job(&store, &held.job).await;
    assert_eq!(failed.status, JobStatus::Failed);
    assert_eq!(failed.error.unwrap()["message"], "the device was lost");
    store.close().await;
}

#[tokio::test]
async fn a_wish_to_cancel_is_granted_whoever_ends_the_hold() {
    let (database, sandbox) = (database().await, Sandbox::new("wish"));
    let store = database.store(&sandbox).await;
    let retry = Settlement::Retry { most_attempts: 9, error: Invalid::new("", "broken") };
    for settlement in [Some(Settlement::Released), Some(retry), None] {
        let lease = if settlement.is_some() { LONG } else { NONE };
        let held = rows::running(&store, lease).await;
        let asked = store.cancel_job(&held.job).await.unwrap();
        assert!(matches!(&asked, Steered::Accepted(job) if job.status == JobStatus::Running), "{asked:?}");
        match settlement {
            Some(settlement) => {
                let wish = store.renew_lease(&held.job, held.epoch, LONG).await.unwrap();
                assert_eq!(wish, Some(Some(Wish::Cancel)));
                assert!(store.settle_job(&held.job, held.epoch, &settlement).await.unwrap());
            }
            None => assert_eq!(store.reap_leases(MOST_ATTEMPTS).await.unwrap(), 1),
        }
        let ended = job(&store, &held.job).await;
        assert_eq!((ended.status, ended.wanted), (JobStatus::Cancelled, None));
    }
    // The same for a job whose data is being read.
    let id = rows::job(&store).await;
    let held = rows::claim(&store, Work::Inspect, LONG).await.unwrap();
    store.cancel_job(&id).await.unwrap();
    assert!(store.settle_job(&id, held.epoch, &rows::VALIDATED).await.unwrap());
    assert_eq!(job(&store, &id).await.status, JobStatus::Cancelled);
    store.close().await;
}

#[tokio::test]
async fn stopping_an_executor_counts_no_attempt() {
    let (database, sandbox) = (database().await, Sandbox::new("released"));
    let store = database.store(&sandbox).await;
    let held = rows::running(&store, LONG).await;
    assert!(store.settle_job(&held.job, held.epoch, &Settlement::Released).await.unwrap());
    let again = rows::claim(&store, Work::Train, LONG).await.unwrap();
    assert_eq!((again.job, again.attempts), (held.job, 1));
    store.close().await;
}

#[tokio::test]
async fn the_database_refuses_every_edge_that_is_not_in_the_table() {
    let (database, sandbox) = (database().await, Sandbox::new("edges"));
    let store = database.store(&sandbox).await;
    let id = rows::job(&store).await;
    let mut connection = database.connection().await;
    for old in JobStatus::ALL {
        for new in JobStatus::ALL.into_iter().filter(|new| *new != old) {
            // A row in the old status, made with the guard away.
            let columns = |status: JobStatus| {
                let lease = if status == JobStatus::Running { "'exec', now()" } else { "NULL, NULL" };
                let finished = if status.is_terminal() { "now()" } else { "NULL" };
                format!(
                    "(status, lease_owner, lease_until, finished_at) = ROW ('{status}'::job_status, {lease}, {finished}::timestamptz)"
                )
            };
            let sql = |status| sqlx::AssertSqlSafe(format!("UPDATE jobs SET {} WHERE id = '{id}'", columns(status)));
            connection.execute("ALTER TABLE jobs DISABLE TRIGGER jobs_guard").await.unwrap();
            connection.execute(sql(old)).await.unwrap();
            connection.execute("ALTER TABLE jobs ENABLE TRIGGER jobs_guard").await.unwrap();
            let moved = connection.execute(sql(new)).await;
            assert_eq!(moved.is_ok(), old.may_become(new), "{old} to {new}: {moved:?}");
            if let Err(error) = moved {
                assert_eq!(longhaul::store::Error::from(error).constraint(), Some("jobs_edge"));
            }
        }
    }
    let lower = sqlx::AssertSqlSafe(format!("UPDATE jobs SET epoch = epoch - 1 WHERE id = '{id}'"));
    let error = connection.execute(lower).await.unwrap_err();
    assert_eq!(longhaul::store::Error::from(error).constraint(), Some("jobs_epoch"));
    store.close().await;
}
