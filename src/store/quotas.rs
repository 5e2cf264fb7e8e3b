//! What a project may use. Checked in the transaction that creates, under the project's row, so that two creates side by side do
//! not both take the last room.

use std::time::Duration;

use sqlx::PgConnection;

use super::{Error, Store};
use crate::domain::ProjectId;

/// Limits of a project; none is without limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Of files, and of uploads as they were promised.
    pub stored_bytes: Option<u64>,
    /// Jobs that have not ended.
    pub jobs: Option<u64>,
    /// Trained by jobs that began in the last 24 hours.
    pub tokens_per_day: Option<u64>,
    /// Trained by all jobs.
    pub tokens: Option<u64>,
}

/// A limit that a create would break.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Exceeded {
    #[error("the project may store {0} bytes, and this would be more: delete files, or have the limit raised")]
    StoredBytes(u64),
    #[error("the project may have {0} jobs that have not ended, and has them: cancel one, or wait until one ends")]
    Jobs(u64),
    #[error("the project may train {limit} tokens a day, and has: wait until jobs of a day ago no longer count")]
    TokensPerDay {
        limit: u64,
        /// Until enough of what was trained no longer counts.
        wait: Duration,
    },
    #[error("the project may train {0} tokens in all, and has: have the limit raised")]
    Tokens(u64),
}

impl Store {
    /// Sets the limits of a project.
    pub async fn set_limits(&self, project: &ProjectId, limits: &Limits) -> Result<(), Error> {
        let stored = |limit: Option<u64>| limit.map(|limit| i64::try_from(limit).unwrap_or(i64::MAX));
        sqlx::query!(
            "UPDATE projects SET max_stored_bytes = $2, max_jobs = $3, max_tokens_per_day = $4, max_tokens = $5 WHERE id = $1",
            project.as_str(),
            stored(limits.stored_bytes),
            stored(limits.jobs),
            stored(limits.tokens_per_day),
            stored(limits.tokens),
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// The limits of a project.
    pub async fn limits(&self, project: &ProjectId) -> Result<Limits, Error> {
        let mut connection = self.pool.acquire().await?;
        read(&mut connection, project).await
    }
}

/// Refuses so many bytes more where they are too many. Holds back other creates of the project until the transaction ends.
pub(super) async fn check_bytes(connection: &mut PgConnection, project: &ProjectId, more: u64) -> Result<(), Error> {
    let Some(limit) = read(connection, project).await?.stored_bytes else { return Ok(()) };
    hold(connection, project).await?;
    let stored = sqlx::query_scalar!(
        r#"SELECT (coalesce((SELECT sum(bytes) FROM files WHERE project_id = $1), 0)
            + coalesce((SELECT sum(bytes) FROM uploads
                WHERE project_id = $1 AND status = 'pending' AND expires_at > now()), 0))::bigint AS "stored!""#,
        project.as_str()
    )
    .fetch_one(connection)
    .await?;
    if (stored as u64).saturating_add(more) <= limit { Ok(()) } else { Err(Exceeded::StoredBytes(limit).into()) }
}

/// Refuses another job where there is no room for it. Holds back other creates of the project until the transaction ends.
pub(super) async fn check_job(connection: &mut PgConnection, project: &ProjectId) -> Result<(), Error> {
    let limits = read(connection, project).await?;
    if (limits.jobs, limits.tokens_per_day, limits.tokens) == (None, None, None) {
        return Ok(());
    }
    hold(connection, project).await?;
    let used = sqlx::query!(
        r#"SELECT count(*) FILTER (WHERE finished_at IS NULL) AS "open!",
            coalesce(sum(coalesce(trained_tokens, (progress ->> 'tokens_seen')::bigint)), 0)::bigint AS "tokens!"
           FROM jobs WHERE project_id = $1"#,
        project.as_str()
    )
    .fetch_one(&mut *connection)
    .await?;
    if let Some(limit) = limits.tokens.filter(|limit| used.tokens as u64 >= *limit) {
        return Err(Exceeded::Tokens(limit).into());
    }
    if let Some(limit) = limits.jobs.filter(|limit| used.open as u64 >= *limit) {
        return Err(Exceeded::Jobs(limit).into());
    }
    match limits.tokens_per_day {
        None => Ok(()),
        Some(limit) => check_day(connection, project, limit).await,
    }
}

/// The newest job from which on the day's tokens reach the limit: when it no longer counts there is room.
async fn check_day(connection: &mut PgConnection, project: &ProjectId, limit: u64) -> Result<(), Error> {
    let wait = sqlx::query_scalar!(
        r#"SELECT extract(epoch FROM started_at + interval '1 day' - now())::float8 AS "wait!" FROM (
                SELECT started_at, sum(coalesce(trained_tokens, (progress ->> 'tokens_seen')::bigint, 0))
                    OVER (ORDER BY started_at DESC, seq DESC) AS total
                FROM jobs WHERE project_id = $1 AND started_at > now() - interval '1 day') AS day
           WHERE total >= $2::bigint ORDER BY started_at DESC LIMIT 1"#,
        project.as_str(),
        i64::try_from(limit).unwrap_or(i64::MAX),
    )
    .fetch_optional(connection)
    .await?;
    match wait {
        None => Ok(()),
        Some(seconds) => Err(Exceeded::TokensPerDay { limit, wait: Duration::from_secs_f64(seconds.max(1.0)) }.into()),
    }
}

async fn read(connection: &mut PgConnection, project: &ProjectId) -> Result<Limits, Error> {
    let row = sqlx::query!(
        "SELECT max_stored_bytes, max_jobs, max_tokens_per_day, max_tokens FROM projects WHERE id = $1",
        project.as_str()
    )
    .fetch_optional(connection)
    .await?;
    let limit = |stored: Option<i64>| stored.map(|limit| limit as u64);
    Ok(row.map_or(Limits::default(), |row| Limits {
        stored_bytes: limit(row.max_stored_bytes),
        jobs: limit(row.max_jobs),
        tokens_per_day: limit(row.max_tokens_per_day),
        tokens: limit(row.max_tokens),
    }))
}

/// Keys of what is inserted beside this stay free: only creates that are counted wait for one another.
async fn hold(connection: &mut PgConnection, project: &ProjectId) -> Result<(), Error> {
    sqlx::query!("SELECT 1 AS held FROM projects WHERE id = $1 FOR NO KEY UPDATE", project.as_str())
        .fetch_optional(connection)
        .await?;
    Ok(())
}
