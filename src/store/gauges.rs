//! How much there is of everything, for who watches the service.

use super::{Error, Store};

/// Counts of this moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Gauges {
    /// Jobs by status; a status that no job has is left out.
    pub jobs: Vec<(String, i64)>,
    /// Seconds that the job has waited which has waited longest for an executor.
    pub longest_wait: f64,
    /// Jobs whose lease has run out and which nobody has taken over yet.
    pub overdue_leases: i64,
    /// Claims of the jobs at work since their last new checkpoints.
    pub attempts: i64,
    pub tokens_per_second: f64,
    pub files: i64,
    pub file_bytes: i64,
    pub checkpoints: i64,
    /// Executors that are alive, their devices, and those that nobody trains on.
    pub hosts: i64,
    pub devices: i64,
    pub free_devices: i64,
}

impl Store {
    /// Counts everything, in one look.
    pub async fn gauges(&self) -> Result<Gauges, Error> {
        let jobs =
            sqlx::query!(r#"SELECT status::text AS "status!", count(*) AS "n!" FROM jobs GROUP BY 1 ORDER BY 1"#)
                .fetch_all(&self.pool)
                .await?;
        let counts = sqlx::query!(
            r#"SELECT
                coalesce(extract(epoch FROM now() - min(greatest(created_at, run_after))
                    FILTER (WHERE status IN ('validating_files', 'queued') AND lease_owner IS NULL AND run_after <= now())),
                    0)::float8 AS "longest_wait!",
                count(*) FILTER (WHERE lease_until < now()) AS "overdue_leases!",
                coalesce(sum(attempts) FILTER (WHERE status = 'running'), 0)::bigint AS "attempts!",
                coalesce(sum((progress->>'tokens_per_second')::float8) FILTER (WHERE status = 'running'), 0)::float8
                    AS "tokens_per_second!",
                (SELECT count(*) FROM files) AS "files!",
                (SELECT coalesce(sum(bytes), 0)::bigint FROM files) AS "file_bytes!",
                (SELECT count(*) FROM checkpoints) AS "checkpoints!"
               FROM jobs"#
        )
        .fetch_one(&self.pool)
        .await?;
        let hosts = self.live_hosts().await?;
        Ok(Gauges {
            jobs: jobs.into_iter().map(|row| (row.status, row.n)).collect(),
            longest_wait: counts.longest_wait,
            overdue_leases: counts.overdue_leases,
            attempts: counts.attempts,
            tokens_per_second: counts.tokens_per_second,
            files: counts.files,
            file_bytes: counts.file_bytes,
            checkpoints: counts.checkpoints,
            hosts: hosts.len() as i64,
            devices: hosts.iter().map(|host| host.machines.len() as i64).sum(),
            free_devices: hosts.iter().map(|host| host.free.len() as i64).sum(),
        })
    }
}
