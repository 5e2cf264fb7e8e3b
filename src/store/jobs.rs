//! Job rows as the API sees them: made once however often a client retries, read, listed.
//!
//! Who holds a job and what a holder may write is `queue.rs`. The state machine itself is in the database.

use std::time::Duration;

use serde_json::Value;
use sqlx::{PgConnection, types::Json};

use super::{Error, Listed, Page, Store, quotas};
use crate::domain::{Event, EventId, FileId, JobId, JobStatus, ProjectId, TrainingSpec};

/// A create that a client sends again is taken for a replay while the first one is this young: two time-outs of 10
/// minutes, as stock clients have them, less what nobody waits for.
const REPLAY_WINDOW: Duration = Duration::from_mins(15);

/// One job. Times are Unix seconds.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub id: JobId,
    pub project: ProjectId,
    /// Higher is earlier, among the project's jobs.
    pub priority: i32,
    pub status: JobStatus,
    /// Name of the base model, as asked.
    pub model: String,
    /// All files in the order of training; never empty.
    pub training_files: Vec<FileId>,
    pub validation_files: Vec<FileId>,
    /// The accepted body.
    pub request: Value,
    pub training: TrainingSpec,
    pub suffix: Option<String>,
    pub seed: i64,
    pub metadata: Option<Value>,
    /// `cancel` or `pause`, while the holder has not acted on it.
    pub wanted: Option<String>,
    pub fine_tuned_model: Option<String>,
    /// Its numbers as a file, once it has ended.
    pub result_file: Option<FileId>,
    pub trained_tokens: Option<i64>,
    /// `{code, message, param}`
    pub error: Option<Value>,
    /// [`crate::domain::progress::StepMetrics`] of the last step.
    pub progress: Option<Value>,
    pub created_at: i64,
    pub started_at: Option<i64>,
    pub finished_at: Option<i64>,
    pub estimated_finish: Option<i64>,
}

/// A job to be made, every value checked.
#[derive(Debug, Clone)]
pub struct NewJob {
    pub project: ProjectId,
    pub model: String,
    /// Higher is earlier, among the project's jobs.
    pub priority: i32,
    /// All files in the order of training; at least one.
    pub training_files: Vec<FileId>,
    pub validation_files: Vec<FileId>,
    pub request: Value,
    pub training: TrainingSpec,
    pub suffix: Option<String>,
    pub metadata: Option<Value>,
    /// Events to tell right after the one of the creation.
    pub notes: Vec<Event>,
    pub attempt: Attempt,
}

/// How a create came in: what tells a first request from one sent again.
#[derive(Debug, Clone, Default)]
pub struct Attempt {
    /// SHA-256 of the body as it came, hex.
    pub body_sha256: String,
    /// The caller's own key.
    pub idempotency_key: Option<String>,
    /// The client says that it sends this again.
    pub is_retry: bool,
}

/// What became of a create.
#[derive(Debug, Clone, PartialEq)]
pub enum Created {
    /// A new job, or the one that an earlier try of the same request made.
    Job(Box<Job>),
    /// This file does not exist.
    NoSuchFile(FileId),
    /// The idempotency key was used for another body.
    KeyReused,
}

/// Which jobs by their metadata.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum MetadataFilter {
    #[default]
    Any,
    /// Only jobs without metadata.
    None,
    /// Only jobs whose metadata holds all of these strings by these keys.
    Holds(Value),
}

struct Row {
    id: String,
    project_id: String,
    priority: i32,
    status: String,
    model: String,
    training_files: Vec<String>,
    validation_files: Vec<String>,
    request: Value,
    training: Json<TrainingSpec>,
    suffix: Option<String>,
    seed: i64,
    metadata: Option<Value>,
    wanted: Option<String>,
    fine_tuned_model: Option<String>,
    result_file: Option<String>,
    trained_tokens: Option<i64>,
    error: Option<Value>,
    progress: Option<Value>,
    created_at: i64,
    started_at: Option<i64>,
    finished_at: Option<i64>,
    estimated_finish: Option<i64>,
}

/// `SELECT` of [`Row`]s with what follows `FROM jobs`.
macro_rules! select_jobs {
    ($rest:literal $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            Row,
            r#"SELECT id, project_id, priority, status::text AS "status!", model, training_files, validation_files, request,
                training AS "training: Json<TrainingSpec>", suffix, seed, metadata, wanted, fine_tuned_model,
                result_file, trained_tokens, error, progress,
                extract(epoch FROM created_at)::bigint AS "created_at!",
                extract(epoch FROM started_at)::bigint AS started_at,
                extract(epoch FROM finished_at)::bigint AS finished_at,
                extract(epoch FROM estimated_finish)::bigint AS estimated_finish
            FROM jobs "# + $rest
            $(, $argument)*
        )
    };
}

