//! Who holds a job: claim, renew, settle, reap.
//!
//! A claim is one short statement that hands out a lease with an epoch. Whatever the holder changes afterwards carries that
//! epoch and changes nothing once it is stale; every method says so with `false` or `None`. Time is the database's. Two
//! kinds of work are claimed: reading the data of a job that is `validating_files` (its status stays), and training one
//! that is `queued` (it becomes `running`).

use std::time::Duration;

use serde_json::{Value, json};
use sqlx::{PgConnection, postgres::PgListener, types::Json};

use super::{Error, Store, results};
use crate::domain::{ExecutorId, FileId, Invalid, JobId, TrainingSpec, hub_name};

/// A job whose model no live host has is left alone this long, since its host may be restarting. Then anybody fails it.
const MODEL_PATIENCE: Duration = Duration::from_mins(5);
/// Pause before the second attempt; doubled for each further one.
const FIRST_BACK_OFF: Duration = Duration::from_secs(2);
/// Longest pause between two attempts.
const LONGEST_BACK_OFF: Duration = Duration::from_mins(5);
/// Jobs that are looked through for the next to train.
const MOST_QUEUED: i64 = 50;
/// Leases reaped by one statement.
const REAP_BATCH: i64 = 100;
/// The wish of a job that takes any device.
pub const ANY_DEVICE: &str = "any";
/// Name of the channel that the jobs table notifies.
const CHANNEL: &str = "jobs";

/// What a holder does with a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Work {
    /// Read, count and check the files of a job that is `validating_files`.
    Inspect,
    /// Train a job that was `queued`.
    Train,
}

/// What a job's holder was asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    Cancel,
    Pause,
}

/// Who claims, and what it can do.
#[derive(Debug, Clone, Copy)]
pub struct Claimant<'a> {
    pub executor: &'a ExecutorId,
    /// How long the lease lasts unless renewed.
    pub lease: Duration,
    /// Base models of this host.
    pub models: &'a [String],
    /// It would fetch a model from a hub that no host has.
    pub fetches: bool,
    /// What it has for the wishes of jobs: `cpu`, `cuda`, and [`ANY_DEVICE`] for those that
    /// [`TrainingSpec::wanted_device`] leaves open.
    pub devices: &'a [String],
    /// How many devices a job would train on.
    pub takes: u64,
    /// The one job to take, where it was chosen among [`Store::queued_jobs`].
    pub only: Option<&'a JobId>,
}

/// A job that waits for training.
#[derive(Debug, Clone, PartialEq)]
pub struct Queued {
    pub job: JobId,
    pub model: String,
    pub training: TrainingSpec,
    /// What the validation settled.
    pub sequence_length: Option<u64>,
}

/// A job, held.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    pub job: JobId,
    pub work: Work,
    /// The fencing token: every write of the holder carries it.
    pub epoch: i64,
    /// Claims since the last new checkpoint, this one counted.
    pub attempts: i32,
    pub model: String,
    /// When the job was made, in seconds since 1970.
    pub created_at: u64,
    pub training_files: Vec<FileId>,
    pub validation_files: Vec<FileId>,
    pub training: TrainingSpec,
    /// Tokens of a sequence, as the validation settled them; none before it.
    pub sequence_length: Option<u64>,
}

/// How a holder lets go of a job.
#[derive(Debug, Clone, PartialEq)]
pub enum Settlement {
    /// The data can be trained on, in sequences of so many tokens: the job queues.
    Validated { sequence_length: Option<u64> },
    /// The last checkpoint is recorded.
    Succeeded { trained_tokens: Option<u64> },
    /// It cannot be done, and trying again would not help.
    Failed { error: Invalid },
    /// This attempt failed, another may not. The most attempts without progress, and what the customer is told after them.
    Retry { most_attempts: i32, error: Invalid },
    /// Stopped as asked, or because the executor stops: the attempt does not count. A wish is granted here.
    Released,
}

/// Hints that some job may have changed. A hint can be lost: whoever waits for one polls as well.
#[derive(Debug)]
pub struct Hints(PgListener);

/// A row of `jobs` as a claim takes it.
struct Row {
    id: String,
    epoch: i64,
    attempts: i32,
    model: String,
    training_files: Vec<String>,
    validation_files: Vec<String>,
    training: Json<TrainingSpec>,
    sequence_length: Option<i64>,
    created_at: i64,
}

