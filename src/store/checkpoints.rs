//! Checkpoints that can be downloaded, and the models they make. A row exists only for bytes that are complete.

use std::collections::BTreeMap;

use sqlx::{PgConnection, types::Json};

use super::{Error, Listed, Page, Store};
use crate::domain::{
    CheckpointId, JobId, ProjectId,
    progress::{WrittenCheckpoint, WrittenFile},
    training::Precision,
};

/// Files under this folder are for continuing a run, not part of the model.
const RESUME_FOLDER: &str = "resume/";
/// Characters of a job's id that end its model's name.
const SHORT_ID: usize = 8;
/// Stands where hosted services name the organization.
pub const ORGANIZATION: &str = "longhaul";

/// One checkpoint of a job. Times are Unix seconds.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    pub id: CheckpointId,
    pub job: JobId,
    pub step: u64,
    /// `ft:<base>:<org>:<suffix>:<short id>`, with `:ckpt-step-<n>` unless it is the last.
    pub model_name: String,
    /// The job's result.
    pub last: bool,
    /// `train_loss`, `valid_loss`, ... at this step.
    pub metrics: BTreeMap<String, f64>,
    pub created_at: i64,
}

/// A checkpoint whose files are all in the object store under `id`.
#[derive(Debug, Clone)]
pub struct NewCheckpoint<'a> {
    pub id: CheckpointId,
    pub job: &'a JobId,
    /// The lease's epoch.
    pub epoch: i64,
    /// What it was trained in, and what goes on from it must be.
    pub precision: Precision,
    pub written: &'a WrittenCheckpoint,
}

/// What became of a record.
#[derive(Debug, Clone, PartialEq)]
pub enum Recorded {
    /// It is there now.
    New(Checkpoint),
    /// An earlier attempt had recorded this step, with the same weights: that one stands, and the new bytes are not needed.
    Before(Checkpoint),
    /// The epoch is stale; nothing was written.
    Stale,
}

/// Which files of a checkpoint; the greater set holds the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FileSet {
    /// What a model is loaded from.
    Model,
    /// The state for continuing, too.
    All,
}

struct Row {
    id: String,
    job_id: String,
    step: i64,
    model_name: String,
    last: bool,
    metrics: Json<BTreeMap<String, f64>>,
    created_at: i64,
}

/// `SELECT` of [`Row`]s with what follows `FROM checkpoints`.
macro_rules! select_checkpoints {
    ($rest:literal $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            Row,
            r#"SELECT id, job_id, step, model_name, last, metrics AS "metrics: Json<BTreeMap<String, f64>>",
                extract(epoch FROM created_at)::bigint AS "created_at!"
            FROM checkpoints "# + $rest
            $(, $argument)*
        )
    };
}

impl Store {
    /// Records a complete checkpoint of the lease's holder, with its files, in one transaction. It counts as progress:
    /// the job's attempts start again from none, and it goes on in the precision of its checkpoint.
    pub async fn record_checkpoint(&self, new: &NewCheckpoint<'_>) -> Result<Recorded, Error> {
        let mut transaction = self.pool.begin().await?;
        let job = sqlx::query!(
            "UPDATE jobs SET attempts = 0, training = training || jsonb_build_object('precision', $3::text)
             WHERE id = $1 AND epoch = $2 AND lease_owner IS NOT NULL RETURNING model, suffix",
            new.job.as_str(),
            new.epoch,
            new.precision.as_str(),
        )
        .fetch_optional(&mut *transaction)
        .await?;
        let Some(job) = job else { return Ok(Recorded::Stale) };
        let name = model_name(&job.model, job.suffix.as_deref(), new.job, new.written);
        let kept = sqlx::query_scalar!(
            "INSERT INTO checkpoints (id, job_id, step, epoch, model_name, last, metrics)
             VALUES ($1, $2, $3, $4, $5, $6, $7)
             ON CONFLICT (job_id, step) DO UPDATE SET
                last = checkpoints.last OR EXCLUDED.last,
                model_name = CASE WHEN checkpoints.last THEN checkpoints.model_name ELSE EXCLUDED.model_name END
             RETURNING id",
            new.id.as_str(),
            new.job.as_str(),
            new.written.step as i64,
            new.epoch,
            name,
            new.written.last,
            Json(&new.written.metrics) as _,
        )
        .fetch_one(&mut *transaction)
        .await?;
        let fresh = kept == new.id.as_str();
        if fresh {
            insert_files(&mut transaction, &new.id, &new.written.files).await?;
        }
        let row = select_checkpoints!("WHERE id = $1", kept).fetch_one(&mut *transaction).await?;
        transaction.commit().await?;
        let checkpoint = row.try_into()?;
        Ok(if fresh { Recorded::New(checkpoint) } else { Recorded::Before(checkpoint) })
    }

