//! One private Postgres for the whole test run, and a fresh database of the current schema for each test.

use std::{
    path::Path,
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use longhaul::store::{
    self, Store,
    private::{Durability, Postgres, Search, Settings},
};
use sqlx::{Connection, Executor, PgConnection};
use tokio::sync::OnceCell;

use super::Sandbox;

const TEMPLATE: &str = "longhaul_template";

struct Cluster {
    postgres: Postgres,
    /// Never dropped: its watcher stops Postgres when the test process ends, however it ends.
    _sandbox: Sandbox,
}

/// An empty database with the current schema.
#[derive(Debug, Clone)]
pub struct Database {
    pub url: String,
}

/// Settings of a private Postgres in `folder`, with the host's binaries.
pub fn cluster_settings(folder: &Path) -> Settings {
    Settings {
        folder: folder.to_owned(),
        search: Search { folder: None, path: std::env::var_os("PATH").unwrap_or_default() },
        account: None,
        durability: Durability::Volatile,
    }
}

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| {
        let sandbox = Sandbox::new("postgres");
        let postgres = Postgres::start(&cluster_settings(sandbox.path())).unwrap();
        Cluster { postgres, _sandbox: sandbox }
    })
}

/// A fresh database, copied from a migrated template.
pub async fn database() -> Database {
    static MIGRATED: OnceCell<()> = OnceCell::const_new();
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let cluster = tokio::task::spawn_blocking(cluster).await.unwrap();
    let admin = cluster.postgres.url_of("postgres");
    MIGRATED
        .get_or_init(|| async {
            statement(&admin, format!("CREATE DATABASE {TEMPLATE}")).await;
            let sandbox = Sandbox::new("template");
            let settings = store_settings(cluster.postgres.url_of(TEMPLATE), sandbox.path());
            let store = Store::connect(&settings).await.unwrap();
            store.migrate().await.unwrap();
            store.close().await;
        })
        .await;
    let name = format!("test_{}", COUNT.fetch_add(1, Ordering::Relaxed));
    statement(&admin, format!("CREATE DATABASE {name} TEMPLATE {TEMPLATE}")).await;
    Database { url: cluster.postgres.url_of(&name) }
}

/// Settings of a store over this database, with the weights in `folder`.
pub fn store_settings(database_url: String, folder: &Path) -> store::Settings {
    store::Settings {
        database_url,
        max_connections: 5,
        max_bulk_connections: 3,
        weights_folder: folder.join("weights"),
    }
}

async fn statement(url: &str, sql: String) {
    let mut connection = PgConnection::connect(url).await.unwrap();
    connection.execute(sqlx::AssertSqlSafe(sql)).await.unwrap();
    connection.close().await.unwrap();
}

impl Database {
    /// A store over this database, with its weights in the sandbox.
    pub async fn store(&self, sandbox: &Sandbox) -> Store {
        Store::connect(&store_settings(self.url.clone(), sandbox.path())).await.unwrap()
    }

    /// A connection of the test's own, for what no method of the store does.
    pub async fn connection(&self) -> PgConnection {
        PgConnection::connect(&self.url).await.unwrap()
    }
}

#[tokio::test]
async fn each_test_has_a_database_of_its_own() {
    let (first, second) = (database().await, database().await);
    let statement = "INSERT INTO hosts (executor_id, hostname, version, machines) VALUES ('e', 'h', 'v', '[]')";
    first.connection().await.execute(statement).await.unwrap();
    second.connection().await.execute(statement).await.unwrap();
    let store = first.store(&Sandbox::new("own")).await;
    store.ping().await.unwrap();
    store.close().await;
}