impl Store {
    /// Makes a job, unless an earlier try of the same request did; then that one is the answer.
    pub async fn create_job(&self, new: &NewJob) -> Result<Created, Error> {
        let mut transaction = self.pool.begin().await?;
        match replayed(&mut transaction, &new.project, &new.attempt).await? {
            Replay::First => {}
            Replay::Of(job) => return Ok(Created::Job(job)),
            Replay::KeyReused => return Ok(Created::KeyReused),
        }
        if let Some(id) = lock_files(&mut transaction, new).await? {
            return Ok(Created::NoSuchFile(id));
        }
        quotas::check_job(&mut transaction, &new.project).await?;
        let id = JobId::random();
        insert(&mut transaction, &id, new).await?;
        for note in &new.notes {
            append_note(&mut transaction, &id, note).await?;
        }
        let job = read(&mut transaction, &id).await?;
        transaction.commit().await?;
        Ok(Created::Job(Box::new(job)))
    }

    /// One job.
    pub async fn job(&self, id: &JobId) -> Result<Option<Job>, Error> {
        let row = select_jobs!("WHERE id = $1", id.as_str()).fetch_optional(&self.pool).await?;
        row.map(Job::try_from).transpose()
    }

    /// Jobs of a project, newest first. `None` when `page.after` names none of them.
    pub async fn list_jobs(
        &self,
        project: &ProjectId,
        page: &Page,
        metadata: &MetadataFilter,
    ) -> Result<Option<Listed<Job>>, Error> {
        let before = match &page.after {
            None => i64::MAX,
            Some(id) => {
                let seq =
                    sqlx::query_scalar!("SELECT seq FROM jobs WHERE id = $1 AND project_id = $2", id, project.as_str());
                match seq.fetch_optional(&self.pool).await? {
                    None => return Ok(None),
                    Some(seq) => seq,
                }
            }
        };
        let (absent, holds) = match metadata {
            MetadataFilter::Any => (false, None),
            MetadataFilter::None => (true, None),
            MetadataFilter::Holds(pairs) => (false, Some(pairs)),
        };
        let rows = select_jobs!(
            "WHERE project_id = $5 AND seq < $1 AND (NOT $2::boolean OR metadata IS NULL) AND ($3::jsonb IS NULL OR metadata @> $3)
             ORDER BY seq DESC LIMIT $4",
            before,
            absent,
            holds,
            page.fetch(),
            project.as_str(),
        )
        .fetch_all(&self.pool)
        .await?;
        let jobs = rows.into_iter().map(Job::try_from).collect::<Result<Vec<_>, _>>()?;
        Ok(Some(page.listed(jobs)))
    }
}

enum Replay {
    First,
    Of(Box<Job>),
    KeyReused,
}

/// Looks for an earlier try of the same project. Tries of one request wait for one another here, so that a second one sent
/// while the first is under way finds its job.
async fn replayed(connection: &mut PgConnection, project: &ProjectId, attempt: &Attempt) -> Result<Replay, Error> {
    let same = format!("{project} {}", attempt.idempotency_key.as_deref().unwrap_or(&attempt.body_sha256));
    let project = project.as_str();
    sqlx::query!("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", same).execute(&mut *connection).await?;
    if let Some(key) = &attempt.idempotency_key {
        let body = sqlx::query_scalar!(
            "SELECT request_sha256 FROM jobs WHERE project_id = $2 AND idempotency_key = $1",
            key,
            project
        )
        .fetch_optional(&mut *connection)
        .await?;
        return Ok(match body {
            None => Replay::First,
            Some(body) if body.as_ref() != Some(&attempt.body_sha256) => Replay::KeyReused,
            Some(_) => {
                let row = select_jobs!("WHERE project_id = $2 AND idempotency_key = $1", key, project)
                    .fetch_one(&mut *connection)
                    .await?;
                Replay::Of(Box::new(row.try_into()?))
            }
        });
    }
    if !attempt.is_retry {
        return Ok(Replay::First);
    }
    let row = select_jobs!(
        "WHERE project_id = $3 AND request_sha256 = $1 AND idempotency_key IS NULL AND created_at > now() - make_interval(secs => $2)
         ORDER BY seq DESC LIMIT 1",
        attempt.body_sha256,
        REPLAY_WINDOW.as_secs_f64(),
        project,
    )
    .fetch_optional(&mut *connection)
    .await?;
    Ok(match row {
        Some(row) => Replay::Of(Box::new(row.try_into()?)),
        None => Replay::First,
    })
}

