//! Uploaded files: the row of facts over one blob or several in their order, from finished upload to deletion.

use std::{ops::Range, path::Path, time::Duration};

use futures_util::{StreamExt, TryStreamExt, stream};
use sha2::{Digest, Sha256};
use sqlx::PgConnection;
use tokio::{fs, io::AsyncWriteExt};

use super::{
    Error, Listed, Order, Page, Store,
    blobs::{self, SpooledBlob},
    quotas,
    weights::ByteStream,
};
use crate::domain::{FileId, JobId, ProjectId, hex};

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
}

/// What an upload says of its file beside the bytes.
#[derive(Debug, Clone)]
pub struct NewFile {
    pub project: ProjectId,
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
}

/// `SELECT` of [`Row`]s with what follows `FROM files`.
macro_rules! select_files {
    ($rest:literal $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            Row,
            r#"SELECT id, filename, purpose, bytes, sha256, status, status_details,
                extract(epoch FROM created_at)::bigint AS "created_at!",
                extract(epoch FROM expires_at)::bigint AS expires_at FROM files "# + $rest
            $(, $argument)*
        )
    };
}

impl Store {
    /// Makes a file of a finished blob, in one transaction that also proves that every byte of the blob is there.
    pub async fn create_file(&self, blob: SpooledBlob, new: &NewFile) -> Result<File, Error> {
        let mut transaction = self.pool.begin().await?;
        if let Err(error) = quotas::check_bytes(&mut transaction, &new.project, blob.bytes).await {
            drop(transaction);
            self.discard(blob).await?;
            return Err(error);
        }
        blobs::seal(&mut transaction, &blob).await?;
        let pieces = [(blob.id, blob.bytes)];
        let file = insert_file(&mut transaction, &pieces, &blob.sha256, new).await?;
        transaction.commit().await?;
        Ok(file)
    }

    /// One file.
    pub async fn file(&self, id: &FileId) -> Result<Option<File>, Error> {
        let row = select_files!("WHERE id = $1", id.as_str()).fetch_optional(&self.pool).await?;
        row.map(File::try_from).transpose()
    }

