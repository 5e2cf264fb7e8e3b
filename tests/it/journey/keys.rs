//! Keys and projects from the command line, over a server that runs and over one that does not.

use longhaul::client::{Failure, http::SHORT};
use serde_json::Value;

use crate::support::{
    Sandbox,
    server::{Server, command},
};

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn keys_are_made_listed_and_revoked_whether_the_server_runs_or_not() {
    let sandbox = Sandbox::new("keys");
    let folder = sandbox.join("server");
    // Before the first start, so that no moment is open.
    let first = command(&folder, &["keys", "create", "--name", "first", "--scope", "admin"]).unwrap();
    let first = first.trim();
    let mut server = Server::start(&folder, &[]);
    let files = |server: &Server| server.client.get("/v1/files", SHORT, |_| ());
    let refusal = files(&server).unwrap_err();
    assert!(matches!(&refusal, Failure::Refused { status: 401, .. }), "{refusal}");
    server.client = server.client.clone().with_key(Some(first)).unwrap();
    files(&server).unwrap();

    // While it runs.
    let project = server.command(&["projects", "create", "team a"]).unwrap();
    assert!(server.command(&["projects", "create", "team a"]).unwrap_err().contains("already"));
    let listed = lines(&server.command(&["projects", "list"]).unwrap());
    assert_eq!((&listed[0]["name"], &listed[1]["name"]), (&"default".into(), &"team a".into()));
    assert_eq!(listed[1]["id"], project.trim());
    server.make_key(&["--project", "team a", "--scope", "read", "--expires-in-days", "2"]);
    files(&server).unwrap();
    let told = server.command(&["keys", "create", "--project", "nobody"]).unwrap_err();
    assert!(told.lines().last().unwrap().starts_with("longhaul: --project nobody: "), "{told}");

    let keys = server.command(&["keys", "list"]).unwrap();
    assert!(!keys.contains(&first[4..]), "{keys}");
    let keys = lines(&keys);
    assert_eq!((&keys[0]["name"], &keys[0]["scope"]), (&"first".into(), &"admin".into()));
    assert!(first.ends_with(keys[0]["ends_in"].as_str().unwrap()));
    let life = keys[1]["expires_at"].as_i64().unwrap() - keys[1]["created_at"].as_i64().unwrap();
    assert_eq!((&keys[1]["project"], life), (&project.trim().into(), 2 * 86_400));

    // Revoked it fails at once; a key itself is no id, and is not repeated.
    server.command(&["keys", "revoke", keys[1]["id"].as_str().unwrap()]).unwrap();
    let refusal = files(&server).unwrap_err();
    assert!(refusal.to_string().contains("revoked"), "{refusal}");
    let told = server.command(&["keys", "revoke", first]).unwrap_err();
    assert!(!told.contains(&first[10..]), "{told}");

    // With a key a server may listen beyond its host; without one it says what to do.
    drop(server);
    let open = Server::listening(&folder, "0.0.0.0:0", &[]);
    drop(open);
    let fresh = command(&sandbox.join("fresh"), &["serve", "--listen", "0.0.0.0:0", "--no-executor"]).unwrap_err();
    assert!(fresh.contains("longhaul keys create"), "{fresh}");
}
