//! Uploads that cannot be used: the field at fault is named, and nothing stays of them.

use std::time::{Duration, Instant};

use axum::{
    body::Body,
    http::{Request, header},
};
use longhaul::api::Settings;

use crate::support::{
    form::{Form, upload},
    service::Service,
};

/// Longest wait for rows that a task of its own deletes.
const LIMIT: Duration = Duration::from_secs(20);

/// Waits until nothing is left of any upload.
async fn nothing_stays(service: &Service) {
    let begun = Instant::now();
    while service.count("blobs").await + service.count("blob_chunks").await > 0 {
        assert!(begun.elapsed() < LIMIT, "rows of a refused upload stay");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(service.count("files").await, 0);
}

#[tokio::test]
async fn every_bad_form_is_told_by_its_field() {
    let service = Service::new("refused").await;
    let text: &[u8] = b"text";
    let form = Form::new;
    let long = "n".repeat(300) + ".txt";
    for (what, form, param) in [
        ("nothing", form(), "purpose"),
        ("no file", form().field("purpose", "fine-tune"), "file"),
        ("no purpose", form().file("a.txt", text), "purpose"),
        ("no such purpose", form().field("purpose", "fun").file("a.txt", text), "purpose"),
        ("no such purpose, late", form().file("a.txt", text).field("purpose", "fun"), "purpose"),
        ("endless purpose", form().field("purpose", &"p".repeat(5000)), "purpose"),
        ("empty file", form().field("purpose", "fine-tune").file("a.txt", b""), "file"),
        ("a format that is no text", form().field("purpose", "fine-tune").file("a.pdf", text), "file"),
        ("the same, late", form().file("a.pdf", text).field("purpose", "fine-tune"), "file"),
        ("no name", form().field("purpose", "fine-tune").file("folder/", text), "file"),
        ("a long name", form().field("purpose", "fine-tune").file(&long, text), "file"),
        ("two files", form().file("a.txt", text).file("b.txt", text).field("purpose", "fine-tune"), "file"),
        ("two purposes", form().field("purpose", "batch").field("purpose", "batch").file("a.txt", text), "purpose"),
        ("unknown field", form().field("colour", "red").field("purpose", "batch").file("a.txt", text), "colour"),
        ("short life", Form::training("a.txt", text).field("expires_after[seconds]", "3599"), "expires_after[seconds]"),
        ("no number", Form::training("a.txt", text).field("expires_after[seconds]", "1h"), "expires_after[seconds]"),
        ("other anchor", Form::training("a.txt", text).field("expires_after[anchor]", "now"), "expires_after[anchor]"),
    ] {
        let answer = service.send(form.request()).await;
        assert_eq!(answer.status, 400, "{what}");
        answer.error(400, param);
    }
    nothing_stays(&service).await;
}

#[tokio::test]
async fn a_body_that_is_no_form_is_refused() {
    let service = Service::new("no-form").await;
    let json = Request::post("/v1/files").header(header::CONTENT_TYPE, "application/json").body("{}".into()).unwrap();
    assert_eq!(service.send(json).await.error(400, "body")["code"], "invalid_multipart");
    let bare = Request::post("/v1/files").body(Body::empty()).unwrap();
    service.send(bare).await.error(400, "body");
    service.send(upload("this is no multipart body".into())).await.error(400, "body");
    let mut cut = Form::training("a.txt", &vec![b'x'; 100_000]).bytes();
    cut.truncate(90_000);
    service.send(upload(cut.into())).await.error(400, "body");
    let mut many = Form::new();
    for _ in 0..20 {
        many = many.field("expires_after[seconds]", "3600");
    }
    assert_eq!(service.send(many.request()).await.error(400, "")["code"], "too_many_fields");
    nothing_stays(&service).await;
}

#[tokio::test]
async fn a_file_over_the_limit_is_refused_while_it_comes() {
    let service = Service::with("large", Settings { max_upload_bytes: 3 << 20, ..Settings::default() }).await;
    let fits = vec![b'a'; 3 << 20];
    let id = service.upload("a.txt", &fits).await;
    service.delete(&format!("/v1/files/{id}")).await.json();
    for form in [Form::training("a.txt", &[&*fits, b"b"].concat()), Form::new().file("a.txt", &vec![b'a'; 9 << 20])] {
        let answer = service.send(form.request()).await;
        let error = answer.error(413, "file");
        assert!(error["message"].as_str().unwrap().contains("3145728"), "{error}");
        assert_eq!(answer.header("x-should-retry"), Some("false"));
    }
    nothing_stays(&service).await;
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_nothing() {
    let service = Service::new("broken").await;
    let content = vec![b'a'; 5 << 20];
    service.send(Form::training("a.txt", &content).broken_off()).await.error(400, "body");
    service.send(Form::new().file("a.txt", &content).broken_off()).await.error(400, "body");
    nothing_stays(&service).await;
}

#[tokio::test]
async fn an_upload_whose_connection_is_dropped_leaves_nothing() {
    let service = Service::new("dropped").await;
    let (sender, chunks) = tokio::sync::mpsc::channel::<Result<Vec<u8>, std::io::Error>>(1);
    let body = futures_util::stream::unfold(chunks, async |mut chunks| Some((chunks.recv().await?, chunks)));
    let router = service.router.clone();
    let serving =
        tokio::spawn(async move { tower::ServiceExt::oneshot(router, upload(Body::from_stream(body))).await });
    let mut head = Form::training("a.txt", &vec![b'a'; 3 << 20]).bytes();
    head.truncate(3 << 20);
    sender.send(Ok(head)).await.unwrap();
    let begun = Instant::now();
    while service.count("blob_chunks").await < 2 {
        assert!(begun.elapsed() < LIMIT, "the first rows are written before the rest comes");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // What a server does with a request whose connection is gone.
    serving.abort();
    nothing_stays(&service).await;
}
