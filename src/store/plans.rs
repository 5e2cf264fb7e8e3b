//! Plans of jobs that nobody has made: asked for by the API, their data read by an executor.

use std::time::Duration;

use serde_json::Value;
use sqlx::types::Json;

use super::{Error, Store};
use crate::domain::{FileId, Invalid, PlanId, ProjectId, TrainingSpec, hub_name, progress::DataSummary};

/// A plan older than this is deleted.
const LIFE: Duration = Duration::from_hours(24);
/// Holds after which nobody tries again: a plan that kills whoever reads it must not go round for ever.
const MOST_HOLDS: i64 = 3;

/// What is to be planned, every value checked.
#[derive(Debug, Clone, PartialEq)]
pub struct NewPlan {
    pub project: ProjectId,
    pub model: String,
    pub training_files: Vec<FileId>,
    pub validation_files: Vec<FileId>,
    pub training: TrainingSpec,
}

/// A plan as it stands. Times are Unix seconds.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredPlan {
    pub id: PlanId,
    pub model: String,
    pub training: TrainingSpec,
    /// `queued`, `ready` or `failed`.
    pub status: String,
    /// Once it is ready.
    pub summary: Option<DataSummary>,
    /// `{code, message, param}`, once it has failed.
    pub error: Option<Value>,
    pub created_at: i64,
}

/// A plan in the hands of an executor.
#[derive(Debug, Clone, PartialEq)]
pub struct TakenPlan {
    pub id: PlanId,
    /// Every write about it carries this.
    pub epoch: i64,
    pub plan: NewPlan,
    pub created_at: i64,
}

impl Store {
    /// Keeps a question, and deletes old ones.
    pub async fn create_plan(&self, plan: &NewPlan) -> Result<PlanId, Error> {
        let id = PlanId::random();
        sqlx::query!("DELETE FROM plans WHERE created_at < now() - make_interval(secs => $1)", LIFE.as_secs_f64())
            .execute(&self.pool)
            .await?;
        let texts = |ids: &[FileId]| ids.iter().map(ToString::to_string).collect::<Vec<_>>();
        sqlx::query!(
            "WITH new AS (INSERT INTO plans (id, model, training_files, validation_files, training, project_id)
                VALUES ($1, $2, $3, $4, $5, $6) RETURNING id)
             SELECT pg_notify('jobs', id) FROM new",
            id.as_str(),
            plan.model,
            &texts(&plan.training_files),
            &texts(&plan.validation_files),
            Json(&plan.training) as _,
            plan.project.as_str(),
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(id)
    }

    /// A plan by its id.
    pub async fn plan(&self, id: &PlanId) -> Result<Option<StoredPlan>, Error> {
        let row = sqlx::query!(
            r#"SELECT id, model, training AS "training: Json<TrainingSpec>", status,
                summary AS "summary: Json<DataSummary>", error, extract(epoch FROM created_at)::bigint AS "created_at!"
               FROM plans WHERE id = $1"#,
            id.as_str(),
        )
        .fetch_optional(&self.pool)
        .await?;
        let plan = row.map(|row| {
            Ok(StoredPlan {
                id: super::stored_id(&row.id)?,
                model: row.model,
                training: row.training.0,
                status: row.status,
                summary: row.summary.map(|summary| summary.0),
                error: row.error,
                created_at: row.created_at,
            })
        });
        plan.transpose()
    }

    /// Takes the oldest plan that waits and whose model is among these, for so long; also one whose model no host has and the caller
    /// `fetches` from a hub. One that was held often enough without an answer fails.
    pub async fn take_plan(
        &self,
        models: &[String],
        fetches: bool,
        lease: Duration,
    ) -> Result<Option<TakenPlan>, Error> {
        let message =
            "the data could not be read: whoever read it stopped before the end; the log of the executors says why";
        let error = Invalid { param: String::new(), message: message.into(), code: "server_error".into() };
        sqlx::query!(
            "UPDATE plans SET status = 'failed', error = $2, taken_until = NULL
             WHERE status = 'queued' AND taken_until < now() AND epoch >= $1",
            MOST_HOLDS,
            super::queue::customer_error(&error),
        )
        .execute(&self.pool)
        .await?;
        let row = sqlx::query!(
            r#"WITH next AS (
                SELECT id FROM plans
                WHERE status = 'queued' AND coalesce(taken_until < now(), true) AND epoch < $3
                    AND (model = ANY ($1) OR $4 AND model ~ $5 AND NOT EXISTS (
                        SELECT 1 FROM hosts WHERE seen_at > now() - make_interval(secs => $6)
                            AND models @> jsonb_build_array(jsonb_build_object('name', plans.model))))
                ORDER BY created_at LIMIT 1 FOR UPDATE SKIP LOCKED)
               UPDATE plans SET epoch = epoch + 1, taken_until = now() + make_interval(secs => $2)
               FROM next WHERE plans.id = next.id
               RETURNING plans.id, project_id, epoch, model, training_files, validation_files,
                    training AS "training: Json<TrainingSpec>", extract(epoch FROM created_at)::bigint AS "created_at!""#,
            models,
            lease.as_secs_f64(),
            MOST_HOLDS,
            fetches,
            hub_name::PATTERN,
            super::hosts::HOST_LIFE.as_secs_f64(),
        )
        .fetch_optional(&self.pool)
        .await?;
        let files = |ids: Vec<String>| ids.iter().map(|id| super::stored_id(id)).collect::<Result<Vec<FileId>, _>>();
        let taken = row.map(|row| {
            let plan = NewPlan {
                project: super::stored_id(&row.project_id)?,
                model: row.model,
                training_files: files(row.training_files)?,
                validation_files: files(row.validation_files)?,
                training: row.training.0,
            };
            Ok(TakenPlan { id: super::stored_id(&row.id)?, epoch: row.epoch, plan, created_at: row.created_at })
        });
        taken.transpose()
    }

    /// Holds a plan for so long from now on. False when it is somebody else's.
    pub async fn renew_plan(&self, id: &PlanId, epoch: i64, lease: Duration) -> Result<bool, Error> {
        let done = sqlx::query!(
            "UPDATE plans SET taken_until = now() + make_interval(secs => $3)
             WHERE id = $1 AND epoch = $2 AND status = 'queued'",
            id.as_str(),
            epoch,
            lease.as_secs_f64(),
        );
        Ok(done.execute(&self.pool).await?.rows_affected() == 1)
    }

    /// Answers a plan with what its data came to, or with what is wrong. False when it is somebody else's.
    pub async fn answer_plan(
        &self,
        id: &PlanId,
        epoch: i64,
        answer: Result<&DataSummary, &Invalid>,
    ) -> Result<bool, Error> {
        let (status, summary, error) = match answer {
            Ok(summary) => ("ready", Some(Json(summary)), None),
            Err(error) => ("failed", None, Some(super::queue::customer_error(error))),
        };
        let done = sqlx::query!(
            "UPDATE plans SET status = $3, summary = $4, error = $5, taken_until = NULL
             WHERE id = $1 AND epoch = $2 AND status = 'queued'",
            id.as_str(),
            epoch,
            status,
            summary as _,
            error,
        );
        Ok(done.execute(&self.pool).await?.rows_affected() == 1)
    }
}