impl Store {
    /// Jobs that wait for training and that the claimant can do, the next first. Projects take turns: that which trains on the
    /// fewest devices is next, then that whose last turn is longest ago; its second job counts as if its first were running. Not more than somebody would look through, and
    /// without those for which an executor calls others just now.
    pub async fn queued_jobs(&self, by: &Claimant<'_>) -> Result<Vec<Queued>, Error> {
        let rows = sqlx::query!(
            r#"WITH shares AS (
                SELECT id AS project_id,
                    (SELECT sum(devices) FROM jobs WHERE project_id = p.id AND status = 'running') AS devices,
                    (SELECT max(turn_at) FROM jobs WHERE project_id = p.id) AS last_turn FROM projects p)
               SELECT id, model, training AS "training: Json<TrainingSpec>", sequence_length
               FROM jobs JOIN shares USING (project_id)
               WHERE status = 'queued' AND run_after <= now() AND model = ANY ($2) AND NOT EXISTS (
                        SELECT 1 FROM rank_calls WHERE job_id = jobs.id AND epoch IS NULL AND called_until > now())
                    AND coalesce(training ->> 'device', CASE training ->> 'precision' WHEN 'f32' THEN 'cpu' END, 'any')
                        = ANY ($1)
               ORDER BY coalesce(shares.devices, 0)
                        + row_number() OVER (PARTITION BY project_id ORDER BY rank_in_queue(jobs) DESC, seq),
                    last_turn NULLS FIRST, seq LIMIT $3"#,
            by.devices,
            by.models,
            MOST_QUEUED,
        )
        .fetch_all(&self.pool)
        .await?;
        let queued = rows.into_iter().map(|row| {
            let sequence_length = row.sequence_length.map(|tokens| tokens as u64);
            let (job, training) = (super::stored_id(&row.id)?, row.training.0);
            Ok(Queued { job, model: row.model, training, sequence_length })
        });
        queued.collect()
    }

    /// The claim with this epoch, if it stands, for a host that has taken ranks of its job.
    pub async fn called_claim(&self, job: &JobId, epoch: i64) -> Result<Option<Claim>, Error> {
        let row = sqlx::query_as!(
            Row,
            r#"SELECT id, epoch, attempts, model, training_files, validation_files,
                training AS "training: Json<TrainingSpec>", sequence_length,
                extract(epoch FROM created_at)::bigint AS "created_at!"
               FROM jobs WHERE id = $1 AND epoch = $2"#,
            job.as_str(),
            epoch,
        )
        .fetch_optional(&self.pool)
        .await?;
        row.map(|row| row.claim(Work::Train)).transpose()
    }

    /// Takes the next job of this kind that the claimant can do, if there is one. Attempts count one more.
    pub async fn claim_job(&self, work: Work, by: &Claimant<'_>) -> Result<Option<Claim>, Error> {
        let row = sqlx::query_as!(
            Row,
            r#"WITH shares AS (
                SELECT id AS project_id,
                    (SELECT sum(devices) FROM jobs WHERE project_id = p.id AND status = 'running') AS devices,
                    (SELECT max(turn_at) FROM jobs WHERE project_id = p.id) AS last_turn FROM projects p),
               next AS (
                SELECT jobs.id FROM jobs JOIN shares USING (project_id)
                WHERE status = CASE WHEN $1 THEN 'validating_files' ELSE 'queued' END::job_status
                    AND lease_owner IS NULL AND run_after <= now()
                    AND coalesce(training ->> 'device', CASE training ->> 'precision' WHEN 'f32' THEN 'cpu' END, 'any')
                        = ANY ($2)
                    AND (model = ANY ($3) OR $1 AND NOT EXISTS (
                        SELECT 1 FROM hosts WHERE seen_at > now() - make_interval(secs => $5)
                            AND models @> jsonb_build_array(jsonb_build_object('name', jobs.model)))
                        AND ($9 AND model ~ $10 OR created_at < now() - make_interval(secs => $4)))
                    AND id = coalesce($8, id)
                ORDER BY coalesce(shares.devices, 0), last_turn NULLS FIRST, rank_in_queue(jobs) DESC, seq
                LIMIT 1 FOR UPDATE OF jobs SKIP LOCKED)
               UPDATE jobs SET status = CASE WHEN $1 THEN status ELSE 'running' END, epoch = epoch + 1,
                    devices = CASE WHEN $1 THEN devices ELSE $11 END, turn_at = CASE WHEN $1 THEN turn_at ELSE now() END,
                    attempts = attempts + 1, lease_owner = $6, lease_until = now() + make_interval(secs => $7),
                    started_at = CASE WHEN $1 THEN started_at ELSE coalesce(started_at, now()) END
               FROM next WHERE jobs.id = next.id
               RETURNING jobs.id, epoch, attempts, model, training_files, validation_files,
                    training AS "training: Json<TrainingSpec>", sequence_length,
                    extract(epoch FROM created_at)::bigint AS "created_at!""#,
            work == Work::Inspect,
            by.devices,
            by.models,
            MODEL_PATIENCE.as_secs_f64(),
            super::hosts::HOST_LIFE.as_secs_f64(),
            by.executor.as_str(),
            by.lease.as_secs_f64(),
            by.only.map(JobId::as_str),
            by.fetches,
            hub_name::PATTERN,
            i32::try_from(by.takes).unwrap_or(i32::MAX),
        )
        .fetch_optional(&self.pool)
        .await?;
        row.map(|row| row.claim(work)).transpose()
    }

    /// Prolongs a lease, counted from now. `None` when it is no longer this holder's; else the wish it should grant.
    pub async fn renew_lease(&self, job: &JobId, epoch: i64, lease: Duration) -> Result<Option<Option<Wish>>, Error> {
        let wanted = sqlx::query_scalar!(
            "UPDATE jobs SET lease_until = now() + make_interval(secs => $3)
             WHERE id = $1 AND epoch = $2 AND lease_owner IS NOT NULL RETURNING wanted",
            job.as_str(),
            epoch,
            lease.as_secs_f64(),
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(wanted.map(|word| match word.as_deref() {
            Some("cancel") => Some(Wish::Cancel),
            Some("pause") => Some(Wish::Pause),
            _ => None,
        }))
    }

    /// Ends the holder's hold. False when the lease was no longer its own; then nothing changed.
    pub async fn settle_job(&self, job: &JobId, epoch: i64, settlement: &Settlement) -> Result<bool, Error> {
        let mut transaction = self.pool.begin().await?;
        let row = &mut *transaction;
        let settled = match settlement {
            Settlement::Validated { sequence_length } => settle_validated(row, job, epoch, *sequence_length).await,
            Settlement::Succeeded { trained_tokens } => settle_succeeded(row, job, epoch, *trained_tokens).await,
            Settlement::Failed { error } => settle_failed(row, job, epoch, &customer_error(error)).await,
            Settlement::Retry { most_attempts, error } => settle_retry(row, job, epoch, *most_attempts, error).await,
            Settlement::Released => settle_released(row, job, epoch).await,
        }?;
        if settled {
            results::write(&mut transaction, job).await?;
        }
        transaction.commit().await?;
        Ok(settled)
    }

    /// Takes expired leases from their holders: the jobs wait again, or end as their holder was asked to end them, or fail
    /// after so many attempts without a new checkpoint. Any number of callers may do this at once.
    pub async fn reap_leases(&self, most_attempts: i32) -> Result<u64, Error> {
        let message = "the job was interrupted this many times without reaching a new checkpoint: ";
        let mut transaction = self.pool.begin().await?;
        let reaped = sqlx::query_scalar!(
            "WITH expired AS (
                SELECT id, CASE
                    WHEN wanted = 'cancel' THEN 'cancelled'
                    WHEN wanted = 'pause' THEN 'paused'
                    WHEN attempts >= $1 THEN 'failed'
                    WHEN status = 'running' THEN 'queued'
                    ELSE status END::job_status AS next
                FROM jobs WHERE lease_until < now() ORDER BY lease_until LIMIT $2 FOR UPDATE SKIP LOCKED)
             UPDATE jobs SET status = next, epoch = epoch + 1, lease_owner = NULL, lease_until = NULL, wanted = NULL,
                estimated_finish = NULL,
                finished_at = CASE WHEN next IN ('cancelled', 'failed') THEN now() END,
                error = CASE WHEN next = 'failed' THEN jsonb_build_object(
                    'code', 'server_error', 'message', $3::text || attempts, 'param', NULL) END
             FROM expired WHERE jobs.id = expired.id RETURNING jobs.id",
            most_attempts,
            REAP_BATCH,
            message,
        )
        .fetch_all(&mut *transaction)
        .await?;
        for job in &reaped {
            results::write(&mut transaction, &super::stored_id(job)?).await?;
        }
        transaction.commit().await?;
        Ok(reaped.len() as u64)
    }

    /// Listens for hints on a connection of its own.
    pub async fn job_hints(&self) -> Result<Hints, Error> {
        let mut listener = PgListener::connect_with(&self.pool).await?;
        listener.listen(CHANNEL).await?;
        Ok(Hints(listener))
    }
}

