//! Projects: whose files, uploads, jobs, plans and webhooks are whose.
//!
//! What something belongs to never changes, so a look at the owner holds for as long as the thing is there.

use super::{Error, Store};
use crate::domain::ProjectId;

/// One project. Times are Unix seconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Project {
    pub id: ProjectId,
    pub name: String,
    pub created_at: i64,
}

/// A kind of thing that belongs to a project.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    File,
    Upload,
    Job,
    Plan,
    Webhook,
}

struct Row {
    id: String,
    name: String,
    created_at: i64,
}

/// `SELECT` of [`Row`]s with what follows `FROM projects`.
macro_rules! select_projects {
    ($rest:literal $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            Row,
            r#"SELECT id, name, extract(epoch FROM created_at)::bigint AS "created_at!" FROM projects "# + $rest
            $(, $argument)*
        )
    };
}

impl Store {
    /// Makes a project. `None` when there is one of that name.
    pub async fn create_project(&self, name: &str) -> Result<Option<Project>, Error> {
        let id = ProjectId::random();
        sqlx::query!(
            "INSERT INTO projects (id, name) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING",
            id.as_str(),
            name
        )
        .execute(&self.pool)
        .await?;
        let row = select_projects!("WHERE id = $1", id.as_str()).fetch_optional(&self.pool).await?;
        row.map(Project::try_from).transpose()
    }

    /// All projects, the oldest first.
    pub async fn projects(&self) -> Result<Vec<Project>, Error> {
        select_projects!("ORDER BY seq").fetch_all(&self.pool).await?.into_iter().map(Project::try_from).collect()
    }

    /// The project of this id or, where there is none, of this name.
    pub async fn project(&self, id_or_name: &str) -> Result<Option<Project>, Error> {
        let row = select_projects!("WHERE id = $1 OR name = $1 ORDER BY id <> $1 LIMIT 1", id_or_name);
        row.fetch_optional(&self.pool).await?.map(Project::try_from).transpose()
    }

    /// True when there is something of this kind and id, and it belongs to the project.
    pub async fn owns(&self, project: &ProjectId, kind: Kind, id: &str) -> Result<bool, Error> {
        let project = project.as_str();
        let found = match kind {
            Kind::File => {
                sqlx::query_scalar!(
                    r#"SELECT EXISTS (SELECT 1 FROM files WHERE id = $1 AND project_id = $2) AS "owns!""#,
                    id,
                    project
                )
                .fetch_one(&self.pool)
                .await?
            }
            Kind::Upload => {
                sqlx::query_scalar!(
                    r#"SELECT EXISTS (SELECT 1 FROM uploads WHERE id = $1 AND project_id = $2) AS "owns!""#,
                    id,
                    project
                )
                .fetch_one(&self.pool)
                .await?
            }
            Kind::Job => {
                sqlx::query_scalar!(
                    r#"SELECT EXISTS (SELECT 1 FROM jobs WHERE id = $1 AND project_id = $2) AS "owns!""#,
                    id,
                    project
                )
                .fetch_one(&self.pool)
                .await?
            }
            Kind::Plan => {
                sqlx::query_scalar!(
                    r#"SELECT EXISTS (SELECT 1 FROM plans WHERE id = $1 AND project_id = $2) AS "owns!""#,
                    id,
                    project
                )
                .fetch_one(&self.pool)
                .await?
            }
            Kind::Webhook => {
                sqlx::query_scalar!(
                    r#"SELECT EXISTS (SELECT 1 FROM webhooks WHERE id = $1 AND project_id = $2) AS "owns!""#,
                    id,
                    project
                )
                .fetch_one(&self.pool)
                .await?
            }
        };
        Ok(found)
    }
}

impl TryFrom<Row> for Project {
    type Error = Error;

    fn try_from(row: Row) -> Result<Self, Error> {
        Ok(Self { id: super::stored_id(&row.id)?, name: row.name, created_at: row.created_at })
    }
}
