//! Uploads in parts: each part a blob of its own, and at the end one file that is the list of them.
//!
//! A part is recorded in the commit that makes its bytes durable, so what was answered is not lost, whoever dies. An upload
//! ends once, under its row's lock; its parts' rows go with that commit, and the blobs that no file took go after it, or
//! with the sweep.

use std::time::Duration;

use sqlx::PgConnection;

use super::{
    Error, Listed, Order, Page, Store,
    blobs::{self, SpooledBlob},
    files::NewFile,
    quotas,
};
use crate::domain::{FileId, PartId, ProjectId, UploadId};

mod completion;

pub use completion::Completion;

/// Life of an upload after its creation, and again after each part.
pub const UPLOAD_LIFE: Duration = Duration::from_hours(1);
/// Most parts of an upload, those counted that a client sent twice.
pub const MAX_PARTS: i64 = 10_000;
/// How long the row of an ended upload is kept.
const RECORD_LIFE: Duration = Duration::from_hours(30 * 24);
/// Uploads that one sweep takes on.
const SWEEP_BATCH: i64 = 100;

/// Where an upload stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UploadStatus {
    Pending,
    Completed,
    Cancelled,
    Expired,
}

impl UploadStatus {
    /// The word used in the API and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
        }
    }

    fn parse(word: &str) -> Result<Self, Error> {
        let all = [Self::Pending, Self::Completed, Self::Cancelled, Self::Expired];
        let found = all.into_iter().find(|status| status.as_str() == word);
        found.ok_or_else(|| Error::Corrupt(format!("{word} is not a status of an upload")))
    }
}

/// One upload. Times are Unix seconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upload {
    pub id: UploadId,
    pub project: ProjectId,
    pub filename: String,
    pub purpose: String,
    pub mime_type: String,
    /// Size of the whole, as promised.
    pub bytes: u64,
    pub status: UploadStatus,
    pub created_at: i64,
    pub expires_at: i64,
    /// What it was completed with.
    pub part_ids: Option<Vec<String>>,
    /// What came of it, unless that was deleted since.
    pub file: Option<FileId>,
    /// Life of the file, where it has an end.
    file_life: Option<Duration>,
}

/// An upload to be begun, every value checked.
#[derive(Debug, Clone)]
pub struct NewUpload {
    pub file: NewFile,
    pub mime_type: String,
    pub bytes: u64,
}

/// One part. Times are Unix seconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    pub id: PartId,
    pub upload: UploadId,
    pub bytes: u64,
    /// Lower-case hex.
    pub sha256: String,
    pub created_at: i64,
}

/// What became of a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Added {
    Part(Part),
    Absent,
    /// The upload has ended.
    Ended(UploadStatus),
    /// The upload holds as many parts, or bytes, as one may.
    Full,
}

/// What became of a wish to cancel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UploadCancellation {
    Done(Box<Upload>),
    Absent,
    Ended(UploadStatus),
}

struct Row {
    id: String,
    project_id: String,
    filename: String,
    purpose: String,
    mime_type: String,
    bytes: i64,
    status: String,
    part_ids: Option<Vec<String>>,
    file_id: Option<String>,
    file_life: Option<f64>,
    created_at: i64,
    expires_at: i64,
}

/// `SELECT` of [`Row`]s with what follows `FROM uploads`. A pending upload whose time is over is told as expired at once.
macro_rules! select_uploads {
    ($rest:literal $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            Row,
            r#"SELECT id, project_id, filename, purpose, mime_type, bytes, part_ids, file_id, file_life,
                CASE WHEN status = 'pending' AND expires_at < now() THEN 'expired' ELSE status END AS "status!",
                extract(epoch FROM created_at)::bigint AS "created_at!",
                extract(epoch FROM expires_at)::bigint AS "expires_at!" FROM uploads "# + $rest
            $(, $argument)*
        )
    };
}

struct PartRow {
    id: String,
    upload_id: String,
    bytes: i64,
    sha256: String,
    created_at: i64,
}

/// `SELECT` of [`PartRow`]s with what follows `FROM upload_parts`.
macro_rules! select_parts {
    ($rest:literal $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            PartRow,
            r#"SELECT id, upload_id, bytes, sha256, extract(epoch FROM created_at)::bigint AS "created_at!"
               FROM upload_parts "# + $rest
            $(, $argument)*
        )
    };
}

