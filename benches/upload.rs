//! How fast an upload goes into the database over HTTP, beside a bare loop of inserts of the same bytes, and what it costs
//! the server's memory.
//!
//! `cargo bench --bench upload [-- --mib N]`. A private Postgres with full durability, the API in a process of its own on
//! loopback, one connection that sends a form. The bare loop inserts rows of 1 MiB on one connection of this process, once
//! with each commit on disk before the next insert and once without that wait, as the server does until the last commit.
#![expect(clippy::unwrap_used, reason = "a measurement that cannot be made ends, and says where")]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::Instant,
};

use longhaul::{
    api,
    store::{
        self, Store,
        private::{Durability, Postgres, Search, Settings},
    },
};
use sqlx::{Connection, Executor, PgConnection};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

const MIB: usize = 1 << 20;
/// Different blocks of text; the stream walks through them.
const BLOCKS: usize = 64;
const BOUNDARY: &str = "boundary-of-the-upload-bench";
/// First argument of the process that serves.
const SERVE: &str = "serve-for-the-bench";
/// What must be reached.
const TARGET_RATIO: f64 = 0.60;
const TARGET_GROWTH_MIB: f64 = 64.0;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == SERVE) {
        return serve(&arguments[1], Path::new(&arguments[2]));
    }
    // Cargo adds --bench.
    let mib =
        arguments.iter().position(|argument| argument == "--mib").map_or(4096, |at| arguments[at + 1].parse().unwrap());
    let folder = std::env::temp_dir().join(format!("longhaul-bench-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let postgres = Postgres::start(&Settings {
        folder: folder.clone(),
        search: Search { folder: None, path: std::env::var_os("PATH").unwrap_or_default() },
        account: None,
        durability: Durability::Durable,
    })
    .unwrap();
    let blocks = text();
    let upload = upload(&postgres.url(), &folder, &blocks, mib);
    let (waiting, free) = (bare(&postgres.url(), &blocks, mib, "on"), bare(&postgres.url(), &blocks, mib, "off"));
    postgres.stop();
    fs::remove_dir_all(&folder).unwrap();

    let mut out = std::io::stdout();
    let ratio = upload.rate / waiting.max(free);
    writeln!(out, "upload over HTTP        {:8.1} MiB/s  ({mib} MiB)", upload.rate).unwrap();
    writeln!(out, "bare inserts, synced    {waiting:8.1} MiB/s").unwrap();
    writeln!(out, "bare inserts, unsynced  {free:8.1} MiB/s").unwrap();
    writeln!(out, "upload / faster bare    {ratio:8.2}        (target >= {TARGET_RATIO})").unwrap();
    let (growth, before) = (upload.growth, upload.before);
    writeln!(out, "server memory           {growth:+8.1} MiB    from {before:.1} (target < {TARGET_GROWTH_MIB})")
        .unwrap();
    let met = ratio >= TARGET_RATIO && growth < TARGET_GROWTH_MIB;
    writeln!(out, "{}", if met { "met" } else { "MISSED" }).unwrap();
}

/// The process that serves: tells its port on standard output, ends when its standard input does.
fn serve(database_url: &str, folder: &Path) {
    let settings = store::Settings {
        database_url: database_url.to_owned(),
        max_connections: 10,
        max_bulk_connections: 6,
        weights_folder: folder.join("weights"),
    };
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let store = Store::connect(&settings).await.unwrap();
        store.migrate().await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut out = std::io::stdout();
        writeln!(out, "{}", listener.local_addr().unwrap()).unwrap();
        out.flush().unwrap();
        let stop = CancellationToken::new();
        let ended = stop.clone();
        std::thread::spawn(move || {
            let _ = std::io::stdin().read(&mut [0]);
            ended.cancel();
        });
        api::serve(listener, store, api::Settings::default(), stop).await.unwrap();
    });
}

struct Uploaded {
    rate: f64,
    /// MiB of the server's process before, and by how much it grew at most.
    before: f64,
    growth: f64,
}

fn upload(database_url: &str, folder: &Path, blocks: &[Vec<u8>], mib: usize) -> Uploaded {
    let program = std::env::current_exe().unwrap();
    let mut server = Command::new(program)
        .args([SERVE, database_url])
        .arg(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut address = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut address).unwrap();
    let address = address.trim();
    // One small upload first: what a server that has worked at all needs is no growth.
    send(address, blocks, 1);
    let before = memory(&server, "VmRSS:");
    let begun = Instant::now();
    send(address, blocks, mib);
    let rate = mib as f64 / begun.elapsed().as_secs_f64();
    let growth = memory(&server, "VmHWM:") - before;
    drop(server.stdin.take());
    server.wait().unwrap();
    Uploaded { rate, before, growth }
}

/// Sends one form and waits for the file.
fn send(address: &str, blocks: &[Vec<u8>], mib: usize) {
    let head = format!(
        "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n--{BOUNDARY}\r\n\
         Content-Disposition: form-data; name=\"file\"; filename=\"corpus.txt\"\r\n\r\n"
    );
    let tail = format!("\r\n--{BOUNDARY}--\r\n");
    let length = head.len() + mib * MIB + tail.len();
    let mut server = TcpStream::connect(address).unwrap();
    write!(
        server,
        "POST /v1/files HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}\r\n\
         Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n{head}"
    )
    .unwrap();
    for n in 0..mib {
        server.write_all(&blocks[n % blocks.len()]).unwrap();
    }
    server.write_all(tail.as_bytes()).unwrap();
    let mut answer = String::new();
    server.read_to_string(&mut answer).unwrap();
    let whole = format!("\"bytes\":{}", mib * MIB);
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(&whole), "{answer}");
}

/// Inserts the same bytes with nothing around them; MiB/s.
fn bare(database_url: &str, blocks: &[Vec<u8>], mib: usize, synchronous_commit: &str) -> f64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut connection = PgConnection::connect(database_url).await.unwrap();
        let set = format!(
            "SET synchronous_commit = {synchronous_commit}; DROP TABLE IF EXISTS bare;
             CREATE TABLE bare (blob text, seq bigint, data bytea, PRIMARY KEY (blob, seq));
             ALTER TABLE bare ALTER COLUMN data SET STORAGE EXTERNAL"
        );
        connection.execute(sqlx::AssertSqlSafe(set)).await.unwrap();
        let begun = Instant::now();
        for n in 0..mib {
            sqlx::query("INSERT INTO bare VALUES ('blob', $1, $2)")
                .bind(n as i64)
                .bind(&*blocks[n % blocks.len()])
                .execute(&mut connection)
                .await
                .unwrap();
        }
        let rate = mib as f64 / begun.elapsed().as_secs_f64();
        connection.execute("DROP TABLE bare; CHECKPOINT").await.unwrap();
        rate
    })
}

/// A line of the process's status, in MiB.
fn memory(process: &Child, line: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let value = status.lines().find_map(|l| l.strip_prefix(line)).unwrap();
    value.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
}

/// Blocks of words in sentences; no two blocks alike.
fn text() -> Vec<Vec<u8>> {
    const WORDS: [&str; 16] = [
        "the", "sea", "was", "calm", "and", "ships", "went", "slowly", "over", "a", "long", "haul", "of", "water",
        "towards", "morning",
    ];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut block = || {
        let mut out = Vec::with_capacity(MIB + 16);
        while out.len() < MIB {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            out.extend(WORDS[(state % 16) as usize].as_bytes());
            out.extend(if state >> 60 == 0 { ".\n" } else { " " }.as_bytes());
        }
        out.truncate(MIB);
        out
    };
    (0..BLOCKS).map(|_| block()).collect()
}