/// Locks the files against deletion until the job is there to protect them; names the first that the project does not have.
async fn lock_files(connection: &mut PgConnection, new: &NewJob) -> Result<Option<FileId>, Error> {
    let wanted: Vec<&FileId> = new.training_files.iter().chain(&new.validation_files).collect();
    let ids: Vec<String> = wanted.iter().map(ToString::to_string).collect();
    let found = sqlx::query_scalar!(
        "SELECT id FROM files WHERE id = ANY ($1) AND project_id = $2 ORDER BY id FOR KEY SHARE",
        &ids,
        new.project.as_str()
    )
    .fetch_all(connection)
    .await?;
    Ok(wanted.into_iter().find(|id| !found.iter().any(|f| f == id.as_str())).cloned())
}

async fn insert(connection: &mut PgConnection, id: &JobId, new: &NewJob) -> Result<(), Error> {
    let texts = |ids: &[FileId]| ids.iter().map(ToString::to_string).collect::<Vec<_>>();
    sqlx::query!(
        "INSERT INTO jobs (id, model, training_file, validation_file, training_files, validation_files, request,
            training, suffix, seed, metadata, request_sha256, idempotency_key, project_id, priority)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)",
        id.as_str(),
        new.model,
        new.training_files.first().map(FileId::as_str),
        new.validation_files.first().map(FileId::as_str),
        &texts(&new.training_files),
        &texts(&new.validation_files),
        new.request,
        Json(&new.training) as _,
        new.suffix,
        new.training.seed as i64,
        new.metadata,
        new.attempt.body_sha256,
        new.attempt.idempotency_key,
        new.project.as_str(),
        new.priority,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// One job, as this transaction sees it.
pub(super) async fn read(connection: &mut PgConnection, id: &JobId) -> Result<Job, Error> {
    select_jobs!("WHERE id = $1", id.as_str()).fetch_one(connection).await?.try_into()
}

/// Appends an event to a job whose row this transaction has locked.
pub(super) async fn append_note(connection: &mut PgConnection, id: &JobId, event: &Event) -> Result<(), Error> {
    let event_id = EventId::random();
    sqlx::query!(
        "WITH held AS (
            UPDATE jobs SET next_event_seq = next_event_seq + 1 WHERE id = $1 RETURNING next_event_seq - 1 AS seq)
         INSERT INTO job_events (job_id, seq, id, level, type, message, data)
         SELECT $1, seq, $2, $3, $4, $5, $6 FROM held",
        id.as_str(),
        event_id.as_str(),
        event.level.as_str(),
        event.kind,
        event.message,
        Some(&event.data).filter(|data| !data.is_null()),
    )
    .execute(connection)
    .await?;
    Ok(())
}

pub(super) fn stored_status(word: &str) -> Result<JobStatus, Error> {
    JobStatus::parse(word).ok_or_else(|| Error::Corrupt(format!("{word} is not a status")))
}

impl TryFrom<Row> for Job {
    type Error = Error;

    fn try_from(row: Row) -> Result<Self, Error> {
        let files = |ids: Vec<String>| ids.iter().map(|id| super::stored_id(id)).collect::<Result<Vec<FileId>, _>>();
        Ok(Self {
            id: super::stored_id(&row.id)?,
            project: super::stored_id(&row.project_id)?,
            priority: row.priority,
            status: stored_status(&row.status)?,
            model: row.model,
            training_files: files(row.training_files)?,
            validation_files: files(row.validation_files)?,
            request: row.request,
            training: row.training.0,
            suffix: row.suffix,
            seed: row.seed,
            metadata: row.metadata,
            wanted: row.wanted,
            fine_tuned_model: row.fine_tuned_model,
            result_file: row.result_file.as_deref().map(super::stored_id).transpose()?,
            trained_tokens: row.trained_tokens,
            error: row.error,
            progress: row.progress,
            created_at: row.created_at,
            started_at: row.started_at,
            finished_at: row.finished_at,
            estimated_finish: row.estimated_finish,
        })
    }
}
