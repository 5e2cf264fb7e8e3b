//! Contents of uploaded files, in rows of 1 MiB.
//!
//! Bytes stream in through a [`BlobWriter`] with bounded memory, one short transaction a row, and become visible only when
//! `files.rs` makes a file of the finished blob, or `uploads.rs` a part. Ranges stream out a row at a time. An upload that ends early, for
//! whatever reason, leaves nothing behind: its rows are deleted by the task that wrote them, or later by the sweep.

use std::{ops::Range, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, TryStreamExt, stream};
use sha2::{Digest, Sha256};
use sqlx::PgConnection;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::Instant,
};

use super::{Error, Store, weights::ByteStream};
use crate::domain::{hex, ids::random_suffix};

/// Bytes of every row but a blob's last.
pub const CHUNK: usize = 1 << 20;
/// Rows waiting between the reader and the writers; with those in flight they bound an upload's memory.
const QUEUED_CHUNKS: usize = 4;
/// Inserts under way at once: one fills the socket while the other waits for its commit.
const WRITERS: usize = 2;
/// Rows fetched ahead of a reader.
const READ_AHEAD: usize = 2;
/// How long an upload waits for a database that has gone away before it fails.
const OUTAGE_WINDOW: Duration = Duration::from_secs(30);
/// Pause between tries while the database is away.
const OUTAGE_PAUSE: Duration = Duration::from_millis(500);
/// Rows deleted by one statement, so that no delete comes near the statement time-out.
const DELETE_BATCH: i64 = 256;

/// A blob under way. Dropping it instead of finishing it deletes what was written.
#[derive(Debug)]
pub struct BlobWriter {
    id: String,
    filling: BytesMut,
    bytes: u64,
    sha256: Sha256,
    queue: mpsc::Sender<Bytes>,
    keep: oneshot::Sender<()>,
    spool: JoinHandle<Result<(), Error>>,
}

/// A blob whose rows are all written. It stays invisible, and falls to the sweep, until a file is made of it.
#[derive(Debug)]
pub struct SpooledBlob {
    pub(super) id: String,
    /// Size of the content.
    pub bytes: u64,
    /// Lower-case hex.
    pub sha256: String,
}

impl Store {
    /// Begins a blob.
    pub async fn begin_blob(&self) -> Result<BlobWriter, Error> {
        let id = format!("blob-{}", random_suffix());
        sqlx::query!("INSERT INTO blobs (id) VALUES ($1)", id).execute(&self.pool).await?;
        let (queue, chunks) = mpsc::channel(QUEUED_CHUNKS);
        let (keep, kept) = oneshot::channel();
        let spool = tokio::spawn(self.clone().spool(id.clone(), chunks, kept));
        let filling = BytesMut::with_capacity(CHUNK);
        Ok(BlobWriter { id, filling, bytes: 0, sha256: Sha256::new(), queue, keep, spool })
    }

    /// Deletes a finished blob of which no file will be made.
    pub async fn discard(&self, blob: SpooledBlob) -> Result<(), Error> {
        self.discard_blob(&blob.id).await
    }

    /// Deletes a blob and its rows, in batches. No file may hold it any more.
    pub(super) async fn discard_blob(&self, id: &str) -> Result<(), Error> {
        let last = sqlx::query_scalar!("SELECT max(seq) FROM blob_chunks WHERE blob_id = $1", id)
            .fetch_one(&self.pool)
            .await?
            .unwrap_or(-1);
        let mut from = 0;
        while from <= last {
            sqlx::query!(
                "DELETE FROM blob_chunks WHERE blob_id = $1 AND seq >= $2 AND seq < $3",
                id,
                from,
                from + DELETE_BATCH
            )
            .execute(&self.bulk)
            .await?;
            from += DELETE_BATCH;
        }
        sqlx::query!("DELETE FROM blobs WHERE id = $1", id).execute(&self.pool).await?;
        Ok(())
    }

    /// Streams `range` of a blob, which must lie inside it. A missing row ends the stream with [`Error::Corrupt`].
    pub(super) fn read_blob(&self, id: &str, range: Range<u64>) -> ByteStream {
        if range.is_empty() {
            return stream::empty().boxed();
        }
        let chunk = CHUNK as u64;
        let (store, id) = (self.clone(), id.to_owned());
        stream::iter(range.start / chunk..=(range.end - 1) / chunk)
            .map(move |seq| {
                let start = range.start.max(seq * chunk) - seq * chunk;
                let end = range.end.min((seq + 1) * chunk) - seq * chunk;
                let (store, id) = (store.clone(), id.clone());
                async move { store.read_chunk(&id, seq, start..end).await }
            })
            .buffered(READ_AHEAD)
            .boxed()
    }

