//! The database that a server uses: the one that is named, or the private one of its data folder.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use tokio::runtime::Runtime;

use crate::{
    config,
    store::{
        self, Store,
        private::{self, Durability, Postgres, Search},
    },
};

/// Connections of a command that asks a few questions.
const CONNECTIONS: u32 = 2;

/// Why the database could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the private Postgres: {0}")]
    Postgres(#[from] private::Error),
    #[error("the database: {}", one_line(.0))]
    Store(#[from] store::Error),
    #[error("the system refused: {0}")]
    System(#[from] std::io::Error),
}

/// An error with its causes.
pub(super) fn one_line(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let text = causes.map(ToString::to_string).collect::<Vec<_>>().join(": ");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Trainers and Postgres work in folders of their own, so no path may hang on the current one.
pub(super) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// A database, and the private Postgres that this process keeps running for it.
pub(super) struct Held {
    url: String,
    postgres: Option<Postgres>,
}

impl Held {
    /// The named database, or the private one of this data folder, which then is this process' alone. `path` is where Postgres'
    /// programs are looked for first.
    pub(super) fn open(args: &config::Database, data: &Path, path: OsString) -> Result<Self, Error> {
        if let Some(url) = &args.database_url {
            return Ok(Self { url: url.clone(), postgres: None });
        }
        let settings = private::Settings {
            folder: absolute(data),
            search: Search { folder: args.postgres_bin.clone(), path },
            account: args.postgres_user.clone(),
            durability: Durability::Durable,
        };
        let postgres = Postgres::start(&settings)?;
        Ok(Self { url: postgres.url(), postgres: Some(postgres) })
    }

    /// The same, or the private one as a server that runs holds it.
    fn open_or_join(args: &config::Database, data: &Path, path: OsString) -> Result<Self, Error> {
        match Self::open(args, data, path) {
            Err(Error::Postgres(private::Error::InUse { .. })) => {
                Ok(Self { url: Postgres::url_in(&absolute(data)), postgres: None })
            }
            opened => opened,
        }
    }

    pub(super) fn url(&self) -> String {
        self.url.clone()
    }

    pub(super) fn close(self) {
        if let Some(postgres) = self.postgres {
            postgres.stop();
        }
    }
}

/// Does something with a server's store, whether the server runs or not. The schema is brought up to date first.
pub(super) fn with_store<T, E: From<Error>>(
    database: &config::Database,
    data: &Path,
    path: OsString,
    work: impl AsyncFnOnce(Store) -> Result<T, E>,
) -> Result<T, E> {
    std::fs::create_dir_all(data).map_err(Error::from)?;
    let runtime = Runtime::new().map_err(Error::from)?;
    let held = Held::open_or_join(database, data, path)?;
    let done = runtime.block_on(async {
        let settings = store::Settings {
            database_url: held.url(),
            max_connections: CONNECTIONS,
            max_bulk_connections: CONNECTIONS,
            weights_folder: absolute(&data.join("weights")),
        };
        let store = Store::connect(&settings).await.map_err(Error::from)?;
        store.migrate().await.map_err(Error::from)?;
        let done = work(store.clone()).await;
        store.close().await;
        done
    });
    held.close();
    done
}