    /// Files of a project, those of one purpose only if it is given. `None` when `page.after` names none of them.
    pub async fn list_files(
        &self,
        project: &ProjectId,
        page: &Page,
        purpose: Option<&str>,
    ) -> Result<Option<Listed<File>>, Error> {
        let after = match &page.after {
            None => None,
            Some(id) => {
                let seq = sqlx::query_scalar!(
                    "SELECT seq FROM files WHERE id = $1 AND project_id = $2",
                    id,
                    project.as_str()
                );
                match seq.fetch_optional(&self.pool).await? {
                    None => return Ok(None),
                    seq => seq,
                }
            }
        };
        let rows = match page.order {
            Order::NewestFirst => {
                select_files!(
                    "WHERE project_id = $4 AND ($1::text IS NULL OR purpose = $1) AND ($2::bigint IS NULL OR seq < $2)
                     ORDER BY seq DESC LIMIT $3",
                    purpose,
                    after,
                    page.fetch(),
                    project.as_str(),
                )
                .fetch_all(&self.pool)
                .await?
            }
            Order::OldestFirst => {
                select_files!(
                    "WHERE project_id = $4 AND ($1::text IS NULL OR purpose = $1) AND ($2::bigint IS NULL OR seq > $2)
                     ORDER BY seq LIMIT $3",
                    purpose,
                    after,
                    page.fetch(),
                    project.as_str(),
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
        let (store, id) = (self.clone(), file.id.clone());
        stream::once(async move {
            let pieces = store.pieces(&id, &range).await?;
            let streams = pieces.into_iter().map(move |(blob, at, bytes)| {
                let inner = range.start.max(at) - at..range.end.min(at + bytes) - at;
                Ok::<_, Error>(store.read_blob(&blob, inner))
            });
            Ok::<_, Error>(stream::iter(streams).try_flatten())
        })
        .try_flatten()
        .boxed()
    }

    /// The blobs that hold `range` of a file: where each begins, and its length.
    async fn pieces(&self, file: &FileId, range: &Range<u64>) -> Result<Vec<(String, u64, u64)>, Error> {
        let rows = sqlx::query!(
            "SELECT blob_id, at, bytes FROM file_blobs WHERE file_id = $1 AND at < $3 AND at + bytes > $2 ORDER BY at",
            file.as_str(),
            range.start as i64,
            range.end as i64,
        )
        .fetch_all(&self.pool)
        .await?;
        let pieces: Vec<_> = rows.into_iter().map(|row| (row.blob_id, row.at as u64, row.bytes as u64)).collect();
        let covered: u64 = pieces.iter().map(|(_, at, n)| (at + n).min(range.end) - at.max(&range.start)).sum();
        if covered == range.end - range.start {
            return Ok(pieces);
        }
        Err(Error::Corrupt(format!("bytes {} to {} of {file} are not all there", range.start, range.end)))
    }

    /// Copies a file's content to `target` on local disk, checked against its digest. `target` must not exist.
    pub async fn copy_file(&self, file: &File, target: &Path) -> Result<(), Error> {
        let mut out = fs::File::create_new(target).await?;
        let mut sha256 = Sha256::new();
        let mut stream = self.read_file(file, 0..file.bytes);
        while let Some(block) = stream.try_next().await? {
            sha256.update(&block);
            out.write_all(&block).await?;
        }
        out.flush().await?;
        if hex(&sha256.finalize()) == file.sha256 {
            return Ok(());
        }
        Err(Error::Corrupt(format!("the rows of {} do not have the digest recorded for them", file.id)))
    }

    /// Deletes a file and its bytes, unless a job that has not ended needs it. Creating a job locks its files, so the two
    /// cannot miss each other.
    pub async fn delete_file(&self, id: &FileId) -> Result<Deletion, Error> {
        let mut transaction = self.pool.begin().await?;
        let found = sqlx::query_scalar!("SELECT id FROM files WHERE id = $1 FOR UPDATE", id.as_str())
            .fetch_optional(&mut *transaction)
            .await?;
        if found.is_none() {
            return Ok(Deletion::Absent);
        }
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
        let blobs = sqlx::query_scalar!("DELETE FROM file_blobs WHERE file_id = $1 RETURNING blob_id", id.as_str())
            .fetch_all(&mut *transaction)
            .await?;
        sqlx::query!("DELETE FROM files WHERE id = $1", id.as_str()).execute(&mut *transaction).await?;
        transaction.commit().await?;
        self.discard_blobs(blobs).await?;
        Ok(Deletion::Deleted)
    }

    /// Deletes blobs that nothing names any more, in a task of their own, so that a caller who leaves does not stop it.
    pub(super) async fn discard_blobs(&self, blobs: Vec<String>) -> Result<(), Error> {
        let store = self.clone();
        let discard = async move {
            for blob in blobs {
                store.discard_blob(&blob).await?;
            }
            Ok(())
        };
        tokio::spawn(discard).await.map_err(|error| Error::Io(std::io::Error::other(error)))?
    }

    /// Deletes files past their end, and blobs older than `orphan_age` that nothing holds (normally [`ORPHAN_AGE`]).
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
               AND NOT EXISTS (SELECT 1 FROM file_blobs f WHERE f.blob_id = b.id)
               AND NOT EXISTS (SELECT 1 FROM upload_parts p WHERE p.blob_id = b.id) LIMIT $2",
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

/// Makes a file of sealed blobs, in their order. What names them besides must let go of them in the same transaction.
pub(super) async fn insert_file(
    connection: &mut PgConnection,
    pieces: &[(String, u64)],
    sha256: &str,
    new: &NewFile,
) -> Result<File, Error> {
    let id = FileId::random();
    let lengths: Vec<i64> = pieces.iter().map(|(_, bytes)| *bytes as i64).collect();
    let blobs: Vec<String> = pieces.iter().map(|(blob, _)| blob.clone()).collect();
    // Nothing is left to process: contents are read, and complained about, when a job is validated.
    sqlx::query!(
        "INSERT INTO files (id, filename, purpose, bytes, sha256, status, expires_at, project_id)
         VALUES ($1, $2, $3, $4, $5, 'processed', now() + make_interval(secs => $6), $7)",
        id.as_str(),
        new.filename,
        new.purpose,
        lengths.iter().sum::<i64>(),
        sha256,
        new.expires_after.map(|life| life.as_secs_f64()),
        new.project.as_str(),
    )
    .execute(&mut *connection)
    .await?;
    sqlx::query!(
        "INSERT INTO file_blobs (file_id, at, bytes, blob_id)
         SELECT $1, (sum(bytes) OVER (ORDER BY n) - bytes)::bigint, bytes, blob
         FROM unnest($2::bigint[], $3::text[]) WITH ORDINALITY AS piece (bytes, blob, n)",
        id.as_str(),
        &lengths,
        &blobs,
    )
    .execute(&mut *connection)
    .await?;
    select_files!("WHERE id = $1", id.as_str()).fetch_one(connection).await?.try_into()
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
        })
    }
}
