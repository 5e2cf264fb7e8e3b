//! Result files: one for every job that did a step, whoever ended it and however; none written twice, none by a stale holder.

use std::time::Duration;

use longhaul::{
    domain::{Invalid, progress::Evaluation},
    store::queue::{Settlement, Work},
};
use serde_json::{Value, json};
use sqlx::Executor;

use crate::support::{
    rows::{self, LONG},
    service::Service,
};

const HEAD: &str = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,learning_rate,grad_norm,seconds,\
                    tokens_per_second,tokens_seen,train_labels,valid_labels\n";

async fn results(service: &Service, job: &impl std::fmt::Display) -> Vec<String> {
    let job = service.get(&format!("/v1/fine_tuning/jobs/{job}")).await.json();
    job["result_files"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_job_that_succeeds_leaves_its_numbers_as_a_file() {
    let service = Service::new("results").await;
    let store = &service.store;
    let held = rows::running(store, LONG).await;
    for step in [0, 2] {
        if step > 0 {
            for step in 1..=2 {
                store.record_step(&held.job, held.epoch, &rows::step(step, 2)).await.unwrap();
            }
        }
        let evaluation = Evaluation { step, valid_loss: 3.5, valid_mean_token_accuracy: 0.125, valid_labels: 640 };
        store.record_evaluation(&held.job, held.epoch, &evaluation).await.unwrap();
    }
    rows::checkpoint(store, &service.sandbox, &held, 2, true, &[("model.safetensors", b"weights")]).await;
    assert_eq!(results(&service, &held.job).await, Vec::<String>::new(), "not before the end");
    let done = Settlement::Succeeded { trained_tokens: Some(256) };
    assert!(store.settle_job(&held.job, held.epoch, &done).await.unwrap());
    assert!(!store.settle_job(&held.job, held.epoch, &done).await.unwrap());

    let ids = results(&service, &held.job).await;
    assert_eq!(ids.len(), 1);
    let file = service.get(&format!("/v1/files/{}", ids[0])).await.json();
    assert_eq!((&file["purpose"], &file["filename"]), (&json!("fine-tune-results"), &json!("step_metrics.csv")));
    assert_eq!(service.get("/v1/files?purpose=fine-tune-results").await.ids(), ids);
    let content = service.get(&format!("/v1/files/{}/content", ids[0])).await;
    let expected = format!(
        "{HEAD}0,,,3.5,0.125,,,,,,,640\n1,2.5,0.25,,,0.00001,0.5,1.0,128.0,128,127,\n\
         2,1.25,0.25,3.5,0.125,0.00001,0.5,1.0,128.0,256,127,640\n"
    );
    assert_eq!(String::from_utf8_lossy(&content.bytes), expected);

    service.delete(&format!("/v1/files/{}", ids[0])).await.json();
    assert_eq!(results(&service, &held.job).await, Vec::<String>::new());
}

#[tokio::test]
async fn every_end_leaves_the_file_once() {
    let service = Service::new("ends").await;
    let store = &service.store;
    let error = Invalid::new("", "it broke");
    let cancel = async |id: &longhaul::domain::JobId| {
        service.post(&format!("/v1/fine_tuning/jobs/{id}/cancel"), &Value::Null).await.json()
    };
    for end in ["failed", "given up", "cancelled while held", "cancelled while paused", "reaped"] {
        let lease = if end == "reaped" { Duration::ZERO } else { LONG };
        let held = rows::running(store, LONG).await;
        let (id, epoch) = (held.job.clone(), held.epoch);
        store.record_step(&id, epoch, &rows::step(1, 2)).await.unwrap();
        store.renew_lease(&id, epoch, lease).await.unwrap();
        let settled = match end {
            "failed" => store.settle_job(&id, epoch, &Settlement::Failed { error: error.clone() }).await.unwrap(),
            "given up" => {
                let retry = Settlement::Retry { most_attempts: 1, error: error.clone() };
                store.settle_job(&id, epoch, &retry).await.unwrap()
            }
            "cancelled while held" => {
                cancel(&id).await;
                assert_eq!(results(&service, &id).await.len(), 0, "the holder has not let go");
                store.settle_job(&id, epoch, &Settlement::Released).await.unwrap()
            }
            "cancelled while paused" => {
                service.post(&format!("/v1/fine_tuning/jobs/{id}/pause"), &Value::Null).await.json();
                store.settle_job(&id, epoch, &Settlement::Released).await.unwrap();
                assert_eq!(results(&service, &id).await.len(), 0, "a paused job has not ended");
                cancel(&id).await["status"] == "cancelled"
            }
            _ => store.reap_leases(1).await.unwrap() == 1,
        };
        assert!(settled, "{end}");
        // Whoever comes late changes nothing.
        store.settle_job(&id, epoch, &Settlement::Failed { error: error.clone() }).await.unwrap();
        let ids = results(&service, &id).await;
        assert_eq!(ids.len(), 1, "{end}");
        let content = service.get(&format!("/v1/files/{}/content", ids[0])).await;
        let expected = format!("{HEAD}1,2.5,0.25,,,0.00001,0.5,1.0,128.0,128,127,\n");
        assert_eq!(String::from_utf8_lossy(&content.bytes), expected, "{end}");
    }
    assert_eq!(service.get("/v1/files?purpose=fine-tune-results").await.ids().len(), 5);

    // Nothing was trained, nothing is told.
    let idle = rows::job(store).await;
    cancel(&idle).await;
    assert_eq!(results(&service, &idle).await.len(), 0);
}

#[tokio::test]
async fn a_long_run_fills_many_rows() {
    let service = Service::new("long").await;
    let store = &service.store;
    let held = rows::running(store, LONG).await;
    let fill = "INSERT INTO job_steps SELECT id, step, jsonb_build_object('step', step, 'train_loss', 1.5)
                FROM jobs, generate_series(1, 60000) AS step";
    service.database.connection().await.execute(fill).await.unwrap();
    let error = Invalid::new("", "it broke");
    assert!(store.settle_job(&held.job, held.epoch, &Settlement::Failed { error }).await.unwrap());
    let ids = results(&service, &held.job).await;
    let content = service.get(&format!("/v1/files/{}/content", ids[0])).await;
    let text = String::from_utf8_lossy(&content.bytes);
    assert!(text.len() > 1 << 20, "more than one row of the store");
    let steps: Vec<u64> = text.lines().skip(1).map(|line| line.split(',').next().unwrap().parse().unwrap()).collect();
    assert_eq!(steps, (1..=60_000).collect::<Vec<_>>());
    assert!(rows::claim(store, Work::Train, LONG).await.is_none());
}