    /// One checkpoint, whosever it is.
    pub async fn checkpoint(&self, id: &CheckpointId) -> Result<Option<Checkpoint>, Error> {
        let row = select_checkpoints!("WHERE id = $1", id.as_str()).fetch_optional(&self.pool).await?;
        row.map(Checkpoint::try_from).transpose()
    }

    /// The checkpoint that a fine-tuned model's name stands for, if it is the project's own.
    pub async fn own_model(&self, project: &ProjectId, name: &str) -> Result<Option<Checkpoint>, Error> {
        let row = select_checkpoints!(
            "WHERE model_name = $1 AND EXISTS (
                SELECT 1 FROM jobs WHERE jobs.id = checkpoints.job_id AND project_id = $2)",
            name,
            project.as_str()
        );
        row.fetch_optional(&self.pool).await?.map(Checkpoint::try_from).transpose()
    }

    /// The checkpoint that a fine-tuned model's name stands for, if it is the project's own or was opened to it.
    pub async fn open_model(&self, project: &ProjectId, name: &str) -> Result<Option<Checkpoint>, Error> {
        let row = select_checkpoints!(
            "WHERE model_name = $1 AND EXISTS (
                SELECT 1 FROM jobs j WHERE j.id = checkpoints.job_id AND (j.project_id = $2 OR EXISTS (
                    SELECT 1 FROM checkpoint_permissions p WHERE p.checkpoint_id = checkpoints.id AND p.project_id = $2)))",
            name,
            project.as_str()
        );
        row.fetch_optional(&self.pool).await?.map(Checkpoint::try_from).transpose()
    }

    /// Those checkpoints of a job that are the project's own or were opened to it, newest first.
    pub async fn open_checkpoints(&self, project: &ProjectId, job: &JobId) -> Result<Vec<Checkpoint>, Error> {
        let rows = select_checkpoints!(
            "WHERE job_id = $1 AND EXISTS (
                SELECT 1 FROM jobs j WHERE j.id = checkpoints.job_id AND (j.project_id = $2 OR EXISTS (
                    SELECT 1 FROM checkpoint_permissions p WHERE p.checkpoint_id = checkpoints.id AND p.project_id = $2)))
             ORDER BY seq DESC",
            job.as_str(),
            project.as_str()
        );
        rows.fetch_all(&self.pool).await?.into_iter().map(Checkpoint::try_from).collect()
    }

    /// The checkpoint of a job that went furthest: where a resumed run goes on.
    pub async fn latest_checkpoint(&self, job: &JobId) -> Result<Option<Checkpoint>, Error> {
        let row = select_checkpoints!("WHERE job_id = $1 ORDER BY step DESC LIMIT 1", job.as_str())
            .fetch_optional(&self.pool)
            .await?;
        row.map(Checkpoint::try_from).transpose()
    }

    /// Checkpoints of a job, newest first. `None` when `page.after` names none of them.
    pub async fn list_checkpoints(&self, job: &JobId, page: &Page) -> Result<Option<Listed<Checkpoint>>, Error> {
        let before = match &page.after {
            None => i64::MAX,
            Some(id) => {
                let seq =
                    sqlx::query_scalar!("SELECT seq FROM checkpoints WHERE job_id = $1 AND id = $2", job.as_str(), id);
                match seq.fetch_optional(&self.pool).await? {
                    None => return Ok(None),
                    Some(seq) => seq,
                }
            }
        };
        let rows = select_checkpoints!(
            "WHERE job_id = $1 AND seq < $2 ORDER BY seq DESC LIMIT $3",
            job.as_str(),
            before,
            page.fetch(),
        )
        .fetch_all(&self.pool)
        .await?;
        let checkpoints = rows.into_iter().map(Checkpoint::try_from).collect::<Result<Vec<_>, _>>()?;
        Ok(Some(page.listed(checkpoints)))
    }

    /// The results of the project's jobs and every checkpoint that was opened to it, newest first, at most `limit`.
    pub async fn fine_tuned_models(&self, project: &ProjectId, limit: u32) -> Result<Vec<Checkpoint>, Error> {
        let rows = select_checkpoints!(
            "WHERE (last AND EXISTS (SELECT 1 FROM jobs WHERE jobs.id = checkpoints.job_id AND project_id = $2))
                OR id IN (SELECT checkpoint_id FROM checkpoint_permissions WHERE project_id = $2)
             ORDER BY seq DESC LIMIT $1",
            i64::from(limit),
            project.as_str()
        );
        rows.fetch_all(&self.pool).await?.into_iter().map(Checkpoint::try_from).collect()
    }

    /// Files of a checkpoint, by path.
    pub async fn checkpoint_files(&self, id: &CheckpointId, set: FileSet) -> Result<Vec<WrittenFile>, Error> {
        let rows = sqlx::query!(
            r#"SELECT path, bytes, sha256 FROM checkpoint_files
               WHERE checkpoint_id = $1 AND ($2 OR NOT resume) ORDER BY path COLLATE "C""#,
            id.as_str(),
            set == FileSet::All
        )
        .fetch_all(&self.pool)
        .await?;
        let file = |row: (String, i64, String)| WrittenFile { path: row.0, bytes: row.1 as u64, sha256: row.2 };
        Ok(rows.into_iter().map(|row| file((row.path, row.bytes, row.sha256))).collect())
    }
}

