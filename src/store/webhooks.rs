//! Webhooks: who is to be told of the end of jobs, and the messages that wait for it.
//!
//! Messages come from a trigger, in the transaction that ends a job. A sender takes them under a lease and says how it went.

use std::time::Duration;

use super::{Error, Store};
use crate::domain::{ProjectId, WebhookId};

/// Most receivers of a project.
pub const MAX_WEBHOOKS: i64 = 16;
/// Messages of one receiver that a sender takes at a time.
const BATCH: i64 = 4;
/// How long messages that are done are kept.
const RECORD_LIFE: Duration = Duration::from_hours(30 * 24);

/// A receiver. Times are Unix seconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Webhook {
    pub id: WebhookId,
    pub name: String,
    pub url: String,
    pub events: Vec<String>,
    pub created_at: i64,
    /// The secret's last characters, by which its owner knows it.
    pub secret_ends: String,
    /// Messages that wait to be delivered.
    pub pending: u64,
    /// How the newest try that failed did, while its message waits.
    pub last_error: Option<String>,
}

/// A message to be sent now, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The same at every try.
    pub id: String,
    pub webhook: WebhookId,
    pub url: String,
    /// `whsec_<base64>`
    pub secret: String,
    /// `fine_tuning.job.succeeded` or another end.
    pub event: String,
    pub job: String,
    pub created_at: i64,
    /// Tries so far, this one counted.
    pub tries: u32,
}

impl Store {
    /// Adds a receiver. `None` when there are as many as may be.
    pub async fn create_webhook(
        &self,
        project: &ProjectId,
        name: &str,
        url: &str,
        events: &[String],
        secret: &str,
    ) -> Result<Option<Webhook>, Error> {
        let id = WebhookId::random();
        let made = sqlx::query!(
            "INSERT INTO webhooks (id, name, url, events, secret, project_id)
             SELECT $1, $2, $3, $4, $5, $7 WHERE (SELECT count(*) FROM webhooks WHERE project_id = $7) < $6",
            id.as_str(),
            name,
            url,
            events,
            secret,
            MAX_WEBHOOKS,
            project.as_str(),
        )
        .execute(&self.pool)
        .await?;
        if made.rows_affected() == 0 {
            return Ok(None);
        }
        Ok(self.webhooks(project).await?.into_iter().find(|webhook| webhook.id == id))
    }

    /// All receivers of a project, newest first.
    pub async fn webhooks(&self, project: &ProjectId) -> Result<Vec<Webhook>, Error> {
        let rows = sqlx::query!(
            r#"SELECT id, name, url, events, extract(epoch FROM created_at)::bigint AS "created_at!",
                right(secret, 4) AS "secret_ends!",
                (SELECT count(*) FROM webhook_messages m WHERE m.webhook_id = w.id AND next_try IS NOT NULL) AS "pending!",
                (SELECT last_error FROM webhook_messages m WHERE m.webhook_id = w.id AND next_try IS NOT NULL
                    AND last_error IS NOT NULL ORDER BY next_try DESC LIMIT 1) AS last_error
               FROM webhooks w WHERE project_id = $1 ORDER BY seq DESC"#,
            project.as_str()
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter()
            .map(|row| {
                Ok(Webhook {
                    id: super::stored_id(&row.id)?,
                    name: row.name,
                    url: row.url,
                    events: row.events,
                    created_at: row.created_at,
                    secret_ends: row.secret_ends,
                    pending: row.pending as u64,
                    last_error: row.last_error,
                })
            })
            .collect()
    }

    /// Removes a receiver and what waits for it; false when there is none.
    pub async fn delete_webhook(&self, id: &WebhookId) -> Result<bool, Error> {
        let done = sqlx::query!("DELETE FROM webhooks WHERE id = $1", id.as_str());
        Ok(done.execute(&self.pool).await?.rows_affected() == 1)
    }

    /// Takes a few messages that are due for each receiver but the `busy` ones, for as long as the lease: until then nobody
    /// else has them.
    pub async fn due_messages(&self, busy: &[String], lease: Duration) -> Result<Vec<Message>, Error> {
        let rows = sqlx::query!(
            r#"WITH due AS (
                SELECT m.id FROM webhooks w CROSS JOIN LATERAL (
                    SELECT id FROM webhook_messages WHERE webhook_id = w.id AND next_try <= now()
                    ORDER BY next_try LIMIT $2 FOR UPDATE SKIP LOCKED) m
                WHERE w.id <> ALL ($1))
               UPDATE webhook_messages m SET tries = tries + 1, next_try = now() + make_interval(secs => $3)
               FROM due, webhooks w WHERE m.id = due.id AND w.id = m.webhook_id
               RETURNING m.id, m.webhook_id, w.url, w.secret, m.event, m.job_id, m.tries,
                extract(epoch FROM m.created_at)::bigint AS "created_at!""#,
            busy,
            BATCH,
            lease.as_secs_f64(),
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter()
            .map(|row| {
                Ok(Message {
                    webhook: super::stored_id(&row.webhook_id)?,
                    id: row.id,
                    url: row.url,
                    secret: row.secret,
                    event: row.event,
                    job: row.job_id,
                    created_at: row.created_at,
                    tries: row.tries as u32,
                })
            })
            .collect()
    }

    /// A message has arrived.
    pub async fn message_delivered(&self, id: &str) -> Result<(), Error> {
        sqlx::query!("UPDATE webhook_messages SET delivered = true, next_try = NULL WHERE id = $1", id)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// A message has not arrived: it is tried again after a while, or given up.
    pub async fn message_failed(&self, id: &str, error: &str, again: Option<Duration>) -> Result<(), Error> {
        sqlx::query!(
            "UPDATE webhook_messages SET last_error = $2, next_try = now() + make_interval(secs => $3)
             WHERE id = $1 AND NOT delivered",
            id,
            error,
            again.map(|pause| pause.as_secs_f64()),
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Forgets messages that were delivered or given up long ago.
    pub async fn sweep_messages(&self) -> Result<u64, Error> {
        let done = sqlx::query!(
            "DELETE FROM webhook_messages WHERE next_try IS NULL AND created_at < now() - make_interval(secs => $1)",
            RECORD_LIFE.as_secs_f64()
        );
        Ok(done.execute(&self.pool).await?.rows_affected())
    }
}
