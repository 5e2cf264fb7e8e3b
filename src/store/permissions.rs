//! Projects to which checkpoints were opened: they may look at the model and download it (`checkpoints.rs`).

use super::{Error, Listed, Order, Page, Store};
use crate::domain::{CheckpointId, PermissionId};

/// One permission. Times are Unix seconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permission {
    pub id: PermissionId,
    pub project: String,
    pub created_at: i64,
}

struct Row {
    id: String,
    project_id: String,
    created_at: i64,
}

/// `SELECT` of [`Row`]s with what follows `FROM checkpoint_permissions`.
macro_rules! select_permissions {
    ($rest:literal $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            Row,
            r#"SELECT id, project_id, extract(epoch FROM created_at)::bigint AS "created_at!"
               FROM checkpoint_permissions "# + $rest
            $(, $argument)*
        )
    };
}

impl Store {
    /// Opens a checkpoint to projects; answers their permissions, those that were there before with the others.
    pub async fn permit(&self, checkpoint: &CheckpointId, projects: &[String]) -> Result<Vec<Permission>, Error> {
        let ids: Vec<String> = projects.iter().map(|_| PermissionId::random().to_string()).collect();
        sqlx::query!(
            "INSERT INTO checkpoint_permissions (id, checkpoint_id, project_id)
             SELECT id, $1, project FROM unnest($2::text[], $3::text[]) AS new (id, project)
             ON CONFLICT (checkpoint_id, project_id) DO NOTHING",
            checkpoint.as_str(),
            &ids,
            projects,
        )
        .execute(&self.pool)
        .await?;
        let rows = select_permissions!(
            "WHERE checkpoint_id = $1 AND project_id = ANY ($2) ORDER BY seq DESC",
            checkpoint.as_str(),
            projects,
        );
        rows.fetch_all(&self.pool).await?.into_iter().map(Permission::try_from).collect()
    }

    /// Permissions of a checkpoint, those of one project only if it is given. `None` when `page.after` names none of them.
    pub async fn list_permissions(
        &self,
        checkpoint: &CheckpointId,
        project: Option<&str>,
        page: &Page,
    ) -> Result<Option<Listed<Permission>>, Error> {
        let after = match &page.after {
            None => None,
            Some(id) => {
                let seq = sqlx::query_scalar!(
                    "SELECT seq FROM checkpoint_permissions WHERE checkpoint_id = $1 AND id = $2",
                    checkpoint.as_str(),
                    id
                );
                match seq.fetch_optional(&self.pool).await? {
                    None => return Ok(None),
                    Some(seq) => Some(seq),
                }
            }
        };
        let rows = match page.order {
            Order::NewestFirst => {
                select_permissions!(
                    "WHERE checkpoint_id = $1 AND ($2::text IS NULL OR project_id = $2) AND ($3::bigint IS NULL OR seq < $3)
                     ORDER BY seq DESC LIMIT $4",
                    checkpoint.as_str(),
                    project,
                    after,
                    page.fetch(),
                )
                .fetch_all(&self.pool)
                .await?
            }
            Order::OldestFirst => {
                select_permissions!(
                    "WHERE checkpoint_id = $1 AND ($2::text IS NULL OR project_id = $2) AND ($3::bigint IS NULL OR seq > $3)
                     ORDER BY seq LIMIT $4",
                    checkpoint.as_str(),
                    project,
                    after,
                    page.fetch(),
                )
                .fetch_all(&self.pool)
                .await?
            }
        };
        Ok(Some(page.listed(rows.into_iter().map(Permission::try_from).collect::<Result<_, _>>()?)))
    }

    /// Takes a permission back; false when there is none.
    pub async fn revoke(&self, checkpoint: &CheckpointId, id: &PermissionId) -> Result<bool, Error> {
        let done = sqlx::query!(
            "DELETE FROM checkpoint_permissions WHERE checkpoint_id = $1 AND id = $2",
            checkpoint.as_str(),
            id.as_str()
        );
        Ok(done.execute(&self.pool).await?.rows_affected() == 1)
    }
}

impl TryFrom<Row> for Permission {
    type Error = Error;

    fn try_from(row: Row) -> Result<Self, Error> {
        Ok(Self { id: super::stored_id(&row.id)?, project: row.project_id, created_at: row.created_at })
    }
}
