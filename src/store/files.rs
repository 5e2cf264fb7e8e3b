//! Uploaded files: the row of facts over a blob, from finished upload to deletion.

use std::{ops::Range, path::Path, time::Duration};

use super::{Error, Listed, Order, Page, Store, blobs::SpooledBlob, weights::ByteStream};
use crate::domain::{FileId, JobId};

/// A blob that no file holds is an upload that ended early once it is this old. Uploads themselves are cut off sooner.
pub const ORPHAN_AGE: Duration = Duration::from_hours(24);
/// Rows that one sweep takes on, so that it stays short.
const SWEEP_BATCH: i64 = 100;

/// One uploaded file. Times are Unix seconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    pub id: FileId,
    /// The name it was sent under: a label, never a path.
    pub filename: String,
    pub purpose: String,
    pub bytes: u64,
    /// Lower-case hex.
    pub sha256: String,
    /// `uploaded`, `processed` or `error`.
    pub status: String,
    pub status_details: Option<String>,
    pub created_at: i64,
    pub expires_at: Option<i64>,
    blob_id: String,
}

/// What an upload says of its file beside the bytes.
#[derive(Debug, Clone)]
pub struct NewFile {
    pub filename: String,
    pub purpose: String,
    /// Life of the file, where it has an end.
    pub expires_after: Option<Duration>,
}

/// What became of a wish to delete a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Deletion {
    Deleted,
    Absent,
    /// A job that has not ended needs it.
    InUse(JobId),
}

struct Row {
    id: String,
    filename: String,
    purpose: String,
    bytes: i64,
    sha256: String,
    status: String,
    status_details: Option<String>,
    created_at: i64,
    expires_at: Option<i64>,
    blob_id: String,
}

/// `SELECT` of [`Row`]s with what follows `FROM files`.
macro_rules! select_files {
    ($rest:literal $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            Row,
            r#"SELECT id, filename, purpose, bytes, sha256, status, status_details, blob_id,
                extract(epoch FROM created_at)::bigint AS "created_at!",
                extract(epoch FROM expires_at)::bigint AS expires_at FROM files "# + $rest
            $(, $argument)*
        )
    };
}

impl Store {
    /// Makes a file of a finished blob, in one transaction that also proves that every byte of the blob is there.
    pub async fn create_file(&self, blob: SpooledBlob, new: &NewFile) -> Result<File, Error> {
        let id = FileId::random();
        let mut transaction = self.pool.begin().await?;
        // Rows are written without waiting for the disk; this commit waits for them all. Should the database have crashed
        // and lost some in between, the count shows it.
        let found = sqlx::query!(
            r#"SELECT count(*) AS "chunks!", coalesce(sum(octet_length(data)), 0)::bigint AS "bytes!"
               FROM blob_chunks WHERE blob_id = $1"#,
            blob.id
        )
        .fetch_one(&mut *transaction)
        .await?;
        let chunks = blob.bytes.div_ceil(super::blobs::CHUNK as u64);
        if found.bytes as u64 != blob.bytes || found.chunks as u64 != chunks {
            return Err(Error::Corrupt(format!("{} lost rows while it was written", blob.id)));
        }
        sqlx::query!(
            "UPDATE blobs SET bytes = $2, sha256 = $3, complete = true WHERE id = $1",
            blob.id,
            blob.bytes as i64,
            blob.sha256
        )
        .execute(&mut *transaction)
        .await?;
        // Nothing is left to process: contents are read, and complained about, when a job is validated.
        sqlx::query!(
            "INSERT INTO files (id, filename, purpose, bytes, sha256, status, blob_id, expires_at)
             VALUES ($1, $2, $3, $4, $5, 'processed', $6, now() + make_interval(secs => $7))",
            id.as_str(),
            new.filename,
            new.purpose,
            blob.bytes as i64,
            blob.sha256,
            blob.id,
            new.expires_after.map(|life| life.as_secs_f64()),
        )
        .execute(&mut *transaction)
        .await?;
        let row = select_files!("WHERE id = $1", id.as_str()).fetch_one(&mut *transaction).await?;
        transaction.commit().await?;
        row.try_into()
    }

    /// One file.
    pub async fn file(&self, id: &FileId) -> Result<Option<File>, Error> {
        let row = select_files!("WHERE id = $1", id.as_str()).fetch_optional(&self.pool).await?;
        row.map(File::try_from).transpose()
    }