async fn insert_files(connection: &mut PgConnection, id: &CheckpointId, files: &[WrittenFile]) -> Result<(), Error> {
    let paths: Vec<String> = files.iter().map(|f| f.path.clone()).collect();
    let bytes: Vec<i64> = files.iter().map(|f| f.bytes as i64).collect();
    let digests: Vec<String> = files.iter().map(|f| f.sha256.clone()).collect();
    let resume: Vec<bool> = files.iter().map(|f| f.path.starts_with(RESUME_FOLDER)).collect();
    sqlx::query!(
        "INSERT INTO checkpoint_files (checkpoint_id, path, bytes, sha256, resume)
         SELECT $1, * FROM unnest($2::text[], $3::bigint[], $4::text[], $5::boolean[])",
        id.as_str(),
        &paths,
        &bytes,
        &digests,
        &resume
    )
    .execute(connection)
    .await?;
    Ok(())
}

fn model_name(base: &str, suffix: Option<&str>, job: &JobId, written: &WrittenCheckpoint) -> String {
    let id = job.as_str();
    let short = &id[id.len().saturating_sub(SHORT_ID)..];
    let name = format!("ft:{base}:{ORGANIZATION}:{}:{short}", suffix.unwrap_or_default());
    if written.last { name } else { format!("{name}:ckpt-step-{}", written.step) }
}

impl TryFrom<Row> for Checkpoint {
    type Error = Error;

    fn try_from(row: Row) -> Result<Self, Error> {
        Ok(Self {
            id: super::stored_id(&row.id)?,
            job: super::stored_id(&row.job_id)?,
            step: row.step as u64,
            model_name: row.model_name,
            last: row.last,
            metrics: row.metrics.0,
            created_at: row.created_at,
        })
    }
}
