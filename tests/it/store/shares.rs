//! Turns of projects: whoever trains on less is next, whoever waited longer after that, and nobody waits for ever.

use longhaul::{
    domain::{ExecutorId, JobId},
    store::{
        Store,
        queue::{ANY_DEVICE, Claim, Claimant, Settlement, Work},
    },
};
use sqlx::{Executor, PgConnection};

use crate::support::{
    Sandbox, database,
    rows::{self, LONG},
};

/// So many queued jobs of a project, the oldest first.
async fn queued(store: &Store, connection: &mut PgConnection, project: &str, count: usize) -> Vec<JobId> {
    let mut jobs = Vec::new();
    for _ in 0..count {
        let job = rows::queued(store).await;
        let set = format!("UPDATE jobs SET project_id = '{project}' WHERE id = '{job}'");
        connection.execute(sqlx::AssertSqlSafe(set)).await.unwrap();
        jobs.push(job);
    }
    jobs
}

/// The next job, on so many devices.
async fn next(store: &Store, takes: u64) -> Claim {
    let (models, devices) = (["tiny".to_owned()], ["cpu".to_owned(), ANY_DEVICE.to_owned()]);
    let executor = ExecutorId::random();
    let by = Claimant {
        executor: &executor,
        lease: LONG,
        models: &models,
        fetches: false,
        devices: &devices,
        takes,
        only: None,
    };
    store.claim_job(Work::Train, &by).await.unwrap().unwrap()
}

async fn give_back(store: &Store, claim: &Claim) {
    let error = longhaul::domain::Invalid::new("", "the data cannot be trained on");
    assert!(store.settle_job(&claim.job, claim.epoch, &Settlement::Failed { error }).await.unwrap());
}

#[tokio::test]
async fn the_project_with_the_fewest_devices_is_next() {
    let (database, sandbox) = (database().await, Sandbox::new("shares"));
    let store = database.store(&sandbox).await;
    let mut connection = database.connection().await;
    let other = store.create_project("other").await.unwrap().unwrap().id;
    let a = queued(&store, &mut connection, "proj_default", 4).await;
    let b = queued(&store, &mut connection, other.as_str(), 4).await;
    // What executors look through: each further job of a project counts as if those before it ran.
    let expected: Vec<&JobId> = a.iter().zip(&b).flat_map(|(a, b)| [a, b]).collect();
    assert_eq!(rows::offered(&store).await.iter().collect::<Vec<_>>(), expected);
    let first = next(&store, 2).await;
    assert_eq!(first.job, a[0], "the oldest");
    assert_eq!(next(&store, 1).await.job, b[0], "it had none");
    assert_eq!(next(&store, 1).await.job, b[1], "one device is fewer than two");
    assert_eq!(next(&store, 1).await.job, a[1], "as many, and its turn is longer ago");
    assert_eq!(next(&store, 1).await.job, b[2]);
    give_back(&store, &first).await;
    assert_eq!(rows::offered(&store).await, [a[2].clone(), a[3].clone(), b[3].clone()], "one device against three");
    assert_eq!(next(&store, 1).await.job, a[2]);
    store.close().await;
}

#[tokio::test]
async fn on_one_device_projects_take_turns_whatever_their_priorities() {
    let (database, sandbox) = (database().await, Sandbox::new("turns"));
    let store = database.store(&sandbox).await;
    let mut connection = database.connection().await;
    let other = store.create_project("other").await.unwrap().unwrap().id;
    let a = queued(&store, &mut connection, "proj_default", 4).await;
    let b = queued(&store, &mut connection, other.as_str(), 2).await;
    connection.execute("UPDATE jobs SET priority = 100 WHERE project_id = 'proj_default'").await.unwrap();
    let mut order = Vec::new();
    for _ in 0..6 {
        let claim = next(&store, 1).await;
        give_back(&store, &claim).await;
        order.push(claim.job);
    }
    let expected = [&a[0], &b[0], &a[1], &b[1], &a[2], &a[3]];
    assert_eq!(order.iter().collect::<Vec<_>>(), expected);
    store.close().await;
}

#[tokio::test]
async fn waiting_raises_what_was_passed_over() {
    let (database, sandbox) = (database().await, Sandbox::new("aging"));
    let store = database.store(&sandbox).await;
    let mut connection = database.connection().await;
    let jobs = queued(&store, &mut connection, "proj_default", 3).await;
    for (job, set) in [
        (&jobs[0], "created_at = created_at - interval '90 minutes'"),
        (&jobs[1], "priority = 2"),
        (&jobs[2], "priority = 1"),
    ] {
        connection.execute(sqlx::AssertSqlSafe(format!("UPDATE jobs SET {set} WHERE id = '{job}'"))).await.unwrap();
    }
    // 1.5 by its age, between 2 and 1.
    assert_eq!(rows::offered(&store).await, [jobs[1].clone(), jobs[0].clone(), jobs[2].clone()]);
    for place in [1, 0, 2] {
        assert_eq!(next(&store, 1).await.job, jobs[place]);
    }
    store.close().await;
}
