//! Files: what goes in comes out, whole or in part, is listed, and goes away when nobody needs it.

use axum::http::Method;
use longhaul::domain::hex;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::{form::Form, service::Service};

/// Bytes of a little more than two rows, without a period that rows share.
fn content() -> Vec<u8> {
    (0..2_300_001u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

#[tokio::test]
async fn fields_in_any_order_make_the_same_file() {
    let service = Service::new("upload").await;
    let content = content();
    let forms = [
        Form::new().field("purpose", "fine-tune").file("book.txt", &content),
        Form::new().file("book.txt", &content).field("purpose", "fine-tune"),
        Form::new()
            .field("expires_after[anchor]", "created_at")
            .file("C:\\\\folder\\\\book.txt", &content)
            .field("expires_after[seconds]", "3600")
            .field("purpose", "fine-tune"),
    ];
    let mut ids = Vec::new();
    for (n, form) in forms.into_iter().enumerate() {
        let request = form.request();
        assert!(request.headers().get("content-length").is_none());
        let file = service.send(request).await.json();
        assert_eq!(file["object"], "file");
        assert_eq!((&file["filename"], &file["purpose"]), (&json!("book.txt"), &json!("fine-tune")));
        assert_eq!((&file["status"], &file["bytes"]), (&json!("processed"), &json!(content.len())));
        assert_eq!(file["sha256"], hex(&Sha256::digest(&content)));
        let life = file["expires_at"].as_i64().map(|end| end - file["created_at"].as_i64().unwrap());
        assert_eq!(life, (n == 2).then_some(3600));
        let id = file["id"].as_str().unwrap().to_owned();
        assert_eq!(service.get(&format!("/v1/files/{id}")).await.json(), file);
        let whole = service.get(&format!("/v1/files/{id}/content")).await;
        assert_eq!((whole.status, whole.bytes.len()), (200, content.len()));
        assert!(whole.bytes == content, "the bytes are those that were sent");
        ids.push(id);
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 3);
    assert_eq!(service.count("blob_chunks").await, 9);
}

#[tokio::test]
async fn content_comes_in_ranges() {
    let service = Service::new("ranges").await;
    let content = content();
    let id = service.upload("book.txt", &content).await;
    let path = format!("/v1/files/{id}/content");
    let tag = format!("\"{}\"", hex(&Sha256::digest(&content)));
    let all = content.len();
    for (range, expected) in [
        ("bytes=0-0", 0..1),
        ("bytes=1048575-1048576", 1_048_575..1_048_577),
        ("bytes=1000000-2200000", 1_000_000..2_200_001),
        ("bytes=2300000-", 2_300_000..all),
        ("bytes=-7", all - 7..all),
        ("bytes=5-999999999", 5..all),
    ] {
        let answer = service.ask(Method::GET, &path, &[("range", range)]).await;
        assert_eq!(answer.status, 206, "{range}");
        let shown = format!("bytes {}-{}/{all}", expected.start, expected.end - 1);
        assert_eq!(answer.header("content-range"), Some(&*shown));
        assert_eq!(answer.header("content-length"), Some(&*expected.len().to_string()));
        assert_eq!(answer.header("etag"), Some(&*tag));
        assert!(answer.bytes == content[expected], "{range}");
    }
    let outside = service.ask(Method::GET, &path, &[("range", "bytes=2300001-")]).await;
    assert_eq!(outside.error(416, "")["code"], "invalid_range");
    assert_eq!(outside.header("content-range"), Some("bytes */2300001"));

    let head = service.ask(Method::HEAD, &path, &[]).await;
    assert_eq!((head.status, head.bytes.len()), (200, 0));
    assert_eq!(head.header("content-length"), Some("2300001"));
    assert_eq!((head.header("accept-ranges"), head.header("etag")), (Some("bytes"), Some(&*tag)));

    let current = service.ask(Method::GET, &path, &[("if-none-match", &tag)]).await;
    assert_eq!((current.status, current.bytes.len()), (304, 0));
    service.ask(Method::GET, &path, &[("if-match", "\"other\"")]).await.error(412, "");
    let part = service.ask(Method::GET, &path, &[("range", "bytes=0-9"), ("if-range", &tag)]).await;
    assert_eq!((part.status, part.bytes.len()), (206, 10));
    let changed = service.ask(Method::GET, &path, &[("range", "bytes=0-9"), ("if-range", "\"other\"")]).await;
    assert_eq!((changed.status, changed.bytes.len()), (200, all));
}

#[tokio::test]
async fn lists_go_page_by_page() {
    let service = Service::new("list").await;
    let mut ids = Vec::new();
    for i in 0..5 {
        ids.push(service.upload(&format!("{i}.txt"), b"text").await);
    }
    let other = Form::new().field("purpose", "user_data").file("photo.png", b"x").request();
    ids.push(service.send(other).await.json()["id"].as_str().unwrap().to_owned());
    let newest: Vec<String> = ids.iter().rev().cloned().collect();

    let whole = service.get("/v1/files").await;
    assert_eq!(whole.ids(), newest);
    let page = whole.json();
    assert_eq!((&page["first_id"], &page["last_id"]), (&json!(newest[0]), &json!(newest[5])));
    assert_eq!(page["has_more"], false);
    assert_eq!(service.get("/v1/files?order=asc").await.ids(), ids);
    assert_eq!(service.get("/v1/files?purpose=fine-tune&limit=2").await.ids(), newest[1..3]);
    assert_eq!(service.get("/v1/files?purpose=batch").await.json()["data"], json!([]));

    let mut walked = Vec::new();
    let mut path = "/v1/files?limit=4".to_owned();
    loop {
        let page = service.get(&path).await;
        walked.extend(page.ids());
        if page.json()["has_more"] == false {
            break;
        }
        path = format!("/v1/files?limit=4&after={}", walked.last().unwrap());
    }
    assert_eq!(walked, newest);
    for (query, param) in [
        ("limit=0", "limit"),
        ("limit=10001", "limit"),
        ("limit=two", "limit"),
        ("order=up", "order"),
        ("after=file-none", "after"),
        ("after=ftjob-x", "after"),
        ("purpose=%00", "purpose"),
    ] {
        service.get(&format!("/v1/files?{query}")).await.error(400, param);
    }
}

#[tokio::test]
async fn a_file_goes_with_its_bytes_once_no_job_needs_it() {
    let service = Service::new("delete").await;
    let id = service.upload("a.txt", &content()).await;
    let body = json!({"model": "tiny", "training_file": id});
    let job: Value = service.post("/v1/fine_tuning/jobs", &body).await.json();
    let refused = service.delete(&format!("/v1/files/{id}")).await;
    let error = refused.error(409, "file_id");
    assert!(error["message"].as_str().unwrap().contains(job["id"].as_str().unwrap()));
    assert_eq!(refused.header("x-should-retry"), Some("false"));

    let cancel = format!("/v1/fine_tuning/jobs/{}/cancel", job["id"].as_str().unwrap());
    service.post(&cancel, &json!(null)).await.json();
    let gone = service.delete(&format!("/v1/files/{id}")).await.json();
    assert_eq!(gone, json!({"id": id, "object": "file", "deleted": true}));
    for path in [format!("/v1/files/{id}"), format!("/v1/files/{id}/content")] {
        service.get(&path).await.error(404, "");
    }
    service.delete(&format!("/v1/files/{id}")).await.error(404, "");
    assert_eq!((service.count("blobs").await, service.count("blob_chunks").await), (0, 0));
}
