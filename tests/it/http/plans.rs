//! Plans over HTTP: asked for, answered by whoever reads the data, held against the hosts that are alive.

use std::time::Duration;

use longhaul::domain::{
    Invalid,
    progress::{DataSummary, PreviewedExample},
};
use serde_json::json;

use crate::support::service::{Service, body};

const PLANS: &str = "/v1/fine_tuning/plans";
const AT_ONCE: [(&str, &str); 1] = [("prefer", "wait=0")];
const LEASE: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_plan_needs_an_executor_and_makes_no_job() {
    let service = Service::new("plan-alone").await;
    let file = service.upload("a.txt", b"some text").await;
    let answer = service.post_with(PLANS, &body(&file, json!({})), &AT_ONCE).await;
    let error = answer.error(503, "");
    assert!(error["message"].as_str().unwrap().contains("no executor is running"), "{error}");
    assert!(answer.header("retry-after").is_some());

    service.host(1 << 30).await;
    let plan = service.post_with(PLANS, &body(&file, json!({})), &AT_ONCE).await.json();
    assert_eq!((&plan["object"], &plan["status"]), (&json!("fine_tuning.plan"), &json!("queued")), "{plan}");
    assert_eq!((&plan["data"], &plan["error"], &plan["hosts"]), (&json!(null), &json!(null), &json!([])));
    assert_eq!((service.count("jobs").await, service.count("plans").await), (0, 1));

    // What a create refuses is refused here.
    service.post_with(PLANS, &body(&file, json!({"model": "absent"})), &AT_ONCE).await.error(400, "model");
    service.post_with(PLANS, &body("file-absent", json!({})), &AT_ONCE).await.error(400, "training_file");
    service.post_with(PLANS, &body(&file, json!({})), &[("prefer", "wait=soon")]).await.error(400, "Prefer");
    service.get(&format!("{PLANS}/ftplan-absent")).await.error(404, "");
    service.get(&format!("{PLANS}/ftjob-absent")).await.error(404, "");
}

#[tokio::test]
async fn an_answered_plan_tells_every_host() {
    let service = Service::new("plan-answered").await;
    service.host(1 << 30).await;
    service.host(1 << 20).await;
    let file = service.upload("a.txt", b"some text").await;
    let training = json!({"training": {"sequence_length": 2048, "long_documents": "split"}});
    let asked = service.post_with(PLANS, &body(&file, training), &AT_ONCE).await.json();
    let store = &service.store;
    assert_eq!(store.take_plan(&["other".into()], false, LEASE).await.unwrap(), None, "only with the model");
    let taken = store.take_plan(&["tiny".into()], false, LEASE).await.unwrap().unwrap();
    assert_eq!(taken.id.as_str(), asked["id"]);
    assert_eq!(taken.plan.training_files[0].as_str(), file);
    assert_eq!(store.take_plan(&["tiny".into()], false, LEASE).await.unwrap(), None, "it is held");

    let preview = vec![PreviewedExample { origin: "a.txt line 1".into(), tokens: 4, ..PreviewedExample::default() }];
    let summary = DataSummary {
        documents: 3,
        tokens: 6000,
        sequence_length: 2048,
        total_steps: 10,
        preview,
        ..DataSummary::default()
    };
    assert!(!store.answer_plan(&taken.id, taken.epoch + 1, Ok(&summary)).await.unwrap(), "a stale holder");
    assert!(store.answer_plan(&taken.id, taken.epoch, Ok(&summary)).await.unwrap());
    assert!(!store.answer_plan(&taken.id, taken.epoch, Ok(&summary)).await.unwrap(), "once");

    let plan = service.get(&format!("{PLANS}/{}", taken.id)).await.json();
    assert_eq!(plan["status"], "ready");
    assert_eq!(
        (&plan["data"]["tokens"], &plan["data"]["preview"][0]["origin"]),
        (&json!(6000), &json!("a.txt line 1"))
    );
    let hosts = plan["hosts"].as_array().unwrap();
    assert_eq!(hosts.len(), 2, "{plan}");
    let large = hosts.iter().find(|host| host["fits"] == true).unwrap();
    let outlook = &large["plan"];
    let (step, all) =
        (outlook["predicted_step_seconds"].as_f64().unwrap(), outlook["predicted_seconds"].as_f64().unwrap());
    assert!(step > 0.0 && (all - 10.0 * step).abs() < 1e-9 * all, "{outlook}");
    assert!(large["longest_sequence"].as_u64().unwrap() >= 2048);
    let ledger: u64 = outlook["ledger"].as_object().unwrap().values().map(|bytes| bytes.as_u64().unwrap()).sum();
    assert!(ledger > 0 && ledger <= outlook["predicted_peak_bytes"].as_u64().unwrap(), "{outlook}");
    let small = hosts.iter().find(|host| host["fits"] == false).unwrap();
    assert!(small["problem"].as_str().unwrap().contains("2048 tokens") && small["plan"].is_null(), "{small}");
    assert!(small["longest_sequence"].as_u64().unwrap() < 2048, "{small}");
}

#[tokio::test]
async fn a_plan_that_is_dropped_goes_to_another_and_not_for_ever() {
    let service = Service::new("plan-dropped").await;
    service.host(1 << 30).await;
    let file = service.upload("a.txt", b"some text").await;
    let store = &service.store;
    let tiny = ["tiny".to_owned()];
    service.post_with(PLANS, &body(&file, json!({})), &AT_ONCE).await.json();
    let first = store.take_plan(&tiny, false, Duration::ZERO).await.unwrap().unwrap();
    let second = store.take_plan(&tiny, false, Duration::ZERO).await.unwrap().unwrap();
    assert_eq!((&second.id, second.epoch), (&first.id, first.epoch + 1));
    assert!(!store.renew_plan(&first.id, first.epoch, LEASE).await.unwrap(), "the first has lost it");
    assert!(store.renew_plan(&second.id, second.epoch, Duration::ZERO).await.unwrap());
    let third = store.take_plan(&tiny, false, LEASE).await.unwrap().unwrap();
    let refusal = Invalid::with_code("invalid_training_file", "training_file", "a.txt line 7: not valid JSON");
    assert!(store.answer_plan(&third.id, third.epoch, Err(&refusal)).await.unwrap());
    let plan = service.get(&format!("{PLANS}/{}", third.id)).await.json();
    assert_eq!((&plan["status"], &plan["error"]["param"]), (&json!("failed"), &json!("training_file")));

    let asked = service.post_with(PLANS, &body(&file, json!({})), &AT_ONCE).await.json();
    for _ in 0..3 {
        assert!(store.take_plan(&tiny, false, Duration::ZERO).await.unwrap().is_some());
    }
    assert_eq!(store.take_plan(&tiny, false, Duration::ZERO).await.unwrap(), None, "three holds are enough");
    let plan = service.get(&format!("{PLANS}/{}", asked["id"].as_str().unwrap())).await.json();
    assert_eq!((&plan["status"], &plan["error"]["code"]), (&json!("failed"), &json!("server_error")), "{plan}");
}
