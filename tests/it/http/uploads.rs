//! Uploads in parts: any order, any size, the same file; what is wrong is refused by name, what is dropped leaves nothing.

use axum::http::{HeaderValue, Method};
use longhaul::{api::upload::MAX_PART_BYTES, domain::hex, store::files::ORPHAN_AGE};
use md5::Md5;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use sqlx::Executor;

use crate::support::{
    form::Form,
    service::{Answer, Service},
};

const UPLOADS: &str = "/v1/uploads";

fn content(bytes: usize) -> Vec<u8> {
    (0..bytes as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

async fn begin(service: &Service, bytes: usize) -> String {
    let body = json!({"filename": "book.txt", "purpose": "fine-tune", "bytes": bytes, "mime_type": "text/plain"});
    let upload = service.post(UPLOADS, &body).await.json();
    assert_eq!((&upload["object"], &upload["status"]), (&json!("upload"), &json!("pending")));
    assert_eq!((&upload["bytes"], &upload["file"]), (&json!(bytes), &Value::Null));
    assert_eq!(upload["expires_at"].as_i64().unwrap() - upload["created_at"].as_i64().unwrap(), 3600);
    upload["id"].as_str().unwrap().to_owned()
}

async fn send(service: &Service, upload: &str, bytes: &[u8]) -> Answer {
    service.send(Form::part(bytes).request_to(&format!("{UPLOADS}/{upload}/parts"))).await
}

async fn part(service: &Service, upload: &str, bytes: &[u8]) -> String {
    let part = send(service, upload, bytes).await.json();
    assert_eq!((&part["object"], &part["upload_id"]), (&json!("upload.part"), &json!(upload)));
    assert_eq!((&part["bytes"], &part["sha256"]), (&json!(bytes.len()), &json!(hex(&Sha256::digest(bytes)))));
    part["id"].as_str().unwrap().to_owned()
}

async fn complete(service: &Service, upload: &str, body: Value) -> Answer {
    service.post(&format!("{UPLOADS}/{upload}/complete"), &body).await
}

#[tokio::test]
async fn parts_in_any_order_become_one_file() {
    let service = Service::new("parts").await;
    let content = content(3_500_000);
    let upload = begin(&service, content.len()).await;
    // Cut where no row of the store ends; a byte alone, and a part that is sent twice.
    let cuts = [0, 1_600_000, 1_600_001, 2_300_000, content.len()];
    let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &content[cut[0]..cut[1]]).collect();
    let (last, second) = tokio::join!(part(&service, &upload, pieces[3]), part(&service, &upload, pieces[1]));
    let unused = part(&service, &upload, pieces[0]).await;
    let (first, third) = tokio::join!(part(&service, &upload, pieces[0]), part(&service, &upload, pieces[2]));
    let stored = service.count("blobs").await;
    assert_eq!(stored, 5);

    // What a client needs that lost its own record.
    let listed = service.get(&format!("{UPLOADS}/{upload}/parts?limit=3&order=asc")).await;
    assert_eq!((listed.ids().len(), &listed.json()["has_more"]), (3, &json!(true)));
    let rest = service.get(&format!("{UPLOADS}/{upload}/parts?order=asc&after={}", listed.ids()[2])).await;
    let mut seen = [listed.ids(), rest.ids()].concat();
    let mut all = vec![last.clone(), second.clone(), unused, first.clone(), third.clone()];
    seen.sort();
    all.sort();
    assert_eq!(seen, all);
    assert_eq!(service.get(UPLOADS).await.ids(), std::slice::from_ref(&upload));

    let ids = json!([first, second, third, last]);
    let md5 = hex(&Md5::digest(&content)).to_uppercase();
    let done = complete(&service, &upload, json!({"part_ids": ids, "md5": md5})).await.json();
    assert_eq!(done["status"], "completed");
    let file = &done["file"];
    assert_eq!((&file["object"], &file["purpose"]), (&json!("file"), &json!("fine-tune")));
    assert_eq!((&file["filename"], &file["bytes"]), (&json!("book.txt"), &json!(content.len())));
    assert_eq!(file["sha256"], hex(&Sha256::digest(&content)));
    assert_eq!(service.count("blobs").await, 4, "the part that was not named is gone");

    // A client that lost the answer asks again; one that means something else is told.
    assert_eq!(complete(&service, &upload, json!({"part_ids": ids})).await.json(), done);
    assert_eq!(service.get(&format!("{UPLOADS}/{upload}")).await.json(), done);
    let other = complete(&service, &upload, json!({"part_ids": [first]})).await;
    assert_eq!(other.error(409, "upload_id")["code"], "upload_ended");
    assert_eq!(other.header("x-should-retry"), Some("false"));
    send(&service, &upload, b"more").await.error(409, "upload_id");

    let id = file["id"].as_str().unwrap();
    let path = format!("/v1/files/{id}/content");
    assert!(service.get(&path).await.bytes == content, "the parts in their order");
    for range in [0..10, 1_599_999..1_600_002, 1_600_000..1_600_001, 1_000_000..3_499_999, 2_300_000..2_300_001] {
        let header = format!("bytes={}-{}", range.start, range.end - 1);
        let answer = service.ask(Method::GET, &path, &[("range", &header)]).await;
        assert_eq!(answer.status, 206);
        assert!(answer.bytes == content[range], "{header}");
    }
    // As an executor fetches it, checked against its digest.
    let stored = service.store.file(&id.parse().unwrap()).await.unwrap().unwrap();
    let copy = service.sandbox.join("copy");
    service.store.copy_file(&stored, &copy).await.unwrap();
    assert!(std::fs::read(copy).unwrap() == content);
    assert_eq!(service.store.sweep_files(std::time::Duration::ZERO).await.unwrap(), 0, "nothing of a file is swept");

    service.delete(&format!("/v1/files/{id}")).await.json();
    assert_eq!((service.count("blobs").await, service.count("blob_chunks").await), (0, 0));
    let after = service.get(&format!("{UPLOADS}/{upload}")).await.json();
    assert_eq!((&after["status"], &after["file"]), (&json!("completed"), &Value::Null));
}

#[tokio::test]
async fn completing_twice_at_once_makes_one_file() {
    let service = Service::new("twice").await;
    let content = content(2_000_000);
    let upload = begin(&service, content.len()).await;
    let ids = json!([part(&service, &upload, &content[..7]).await, part(&service, &upload, &content[7..]).await]);
    let body = json!({"part_ids": ids});
    let (one, two) = tokio::join!(complete(&service, &upload, body.clone()), complete(&service, &upload, body.clone()));
    assert_eq!(one.json(), two.json());
    assert_eq!((service.count("files").await, service.count("blobs").await), (1, 2));
}

#[tokio::test]
async fn what_does_not_make_the_file_is_refused_by_name() {
    let service = Service::new("incomplete").await;
    let content = content(1000);
    let upload = begin(&service, content.len()).await;
    let (a, b) = (part(&service, &upload, &content[..400]).await, part(&service, &upload, &content[400..]).await);
    let other = begin(&service, 400).await;
    let foreign = part(&service, &other, &content[..400]).await;
    let md5 = hex(&Md5::digest(&content));
    for (body, code, param) in [
        (json!({}), "missing_required_parameter", "part_ids"),
        (json!({"part_ids": []}), "missing_required_parameter", "part_ids"),
        (json!({"part_ids": a}), "invalid_value", "part_ids"),
        (json!({"part_ids": [a, 7]}), "part_not_found", "part_ids[1]"),
        (json!({"part_ids": [a, "part_none"]}), "part_not_found", "part_ids[1]"),
        (json!({"part_ids": [foreign, b]}), "part_not_found", "part_ids[0]"),
        (json!({"part_ids": [a, a]}), "invalid_value", "part_ids[1]"),
        (json!({"part_ids": [a]}), "wrong_size", "part_ids"),
        (json!({"part_ids": [b, a], "md5": md5}), "checksum_mismatch", "md5"),
        (json!({"part_ids": [a, b], "md5": "x".repeat(32)}), "invalid_value", "md5"),
        (json!({"part_ids": [a, b], "md5": "ab"}), "invalid_value", "md5"),
        (json!({"part_ids": [a, b], "parts": 2}), "unknown_parameter", "parts"),
    ] {
        assert_eq!(complete(&service, &upload, body.clone()).await.error(400, param)["code"], code, "{body}");
    }
    assert_eq!(service.count("files").await, 0);
    complete(&service, &upload, json!({"part_ids": [a, b], "md5": md5})).await.json();
    complete(&service, "upload_none", json!({"part_ids": [a]})).await.error(404, "");
    service.get(&format!("{UPLOADS}/upload_none/parts")).await.error(404, "");
    send(&service, "upload_none", b"x").await.error(404, "");
}

#[tokio::test]
async fn an_upload_is_checked_when_it_begins() {
    let service = Service::new("begin").await;
    let good = json!({"filename": "a.txt", "purpose": "fine-tune", "bytes": 5, "mime_type": "text/plain"});
    for (field, value, status, param) in [
        ("filename", Value::Null, 400, "filename"),
        ("filename", json!("a\nb.txt"), 400, "filename"),
        ("filename", json!("a.exe"), 400, "filename"),
        ("purpose", Value::Null, 400, "purpose"),
        ("purpose", json!("training"), 400, "purpose"),
        ("bytes", Value::Null, 400, "bytes"),
        ("bytes", json!(0), 400, "bytes"),
        ("bytes", json!(1.5), 400, "bytes"),
        ("bytes", json!(65u64 << 30), 413, "bytes"),
        ("mime_type", Value::Null, 400, "mime_type"),
        ("expires_after", json!({"anchor": "now", "seconds": 3600}), 400, "expires_after.anchor"),
        ("expires_after", json!({"anchor": "created_at", "seconds": 3599}), 400, "expires_after.seconds"),
        ("parts", json!(3), 400, "parts"),
    ] {
        let mut body = good.clone();
        body[field] = value;
        service.post(UPLOADS, &body).await.error(status, param);
    }
    let mut body = good.clone();
    body["expires_after"] = json!({"anchor": "created_at", "seconds": 7200});
    let upload = service.post(UPLOADS, &body).await.json()["id"].as_str().unwrap().to_owned();
    let id = part(&service, &upload, b"hello").await;
    let file = complete(&service, &upload, json!({"part_ids": [id]})).await.json()["file"].clone();
    assert_eq!(file["expires_at"].as_i64().unwrap() - file["created_at"].as_i64().unwrap(), 7200);
}

#[tokio::test]
async fn a_part_is_checked_and_a_refused_one_leaves_nothing() {
    let service = Service::new("part").await;
    let upload = begin(&service, 10).await;
    let path = format!("{UPLOADS}/{upload}/parts");
    for (form, code, param) in [
        (Form::new(), "missing_required_parameter", "data"),
        (Form::part(b""), "invalid_value", "data"),
        (Form::new().content("file", "a", b"x"), "unknown_parameter", "file"),
        (Form::part(b"x").field("purpose", "batch"), "too_many_fields", "data"),
    ] {
        assert_eq!(service.send(form.request_to(&path)).await.error(400, param)["code"], code);
    }
    service.post(&path, &json!({"data": "x"})).await.error(400, "body");
    let with = async |digest: &str| {
        let mut request = Form::part(b"hello").request_to(&path);
        request.headers_mut().insert("x-content-sha256", HeaderValue::from_str(digest).unwrap());
        service.send(request).await
    };
    with("nonsense").await.error(400, "x-content-sha256");
    let wrong = with(&hex(&Sha256::digest(b"hallo"))).await;
    assert_eq!(wrong.error(400, "x-content-sha256")["code"], "checksum_mismatch");
    assert_eq!((service.count("blobs").await, service.count("upload_parts").await), (0, 0));
    with(&hex(&Sha256::digest(b"hello")).to_uppercase()).await.json();
    assert_eq!(service.count("upload_parts").await, 1);
}

#[tokio::test]
async fn the_largest_part_of_stock_clients_passes_and_no_larger_one() {
    let service = Service::new("large").await;
    let content = content(MAX_PART_BYTES as usize + 1);
    let upload = begin(&service, content.len() - 1).await;
    let refused = send(&service, &upload, &content).await;
    assert_eq!(refused.error(413, "data")["code"], "too_large");
    let id = part(&service, &upload, &content[..content.len() - 1]).await;
    // Twice the size and one part is all that an upload holds.
    for _ in 0..2 {
        part(&service, &upload, &content[..content.len() - 1]).await;
    }
    assert_eq!(send(&service, &upload, b"x").await.error(409, "data")["code"], "upload_full");
    complete(&service, &upload, json!({"part_ids": [id]})).await.json();
    assert_eq!(service.count("blob_chunks").await, 64);
}

#[tokio::test]
async fn cancelled_and_expired_uploads_leave_no_bytes() {
    let service = Service::new("ended").await;
    let upload = begin(&service, 10).await;
    let id = part(&service, &upload, b"hello").await;
    let cancel = format!("{UPLOADS}/{upload}/cancel");
    let ended = service.post(&cancel, &Value::Null).await.json();
    assert_eq!(ended["status"], "cancelled");
    assert_eq!(service.ask(Method::POST, &cancel, &[("content-type", "application/json")]).await.json(), ended);
    assert_eq!((service.count("blobs").await, service.count("blob_chunks").await), (0, 0));
    send(&service, &upload, b"hello").await.error(409, "upload_id");
    complete(&service, &upload, json!({"part_ids": [id]})).await.error(409, "upload_id");

    let upload = begin(&service, 10).await;
    let id = part(&service, &upload, b"hello").await;
    // Blobs of pending uploads are no orphans, however old.
    assert_eq!(service.store.sweep_files(std::time::Duration::ZERO).await.unwrap(), 0);
    assert_eq!(service.store.sweep_uploads().await.unwrap(), 0);
    let age = "UPDATE uploads SET expires_at = now() - interval '1 second' WHERE status = 'pending'";
    service.database.connection().await.execute(age).await.unwrap();
    assert_eq!(service.get(&format!("{UPLOADS}/{upload}")).await.json()["status"], "expired");
    send(&service, &upload, b"more").await.error(409, "upload_id");
    complete(&service, &upload, json!({"part_ids": [id]})).await.error(409, "upload_id");
    assert_eq!(service.store.sweep_uploads().await.unwrap(), 1);
    assert_eq!(service.get(&format!("{UPLOADS}/{upload}")).await.json()["status"], "expired");
    assert_eq!((service.count("blobs").await, service.count("upload_parts").await), (0, 0));
    service.post(&format!("{UPLOADS}/{upload}/cancel"), &Value::Null).await.error(409, "upload_id");
    let forget = "UPDATE uploads SET expires_at = now() - interval '31 days'";
    service.database.connection().await.execute(forget).await.unwrap();
    service.store.sweep_uploads().await.unwrap();
    service.store.sweep_files(ORPHAN_AGE).await.unwrap();
    assert_eq!(service.count("uploads").await, 0);
}
