//! An upload in parts goes on where it was, whoever is killed between two of them.

use std::{
    fs,
    io::Cursor,
    path::Path,
    process::{Child, Command, Stdio},
};

use longhaul::{
    client::{
        http::{Client, SHORT},
        multipart,
    },
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
    let (content_type, length) = (form::content_type(), body.len() as u64);
    let mut form = multipart::Form { content_type, length, body: Box::new(Cursor::new(body)) };
    client.post_form(&path, &mut form, None).unwrap()
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

/// `longhaul upload` as a process: small parts, so that it takes a while.
fn uploading(server: &Server, file: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_longhaul"))
        .args(["upload", "--json", "--part-bytes", "65536", "--at-once", "3", "--server", &server.address])
        .arg(file)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn the_command_sends_parts_and_goes_on_after_it_and_the_server_were_killed() {
    const BYTES: u32 = 60_000_001;
    let sandbox = Sandbox::new("upload-command");
    let mut server = Server::start(&sandbox.join("server"), &["--no-executor"]);
    let file = sandbox.join("a long book.txt");
    let content: Vec<u8> = (0..BYTES).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    fs::write(&file, &content).unwrap();
    let listed = |server: &Server| server.client.get("/v1/uploads", SHORT, |_| ()).unwrap()["data"].clone();
    let parts = |server: &Server, upload: &str| {
        let path = format!("/v1/uploads/{upload}/parts?limit=1000");
        server.client.get(&path, SHORT, |_| ()).map_or(0, |page| page["data"].as_array().unwrap().len())
    };

    let mut client = uploading(&server, &file);
    let upload = until("an upload", || listed(&server)[0]["id"].as_str().map(str::to_owned));
    until("some parts", || (parts(&server, &upload) >= 5).then_some(()));
    client.kill().unwrap();
    client.wait().unwrap();
    let before = parts(&server, &upload);
    assert_eq!(listed(&server)[0]["status"], "pending", "the kill came in the middle");

    let client = uploading(&server, &file);
    until("more parts", || (parts(&server, &upload) >= before + 5).then_some(()));
    server.process.signal(Signal::KILL);
    server.process.kill();
    server = server.again();
    let ended = client.wait_with_output().unwrap();
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    let told: Value = serde_json::from_slice(&ended.stdout).unwrap();
    assert_eq!((&told["filename"], &told["bytes"]), (&"a long book.txt".into(), &BYTES.into()));
    assert_eq!(told["sha256"], hex(&Sha256::digest(&content)));
    let uploads = listed(&server);
    assert_eq!(uploads.as_array().unwrap().len(), 1, "both went on with the first: {uploads}");
    assert_eq!((&uploads[0]["status"], &uploads[0]["file"]["id"]), (&"completed".into(), &told["id"]));
    let path = format!("/v1/files/{}/content", told["id"].as_str().unwrap());
    let mut answer = server.client.open(&path, |request| request).unwrap();
    assert!(answer.body_mut().with_config().limit(u64::MAX).read_to_vec().unwrap() == content);
}
