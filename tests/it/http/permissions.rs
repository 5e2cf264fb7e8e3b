//! Permissions of checkpoints: made, listed, taken back, gone with the checkpoint.

use serde_json::json;

use super::checkpoints::finished;
use crate::support::service::Service;

#[tokio::test]
async fn permissions_are_kept_until_they_are_taken_back() {
    let service = Service::new("permissions").await;
    let (job, _) = finished(&service).await;
    let model = service.get(&format!("/v1/fine_tuning/jobs/{job}")).await.json()["fine_tuned_model"].clone();
    let model = model.as_str().unwrap();
    let path = format!("/v1/fine_tuning/checkpoints/{model}/permissions");
    let made = service.post(&path, &json!({"project_ids": ["proj_a", "proj_b", "proj_a"]})).await;
    let page = made.json();
    assert_eq!((made.ids().len(), &page["has_more"]), (2, &json!(false)));
    assert_eq!((&page["first_id"], &page["last_id"]), (&json!(made.ids()[0]), &json!(made.ids()[1])));
    assert_eq!(page["data"][0]["object"], "checkpoint.permission");
    assert!(made.ids()[0].starts_with("cp_"));
    let again = service.post(&path, &json!({"project_ids": ["proj_b", "proj_c"]})).await.json();
    let of = |page: &serde_json::Value, project: &str| {
        page["data"].as_array().unwrap().iter().find(|row| row["project_id"] == project).map(|row| row["id"].clone())
    };
    assert_eq!(of(&again, "proj_b"), of(&page, "proj_b"), "it had one");

    let newest = service.get(&path).await.ids();
    assert_eq!(newest.len(), 3);
    let mut oldest = newest.clone();
    oldest.reverse();
    assert_eq!(service.get(&format!("{path}?order=ascending")).await.ids(), oldest);
    assert_eq!(service.get(&format!("{path}?order=descending&limit=1&after={}", newest[0])).await.ids(), newest[1..2]);
    let one = service.get(&format!("{path}?project_id=proj_a")).await.json();
    assert_eq!(one["data"][0]["project_id"], "proj_a");
    service.get(&format!("{path}?after=cp_none")).await.error(400, "after");

    let gone = service.delete(&format!("{path}/{}", newest[0])).await.json();
    assert_eq!(gone, json!({"id": newest[0], "object": "checkpoint.permission", "deleted": true}));
    service.delete(&format!("{path}/{}", newest[0])).await.error(404, "");
    for (body, param) in [
        (json!({}), "project_ids"),
        (json!({"project_ids": []}), "project_ids"),
        (json!({"project_ids": ["a", 1]}), "project_ids[1]"),
        (json!({"project_ids": [""]}), "project_ids[0]"),
        (json!({"projects": ["a"]}), "projects"),
    ] {
        service.post(&path, &body).await.error(400, param);
    }
    service
        .post("/v1/fine_tuning/checkpoints/ft:none/permissions", &json!({"project_ids": ["a"]}))
        .await
        .error(404, "");
    service.delete(&format!("/v1/models/{model}")).await.json();
    service.get(&path).await.error(404, "");
    assert_eq!(service.count("checkpoint_permissions").await, 0);
}
