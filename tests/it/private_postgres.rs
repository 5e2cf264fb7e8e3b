//! The private Postgres: made, adopted, killed, refused.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use longhaul::store::private::{Error, Postgres, Search, Settings};
use rustix::process::{Pid, Signal, kill_process};
use sqlx::{Connection, Executor, PgConnection, Row};

use crate::support::{Sandbox, cluster_settings};

/// Longest wait for something that is bound to happen.
const LIMIT: Duration = Duration::from_mins(1);

async fn start(settings: &Settings) -> Result<Postgres, Error> {
    let settings = settings.clone();
    tokio::task::spawn_blocking(move || Postgres::start(&settings)).await.unwrap()
}

async fn stop(postgres: Postgres) {
    tokio::task::spawn_blocking(|| postgres.stop()).await.unwrap();
}

async fn connect(postgres: &Postgres) -> PgConnection {
    let deadline = Instant::now() + LIMIT;
    loop {
        match PgConnection::connect(&postgres.url()).await {
            Ok(connection) => return connection,
            Err(error) if Instant::now() > deadline => panic!("no connection: {error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

#[tokio::test]
async fn survives_kill_and_keeps_what_was_committed() {
    let sandbox = Sandbox::new("kill");
    let postgres = start(&cluster_settings(sandbox.path())).await.unwrap();
    let mut connection = connect(&postgres).await;
    connection.execute("CREATE TABLE kept (n int); INSERT INTO kept VALUES (7)").await.unwrap();
    let settings = connection.fetch_one("SELECT current_setting('listen_addresses'), version()").await.unwrap();
    assert_eq!(settings.get::<String, _>(0), "", "nothing may listen on the network");

    let first = postgres.pid().unwrap();
    kill_process(Pid::from_raw(first).unwrap(), Signal::KILL).unwrap();
    drop(connection);
    let mut connection = loop {
        let connection = connect(&postgres).await;
        if postgres.pid().is_some_and(|pid| pid != first) {
            break connection;
        }
    };
    let kept = connection.fetch_one("SELECT n FROM kept").await.unwrap();
    assert_eq!(kept.get::<i32, _>(0), 7);
    stop(postgres).await;
    assert!(PgConnection::connect(&sandbox_url(&sandbox)).await.is_err(), "nothing runs after a stop");
}

#[tokio::test]
async fn starts_again_though_a_process_of_the_killed_one_lives_on() {
    let sandbox = Sandbox::new("orphan");
    let postgres = start(&cluster_settings(sandbox.path())).await.unwrap();
    let mut busy = connect(&postgres).await;
    let backend = busy.fetch_one("SELECT pg_backend_pid()").await.unwrap().get::<i32, _>(0);
    // It never looks up, so it does not see that its server has died.
    let looping = tokio::spawn(async move { busy.execute("DO $$ BEGIN LOOP END LOOP; END $$").await.map(drop) });
    let path = format!("/proc/{backend}/stat");
    while !fs::read_to_string(&path).unwrap().contains(") R ") {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let first = postgres.pid().unwrap();
    kill_process(Pid::from_raw(first).unwrap(), Signal::KILL).unwrap();
    let deadline = Instant::now() + LIMIT;
    while postgres.pid().is_none_or(|pid| pid == first) {
        assert!(Instant::now() < deadline, "it did not start again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    connect(&postgres).await.fetch_one("SELECT 1").await.unwrap();
    // Who has ended stays in the list of processes until somebody asks how.
    let left = fs::read_to_string(&path).unwrap_or_default();
    assert!(left.is_empty() || left.contains(") Z "), "the process of the killed one has been ended: {left}");
    assert!(looping.await.unwrap().is_err());
    stop(postgres).await;
}

fn sandbox_url(sandbox: &Sandbox) -> String {
    format!("postgres://longhaul@localhost/longhaul?host={}", sandbox.join("postgres").display())
}

#[tokio::test]
async fn adopts_a_cluster_that_a_killed_server_left() {
    let sandbox = Sandbox::new("adopt");
    let settings = cluster_settings(sandbox.path());
    let first = start(&settings).await.unwrap();
    let pid = first.pid().unwrap();
    // Dropped without a stop: what is left behind is what a killed server leaves.
    drop(first);
    let second = start(&settings).await.unwrap();
    assert_eq!(second.pid(), Some(pid));
    connect(&second).await.close().await.unwrap();
    stop(second).await;
}

#[tokio::test]
async fn one_server_a_data_folder() {
    let sandbox = Sandbox::new("lock");
    let settings = cluster_settings(sandbox.path());
    let first = start(&settings).await.unwrap();
    let refused = start(&settings).await.unwrap_err();
    assert!(matches!(refused, Error::InUse { .. }), "{refused}");
    stop(first).await;
    stop(start(&settings).await.unwrap()).await;
}

#[tokio::test]
async fn a_long_path_gets_a_short_socket() {
    let sandbox = Sandbox::new("long");
    let postgres = start(&cluster_settings(&sandbox.join("d".repeat(90)))).await.unwrap();
    connect(&postgres).await.close().await.unwrap();
    stop(postgres).await;
}

#[tokio::test]
async fn an_interrupted_making_is_made_anew() {
    let sandbox = Sandbox::new("half");
    let half = sandbox.join("postgres/cluster.new");
    fs::create_dir_all(&half).unwrap();
    fs::write(half.join("PG_VERSION"), "15").unwrap();
    let postgres = start(&cluster_settings(sandbox.path())).await.unwrap();
    connect(&postgres).await.close().await.unwrap();
    stop(postgres).await;
}

#[tokio::test]
async fn missing_binaries_are_named_with_the_way_out() {
    let sandbox = Sandbox::new("missing");
    let mut settings = cluster_settings(sandbox.path());
    settings.search = Search { folder: Some(PathBuf::from("/nowhere/bin")), path: "".into() };
    let said = start(&settings).await.unwrap_err().to_string();
    assert!(said.contains("/nowhere/bin") && said.contains("apt-get install postgresql"), "{said}");
}

#[tokio::test]
async fn another_major_version_is_refused() {
    let sandbox = Sandbox::new("version");
    fs::create_dir_all(sandbox.join("postgres/cluster")).unwrap();
    fs::write(sandbox.join("postgres/cluster/PG_VERSION"), "9\n").unwrap();
    let said = start(&cluster_settings(sandbox.path())).await.unwrap_err().to_string();
    assert!(said.contains("made by PostgreSQL 9"), "{said}");
}

#[tokio::test]
async fn as_root_a_closed_folder_is_named() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let sandbox = Sandbox::new("closed");
    let closed = sandbox.join("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    let said = start(&cluster_settings(&closed.join("data"))).await.unwrap_err().to_string();
    assert!(said.contains(closed.to_str().unwrap()) && said.contains("--data"), "{said}");
    assert!(!Path::new(&closed.join("data/postgres/cluster")).exists());
}

#[tokio::test]
async fn an_unknown_account_is_refused() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let sandbox = Sandbox::new("account");
    let mut settings = cluster_settings(sandbox.path());
    settings.account = Some("nobody-of-this-name".into());
    let said = start(&settings).await.unwrap_err().to_string();
    assert!(said.contains("nobody-of-this-name") && said.contains("--postgres-user"), "{said}");
}
