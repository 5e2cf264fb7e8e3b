//! Keys: made, looked up by their digest, revoked. The key itself is nowhere in the database.

use std::time::Duration;

use super::{Error, Store};
use crate::domain::{KeyId, ProjectId, Scope, access::Secret};

/// A key as lists show it. Times are Unix seconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    pub id: KeyId,
    pub project: ProjectId,
    pub name: String,
    pub scope: Scope,
    /// The key's last characters.
    pub hint: String,
    pub created_at: i64,
    pub expires_at: Option<i64>,
    pub revoked_at: Option<i64>,
    pub last_used_at: Option<i64>,
    pub requests_per_minute: Option<u32>,
}

/// A key to be made.
#[derive(Debug, Clone)]
pub struct NewKey<'a> {
    pub project: &'a ProjectId,
    pub name: &'a str,
    pub scope: Scope,
    /// How long it is to live, where not for ever.
    pub life: Option<Duration>,
    /// How often it may be used, where that is limited.
    pub requests_per_minute: Option<u32>,
}

/// What a request's key is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// It may do this, for that project.
    Valid(Grant),
    Revoked,
    Expired,
    /// There is no such key.
    No,
}

/// What a key that holds lets its bearer do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    pub key: KeyId,
    pub project: ProjectId,
    pub scope: Scope,
    pub requests_per_minute: Option<u32>,
}

struct Row {
    id: String,
    project_id: String,
    name: String,
    scope: String,
    hint: String,
    created_at: i64,
    expires_at: Option<i64>,
    revoked_at: Option<i64>,
    last_used_at: Option<i64>,
    requests_per_minute: Option<i32>,
}

/// `SELECT` of [`Row`]s with what follows `FROM api_keys`.
macro_rules! select_keys {
    ($rest:literal $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            Row,
            r#"SELECT id, project_id, name, scope, hint, extract(epoch FROM created_at)::bigint AS "created_at!",
                extract(epoch FROM expires_at)::bigint AS expires_at, extract(epoch FROM revoked_at)::bigint AS revoked_at,
                extract(epoch FROM last_used_at)::bigint AS last_used_at, requests_per_minute FROM api_keys "# + $rest
            $(, $argument)*
        )
    };
}

impl Store {
    /// Keeps a key's digest, and what it may do.
    pub async fn create_key(&self, secret: &Secret, new: &NewKey<'_>) -> Result<Key, Error> {
        let id = KeyId::random();
        sqlx::query!(
            "INSERT INTO api_keys (id, project_id, name, sha256, hint, scope, expires_at, requests_per_minute)
             VALUES ($1, $2, $3, $4, $5, $6, now() + make_interval(secs => $7), $8)",
            id.as_str(),
            new.project.as_str(),
            new.name,
            secret.sha256(),
            secret.hint(),
            new.scope.as_str(),
            new.life.map(|life| life.as_secs_f64()),
            new.requests_per_minute.map(|limit| limit as i32),
        )
        .execute(&self.pool)
        .await?;
        select_keys!("WHERE id = $1", id.as_str()).fetch_one(&self.pool).await?.try_into()
    }

    /// All keys, the oldest first, also those that are expired or revoked.
    pub async fn keys(&self) -> Result<Vec<Key>, Error> {
        select_keys!("ORDER BY seq").fetch_all(&self.pool).await?.into_iter().map(Key::try_from).collect()
    }

    /// Revokes a key, for good; once more changes nothing. False when there is none.
    pub async fn revoke_key(&self, id: &KeyId) -> Result<bool, Error> {
        let done =
            sqlx::query!("UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE id = $1", id.as_str());
        Ok(done.execute(&self.pool).await?.rows_affected() == 1)
    }

    /// True once a key was made, whatever has become of it: a server whose last key is revoked does not open to all.
    pub async fn has_keys(&self) -> Result<bool, Error> {
        let found = sqlx::query_scalar!(r#"SELECT EXISTS (SELECT 1 FROM api_keys) AS "any!""#);
        Ok(found.fetch_one(&self.pool).await?)
    }

    /// Looks a key up. That one which holds was used is noted, once a minute at most.
    pub async fn known_key(&self, secret: &Secret) -> Result<Known, Error> {
        let row = sqlx::query!(
            r#"SELECT id, project_id, scope, requests_per_minute, revoked_at IS NOT NULL AS "revoked!",
                coalesce(expires_at <= now(), false) AS "expired!",
                coalesce(last_used_at < now() - interval '1 minute', true) AS "unnoted!"
               FROM api_keys WHERE sha256 = $1"#,
            secret.sha256()
        )
        .fetch_optional(&self.pool)
        .await?;
        let Some(row) = row else { return Ok(Known::No) };
        if row.revoked {
            return Ok(Known::Revoked);
        }
        if row.expired {
            return Ok(Known::Expired);
        }
        if row.unnoted {
            // Asked again under the row's lock: of requests side by side one writes.
            sqlx::query!(
                "UPDATE api_keys SET last_used_at = now()
                 WHERE id = $1 AND coalesce(last_used_at < now() - interval '1 minute', true)",
                row.id
            )
            .execute(&self.pool)
            .await?;
        }
        Ok(Known::Valid(Grant {
            key: super::stored_id(&row.id)?,
            project: super::stored_id(&row.project_id)?,
            scope: stored_scope(&row.scope)?,
            requests_per_minute: row.requests_per_minute.map(|limit| limit as u32),
        }))
    }
}

fn stored_scope(word: &str) -> Result<Scope, Error> {
    Scope::parse(word).ok_or_else(|| Error::Corrupt(format!("{word} is not a scope")))
}

impl TryFrom<Row> for Key {
    type Error = Error;

    fn try_from(row: Row) -> Result<Self, Error> {
        Ok(Self {
            id: super::stored_id(&row.id)?,
            project: super::stored_id(&row.project_id)?,
            name: row.name,
            scope: stored_scope(&row.scope)?,
            hint: row.hint,
            created_at: row.created_at,
            expires_at: row.expires_at,
            revoked_at: row.revoked_at,
            last_used_at: row.last_used_at,
            requests_per_minute: row.requests_per_minute.map(|limit| limit as u32),
        })
    }
}
