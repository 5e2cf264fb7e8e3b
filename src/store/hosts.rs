//! What the executors have: each publishes its host's machines and models, the API reads those seen lately.

use std::time::Duration;

use sqlx::types::Json;

use super::{Error, Store};
use crate::domain::{BaseModel, ExecutorId, Machine};

/// A host not seen for this long counts as gone; executors publish several times within it.
pub const HOST_LIFE: Duration = Duration::from_mins(1);

/// One executor and its host. Times are Unix seconds.
#[derive(Debug, Clone, PartialEq)]
pub struct Host {
    pub executor: ExecutorId,
    pub hostname: String,
    pub version: String,
    /// One for each GPU, one for the CPU.
    pub machines: Vec<Machine>,
    /// Places in `machines` of those that nobody trains on.
    pub free: Vec<usize>,
    /// What its model folder and its cache of hub models hold.
    pub models: Vec<BaseModel>,
    /// It fetches models from a hub that no host has.
    pub fetches: bool,
    pub started_at: i64,
    pub seen_at: i64,
}

/// What an executor publishes.
#[derive(Debug, Clone)]
pub struct NewHost<'a> {
    pub executor: &'a ExecutorId,
    pub hostname: &'a str,
    pub machines: &'a [Machine],
    pub free: &'a [usize],
    pub models: &'a [BaseModel],
    pub fetches: bool,
}

impl Store {
    /// Publishes a host, or shows that it is still there.
    pub async fn publish_host(&self, host: &NewHost<'_>) -> Result<(), Error> {
        sqlx::query!(
            "INSERT INTO hosts (executor_id, hostname, version, machines, models, free, fetches)
             VALUES ($1, $2, $3, $4, $5, $6, $7)
             ON CONFLICT (executor_id) DO UPDATE SET hostname = EXCLUDED.hostname, version = EXCLUDED.version,
                machines = EXCLUDED.machines, models = EXCLUDED.models, free = EXCLUDED.free, fetches = EXCLUDED.fetches,
                seen_at = now()",
            host.executor.as_str(),
            host.hostname,
            env!("CARGO_PKG_VERSION"),
            Json(host.machines) as _,
            Json(host.models) as _,
            Json(host.free) as _,
            host.fetches,
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Takes a host off the list: its executor is stopping.
    pub async fn withdraw_host(&self, executor: &ExecutorId) -> Result<(), Error> {
        sqlx::query!("DELETE FROM hosts WHERE executor_id = $1", executor.as_str()).execute(&self.pool).await?;
        Ok(())
    }

    /// Hosts seen within [`HOST_LIFE`].
    pub async fn live_hosts(&self) -> Result<Vec<Host>, Error> {
        let rows = sqlx::query!(
            r#"SELECT executor_id, hostname, version, machines AS "machines: Json<Vec<Machine>>",
                models AS "models: Json<Vec<BaseModel>>", free AS "free: Json<Vec<usize>>", fetches,
                extract(epoch FROM started_at)::bigint AS "started_at!",
                extract(epoch FROM seen_at)::bigint AS "seen_at!"
               FROM hosts WHERE seen_at > now() - make_interval(secs => $1) ORDER BY started_at, executor_id"#,
            HOST_LIFE.as_secs_f64()
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter()
            .map(|row| {
                Ok(Host {
                    executor: super::stored_id(&row.executor_id)?,
                    hostname: row.hostname,
                    version: row.version,
                    machines: row.machines.0,
                    free: row.free.0,
                    models: row.models.0,
                    fetches: row.fetches,
                    started_at: row.started_at,
                    seen_at: row.seen_at,
                })
            })
            .collect()
    }
}
