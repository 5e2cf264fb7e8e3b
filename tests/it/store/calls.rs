//! Calls for ranks: one leader a job, one taker a call, and a hold that ends with either side's.

use std::time::Duration;

use longhaul::{
    domain::{
        ExecutorId,
        run::{Part, Ranks, Token},
    },
    store::{
        Store,
        calls::{NewCall, Told},
        queue::{Settlement, Work},
    },
};
use serde_json::json;
use sqlx::Executor;

use crate::support::{
    Sandbox, database,
    model::machine,
    rows::{self, LONG},
};

fn part(first: u64) -> Part {
    Part { first, n: 1, of: Ranks { sequence: 3, data: 1 }, machine: machine(1 << 30), token: Token::random() }
}

fn calls(hosts: &[&ExecutorId]) -> Vec<NewCall> {
    hosts.iter().zip(1..).map(|(host, first)| NewCall { host: (*host).clone(), part: part(first) }).collect()
}

async fn renewed(store: &Store, id: i64) -> Option<Told> {
    store.renew_call(id, LONG).await.unwrap()
}

#[tokio::test]
async fn a_call_holds_as_long_as_its_leaders_claim() {
    let (database, sandbox) = (database().await, Sandbox::new("calls"));
    let store = database.store(&sandbox).await;
    let job = rows::queued(&store).await;
    let (leader, other, host, third) =
        (ExecutorId::random(), ExecutorId::random(), ExecutorId::random(), ExecutorId::random());
    assert!(store.call_ranks(&job, &leader, &calls(&[&host, &third]), LONG).await.unwrap());
    assert!(!store.call_ranks(&job, &other, &calls(&[&host]), LONG).await.unwrap(), "one leads");
    let call = store.next_call(&host).await.unwrap().unwrap();
    assert_eq!((&call.job, call.part.first, call.part.n), (&job, 1, 1));
    assert_eq!(store.next_call(&other).await.unwrap(), None, "it is not asked");
    assert!(store.take_call(call.id, LONG).await.unwrap() && !store.take_call(call.id, LONG).await.unwrap());
    assert_eq!(store.next_call(&host).await.unwrap(), None);
    assert_eq!(renewed(&store, call.id).await, Some(Told::default()));
    let answers = store.answers(&job, &leader).await.unwrap();
    let taken: Vec<_> = answers.iter().map(|answer| (&answer.host, answer.taken, answer.ready)).collect();
    assert_eq!(taken, [(&host, true, false), (&third, false, false)]);

    let claim = rows::claim_as(&store, &leader, Work::Train, LONG).await.unwrap();
    store.begin_calls(&job, &leader, claim.epoch).await.unwrap();
    assert_eq!(renewed(&store, call.id).await.unwrap().epoch, Some(claim.epoch));
    assert_eq!(store.called_claim(&call.job, claim.epoch).await.unwrap(), Some(claim.clone()));
    assert_eq!(store.called_claim(&call.job, claim.epoch + 1).await.unwrap(), None);
    store.ready_call(call.id).await.unwrap();
    assert!(store.tell_meeting(&job, claim.epoch, "10.0.0.5:4242").await.unwrap());
    assert!(!store.tell_meeting(&job, claim.epoch - 1, "10.0.0.6:1").await.unwrap(), "a stale leader");
    assert_eq!(renewed(&store, call.id).await.unwrap().address.as_deref(), Some("10.0.0.5:4242"));
    store.end_call(call.id, &json!({"report": "alive"})).await.unwrap();
    let answers = store.answers(&job, &leader).await.unwrap();
    assert!(answers[0].ready && answers[0].ended.is_some() && !answers[0].lapsed);

    assert!(store.settle_job(&job, claim.epoch, &Settlement::Released).await.unwrap());
    assert_eq!(renewed(&store, call.id).await, None, "the claim is over");
    assert!(store.call_ranks(&job, &other, &calls(&[&host]), LONG).await.unwrap(), "what is over is in nobody's way");
    store.drop_calls(&job, &other).await.unwrap();
    assert_eq!(store.next_call(&host).await.unwrap(), None);
    store.close().await;
}

#[tokio::test]
async fn whoever_stops_renewing_is_seen_by_the_other() {
    let (database, sandbox) = (database().await, Sandbox::new("lapsed"));
    let store = database.store(&sandbox).await;
    let job = rows::queued(&store).await;
    let (leader, host) = (ExecutorId::random(), ExecutorId::random());
    let by_leader = calls(&[&host]);
    assert!(store.call_ranks(&job, &leader, &by_leader, Duration::ZERO).await.unwrap());
    assert_eq!(store.next_call(&host).await.unwrap(), None, "it is open no more");
    assert!(store.call_ranks(&job, &leader, &by_leader, LONG).await.unwrap());
    let call = store.next_call(&host).await.unwrap().unwrap();
    assert!(store.take_call(call.id, LONG).await.unwrap());
    let claim = rows::claim_as(&store, &leader, Work::Train, LONG).await.unwrap();
    store.begin_calls(&job, &leader, claim.epoch).await.unwrap();

    let past = "UPDATE rank_calls SET taken_until = now() - interval '1 s'";
    database.connection().await.execute(past).await.unwrap();
    assert!(store.answers(&job, &leader).await.unwrap()[0].lapsed);
    assert_eq!(renewed(&store, call.id).await, None, "a lease that ran out is not renewed");
    database.connection().await.execute("UPDATE rank_calls SET taken_until = now() + interval '1 h'").await.unwrap();
    assert!(renewed(&store, call.id).await.is_some());
    database.connection().await.execute("UPDATE jobs SET lease_until = now() - interval '1 s'").await.unwrap();
    assert_eq!(store.reap_leases(9).await.unwrap(), 1);
    assert_eq!(renewed(&store, call.id).await, None, "the leader is gone");
    store.close().await;
}

#[tokio::test]
async fn a_job_that_somebody_calls_for_is_not_offered() {
    let (database, sandbox) = (database().await, Sandbox::new("offered"));
    let store = database.store(&sandbox).await;
    let job = rows::queued(&store).await;
    let (leader, host) = (ExecutorId::random(), ExecutorId::random());
    let offered = async || rows::offered(&store).await;
    assert_eq!(offered().await.first(), Some(&job));
    store.call_ranks(&job, &leader, &calls(&[&host]), LONG).await.unwrap();
    assert_eq!(offered().await, []);
    store.drop_calls(&job, &leader).await.unwrap();
    assert_eq!(offered().await, [job]);
    store.close().await;
}