    async fn read_chunk(&self, id: &str, seq: u64, part: Range<u64>) -> Result<Bytes, Error> {
        let length = part.end - part.start;
        // substring reads only the pages it needs: the column is stored uncompressed.
        let data = sqlx::query_scalar!(
            r#"SELECT substring(data FROM $3 FOR $4) AS "data!" FROM blob_chunks WHERE blob_id = $1 AND seq = $2"#,
            id,
            seq as i64,
            part.start as i32 + 1,
            length as i32,
        )
        .fetch_optional(&self.bulk)
        .await?;
        match data {
            Some(data) if data.len() as u64 == length => Ok(data.into()),
            _ => Err(Error::Corrupt(format!("row {seq} of {id} is missing or short"))),
        }
    }

    /// Writes the queue's chunks; at its end keeps them only if it was told to.
    async fn spool(
        self,
        id: String,
        mut chunks: mpsc::Receiver<Bytes>,
        mut kept: oneshot::Receiver<()>,
    ) -> Result<(), Error> {
        let written = stream::poll_fn(|context| chunks.poll_recv(context))
            .enumerate()
            .map(Ok)
            .try_for_each_concurrent(WRITERS, |(seq, data)| self.insert_chunk(&id, seq as i64, data))
            .await;
        if written.is_ok() && kept.try_recv().is_ok() {
            return Ok(());
        }
        if let Err(error) = self.discard_blob(&id).await {
            tracing::warn!(blob = id, %error, "an abandoned upload stays until the sweep");
        }
        written
    }

    async fn insert_chunk(&self, id: &str, seq: i64, data: Bytes) -> Result<(), Error> {
        let give_up = Instant::now() + OUTAGE_WINDOW;
        loop {
            let insert =
                sqlx::query!("INSERT INTO blob_chunks (blob_id, seq, data) VALUES ($1, $2, $3)", id, seq, &*data);
            match insert.execute(&self.bulk).await.map_err(Error::from) {
                Ok(_) => return Ok(()),
                // Only this task writes this row, so an earlier try did it and its answer was lost.
                Err(error) if error.constraint() == Some("blob_chunks_pkey") => return Ok(()),
                Err(Error::Unavailable(_)) if Instant::now() < give_up => tokio::time::sleep(OUTAGE_PAUSE).await,
                Err(error) => return Err(error),
            }
        }
    }
}

impl BlobWriter {
    /// Takes the next bytes; waits while the database is behind.
    pub async fn write(&mut self, mut bytes: Bytes) -> Result<(), Error> {
        self.bytes += bytes.len() as u64;
        self.sha256.update(&bytes);
        while !bytes.is_empty() {
            let part = bytes.split_to(bytes.len().min(CHUNK - self.filling.len()));
            self.filling.extend_from_slice(&part);
            if self.filling.len() == CHUNK {
                self.push(CHUNK).await?;
            }
        }
        Ok(())
    }

    /// Bytes taken so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes what is left and waits until every row is in.
    pub async fn finish(mut self) -> Result<SpooledBlob, Error> {
        if !self.filling.is_empty() {
            self.push(0).await?;
        }
        // A spool that has ended already has failed; its own error follows.
        let _ = self.keep.send(());
        drop(self.queue);
        joined(self.spool.await)?;
        Ok(SpooledBlob { id: self.id, bytes: self.bytes, sha256: hex(&self.sha256.finalize()) })
    }

    async fn push(&mut self, next_capacity: usize) -> Result<(), Error> {
        let full = std::mem::replace(&mut self.filling, BytesMut::with_capacity(next_capacity)).freeze();
        if self.queue.send(full).await.is_ok() {
            return Ok(());
        }
        joined((&mut self.spool).await)?;
        Err(Error::Corrupt("the upload's rows were deleted while it ran".into()))
    }
}

/// Seals a finished blob within the transaction that makes something of it, and proves that every byte is there.
///
/// Rows are written without waiting for the disk; the commit of this transaction waits for them all. Should the database
/// have crashed and lost some in between, the count shows it.
pub(super) async fn seal(connection: &mut PgConnection, blob: &SpooledBlob) -> Result<(), Error> {
    let found = sqlx::query!(
        r#"SELECT count(*) AS "chunks!", coalesce(sum(octet_length(data)), 0)::bigint AS "bytes!"
           FROM blob_chunks WHERE blob_id = $1"#,
        blob.id
    )
    .fetch_one(&mut *connection)
    .await?;
    let chunks = blob.bytes.div_ceil(CHUNK as u64);
    if found.bytes as u64 != blob.bytes || found.chunks as u64 != chunks {
        return Err(Error::Corrupt(format!("{} lost rows while it was written", blob.id)));
    }
    sqlx::query!(
        "UPDATE blobs SET bytes = $2, sha256 = $3, complete = true WHERE id = $1",
        blob.id,
        blob.bytes as i64,
        blob.sha256
    )
    .execute(connection)
    .await?;
    Ok(())
}

fn joined(spool: Result<Result<(), Error>, tokio::task::JoinError>) -> Result<(), Error> {
    spool.map_err(|error| Error::Io(std::io::Error::other(error)))?
}
