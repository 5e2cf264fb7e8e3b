//! Fine-tuned models go with their weights, once no job goes on from them; base models belong to their hosts.

use longhaul::store::queue::Settlement;
use serde_json::{Value, json};

use super::checkpoints::finished;
use crate::support::{
    rows::{self, LONG},
    service::Service,
};

fn encoded(model: &str) -> String {
    format!("/v1/models/{}", model.replace('/', "%2F"))
}

#[tokio::test]
async fn a_fine_tuned_model_goes_with_its_weights() {
    let service = Service::new("delete-model").await;
    let (job, ids) = finished(&service).await;
    let list = format!("/v1/fine_tuning/jobs/{job}/checkpoints");
    let models: Vec<String> = service.get(&list).await.json()["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|checkpoint| checkpoint["fine_tuned_model_checkpoint"].as_str().unwrap().to_owned())
        .collect();
    assert!(models[0].starts_with("ft:tiny:"), "{models:?}");
    let there =
        async |n: usize| service.store.weights().read(&ids[n], "model.safetensors", 0..7).await.unwrap().is_some();
    assert!(there(0).await && there(1).await);

    let gone = service.delete(&encoded(&models[0])).await.json();
    assert_eq!(gone, json!({"id": models[0], "object": "model", "deleted": true}));
    assert!(!there(1).await, "the bytes go with the model");
    assert!(there(0).await, "and no others");
    service.get(&encoded(&models[0])).await.error(404, "");
    service.delete(&encoded(&models[0])).await.error(404, "");
    assert_eq!(service.get(&list).await.ids(), [ids[0].as_str()]);
    service.get(&format!("{list}/{}/files", ids[1])).await.error(404, "");
    let told = service.get(&format!("/v1/fine_tuning/jobs/{job}")).await.json();
    assert_eq!((&told["status"], &told["fine_tuned_model"]), (&json!("succeeded"), &json!(models[0])));
    service.delete(&encoded(&models[1])).await.json();
    assert_eq!(service.count("checkpoint_files").await, 0);
}

#[tokio::test]
async fn what_a_job_goes_on_from_stays_until_its_end() {
    let service = Service::new("keep-model").await;
    let store = &service.store;
    let held = rows::running(store, LONG).await;
    rows::checkpoint(store, &service.sandbox, &held, 2, false, &[("model.safetensors", b"weights")]).await;
    let list = format!("/v1/fine_tuning/jobs/{}/checkpoints", held.job);
    let model = service.get(&list).await.json()["data"][0]["fine_tuned_model_checkpoint"].clone();
    let path = encoded(model.as_str().unwrap());
    let refused = service.delete(&path).await;
    assert_eq!(refused.error(409, "model")["code"], "model_in_use");
    assert_eq!(refused.header("x-should-retry"), Some("false"));
    service.post(&format!("/v1/fine_tuning/jobs/{}/cancel", held.job), &Value::Null).await.json();
    service.delete(&path).await.error(409, "model");
    assert!(store.settle_job(&held.job, held.epoch, &Settlement::Released).await.unwrap());
    service.delete(&path).await.json();

    service.host(1 << 30).await;
    assert_eq!(service.delete("/v1/models/tiny").await.error(400, "model")["code"], "base_model");
    service.delete("/v1/models/none").await.error(404, "");
    service.delete("/v1/models/%00").await.error(404, "");
}