    /// Files, those of one purpose only if it is given. `None` when `page.after` names no file.
    pub async fn list_files(&self, page: &Page, purpose: Option<&str>) -> Result<Option<Listed<File>>, Error> {
        let after = match &page.after {
            None => None,
            Some(id) => {
                let seq = sqlx::query_scalar!("SELECT seq FROM files WHERE id = $1", id);
                match seq.fetch_optional(&self.pool).await? {
                    None => return Ok(None),
                    seq => seq,
                }
            }
        };
        let rows = match page.order {
            Order::NewestFirst => {
                select_files!(
                    "WHERE ($1::text IS NULL OR purpose = $1) AND ($2::bigint IS NULL OR seq < $2) ORDER BY seq DESC LIMIT $3",
                    purpose,
                    after,
                    page.fetch(),
                )
                .fetch_all(&self.pool)
                .await?
            }
            Order::OldestFirst => {
                select_files!(
                    "WHERE ($1::text IS NULL OR purpose = $1) AND ($2::bigint IS NULL OR seq > $2) ORDER BY seq LIMIT $3",
                    purpose,
                    after,
                    page.fetch(),
                )
                .fetch_all(&self.pool)
                .await?
            }
        };
        let files = rows.into_iter().map(File::try_from).collect::<Result<Vec<_>, _>>()?;
        Ok(Some(page.listed(files)))
    }

    /// Streams `range` of a file's content, which must lie inside it.
    pub fn read_file(&self, file: &File, range: Range<u64>) -> ByteStream {
        self.read_blob(&file.blob_id, range)
    }

    /// Copies a file's content to `target` on local disk, checked against its digest. `target` must not exist.
    pub async fn copy_file(&self, file: &File, target: &Path) -> Result<(), Error> {
        let blob = SpooledBlob { id: file.blob_id.clone(), bytes: file.bytes, sha256: file.sha256.clone() };
        self.copy_blob(&blob, target).await
    }

    /// Deletes a file and its bytes, unless a job that has not ended needs it. Creating a job locks its files, so the two
    /// cannot miss each other.
    pub async fn delete_file(&self, id: &FileId) -> Result<Deletion, Error> {
        let mut transaction = self.pool.begin().await?;
        let blob = sqlx::query_scalar!("SELECT blob_id FROM files WHERE id = $1 FOR UPDATE", id.as_str())
            .fetch_optional(&mut *transaction)
            .await?;
        let Some(blob) = blob else { return Ok(Deletion::Absent) };
        let user = sqlx::query_scalar!(
            "SELECT id FROM jobs WHERE status NOT IN ('succeeded', 'failed', 'cancelled')
               AND ($1 = ANY (training_files) OR $1 = ANY (validation_files)) LIMIT 1",
            id.as_str()
        )
        .fetch_optional(&mut *transaction)
        .await?;
        if let Some(job) = user {
            return Ok(Deletion::InUse(super::stored_id(&job)?));
        }
        sqlx::query!("DELETE FROM files WHERE id = $1", id.as_str()).execute(&mut *transaction).await?;
        transaction.commit().await?;
        // The file is gone from here on. Its rows go in a task of their own, so that a caller who leaves does not stop it.
        let store = self.clone();
        tokio::spawn(async move { store.discard_blob(&blob).await })
            .await
            .map_err(|error| Error::Io(std::io::Error::other(error)))??;
        Ok(Deletion::Deleted)
    }

    /// Deletes files past their end, and blobs older than `orphan_age` that no file holds (normally [`ORPHAN_AGE`]).
    /// Returns how many of either went. Safe to run anywhere at any time.
    pub async fn sweep_files(&self, orphan_age: Duration) -> Result<u64, Error> {
        let mut gone = 0;
        let expired = sqlx::query_scalar!("SELECT id FROM files WHERE expires_at < now() LIMIT $1", SWEEP_BATCH)
            .fetch_all(&self.pool)
            .await?;
        for id in expired {
            gone += u64::from(self.delete_file(&super::stored_id(&id)?).await? == Deletion::Deleted);
        }
        let orphans = sqlx::query_scalar!(
            "SELECT id FROM blobs b WHERE created_at < now() - make_interval(secs => $1)
               AND NOT EXISTS (SELECT 1 FROM files f WHERE f.blob_id = b.id) LIMIT $2",
            orphan_age.as_secs_f64(),
            SWEEP_BATCH
        )
        .fetch_all(&self.pool)
        .await?;
        for blob in orphans {
            self.discard_blob(&blob).await?;
            gone += 1;
        }
        Ok(gone)
    }
}

impl TryFrom<Row> for File {
    type Error = Error;

    fn try_from(row: Row) -> Result<Self, Error> {
        Ok(Self {
            id: super::stored_id(&row.id)?,
            filename: row.filename,
            purpose: row.purpose,
            bytes: row.bytes as u64,
            sha256: row.sha256,
            status: row.status,
            status_details: row.status_details,
            created_at: row.created_at,
            expires_at: row.expires_at,
            blob_id: row.blob_id,
        })
    }
}