impl Hints {
    /// Waits for a hint, or for the loss of some: both mean that it is time to look.
    pub async fn next(&mut self) -> Result<(), Error> {
        self.0.try_recv().await?;
        Ok(())
    }
}

impl Row {
    fn claim(self, work: Work) -> Result<Claim, Error> {
        let files = |ids: Vec<String>| ids.iter().map(|id| super::stored_id(id)).collect::<Result<Vec<FileId>, _>>();
        Ok(Claim {
            job: super::stored_id(&self.id)?,
            work,
            epoch: self.epoch,
            attempts: self.attempts,
            model: self.model,
            created_at: self.created_at.max(0) as u64,
            training_files: files(self.training_files)?,
            validation_files: files(self.validation_files)?,
            training: self.training.0,
            sequence_length: self.sequence_length.map(|tokens| tokens as u64),
        })
    }
}

async fn settle_validated(row: &mut PgConnection, job: &JobId, epoch: i64, tokens: Option<u64>) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE jobs SET lease_owner = NULL, lease_until = NULL, wanted = NULL, attempts = 0, sequence_length = $3,
            status = CASE wanted WHEN 'cancel' THEN 'cancelled' WHEN 'pause' THEN 'paused' ELSE 'queued' END::job_status,
            finished_at = CASE wanted WHEN 'cancel' THEN now() END
         WHERE id = $1 AND epoch = $2 AND lease_owner IS NOT NULL AND status = 'validating_files'",
        job.as_str(),
        epoch,
        tokens.map(|tokens| tokens as i64),
    );
    Ok(done.execute(row).await?.rows_affected() == 1)
}