impl Store {
    /// Begins an upload, for which there must be room.
    pub async fn create_upload(&self, new: &NewUpload) -> Result<Upload, Error> {
        let id = UploadId::random();
        let mut transaction = self.pool.begin().await?;
        quotas::check_bytes(&mut transaction, &new.file.project, new.bytes).await?;
        sqlx::query!(
            "INSERT INTO uploads (id, filename, purpose, mime_type, bytes, file_life, expires_at, project_id)
             VALUES ($1, $2, $3, $4, $5, $6, now() + make_interval(secs => $7), $8)",
            id.as_str(),
            new.file.filename,
            new.file.purpose,
            new.mime_type,
            new.bytes as i64,
            new.file.expires_after.map(|life| life.as_secs_f64()),
            UPLOAD_LIFE.as_secs_f64(),
            new.file.project.as_str(),
        )
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        select_uploads!("WHERE id = $1", id.as_str()).fetch_one(&self.pool).await?.try_into()
    }

    /// One upload.
    pub async fn upload(&self, id: &UploadId) -> Result<Option<Upload>, Error> {
        let row = select_uploads!("WHERE id = $1", id.as_str()).fetch_optional(&self.pool).await?;
        row.map(Upload::try_from).transpose()
    }

    /// Uploads of a project, newest first. `None` when `page.after` names none of them.
    pub async fn list_uploads(&self, project: &ProjectId, page: &Page) -> Result<Option<Listed<Upload>>, Error> {
        let before = match &page.after {
            None => i64::MAX,
            Some(id) => {
                let seq = sqlx::query_scalar!(
                    "SELECT seq FROM uploads WHERE id = $1 AND project_id = $2",
                    id,
                    project.as_str()
                );
                match seq.fetch_optional(&self.pool).await? {
                    None => return Ok(None),
                    Some(seq) => seq,
                }
            }
        };
        let rows = select_uploads!(
            "WHERE project_id = $3 AND seq < $1 ORDER BY seq DESC LIMIT $2",
            before,
            page.fetch(),
            project.as_str()
        );
        let rows = rows.fetch_all(&self.pool).await?;
        Ok(Some(page.listed(rows.into_iter().map(Upload::try_from).collect::<Result<_, _>>()?)))
    }

