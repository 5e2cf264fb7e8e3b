//! An upload in parts goes on where it was, whoever is killed between two of them.

use std::fs;

use longhaul::{
    client::http::{Client, SHORT},
    domain::hex,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::{
    Sandbox,
    form::{self, Form},
    server::{Server, until},
};

const PART: usize = 1_300_000;

fn send(client: &Client, upload: &str, bytes: &[u8]) -> Value {
    let body = Form::part(bytes).bytes();
    let path = format!("/v1/uploads/{upload}/parts");
    client.post_stream(&path, &form::content_type(), body.len() as u64, &mut &*body).unwrap()
}

#[test]
fn what_was_accepted_of_an_upload_outlives_server_and_database() {
    let sandbox = Sandbox::new("upload");
    let arguments = ["--no-executor"];
    let mut server = Server::start(&sandbox.join("server"), &arguments);
    let content: Vec<u8> = (0..3 * PART as u32 + 17).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let body = json!({"filename": "a.txt", "purpose": "fine-tune", "bytes": content.len(), "mime_type": "text/plain"});
    let upload = server.client.post_again("/v1/uploads", &body, "unused").unwrap();
    let upload = upload["id"].as_str().unwrap().to_owned();
    let pieces: Vec<&[u8]> = content.chunks(PART).collect();

    send(&server.client, &upload, pieces[2]);
    server.process.signal(Signal::KILL);
    server.process.kill();
    server = Server::start(&sandbox.join("server"), &arguments);

    send(&server.client, &upload, pieces[0]);
    let postmaster = fs::read_to_string(find(&server.folder, "postmaster.pid")).unwrap();
    let pid: i32 = postmaster.lines().next().unwrap().parse().unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    let path = format!("/v1/uploads/{upload}/parts?order=asc");
    let listed = until("the database to be back", || server.client.get(&path, SHORT, |_| ()).ok());

    // The client knows nothing but what the server tells it: it sends what is missing.
    let known = |listed: &Value, bytes: &[u8]| {
        let digest = hex(&Sha256::digest(bytes));
        let parts = listed["data"].as_array().unwrap().iter();
        parts.filter(|part| part["sha256"] == digest).map(|part| part["id"].clone()).next()
    };
    let missing: Vec<usize> = (0..pieces.len()).filter(|n| known(&listed, pieces[*n]).is_none()).collect();
    assert_eq!(missing, [1, 3]);
    for n in missing {
        send(&server.client, &upload, pieces[n]);
    }
    let listed = server.client.get(&path, SHORT, |_| ()).unwrap();
    let ids: Vec<Value> = pieces.iter().map(|bytes| known(&listed, bytes).unwrap()).collect();
    let path = format!("/v1/uploads/{upload}/complete");
    let done = server.client.post_again(&path, &json!({"part_ids": ids}), "unused").unwrap();
    assert_eq!(done["file"]["sha256"], hex(&Sha256::digest(&content)));
    let id = done["file"]["id"].as_str().unwrap();
    let mut answer = server.client.open(&format!("/v1/files/{id}/content"), |request| request).unwrap();
    assert!(answer.body_mut().read_to_vec().unwrap() == content);
}

/// The file of that name, wherever under the folder it lies.
fn find(folder: &std::path::Path, name: &str) -> std::path::PathBuf {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_name() == name {
                return path;
            }
            if path.is_dir() {
                folders.push(path);
            }
        }
    }
    panic!("there is no {name}");
}
