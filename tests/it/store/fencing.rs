//! Fencing: a holder whose epoch is stale writes nothing, by any method, and its bytes are no checkpoint.

use std::time::Duration;

use longhaul::{
    domain::{Event, Invalid, JobStatus, Level, ProjectId, progress::Evaluation},
    store::{
        Page,
        checkpoints::Recorded,
        events::Writer,
        queue::{Settlement, Work},
    },
};
use serde_json::json;

use crate::support::{
    Sandbox, database,
    rows::{self, LONG},
};

const WEIGHTS: &[(&str, &[u8])] = &[("model.safetensors", b"weights")];

#[tokio::test]
async fn a_stale_holder_writes_nothing() {
    let (database, sandbox) = (database().await, Sandbox::new("stale"));
    let store = database.store(&sandbox).await;
    let stale = rows::running(&store, Duration::ZERO).await;
    store.reap_leases(9).await.unwrap();
    let page = Page { limit: 100, ..Page::default() };
    // Once while nobody holds the job, once while another does.
    for held_again in [false, true] {
        let holder = if held_again { rows::claim(&store, Work::Train, LONG).await } else { None };
        assert_eq!(holder.is_some(), held_again);
        let (before, events) =
            (store.job(&stale.job).await.unwrap(), store.list_events(&stale.job, &page).await.unwrap());
        let (id, epoch) = (&stale.job, stale.epoch);
        let event = Event::message(Level::Info, "from a ghost");
        assert!(!store.append_event(id, Writer::Holder(epoch), &event).await.unwrap());
        assert!(!store.record_step(id, epoch, &rows::step(1, 4)).await.unwrap());
        let evaluation = Evaluation { step: 1, valid_loss: 1.0, valid_mean_token_accuracy: 0.5, valid_labels: 3 };
        assert!(!store.record_evaluation(id, epoch, &evaluation).await.unwrap());
        assert_eq!(rows::checkpoint(&store, &sandbox, &stale, 1, true, WEIGHTS).await.1, Recorded::Stale);
        assert_eq!(store.renew_lease(id, epoch, LONG).await.unwrap(), None);
        let error = Invalid::new("", "broken");
        for settlement in [
            rows::VALIDATED,
            Settlement::Succeeded { trained_tokens: Some(1) },
            Settlement::Failed { error: error.clone() },
            Settlement::Retry { most_attempts: 1, error },
            Settlement::Released,
        ] {
            assert!(!store.settle_job(id, epoch, &settlement).await.unwrap(), "{settlement:?}");
        }
        assert_eq!(store.job(id).await.unwrap(), before);
        assert_eq!(store.list_events(id, &page).await.unwrap(), events);
        assert_eq!(store.list_checkpoints(id, &page).await.unwrap().unwrap().rows, []);
        if let Some(holder) = holder {
            assert_eq!(store.renew_lease(id, holder.epoch, LONG).await.unwrap(), Some(None), "the holder holds on");
        }
    }
    store.close().await;
}

#[tokio::test]
async fn the_holder_writes_and_succeeds_only_with_its_last_checkpoint() {
    let (database, sandbox) = (database().await, Sandbox::new("holder"));
    let store = database.store(&sandbox).await;
    let held = rows::running(&store, LONG).await;
    let (id, epoch) = (&held.job, held.epoch);
    for step in 1..=2 {
        assert!(store.record_step(id, epoch, &rows::step(step, 2)).await.unwrap());
    }
    let done = Settlement::Succeeded { trained_tokens: Some(256) };
    assert!(!store.settle_job(id, epoch, &done).await.unwrap(), "there is no result yet");
    let (first, recorded) = rows::checkpoint(&store, &sandbox, &held, 2, true, WEIGHTS).await;
    assert!(matches!(recorded, Recorded::New(checkpoint) if checkpoint.id == first && checkpoint.last));
    let (_, again) = rows::checkpoint(&store, &sandbox, &held, 2, true, WEIGHTS).await;
    assert!(matches!(again, Recorded::Before(checkpoint) if checkpoint.id == first), "one checkpoint a step");
    assert!(store.settle_job(id, epoch, &done).await.unwrap());
    assert!(!store.settle_job(id, epoch, &done).await.unwrap(), "once");
    let job = store.job(id).await.unwrap().unwrap();
    assert_eq!((job.status, job.trained_tokens), (JobStatus::Succeeded, Some(256)));
    let name = format!("ft:tiny:longhaul::{}", &id.as_str()[id.as_str().len() - 8..]);
    assert_eq!(job.fine_tuned_model, Some(name.clone()));
    assert_eq!(store.own_model(&ProjectId::default_project(), &name).await.unwrap().unwrap().id, first);
    assert_eq!(job.progress.unwrap()["step"], json!(2));
    assert!(!store.record_step(id, epoch, &rows::step(3, 3)).await.unwrap(), "it is over");
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn events_of_many_writers_are_numbered_without_gaps() {
    let (database, sandbox) = (database().await, Sandbox::new("events"));
    let store = database.store(&sandbox).await;
    let held = rows::running(&store, LONG).await;
    let writers = (0..6u64).map(|writer| {
        let (store, job, epoch) = (store.clone(), held.job.clone(), held.epoch);
        tokio::spawn(async move {
            for n in 0..10 {
                let event = Event::info(format!("{writer}/{n}"), json!({"n": n}));
                let by = if writer % 2 == 0 { Writer::Service } else { Writer::Holder(epoch) };
                assert!(store.append_event(&job, by, &event).await.unwrap());
            }
        })
    });
    for done in futures_util::future::join_all(writers).await {
        done.unwrap();
    }
    let page = Page { limit: 1000, ..Page::default() };
    let events = store.list_events(&held.job, &page).await.unwrap().unwrap().rows;
    let numbers: Vec<i64> = events.iter().rev().map(|event| event.seq).collect();
    assert_eq!(numbers, (1..=63).collect::<Vec<_>>(), "three of its life, sixty of the writers");
    store.close().await;
}