    /// Parts of a pending upload. `None` when `page.after` names none of them.
    pub async fn list_parts(&self, upload: &UploadId, page: &Page) -> Result<Option<Listed<Part>>, Error> {
        let after = match &page.after {
            None => None,
            Some(id) => {
                let seq = sqlx::query_scalar!(
                    "SELECT seq FROM upload_parts WHERE upload_id = $1 AND id = $2",
                    upload.as_str(),
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
                select_parts!(
                    "WHERE upload_id = $1 AND ($2::bigint IS NULL OR seq < $2) ORDER BY seq DESC LIMIT $3",
                    upload.as_str(),
                    after,
                    page.fetch(),
                )
                .fetch_all(&self.pool)
                .await?
            }
            Order::OldestFirst => {
                select_parts!(
                    "WHERE upload_id = $1 AND ($2::bigint IS NULL OR seq > $2) ORDER BY seq LIMIT $3",
                    upload.as_str(),
                    after,
                    page.fetch(),
                )
                .fetch_all(&self.pool)
                .await?
            }
        };
        Ok(Some(page.listed(rows.into_iter().map(Part::try_from).collect::<Result<_, _>>()?)))
    }

    /// Makes a part of a finished blob, which is durable when this returns; without a part, the blob is deleted. The upload
    /// lives on from here for as long as a new one would. `most_bytes` is what all its parts may hold together.
    pub async fn add_part(&self, upload: &UploadId, blob: SpooledBlob, most_bytes: u64) -> Result<Added, Error> {
        let added = self.try_add_part(upload, &blob, most_bytes).await?;
        if !matches!(added, Added::Part(_)) {
            self.discard(blob).await?;
        }
        Ok(added)
    }

    async fn try_add_part(&self, upload: &UploadId, blob: &SpooledBlob, most_bytes: u64) -> Result<Added, Error> {
        let mut transaction = self.pool.begin().await?;
        match lock(&mut transaction, upload).await? {
            None => return Ok(Added::Absent),
            Some(found) if found.status != UploadStatus::Pending => return Ok(Added::Ended(found.status)),
            Some(_) => {}
        }
        let held = sqlx::query!(
            r#"SELECT count(*) AS "parts!", coalesce(sum(bytes), 0)::bigint AS "bytes!"
               FROM upload_parts WHERE upload_id = $1"#,
            upload.as_str()
        )
        .fetch_one(&mut *transaction)
        .await?;
        if held.parts >= MAX_PARTS || held.bytes as u64 + blob.bytes > most_bytes {
            return Ok(Added::Full);
        }
        blobs::seal(&mut transaction, blob).await?;
        let id = PartId::random();
        sqlx::query!(
            "INSERT INTO upload_parts (id, upload_id, bytes, sha256, blob_id) VALUES ($1, $2, $3, $4, $5)",
            id.as_str(),
            upload.as_str(),
            blob.bytes as i64,
            blob.sha256,
            blob.id,
        )
        .execute(&mut *transaction)
        .await?;
        prolong(&mut transaction, upload).await?;
        let row = select_parts!("WHERE id = $1", id.as_str()).fetch_one(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(Added::Part(row.try_into()?))
    }

    /// Cancels a pending upload and deletes its parts. Cancelling again changes nothing.
    pub async fn cancel_upload(&self, id: &UploadId) -> Result<UploadCancellation, Error> {
        let mut transaction = self.pool.begin().await?;
        let Some(upload) = lock(&mut transaction, id).await? else { return Ok(UploadCancellation::Absent) };
        match upload.status {
            UploadStatus::Cancelled => return Ok(UploadCancellation::Done(Box::new(upload))),
            UploadStatus::Pending => {}
            status => return Ok(UploadCancellation::Ended(status)),
        }
        let blobs = drop_parts(&mut transaction, id.as_str()).await?;
        sqlx::query!("UPDATE uploads SET status = 'cancelled' WHERE id = $1", id.as_str())
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        self.discard_blobs(blobs).await?;
        Ok(UploadCancellation::Done(Box::new(Upload { status: UploadStatus::Cancelled, ..upload })))
    }

    /// Ends pending uploads whose time is over, deletes their parts, and forgets uploads that ended long ago. Returns how
    /// many ended. Safe to run anywhere at any time.
    pub async fn sweep_uploads(&self) -> Result<u64, Error> {
        let mut transaction = self.pool.begin().await?;
        let expired = sqlx::query_scalar!(
            "UPDATE uploads SET status = 'expired' WHERE id IN (
                SELECT id FROM uploads WHERE status = 'pending' AND expires_at < now() LIMIT $1 FOR UPDATE SKIP LOCKED)
             RETURNING id",
            SWEEP_BATCH
        )
        .fetch_all(&mut *transaction)
        .await?;
        let mut blobs = Vec::new();
        for id in &expired {
            blobs.extend(drop_parts(&mut transaction, id).await?);
        }
        transaction.commit().await?;
        self.discard_blobs(blobs).await?;
        sqlx::query!(
            "DELETE FROM uploads WHERE status <> 'pending' AND expires_at < now() - make_interval(secs => $1)",
            RECORD_LIFE.as_secs_f64()
        )
        .execute(&self.pool)
        .await?;
        Ok(expired.len() as u64)
    }
}

/// The upload, its row locked until the transaction ends.
async fn lock(connection: &mut PgConnection, id: &UploadId) -> Result<Option<Upload>, Error> {
    let row = select_uploads!("WHERE id = $1 FOR UPDATE", id.as_str()).fetch_optional(connection).await?;
    row.map(Upload::try_from).transpose()
}

async fn prolong(connection: &mut PgConnection, id: &UploadId) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE uploads SET expires_at = greatest(expires_at, now() + make_interval(secs => $2))
         WHERE id = $1 AND status = 'pending'",
        id.as_str(),
        UPLOAD_LIFE.as_secs_f64()
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Takes the parts' rows away; answers the blobs that they held.
async fn drop_parts(connection: &mut PgConnection, id: &str) -> Result<Vec<String>, Error> {
    let blobs = sqlx::query_scalar!("DELETE FROM upload_parts WHERE upload_id = $1 RETURNING blob_id", id);
    Ok(blobs.fetch_all(connection).await?)
}

impl TryFrom<Row> for Upload {
    type Error = Error;

    fn try_from(row: Row) -> Result<Self, Error> {
        Ok(Self {
            id: super::stored_id(&row.id)?,
            project: super::stored_id(&row.project_id)?,
            filename: row.filename,
            purpose: row.purpose,
            mime_type: row.mime_type,
            bytes: row.bytes as u64,
            status: UploadStatus::parse(&row.status)?,
            created_at: row.created_at,
            expires_at: row.expires_at,
            part_ids: row.part_ids,
            file: row.file_id.as_deref().map(super::stored_id).transpose()?,
            file_life: row.file_life.map(Duration::from_secs_f64),
        })
    }
}

impl TryFrom<PartRow> for Part {
    type Error = Error;

    fn try_from(row: PartRow) -> Result<Self, Error> {
        Ok(Self {
            id: super::stored_id(&row.id)?,
            upload: super::stored_id(&row.upload_id)?,
            bytes: row.bytes as u64,
            sha256: row.sha256,
            created_at: row.created_at,
        })
    }
}
