//! The numbers of a job that has ended, as a CSV file: one line a step.
//!
//! Written within the transaction that ends the job, whoever ends it and however: under the lease's epoch where there is
//! a holder, once since a job ends once, and visible together with the end. Memory is bounded by pages of steps and one row
//! of the file.

use serde_json::Value;
use sha2::{Digest, Sha256};
use sqlx::PgConnection;

use super::{
    Error,
    blobs::{CHUNK, SpooledBlob, seal},
    files::{NewFile, insert_file},
};
use crate::domain::{JobId, hex, ids::random_suffix};

/// Purpose of such files.
pub const PURPOSE: &str = "fine-tune-results";
/// Name of such files.
const FILENAME: &str = "step_metrics.csv";
/// Columns, and the members of a step's metrics that they show. The first five are OpenAI's.
const COLUMNS: [(&str, &str); 12] = [
    ("step", "step"),
    ("train_loss", "train_loss"),
    ("train_accuracy", "train_mean_token_accuracy"),
    ("valid_loss", "full_valid_loss"),
    ("valid_mean_token_accuracy", "full_valid_mean_token_accuracy"),
    ("learning_rate", "learning_rate"),
    ("grad_norm", "grad_norm"),
    ("seconds", "seconds"),
    ("tokens_per_second", "tokens_per_second"),
    ("tokens_seen", "tokens_seen"),
    ("train_labels", "valid_labels"),
    ("valid_labels", "full_valid_labels"),
];
/// Steps read at a time.
const PAGE: i64 = 2000;

/// The file under way: its finished rows are in the database.
struct Csv {
    blob: String,
    rows: i64,
    filling: Vec<u8>,
    bytes: u64,
    sha256: Sha256,
}

/// Writes the file of a job that this transaction has just ended, if any step of it was done.
pub(super) async fn write(connection: &mut PgConnection, job: &JobId) -> Result<(), Error> {
    let wanted = sqlx::query_scalar!(
        "SELECT project_id FROM jobs
         WHERE id = $1 AND result_file IS NULL AND status IN ('succeeded', 'failed', 'cancelled')
            AND EXISTS (SELECT 1 FROM job_steps WHERE job_id = $1)",
        job.as_str()
    )
    .fetch_optional(&mut *connection)
    .await?;
    let Some(project) = wanted else { return Ok(()) };
    let blob = all_steps(connection, job).await?;
    seal(connection, &blob).await?;
    let new = NewFile {
        project: super::stored_id(&project)?,
        filename: FILENAME.into(),
        purpose: PURPOSE.into(),
        expires_after: None,
    };
    let file = insert_file(connection, &[(blob.id, blob.bytes)], &blob.sha256, &new).await?;
    sqlx::query!("UPDATE jobs SET result_file = $2 WHERE id = $1", job.as_str(), file.id.as_str())
        .execute(connection)
        .await?;
    Ok(())
}

async fn all_steps(connection: &mut PgConnection, job: &JobId) -> Result<SpooledBlob, Error> {
    let mut csv = Csv::begin(connection).await?;
    let mut after = -1;
    loop {
        let steps = sqlx::query!(
            "SELECT step, metrics FROM job_steps WHERE job_id = $1 AND step > $2 ORDER BY step LIMIT $3",
            job.as_str(),
            after,
            PAGE,
        )
        .fetch_all(&mut *connection)
        .await?;
        for step in &steps {
            csv.line(connection, &line(&step.metrics)).await?;
        }
        match steps.last() {
            Some(last) => after = last.step,
            None => return csv.finish(connection).await,
        }
    }
}

/// Cells that were not measured at this step are empty.
fn line(metrics: &Value) -> String {
    let cells = COLUMNS.map(|(_, member)| match &metrics[member] {
        Value::Number(number) => number.to_string(),
        _ => String::new(),
    });
    format!("{}\n", cells.join(","))
}

impl Csv {
    async fn begin(connection: &mut PgConnection) -> Result<Self, Error> {
        let blob = format!("blob-{}", random_suffix());
        sqlx::query!("INSERT INTO blobs (id) VALUES ($1)", blob).execute(&mut *connection).await?;
        let mut csv = Self { blob, rows: 0, filling: Vec::new(), bytes: 0, sha256: Sha256::new() };
        csv.line(connection, &format!("{}\n", COLUMNS.map(|(name, _)| name).join(","))).await?;
        Ok(csv)
    }

    async fn line(&mut self, connection: &mut PgConnection, line: &str) -> Result<(), Error> {
        self.bytes += line.len() as u64;
        self.sha256.update(line);
        self.filling.extend_from_slice(line.as_bytes());
        if self.filling.len() >= CHUNK {
            let rest = self.filling.split_off(CHUNK);
            self.insert(connection).await?;
            self.filling = rest;
        }
        Ok(())
    }

    async fn insert(&mut self, connection: &mut PgConnection) -> Result<(), Error> {
        sqlx::query!(
            "INSERT INTO blob_chunks (blob_id, seq, data) VALUES ($1, $2, $3)",
            self.blob,
            self.rows,
            self.filling
        )
        .execute(connection)
        .await?;
        self.rows += 1;
        Ok(())
    }

    async fn finish(mut self, connection: &mut PgConnection) -> Result<SpooledBlob, Error> {
        if !self.filling.is_empty() {
            self.insert(connection).await?;
        }
        Ok(SpooledBlob { id: self.blob, bytes: self.bytes, sha256: hex(&self.sha256.finalize()) })
    }
}
