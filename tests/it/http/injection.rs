//! Paths and headers that mean something else than they seem to: none of them gets past the key.

use axum::{
    body::Body,
    http::{HeaderValue, Method, Request},
};
use longhaul::{
    api::{self, Settings},
    domain::{ProjectId, Scope},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_util::sync::CancellationToken;

use crate::support::service::Service;

#[tokio::test]
async fn no_path_leads_around_the_key() {
    let service = Service::new("paths").await;
    let file = service.upload("secret.txt", b"the content of a file").await;
    let other = service.project("other").await;
    let key = service.key(&other, Scope::Admin).await;
    let long = format!("/v1/files/{}", "a".repeat(60_000));
    let mut paths = vec![
        "/v1/../healthz".to_owned(),
        "/healthz/../v1/files".to_owned(),
        "/healthz/..%2fv1/files".to_owned(),
        "/healthz%2f..%2fv1%2ffiles".to_owned(),
        "/healthz/".to_owned(),
        "/healthz;/v1/files".to_owned(),
        "/healthz%00".to_owned(),
        "//v1/files".to_owned(),
        "/V1/files".to_owned(),
        "/v1%2Ffiles".to_owned(),
        "/%76%31/files".to_owned(),
        "/hf/../v1/files".to_owned(),
        long,
    ];
    for odd in
        ["", "/", "%2f", "%2F..%2F", "/..", "%00", "%0d%0aSet-Cookie:%20a=b", "%ff", ";a", "/content", "/content/"]
    {
        paths.push(format!("/v1/files/{file}{odd}"));
        paths.push(format!("/v1/files/..%2f{file}{odd}"));
        paths.push(format!("/v1/files/./{file}{odd}"));
        paths.push(format!("/v1/fine_tuning/checkpoints/x/permissions/../../../../files/{file}{odd}"));
        paths.push(format!("/hf/longhaul/x-{file}/resolve/main/..%2f..%2f..%2f{file}{odd}"));
    }
    for path in paths {
        for method in [Method::GET, Method::HEAD, Method::DELETE, Method::OPTIONS, Method::POST] {
            let what = format!("{method} {}", &path[..path.len().min(100)]);
            let shut = service.ask(method.clone(), &path, &[]).await;
            assert_eq!(shut.status, 401, "{what}");
            let open = service.ask_as(&key, method.clone(), &path).await;
            // There may be a route that such a path names; the file of the other project is behind none.
            assert!([400, 404, 405].contains(&open.status) || path == "//v1/files", "{what}: {}", open.status);
            for answer in [&shut, &open] {
                let text = String::from_utf8_lossy(&answer.bytes);
                assert!(!text.contains("the content of a file") && answer.header("set-cookie").is_none(), "{what}");
            }
        }
    }
    assert_eq!(service.count("files").await, 1);
}

#[tokio::test]
async fn no_header_stands_for_a_key() {
    let service = Service::new("headers").await;
    let key = service.key(&ProjectId::default_project(), Scope::Read).await;
    let with = async |headers: &[(&str, &[u8])]| {
        let mut request = Request::get("/v1/files");
        for (name, value) in headers {
            request = request.header(*name, HeaderValue::from_bytes(value).unwrap());
        }
        service.send(request.body(Body::empty()).unwrap()).await
    };
    let bearer = format!("Bearer {key}");
    for right in [bearer.clone(), format!("bearer {key}"), format!("BEARER  {key} ")] {
        assert_eq!(with(&[("authorization", right.as_bytes())]).await.status, 200, "{right}");
    }
    let overlong = format!("{bearer}{}", "a".repeat(100_000));
    let wrong: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b"Bearer".to_vec(),
        b"Bearer ".to_vec(),
        key.clone().into_bytes(),
        format!("Basic {key}").into_bytes(),
        format!("Bearer{key}").into_bytes(),
        format!("Bearer {key},{bearer}").into_bytes(),
        format!("Bearer {key} x").into_bytes(),
        format!("Bearer {}", key.to_lowercase()).into_bytes(),
        [bearer.as_bytes(), b"\xff"].concat(),
        format!("Bearer {}", "' OR '1'='1").into_bytes(),
        overlong.into_bytes(),
    ];
    for value in &wrong {
        with(&[("authorization", value)]).await.error(401, "");
    }
    // Two of them: a proxy and this server might take different ones.
    with(&[("authorization", bearer.as_bytes()), ("authorization", b"Bearer other")]).await.error(401, "");
    with(&[("authorization", b"Bearer other"), ("authorization", bearer.as_bytes())]).await.error(401, "");
    for (name, value) in [
        ("x-original-url", "/healthz"),
        ("x-rewrite-url", "/healthz"),
        ("x-forwarded-for", "127.0.0.1"),
        ("x-http-method-override", "OPTIONS"),
        ("openai-organization", "proj_default"),
        ("openai-project", "proj_default"),
        ("x-api-key", key.as_str()),
        ("cookie", bearer.as_str()),
    ] {
        with(&[(name, value.as_bytes())]).await.error(401, "");
    }
}

/// Bytes that no client of HTTP would send, past any library on the way.
#[tokio::test]
async fn raw_requests_do_not_smuggle_a_key() {
    let service = Service::new("raw").await;
    let key = service.key(&ProjectId::default_project(), Scope::Read).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
    tokio::spawn(api::serve(listener, service.store.clone(), Settings::default(), stop.clone()));
    let sent = async |request: String| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // A server that has refused may close before it has read everything.
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    };
    let rest = "Host: x\r\nConnection: close\r\n";
    let right = sent(format!("GET /v1/files HTTP/1.1\r\n{rest}Authorization: Bearer {key}\r\n\r\n")).await;
    assert!(right.starts_with("HTTP/1.1 200"), "{right}");
    for request in [
        format!("GET /v1/files HTTP/1.1\r\n{rest}Authorization: Bearer\r\n {key}\r\n\r\n"),
        format!("GET /v1/files HTTP/1.1\r\n{rest}Authorization: Bearer {key}\0\r\n\r\n"),
        format!("GET /v1/files HTTP/1.1\r\n{rest}Authorization : Bearer {key}\r\n\r\n"),
        format!("GET /v1/files HTTP/1.1\r\n{rest}X-A: b\rAuthorization: Bearer {key}\r\n\r\n"),
        format!("GET /v1/files?x=\r\nAuthorization: Bearer {key} HTTP/1.1\r\n{rest}\r\n"),
        format!("GET /v1/files\0 HTTP/1.1\r\n{rest}\r\n"),
        format!("GET http://x/healthz/../v1/files HTTP/1.1\r\n{rest}\r\n"),
        format!("GET /v1/files HTTP/1.1\r\n{rest}\r\nAuthorization: Bearer {key}\r\n\r\n"),
    ] {
        let answer = sent(request.clone()).await;
        let status = answer.split(' ').nth(1).unwrap_or_default();
        assert!(["400", "401", "404"].contains(&status) || answer.is_empty(), "{request:?}: {answer}");
        assert!(!answer.contains("\"data\""), "{request:?}: {answer}");
    }
    stop.cancel();
}