async fn settle_succeeded(row: &mut PgConnection, job: &JobId, epoch: i64, tokens: Option<u64>) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE jobs SET lease_owner = NULL, lease_until = NULL, wanted = NULL, estimated_finish = NULL,
            status = 'succeeded', finished_at = now(), trained_tokens = coalesce($3, trained_tokens),
            fine_tuned_model = result.model_name
         FROM (SELECT model_name FROM checkpoints WHERE job_id = $1 AND last) AS result
         WHERE id = $1 AND epoch = $2 AND lease_owner IS NOT NULL AND status = 'running'",
        job.as_str(),
        epoch,
        tokens.map(|tokens| tokens as i64),
    );
    Ok(done.execute(row).await?.rows_affected() == 1)
}

async fn settle_failed(row: &mut PgConnection, job: &JobId, epoch: i64, error: &Value) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE jobs SET lease_owner = NULL, lease_until = NULL, wanted = NULL, estimated_finish = NULL,
            status = 'failed', finished_at = now(), error = $3
         WHERE id = $1 AND epoch = $2 AND lease_owner IS NOT NULL",
        job.as_str(),
        epoch,
        error,
    );
    Ok(done.execute(row).await?.rows_affected() == 1)
}

async fn settle_retry(
    row: &mut PgConnection,
    job: &JobId,
    epoch: i64,
    most: i32,
    error: &Invalid,
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "WITH held AS (
            SELECT id, CASE
                WHEN wanted = 'cancel' THEN 'cancelled'
                WHEN wanted = 'pause' THEN 'paused'
                WHEN attempts >= $3 THEN 'failed'
                WHEN status = 'running' THEN 'queued'
                ELSE status END::job_status AS next
            FROM jobs WHERE id = $1 AND epoch = $2 AND lease_owner IS NOT NULL FOR UPDATE)
         UPDATE jobs SET status = next, lease_owner = NULL, lease_until = NULL, wanted = NULL, estimated_finish = NULL,
            run_after = now() + make_interval(secs => least($5::float8, $6::float8 * 2 ^ least(attempts - 1, 30))),
            finished_at = CASE WHEN next IN ('cancelled', 'failed') THEN now() END,
            error = CASE WHEN next = 'failed' THEN $4::jsonb END
         FROM held WHERE jobs.id = held.id",
        job.as_str(),
        epoch,
        most,
        customer_error(error),
        LONGEST_BACK_OFF.as_secs_f64(),
        FIRST_BACK_OFF.as_secs_f64(),
    );
    Ok(done.execute(row).await?.rows_affected() == 1)
}

async fn settle_released(row: &mut PgConnection, job: &JobId, epoch: i64) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE jobs SET lease_owner = NULL, lease_until = NULL, wanted = NULL, estimated_finish = NULL,
            attempts = greatest(attempts - 1, 0),
            status = CASE
                WHEN wanted = 'cancel' THEN 'cancelled'
                WHEN wanted = 'pause' THEN 'paused'
                WHEN status = 'running' THEN 'queued'
                ELSE status END::job_status,
            finished_at = CASE wanted WHEN 'cancel' THEN now() END
         WHERE id = $1 AND epoch = $2 AND lease_owner IS NOT NULL",
        job.as_str(),
        epoch,
    );
    Ok(done.execute(row).await?.rows_affected() == 1)
}

/// `error` of a failed job, as the API shows it.
pub(super) fn customer_error(error: &Invalid) -> Value {
    let param = Some(&error.param).filter(|param| !param.is_empty());
    json!({ "code": error.code, "message": error.message, "param": param })
}
