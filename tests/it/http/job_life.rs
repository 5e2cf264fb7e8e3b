//! Jobs after they were made: lists, the metadata filter, cancelling, pausing and resuming.

use longhaul::{
    domain::JobId,
    store::queue::{Settlement, Wish, Work},
};
use serde_json::{Value, json};

use crate::support::{
    rows::{self, LONG},
    service::{Answer, Service},
};

const JOBS: &str = "/v1/fine_tuning/jobs";

async fn cancel(service: &Service, id: &JobId) -> Answer {
    steer(service, id, "cancel").await
}

async fn steer(service: &Service, id: &JobId, verb: &str) -> Answer {
    // Stock clients send an empty body that they call JSON.
    let request = axum::http::Request::post(format!("{JOBS}/{id}/{verb}")).header("content-type", "application/json");
    service.send(request.body(axum::body::Body::empty()).unwrap()).await
}

#[tokio::test]
async fn jobs_are_listed_newest_first_and_by_metadata() {
    let service = Service::new("jobs").await;
    let mut ids = Vec::new();
    for metadata in [json!({"k": "v"}), Value::Null, json!({"k": "v w", "n": "1"}), json!({"k": "v", "n": "2"})] {
        ids.push(service.job(json!({"metadata": metadata})).await["id"].as_str().unwrap().to_owned());
    }
    let pick = |which: &[usize]| which.iter().map(|i| ids[*i].clone()).collect::<Vec<_>>();
    for (query, expected) in [
        ("", pick(&[3, 2, 1, 0])),
        ("?limit=2", pick(&[3, 2])),
        (&format!("?limit=2&after={}", ids[2]), pick(&[1, 0])),
        ("?metadata[k]=v", pick(&[3, 0])),
        ("?metadata%5Bk%5D=v+w", pick(&[2])),
        ("?metadata%5Bk%5D=v%20w&metadata%5Bn%5D=1", pick(&[2])),
        ("?metadata[k]=v&metadata[n]=1", pick(&[])),
        ("?metadata=null", pick(&[1])),
        (&format!("?metadata[k]=v&after={}", ids[3]), pick(&[0])),
    ] {
        assert_eq!(service.get(&format!("{JOBS}{query}")).await.ids(), expected, "{query}");
    }
    assert_eq!(service.get(&format!("{JOBS}?limit=3")).await.json()["has_more"], true);
    assert_eq!(service.get(&format!("{JOBS}?limit=4")).await.json()["has_more"], false);
    for (query, param) in
        [("limit=0", "limit"), ("limit=1001", "limit"), ("after=ftjob-none", "after"), ("metadata=x", "metadata")]
    {
        service.get(&format!("{JOBS}?{query}")).await.error(400, param);
    }
}

#[tokio::test]
async fn a_job_that_nobody_holds_is_cancelled_at_once() {
    let service = Service::new("cancel").await;
    let validating = rows::job(&service.store).await;
    let job = cancel(&service, &validating).await.json();
    assert_eq!(job["status"], "cancelled");
    assert!(job["finished_at"].is_i64());
    assert_eq!(cancel(&service, &validating).await.json(), job, "cancelling again changes nothing");

    let queued = rows::queued(&service.store).await;
    assert_eq!(cancel(&service, &queued).await.json()["status"], "cancelled");
    assert!(rows::claim(&service.store, Work::Train, LONG).await.is_none());
    cancel(&service, &"ftjob-none".parse().unwrap()).await.error(404, "");
}

#[tokio::test]
async fn the_holder_of_a_job_is_asked_to_cancel_it() {
    let service = Service::new("held").await;
    let held = rows::running(&service.store, LONG).await;
    assert_eq!(cancel(&service, &held.job).await.json()["status"], "running");
    assert_eq!(cancel(&service, &held.job).await.json()["status"], "running");
    let events = service.get(&format!("{JOBS}/{}/events", held.job)).await.json();
    let asked = |event: &&Value| event["message"].as_str().unwrap().contains("Cancellation requested");
    assert_eq!(events["data"].as_array().unwrap().iter().filter(asked).count(), 1);
    let wish = service.store.renew_lease(&held.job, held.epoch, LONG).await.unwrap();
    assert_eq!(wish, Some(Some(Wish::Cancel)));
    assert!(service.store.settle_job(&held.job, held.epoch, &Settlement::Released).await.unwrap());
    let job = service.get(&format!("{JOBS}/{}", held.job)).await.json();
    assert_eq!((&job["status"], job["finished_at"].is_i64()), (&json!("cancelled"), true));
}

