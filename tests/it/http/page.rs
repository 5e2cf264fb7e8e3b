//! The page at `/`: its files, what a browser may do with them, and that they name nothing that is not there.

use std::{collections::BTreeSet, fs};

use axum::http::Method;

use crate::support::{service::Service, tree};

/// What stands between quotes after each of these.
fn named(text: &str, before: &str) -> Vec<String> {
    text.split(before).skip(1).filter_map(|rest| rest.split('"').next()).map(str::to_owned).collect()
}

#[tokio::test]
async fn the_page_and_all_that_it_names_is_served_with_a_strict_policy() {
    let service = Service::new("page").await;
    let index = service.get("/").await;
    assert_eq!((index.status, index.header("content-type")), (200, Some("text/html; charset=utf-8")));
    let html = String::from_utf8(index.bytes.to_vec()).unwrap();
    assert!(!html.contains("<style") && !html.contains(" style=") && !html.contains(" onclick"), "nothing inline");
    let mut wanted: Vec<String> = ["src=\"", "href=\"page/"]
        .iter()
        .flat_map(|before| named(&html, before))
        .map(|name| name.trim_start_matches("page/").to_owned())
        .collect();
    let mut seen = BTreeSet::new();
    while let Some(name) = wanted.pop() {
        if !seen.insert(name.clone()) {
            continue;
        }
        let asset = service.get(&format!("/page/{name}")).await;
        let kind = match name.rsplit('.').next() {
            Some("js") => "text/javascript; charset=utf-8",
            Some("css") => "text/css; charset=utf-8",
            _ => "image/svg+xml",
        };
        assert_eq!((asset.status, asset.header("content-type")), (200, Some(kind)), "{name}");
        let policy = asset.header("content-security-policy").unwrap();
        assert!(policy.starts_with("default-src 'none'; script-src 'self';") && !policy.contains("unsafe"), "{policy}");
        assert_eq!(asset.header("x-content-type-options"), Some("nosniff"));
        let text = String::from_utf8(asset.bytes.to_vec()).unwrap();
        wanted.extend(named(&text, "from \"./"));
    }
    // No file lies in the folder that nothing leads to.
    let folder = tree().join("src/api/page");
    let there = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let there: BTreeSet<String> = there.filter(|name| name != "index.html").collect();
    assert_eq!(seen, there);
}

#[tokio::test]
async fn a_browser_keeps_the_page_until_it_changes() {
    let service = Service::new("page-cache").await;
    for path in ["/", "/page/app.js"] {
        let first = service.get(path).await;
        let tag = first.header("etag").unwrap();
        assert_eq!(first.header("cache-control"), Some("no-cache"));
        for known in [tag, &format!("\"other\", W/{tag}")] {
            let again = service.ask(Method::GET, path, &[("if-none-match", known)]).await;
            assert_eq!((again.status, again.bytes.len()), (304, 0), "{known}");
            assert_eq!(again.header("etag"), Some(tag));
        }
        assert_eq!(service.ask(Method::GET, path, &[("if-none-match", "\"other\"")]).await.status, 200);
        let head = service.ask(Method::HEAD, path, &[]).await;
        assert_eq!((head.status, head.bytes.len()), (200, 0));
    }
    let absent = service.get("/page/../Cargo.toml").await;
    assert_eq!(absent.status, 404);
    let absent = service.get("/page/no%2Fsuch").await;
    let envelope: serde_json::Value = serde_json::from_slice(&absent.bytes).unwrap();
    assert_eq!((absent.status, &envelope["error"]["code"]), (404, &"not_found".into()));
}
