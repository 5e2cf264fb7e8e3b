//! A job's story: events with gap-free numbers, and one row of numbers per optimizer step.
//!
//! Everything here is one statement under the job's row lock. A writer that holds the job gives its lease's epoch, and
//! writes nothing once that is stale.

use serde_json::{Value, json};

use super::{Error, Listed, Page, Store};
use crate::domain::{
    Event, EventId, JobId,
    progress::{Evaluation, StepMetrics},
};

/// One event as it is stored. Times are Unix seconds.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredEvent {
    pub id: String,
    /// Position in the job's story: 1, 2, 3 without gaps.
    pub seq: i64,
    pub level: String,
    /// `message` or `metrics`.
    pub kind: String,
    pub message: String,
    pub data: Option<Value>,
    pub created_at: i64,
}

/// On whose behalf something is written to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writer {
    /// The service itself, whatever the job's state.
    Service,
    /// The holder of the lease with this epoch.
    Holder(i64),
}

impl Writer {
    fn epoch(self) -> Option<i64> {
        match self {
            Self::Service => None,
            Self::Holder(epoch) => Some(epoch),
        }
    }
}

impl Store {
    /// Appends an event; false when there is no such job or the writer's epoch is stale.
    pub async fn append_event(&self, job: &JobId, writer: Writer, event: &Event) -> Result<bool, Error> {
        let data = Some(&event.data).filter(|data| !data.is_null());
        let id = EventId::random();
        let done = sqlx::query!(
            "WITH held AS (
                UPDATE jobs SET next_event_seq = next_event_seq + 1
                WHERE id = $1 AND ($2::bigint IS NULL OR (epoch = $2 AND lease_owner IS NOT NULL))
                RETURNING next_event_seq - 1 AS seq)
             INSERT INTO job_events (job_id, seq, id, level, type, message, data)
             SELECT $1, seq, $3, $4, $5, $6, $7 FROM held",
            job.as_str(),
            writer.epoch(),
            id.as_str(),
            event.level.as_str(),
            event.kind,
            event.message,
            data,
        )
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Records one optimizer step of the lease's holder: its row, a metrics event, the job's progress and estimated end.
    /// A step done again after a resume overwrites its row. False when the epoch is stale.
    pub async fn record_step(&self, job: &JobId, epoch: i64, metrics: &StepMetrics) -> Result<bool, Error> {
        let message = format!("Step {}/{}: training loss={:.4}", metrics.step, metrics.total_steps, metrics.train_loss);
        let left = metrics.estimated_seconds_left;
        let id = EventId::random();
        let done = sqlx::query!(
            "WITH held AS (
                UPDATE jobs SET next_event_seq = next_event_seq + 1, progress = $3, trained_tokens = $7,
                    estimated_finish = now() + make_interval(secs => $4)
                WHERE id = $1 AND epoch = $2 AND lease_owner IS NOT NULL
                RETURNING next_event_seq - 1 AS seq),
             step AS (
                INSERT INTO job_steps (job_id, step, metrics) SELECT $1, $8, $3 FROM held
                ON CONFLICT (job_id, step) DO UPDATE SET metrics = job_steps.metrics || EXCLUDED.metrics)
             INSERT INTO job_events (job_id, seq, id, level, type, message, data)
             SELECT $1, seq, $5, 'info', 'metrics', $6, $3 FROM held",
            job.as_str(),
            epoch,
            serde_json::to_value(metrics)?,
            // A wild estimate must not overflow the database's calendar: a century is as good as never.
            if left.is_finite() { left.clamp(0.0, 3.2e9) } else { 3.2e9 },
            id.as_str(),
            message,
            metrics.tokens_seen as i64,
            metrics.step as i64,
        )
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Records an evaluation of the lease's holder beside the numbers of its step. False when the epoch is stale.
    pub async fn record_evaluation(&self, job: &JobId, epoch: i64, evaluation: &Evaluation) -> Result<bool, Error> {
        let Evaluation { step, valid_loss, valid_mean_token_accuracy, valid_labels } = *evaluation;
        let metrics = json!({
            "step": step, "full_valid_loss": valid_loss, "full_valid_mean_token_accuracy": valid_mean_token_accuracy,
            "full_valid_labels": valid_labels,
        });
        let id = EventId::random();
        let done = sqlx::query!(
            "WITH held AS (
                UPDATE jobs SET next_event_seq = next_event_seq + 1
                WHERE id = $1 AND epoch = $2 AND lease_owner IS NOT NULL
                RETURNING next_event_seq - 1 AS seq),
             step AS (
                INSERT INTO job_steps (job_id, step, metrics) SELECT $1, $6, $3 FROM held
                ON CONFLICT (job_id, step) DO UPDATE SET metrics = job_steps.metrics || EXCLUDED.metrics)
             INSERT INTO job_events (job_id, seq, id, level, type, message, data)
             SELECT $1, seq, $4, 'info', 'metrics', $5, $3 FROM held",
            job.as_str(),
            epoch,
            metrics,
            id.as_str(),
            format!("Step {step}: validation loss={valid_loss:.4}"),
            step as i64,
        )
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Events of a job, newest first. `None` when `page.after` names none of its events.
    pub async fn list_events(&self, job: &JobId, page: &Page) -> Result<Option<Listed<StoredEvent>>, Error> {
        let before = match &page.after {
            None => i64::MAX,
            Some(id) => match self.event_position(job, id).await? {
                None => return Ok(None),
                Some(seq) => seq,
            },
        };
        let rows = sqlx::query_as!(
            StoredEvent,
            r#"SELECT id, seq, level, type AS kind, message, data,
                extract(epoch FROM created_at)::bigint AS "created_at!"
               FROM job_events WHERE job_id = $1 AND seq < $2 ORDER BY seq DESC LIMIT $3"#,
            job.as_str(),
            before,
            page.fetch(),
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(Some(page.listed(rows)))
    }

    /// Events of a job after position `seq`, oldest first, at most `limit`.
    pub async fn events_after(&self, job: &JobId, seq: i64, limit: u32) -> Result<Vec<StoredEvent>, Error> {
        let rows = sqlx::query_as!(
            StoredEvent,
            r#"SELECT id, seq, level, type AS kind, message, data,
                extract(epoch FROM created_at)::bigint AS "created_at!"
               FROM job_events WHERE job_id = $1 AND seq > $2 ORDER BY seq LIMIT $3"#,
            job.as_str(),
            seq,
            i64::from(limit),
        );
        Ok(rows.fetch_all(&self.pool).await?)
    }

    /// Position of an event in its job's story.
    pub async fn event_position(&self, job: &JobId, id: &str) -> Result<Option<i64>, Error> {
        let seq = sqlx::query_scalar!("SELECT seq FROM job_events WHERE job_id = $1 AND id = $2", job.as_str(), id);
        Ok(seq.fetch_optional(&self.pool).await?)
    }
}
