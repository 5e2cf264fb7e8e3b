//! Calls of one host for ranks on others, where a job takes more devices than one has.
//!
//! A leader calls before it claims the job: [`Store::call_ranks`], [`Store::take_call`] on the other side, then the claim and
//! [`Store::begin_calls`]. From then on a call holds as long as the claim does. Time is the database's.

use std::time::Duration;

use serde_json::Value;
use sqlx::types::Json;

use super::{Error, Store};
use crate::domain::{ExecutorId, JobId, run::Part};

/// A host that is asked for ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct NewCall {
    pub host: ExecutorId,
    pub part: Part,
}

/// A call as the host sees it that is asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    pub id: i64,
    pub job: JobId,
    pub part: Part,
}

/// What the leader has told so far.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Told {
    /// The job is claimed, under this epoch.
    pub epoch: Option<i64>,
    /// Rank 0 listens.
    pub address: Option<String>,
}

/// A call as its leader sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub host: ExecutorId,
    pub taken: bool,
    /// It was taken, and is renewed no more.
    pub lapsed: bool,
    pub ready: bool,
    /// A trainer's report.
    pub ended: Option<Value>,
}

impl Store {
    /// Asks these hosts for ranks of a job that is queued, for so long. False when another executor has the job or calls for it.
    pub async fn call_ranks(
        &self,
        job: &JobId,
        leader: &ExecutorId,
        calls: &[NewCall],
        patience: Duration,
    ) -> Result<bool, Error> {
        let mut transaction = self.pool.begin().await?;
        let queued = sqlx::query_scalar!(
            "SELECT id FROM jobs WHERE id = $1 AND status = 'queued' AND lease_owner IS NULL FOR UPDATE",
            job.as_str(),
        )
        .fetch_optional(&mut *transaction)
        .await?;
        // Calls of earlier attempts hold no more: the job is queued.
        sqlx::query!(
            "DELETE FROM rank_calls WHERE job_id = $1 AND (epoch IS NOT NULL OR called_until <= now())",
            job.as_str(),
        )
        .execute(&mut *transaction)
        .await?;
        let called = sqlx::query_scalar!("SELECT id FROM rank_calls WHERE job_id = $1 LIMIT 1", job.as_str())
            .fetch_optional(&mut *transaction)
            .await?;
        if queued.is_none() || called.is_some() {
            return Ok(false);
        }
        for NewCall { host, part } in calls {
            sqlx::query!(
                "INSERT INTO rank_calls (job_id, leader, host, part, called_until)
                 VALUES ($1, $2, $3, $4, now() + make_interval(secs => $5))",
                job.as_str(),
                leader.as_str(),
                host.as_str(),
                Json(part) as _,
                patience.as_secs_f64(),
            )
            .execute(&mut *transaction)
            .await?;
        }
        transaction.commit().await?;
        Ok(true)
    }

    /// The oldest open call to this host.
    pub async fn next_call(&self, host: &ExecutorId) -> Result<Option<Call>, Error> {
        let row = sqlx::query!(
            r#"SELECT id, job_id, part AS "part: Json<Part>" FROM rank_calls
               WHERE host = $1 AND taken_until IS NULL AND epoch IS NULL AND called_until > now() ORDER BY id LIMIT 1"#,
            host.as_str(),
        )
        .fetch_optional(&self.pool)
        .await?;
        row.map(|row| Ok(Call { id: row.id, job: super::stored_id(&row.job_id)?, part: row.part.0 })).transpose()
    }

    /// Takes a call under a lease. False when it is open no more.
    pub async fn take_call(&self, id: i64, lease: Duration) -> Result<bool, Error> {
        let done = sqlx::query!(
            "UPDATE rank_calls SET taken_until = now() + make_interval(secs => $2)
             WHERE id = $1 AND taken_until IS NULL AND epoch IS NULL AND called_until > now()",
            id,
            lease.as_secs_f64(),
        );
        Ok(done.execute(&self.pool).await?.rows_affected() == 1)
    }

    /// Prolongs the lease of a call, counted from now. `None` once it holds no more; else what the leader has told.
    pub async fn renew_call(&self, id: i64, lease: Duration) -> Result<Option<Told>, Error> {
        let told = sqlx::query_as!(
            Told,
            "UPDATE rank_calls SET taken_until = now() + make_interval(secs => $2) FROM jobs
             WHERE rank_calls.id = $1 AND jobs.id = job_id AND taken_until > now()
                AND (rank_calls.epoch IS NULL AND called_until > now()
                    OR rank_calls.epoch = jobs.epoch AND lease_owner = leader)
             RETURNING rank_calls.epoch, address",
            id,
            lease.as_secs_f64(),
        );
        Ok(told.fetch_optional(&self.pool).await?)
    }

    /// The host has everything that its ranks need.
    pub async fn ready_call(&self, id: i64) -> Result<(), Error> {
        sqlx::query!("UPDATE rank_calls SET ready = true WHERE id = $1", id).execute(&self.pool).await?;
        Ok(())
    }

    /// How the host's ranks ended. Its lease ends with it.
    pub async fn end_call(&self, id: i64, ended: &Value) -> Result<(), Error> {
        sqlx::query!("UPDATE rank_calls SET ended = $2 WHERE id = $1", id, ended).execute(&self.pool).await?;
        Ok(())
    }

    /// The calls of a leader for a job.
    pub async fn answers(&self, job: &JobId, leader: &ExecutorId) -> Result<Vec<Answer>, Error> {
        let rows = sqlx::query!(
            r#"SELECT host, taken_until IS NOT NULL AS "taken!", coalesce(taken_until <= now(), false) AS "lapsed!", ready, ended
               FROM rank_calls WHERE job_id = $1 AND leader = $2 ORDER BY id"#,
            job.as_str(),
            leader.as_str(),
        )
        .fetch_all(&self.pool)
        .await?;
        let answers = rows.into_iter().map(|row| {
            let (host, lapsed) = (super::stored_id(&row.host)?, row.lapsed && row.ended.is_none());
            Ok(Answer { host, taken: row.taken, lapsed, ready: row.ready, ended: row.ended })
        });
        answers.collect()
    }

    /// The job is claimed: from here on its calls hold as long as this claim.
    pub async fn begin_calls(&self, job: &JobId, leader: &ExecutorId, epoch: i64) -> Result<(), Error> {
        sqlx::query!(
            "UPDATE rank_calls SET epoch = $3 WHERE job_id = $1 AND leader = $2",
            job.as_str(),
            leader.as_str(),
            epoch,
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Tells the called hosts where rank 0 listens. False when the epoch is stale.
    pub async fn tell_meeting(&self, job: &JobId, epoch: i64, address: &str) -> Result<bool, Error> {
        let done = sqlx::query!(
            "UPDATE rank_calls SET address = $3 FROM jobs
             WHERE job_id = $1 AND jobs.id = job_id AND rank_calls.epoch = $2 AND jobs.epoch = $2",
            job.as_str(),
            epoch,
            address,
        );
        Ok(done.execute(&self.pool).await?.rows_affected() > 0)
    }

    /// Takes a leader's calls for a job back.
    pub async fn drop_calls(&self, job: &JobId, leader: &ExecutorId) -> Result<(), Error> {
        sqlx::query!("DELETE FROM rank_calls WHERE job_id = $1 AND leader = $2", job.as_str(), leader.as_str())
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}
