//! Postgres rows and file contents; the only SQL of the program.
//!
//! `Store` is handed to the API and to the executor: plain methods, one file a table, each method its own short
//! transaction (none outlives its function). Knows `domain` and nothing of HTTP, devices or trainers.

use std::{path::PathBuf, time::Duration};

use sqlx::{
    PgPool,
    migrate::Migrator,
    postgres::{PgConnectOptions, PgPoolOptions},
};

pub mod blobs;
pub mod calls;
pub mod checkpoints;
pub mod events;
pub mod files;
pub mod gauges;
pub mod hosts;
pub mod jobs;
pub mod keys;
mod page;
pub mod permissions;
pub mod plans;
pub mod private;
pub mod projects;
pub mod queue;
pub mod quotas;
pub mod results;
pub mod retention;
pub mod steer;
pub mod uploads;
pub mod webhooks;
pub mod weights;

pub use page::{Listed, Order, Page};
pub use weights::Weights;

/// Longest that one statement may run; the largest is a batch of deletes.
const STATEMENT_TIMEOUT: &str = "30s";
/// Longest wait for a row lock: every holder of one is a short transaction.
const LOCK_TIMEOUT: &str = "10s";
/// A transaction left open this long by a stalled process is ended by the database, so that its locks do not stay.
const IDLE_IN_TRANSACTION_TIMEOUT: &str = "30s";
/// Longest wait for a free (or new) connection before the database counts as unavailable.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);
/// Idle connections above the first are closed after this.
const IDLE_CONNECTION: Duration = Duration::from_mins(5);

/// The schema, embedded in the binary: numbered files, applied in order, forward only.
static MIGRATOR: Migrator = sqlx::migrate!("./migrations");

/// Where rows and weights live.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `postgres://...`; a Unix socket is given as `postgres:///name?host=/folder&user=...`.
    pub database_url: String,
    /// Connections for small transactions.
    pub max_connections: u32,
    /// Connections for bytes of uploads and downloads, apart so that transfers cannot starve heartbeats.
    pub max_bulk_connections: u32,
    /// Folder of the local object store for checkpoints.
    pub weights_folder: PathBuf,
}

/// Rows in Postgres and weights in the object store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    pool: PgPool,
    bulk: PgPool,
    weights: Weights,
}

impl Store {
    /// Opens both pools (one connection is made at once, so that a wrong URL is told now) and the object store.
    pub async fn connect(settings: &Settings) -> Result<Self, Error> {
        let options: PgConnectOptions = settings.database_url.parse()?;
        let options = options.application_name("longhaul").options([
            ("statement_timeout", STATEMENT_TIMEOUT),
            ("lock_timeout", LOCK_TIMEOUT),
            ("idle_in_transaction_session_timeout", IDLE_IN_TRANSACTION_TIMEOUT),
        ]);
        let pool = |max: u32| {
            PgPoolOptions::new()
                .max_connections(max.max(1))
                .acquire_timeout(ACQUIRE_TIMEOUT)
                .idle_timeout(IDLE_CONNECTION)
        };
        Ok(Self {
            pool: pool(settings.max_connections).connect_with(options.clone()).await?,
            // Commits of upload rows need not wait for the disk: the commit that makes a file of them does, for them all.
            bulk: pool(settings.max_bulk_connections)
                .connect_lazy_with(options.options([("synchronous_commit", "off")])),
            weights: Weights::local(&settings.weights_folder)?,
        })
    }

    /// Brings the schema up to date. Concurrent callers wait for one another on an advisory lock.
    pub async fn migrate(&self) -> Result<(), Error> {
        Ok(MIGRATOR.run(&self.pool).await?)
    }

    /// One round trip to the database.
    pub async fn ping(&self) -> Result<(), Error> {
        sqlx::query_scalar!("SELECT 1").fetch_one(&self.pool).await?;
        Ok(())
    }

    /// The bytes of checkpoints.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Closes every connection; calls that wait for one fail.
    pub async fn close(&self) {
        self.pool.close().await;
        self.bulk.close().await;
    }
}

/// What can go wrong below the API. Absence is never an error: it is an `Option` in the answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A row would break a named constraint: somebody else was first, or the caller broke a rule.
    #[error("the database refused the row: {constraint}")]
    Conflict {
        /// Name of the constraint (`jobs_edge`, `files_pkey`, ...).
        constraint: String,
        /// The database's own words.
        #[source]
        source: sqlx::Error,
    },
    /// The database cannot be reached at the moment. Trying again later may help.
    #[error("the database cannot be reached")]
    Unavailable(#[source] sqlx::Error),
    /// Anything else the database said.
    #[error("the database failed")]
    Database(#[source] sqlx::Error),
    /// The schema could not be brought up to date.
    #[error("the schema could not be migrated")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// A limit of the project does not allow it.
    #[error(transparent)]
    Quota(#[from] quotas::Exceeded),
    /// The object store failed.
    #[error("the object store failed")]
    Weights(#[from] object_store::Error),
    /// A local file beside the store could not be read or written.
    #[error("a file of the store could not be read or written")]
    Io(#[from] std::io::Error),
    /// Bytes are not what their size and digest say.
    #[error("damaged: {0}")]
    Corrupt(String),
    /// A row holds what this version cannot read.
    #[error("a stored value cannot be read")]
    Stored(#[from] serde_json::Error),
}

impl Error {
    /// The name of the broken constraint, where one was broken.
    pub fn constraint(&self) -> Option<&str> {
        match self {
            Self::Conflict { constraint, .. } => Some(constraint),
            _ => None,
        }
    }
}

/// An id out of a row; the database holds only ids that we made.
fn stored_id<T: std::str::FromStr>(id: &str) -> Result<T, Error> {
    id.parse().map_err(|_| Error::Corrupt(format!("{id} is not an id of its kind")))
}

/// SQLSTATE classes of a server that is going away or has no room: 08 connection, 53 resources, 57P shutdown.
fn is_outage(code: &str) -> bool {
    code.starts_with("08") || code.starts_with("53") || code.starts_with("57P")
}

impl From<sqlx::Error> for Error {
    fn from(source: sqlx::Error) -> Self {
        use sqlx::Error as E;
        let database = source.as_database_error();
        if let Some(constraint) = database.and_then(|e| e.constraint()).map(str::to_owned) {
            return Self::Conflict { constraint, source };
        }
        let outage = database.and_then(sqlx::error::DatabaseError::code).is_some_and(|code| is_outage(&code));
        match source {
            _ if outage => Self::Unavailable(source),
            E::Io(_) | E::Tls(_) | E::PoolTimedOut | E::PoolClosed | E::WorkerCrashed => Self::Unavailable(source),
            _ => Self::Database(source),
        }
    }
}
