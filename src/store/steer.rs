//! What a user may do to a job after it was made: cancel, pause, resume.
//!
//! A job that nobody holds changes at once; the holder of one that is held finds the wish with its next renewal, and grants
//! it when it lets go. Asking again for what is so already changes nothing.

use sqlx::PgConnection;

use super::{
    Error, Store,
    jobs::{Job, append_note, read, stored_status},
    results,
};
use crate::domain::{Event, JobId, JobStatus, Level};

/// What became of a wish.
#[derive(Debug, Clone, PartialEq)]
pub enum Steered {
    /// It is so, or the job's holder has been asked.
    Accepted(Box<Job>),
    /// The job had ended already, otherwise.
    Ended(JobStatus),
    /// The job is about to be cancelled.
    Cancelling,
    Absent,
}

/// A job's row, locked.
struct Locked {
    status: JobStatus,
    wanted: Option<String>,
    held: bool,
}

impl Store {
    /// Cancels a job.
    pub async fn cancel_job(&self, id: &JobId) -> Result<Steered, Error> {
        let mut transaction = self.pool.begin().await?;
        let Some(job) = lock(&mut transaction, id).await? else { return Ok(Steered::Absent) };
        match job.status {
            JobStatus::Cancelled => {}
            JobStatus::Succeeded | JobStatus::Failed => return Ok(Steered::Ended(job.status)),
            _ if !job.held => {
                sqlx::query!(
                    "UPDATE jobs SET status = 'cancelled', finished_at = now(), wanted = NULL, estimated_finish = NULL
                     WHERE id = $1",
                    id.as_str()
                )
                .execute(&mut *transaction)
                .await?;
                results::write(&mut transaction, id).await?;
            }
            _ if job.wanted.as_deref() == Some("cancel") => {}
            _ => {
                let note = "Cancellation requested; the job stops after its current step";
                wish(&mut transaction, id, Some("cancel"), note).await?;
            }
        }
        let job = read(&mut transaction, id).await?;
        transaction.commit().await?;
        Ok(Steered::Accepted(Box::new(job)))
    }

    /// Pauses a job. Its checkpoints stay, and a trainer writes one before it stops.
    pub async fn pause_job(&self, id: &JobId) -> Result<Steered, Error> {
        let mut transaction = self.pool.begin().await?;
        let Some(job) = lock(&mut transaction, id).await? else { return Ok(Steered::Absent) };
        match job.status {
            status if status.is_terminal() => return Ok(Steered::Ended(status)),
            JobStatus::Paused => {}
            _ if !job.held => {
                sqlx::query!("UPDATE jobs SET status = 'paused', estimated_finish = NULL WHERE id = $1", id.as_str())
                    .execute(&mut *transaction)
                    .await?;
            }
            _ if job.wanted.as_deref() == Some("cancel") => return Ok(Steered::Cancelling),
            _ if job.wanted.is_some() => {}
            _ => {
                let note = "Pause requested; the job stops after its current step and keeps a checkpoint";
                wish(&mut transaction, id, Some("pause"), note).await?;
            }
        }
        let job = read(&mut transaction, id).await?;
        transaction.commit().await?;
        Ok(Steered::Accepted(Box::new(job)))
    }

    /// Lets a paused job go on where it was: in validation, or in the queue and from its last checkpoint. A pause that was
    /// only asked for is taken back.
    pub async fn resume_job(&self, id: &JobId) -> Result<Steered, Error> {
        let mut transaction = self.pool.begin().await?;
        let Some(job) = lock(&mut transaction, id).await? else { return Ok(Steered::Absent) };
        match job.status {
            status if status.is_terminal() => return Ok(Steered::Ended(status)),
            JobStatus::Paused => {
                sqlx::query!(
                    "UPDATE jobs SET run_after = now(), status = CASE
                        WHEN started_at IS NULL AND sequence_length IS NULL THEN 'validating_files'
                        ELSE 'queued' END::job_status
                     WHERE id = $1",
                    id.as_str()
                )
                .execute(&mut *transaction)
                .await?;
            }
            _ if job.wanted.as_deref() == Some("cancel") => return Ok(Steered::Cancelling),
            _ if job.wanted.as_deref() == Some("pause") => {
                wish(&mut transaction, id, None, "The pause was taken back; the job goes on").await?;
            }
            _ => {}
        }
        let job = read(&mut transaction, id).await?;
        transaction.commit().await?;
        Ok(Steered::Accepted(Box::new(job)))
    }
}

async fn lock(connection: &mut PgConnection, id: &JobId) -> Result<Option<Locked>, Error> {
    let found = sqlx::query!(
        r#"SELECT status::text AS "status!", wanted, lease_owner IS NOT NULL AS "held!"
           FROM jobs WHERE id = $1 FOR UPDATE"#,
        id.as_str()
    )
    .fetch_optional(connection)
    .await?;
    let locked =
        found.map(|row| Ok(Locked { status: stored_status(&row.status)?, wanted: row.wanted, held: row.held }));
    locked.transpose()
}

async fn wish(connection: &mut PgConnection, id: &JobId, wanted: Option<&str>, note: &str) -> Result<(), Error> {
    sqlx::query!("UPDATE jobs SET wanted = $2 WHERE id = $1", id.as_str(), wanted).execute(&mut *connection).await?;
    append_note(connection, id, &Event::message(Level::Info, note)).await
}