#[tokio::test]
async fn a_job_that_has_ended_cannot_be_cancelled() {
    let service = Service::new("ended").await;
    let held = rows::running(&service.store, LONG).await;
    let error = longhaul::domain::Invalid::with_code("bad_data", "training_file", "line 3 is no document");
    assert!(service.store.settle_job(&held.job, held.epoch, &Settlement::Failed { error }).await.unwrap());
    let answer = cancel(&service, &held.job).await;
    assert_eq!(answer.error(409, "")["code"], "job_ended");
    assert_eq!(answer.header("x-should-retry"), Some("false"));
    let job = service.get(&format!("{JOBS}/{}", held.job)).await.json();
    assert_eq!(job["status"], "failed");
    let error = json!({"code": "bad_data", "message": "line 3 is no document", "param": "training_file"});
    assert_eq!(job["error"], error);
}

#[tokio::test]
async fn a_job_that_nobody_holds_is_paused_at_once_and_goes_back_where_it_was() {
    let service = Service::new("pause").await;
    let id = rows::job(&service.store).await;
    for _ in 0..2 {
        assert_eq!(steer(&service, &id, "pause").await.json()["status"], "paused");
    }
    assert!(rows::claim(&service.store, Work::Inspect, LONG).await.is_none());
    for _ in 0..2 {
        let resumed = steer(&service, &id, "resume").await.json();
        assert_eq!(resumed["status"], "validating_files", "its files were not validated yet");
    }
    let held = rows::claim(&service.store, Work::Inspect, LONG).await.unwrap();
    assert!(service.store.settle_job(&id, held.epoch, &rows::VALIDATED).await.unwrap());
    assert_eq!(steer(&service, &id, "pause").await.json()["status"], "paused");
    assert!(rows::claim(&service.store, Work::Train, LONG).await.is_none());
    assert_eq!(steer(&service, &id, "resume").await.json()["status"], "queued");
    assert_eq!(steer(&service, &id, "pause").await.json()["status"], "paused");
    assert_eq!(cancel(&service, &id).await.json()["status"], "cancelled");
    for verb in ["pause", "resume"] {
        let answer = steer(&service, &id, verb).await;
        assert_eq!(answer.error(409, "")["code"], "job_ended");
        assert_eq!(answer.header("x-should-retry"), Some("false"));
        steer(&service, &"ftjob-none".parse().unwrap(), verb).await.error(404, "");
    }
}

#[tokio::test]
async fn the_holder_of_a_job_is_asked_to_pause_it_and_a_pause_can_be_taken_back() {
    let service = Service::new("pause-held").await;
    let store = &service.store;
    let held = rows::running(store, LONG).await;
    let wish = async |epoch| store.renew_lease(&held.job, epoch, LONG).await.unwrap();
    for _ in 0..2 {
        assert_eq!(steer(&service, &held.job, "pause").await.json()["status"], "running");
    }
    assert_eq!(wish(held.epoch).await, Some(Some(Wish::Pause)));
    assert_eq!(steer(&service, &held.job, "resume").await.json()["status"], "running");
    assert_eq!(wish(held.epoch).await, Some(None));
    // The holder had heard it before: it lets go, and the job goes on.
    assert!(store.settle_job(&held.job, held.epoch, &Settlement::Released).await.unwrap());
    let held = rows::claim(store, Work::Train, LONG).await.unwrap();

    steer(&service, &held.job, "pause").await.json();
    assert!(store.settle_job(&held.job, held.epoch, &Settlement::Released).await.unwrap());
    let job = service.get(&format!("{JOBS}/{}", held.job)).await.json();
    assert_eq!((&job["status"], &job["finished_at"]), (&json!("paused"), &Value::Null));
    assert_eq!(steer(&service, &held.job, "resume").await.json()["status"], "queued");

    // Cancelling comes before pausing, in whichever order they are asked for.
    let held = rows::claim(store, Work::Train, LONG).await.unwrap();
    steer(&service, &held.job, "pause").await.json();
    cancel(&service, &held.job).await.json();
    for verb in ["pause", "resume"] {
        assert_eq!(steer(&service, &held.job, verb).await.error(409, "")["code"], "job_cancelling");
    }
    assert!(store.settle_job(&held.job, held.epoch, &Settlement::Released).await.unwrap());
    assert_eq!(service.get(&format!("{JOBS}/{}", held.job)).await.json()["status"], "cancelled");
}
