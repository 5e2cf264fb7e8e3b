//! What is kept of checkpoints: the state for continuing only beside the newest of a job, the model files of all of them,
//! and no object without a row.
//!
//! Rows go first, bytes after: a row never names bytes that are gone. What a crash leaves between the two, the sweep finds.

use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, SystemTime},
};

use super::{Error, Store, weights::key};
use crate::domain::{CheckpointId, JobId, ProjectId};

/// Objects without a row that are younger than this may belong to a checkpoint that is being stored.
pub const GARBAGE_AGE: Duration = Duration::from_hours(24);

/// What became of a wish to delete a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelDeletion {
    Deleted,
    Absent,
    /// Its job has not ended and may go on from it.
    InUse(JobId),
}

impl Store {
    /// Deletes a fine-tuned model of a project: its checkpoint's row, and then the bytes, unless the job that it belongs to has not
    /// ended. Other checkpoints of the job are models of their own and stay.
    pub async fn delete_model(&self, project: &ProjectId, name: &str) -> Result<ModelDeletion, Error> {
        let mut transaction = self.pool.begin().await?;
        let found = sqlx::query!(
            r#"SELECT c.id, c.job_id, j.finished_at IS NOT NULL AS "ended!" FROM checkpoints c
               JOIN jobs j ON j.id = c.job_id WHERE c.model_name = $1 AND j.project_id = $2 FOR UPDATE"#,
            name,
            project.as_str()
        )
        .fetch_optional(&mut *transaction)
        .await?;
        let Some(found) = found else { return Ok(ModelDeletion::Absent) };
        if !found.ended {
            return Ok(ModelDeletion::InUse(super::stored_id(&found.job_id)?));
        }
        sqlx::query!("DELETE FROM checkpoints WHERE id = $1", found.id).execute(&mut *transaction).await?;
        transaction.commit().await?;
        // In a task of its own, so that a caller who leaves does not stop it; should the process die, the sweep finds the rest.
        let (weights, id) = (self.weights.clone(), super::stored_id(&found.id)?);
        tokio::spawn(async move { weights.delete(&id).await })
            .await
            .map_err(|error| Error::Io(std::io::Error::other(error)))??;
        Ok(ModelDeletion::Deleted)
    }

    /// Drops the state for continuing of every checkpoint of the job that a newer one with such state has replaced.
    /// Harmless whoever calls it and however late. Answers the number of files dropped.
    pub async fn drop_replaced_state(&self, job: &JobId) -> Result<u64, Error> {
        let gone = sqlx::query!(
            "DELETE FROM checkpoint_files f USING checkpoints c
             WHERE f.checkpoint_id = c.id AND c.job_id = $1 AND f.resume AND c.step < (
                SELECT max(newer.step) FROM checkpoints newer WHERE newer.job_id = $1 AND EXISTS (
                    SELECT 1 FROM checkpoint_files state WHERE state.checkpoint_id = newer.id AND state.resume))
             RETURNING f.checkpoint_id, f.path",
            job.as_str()
        )
        .fetch_all(&self.pool)
        .await?;
        let mut objects = Vec::with_capacity(gone.len());
        for file in &gone {
            objects.push(key(&super::stored_id(&file.checkpoint_id)?, &file.path));
        }
        self.weights.delete_objects(objects).await?;
        Ok(gone.len() as u64)
    }

    /// Deletes objects that no row names and that are older than `age`. Answers how many went.
    pub async fn sweep_weights(&self, age: Duration) -> Result<u64, Error> {
        let mut gone = 0;
        for checkpoint in self.weights.checkpoints().await? {
            let found = self.weights.objects(&checkpoint).await?;
            let old = |modified: &SystemTime| modified.elapsed().is_ok_and(|elapsed| elapsed >= age);
            let candidates: BTreeMap<_, _> = found.into_iter().filter(|(_, modified)| old(modified)).collect();
            if candidates.is_empty() {
                continue;
            }
            let named = self.named_objects(&checkpoint).await?;
            let garbage: Vec<_> = candidates.into_keys().filter(|path| !named.contains(path)).collect();
            gone += garbage.len() as u64;
            self.weights.delete_objects(garbage).await?;
        }
        Ok(gone)
    }

    async fn named_objects(&self, checkpoint: &CheckpointId) -> Result<HashSet<object_store::path::Path>, Error> {
        let paths =
            sqlx::query_scalar!("SELECT path FROM checkpoint_files WHERE checkpoint_id = $1", checkpoint.as_str())
                .fetch_all(&self.pool)
                .await?;
        Ok(paths.iter().map(|path| key(checkpoint, path)).collect())
    }
}
