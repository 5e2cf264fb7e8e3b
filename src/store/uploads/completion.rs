//! Completing an upload: its parts' blobs, in the order given, become one file.

use futures_util::TryStreamExt;
use md5::Md5;
use sha2::{Digest, Sha256};

use super::{Upload, UploadStatus, drop_parts, lock, prolong};
use crate::{
    domain::{UploadId, hex},
    store::{
        Error, Store,
        files::{File, NewFile, insert_file},
    },
};

/// What became of a wish to complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Completion {
    Done(Box<Upload>, Option<Box<File>>),
    Absent,
    /// The upload has ended otherwise, or with other parts.
    Ended(UploadStatus),
    /// The part at this place of the list is none of this upload.
    NoSuchPart(usize),
    /// The parts hold so many bytes, which is not what was promised.
    WrongSize {
        promised: u64,
        found: u64,
    },
    /// The whole has this MD5, not the one given.
    WrongMd5(String),
}

struct Digests {
    sha256: String,
    md5: Option<String>,
}

impl Store {
    /// Makes one file of the parts in the order given; those that are not named are dropped. The bytes are read once, for
    /// their digests, and not moved. Completing again with the same parts answers the same.
    pub async fn complete_upload(
        &self,
        id: &UploadId,
        part_ids: &[String],
        md5: Option<&str>,
    ) -> Result<Completion, Error> {
        let Some(upload) = self.upload(id).await? else { return Ok(Completion::Absent) };
        if upload.status != UploadStatus::Pending {
            return self.completed_before(upload, part_ids).await;
        }
        let pieces = match self.pieces_of(id, part_ids).await? {
            Ok(pieces) => pieces,
            // An upload that was ended just now has no parts any more.
            Err(place) => match self.upload(id).await? {
                Some(upload) if upload.status != UploadStatus::Pending => {
                    return self.completed_before(upload, part_ids).await;
                }
                _ => return Ok(Completion::NoSuchPart(place)),
            },
        };
        let found = pieces.iter().map(|(_, bytes)| bytes).sum();
        if found != upload.bytes {
            return Ok(Completion::WrongSize { promised: upload.bytes, found });
        }
        // The reading may take longer than the upload has left.
        prolong(&mut *self.pool.acquire().await?, id).await?;
        let digests = match self.digests(&pieces, md5.is_some()).await {
            // The parts went while they were read: somebody ended the upload meanwhile.
            Err(Error::Corrupt(why)) => match self.upload(id).await? {
                Some(upload) if upload.status != UploadStatus::Pending => {
                    return self.completed_before(upload, part_ids).await;
                }
                _ => return Err(Error::Corrupt(why)),
            },
            digests => digests?,
        };
        match (md5, digests.md5) {
            (Some(given), Some(md5)) if !given.eq_ignore_ascii_case(&md5) => return Ok(Completion::WrongMd5(md5)),
            _ => {}
        }
        self.turn_into_file(&upload, part_ids, &pieces, &digests.sha256).await
    }

    async fn turn_into_file(
        &self,
        upload: &Upload,
        part_ids: &[String],
        pieces: &[(String, u64)],
        sha256: &str,
    ) -> Result<Completion, Error> {
        let id = upload.id.as_str();
        let mut transaction = self.pool.begin().await?;
        match lock(&mut transaction, &upload.id).await? {
            None => return Ok(Completion::Absent),
            Some(now) if now.status != UploadStatus::Pending => {
                drop(transaction);
                return self.completed_before(now, part_ids).await;
            }
            Some(_) => {}
        }
        let blobs = drop_parts(&mut transaction, id).await?;
        let new = NewFile {
            project: upload.project.clone(),
            filename: upload.filename.clone(),
            purpose: upload.purpose.clone(),
            expires_after: upload.file_life,
        };
        let file = insert_file(&mut transaction, pieces, sha256, &new).await?;
        sqlx::query!(
            "UPDATE uploads SET status = 'completed', file_id = $2, part_ids = $3 WHERE id = $1",
            id,
            file.id.as_str(),
            part_ids,
        )
        .execute(&mut *transaction)
        .await?;
        let completed = lock(&mut transaction, &upload.id).await?;
        transaction.commit().await?;
        let unused = blobs.into_iter().filter(|blob| !pieces.iter().any(|(taken, _)| taken == blob)).collect();
        self.discard_blobs(unused).await?;
        Ok(completed.map_or(Completion::Absent, |upload| Completion::Done(Box::new(upload), Some(Box::new(file)))))
    }

    /// The answer to completing an upload that has ended already.
    async fn completed_before(&self, upload: Upload, part_ids: &[String]) -> Result<Completion, Error> {
        if upload.status != UploadStatus::Completed || upload.part_ids.as_deref() != Some(part_ids) {
            return Ok(Completion::Ended(upload.status));
        }
        let file = match &upload.file {
            Some(id) => self.file(id).await?,
            None => None,
        };
        Ok(Completion::Done(Box::new(upload), file.map(Box::new)))
    }

    async fn digests(&self, pieces: &[(String, u64)], with_md5: bool) -> Result<Digests, Error> {
        let mut sha256 = Sha256::new();
        let mut md5 = with_md5.then(Md5::new);
        for (blob, bytes) in pieces {
            let mut stream = self.read_blob(blob, 0..*bytes);
            while let Some(block) = stream.try_next().await? {
                sha256.update(&block);
                if let Some(md5) = &mut md5 {
                    md5.update(&block);
                }
            }
        }
        Ok(Digests { sha256: hex(&sha256.finalize()), md5: md5.map(|md5| hex(&md5.finalize())) })
    }

    /// Blobs and sizes of the named parts in the order of their names; or the place of the first that is none of the upload.
    async fn pieces_of(&self, id: &UploadId, part_ids: &[String]) -> Result<Result<Vec<(String, u64)>, usize>, Error> {
        let rows = sqlx::query!(
            r#"SELECT part.blob_id AS "blob_id?", part.bytes AS "bytes?"
               FROM unnest($2::text[]) WITH ORDINALITY AS named (id, n)
               LEFT JOIN upload_parts part ON part.id = named.id AND part.upload_id = $1 ORDER BY n"#,
            id.as_str(),
            part_ids,
        )
        .fetch_all(&self.pool)
        .await?;
        let pieces = rows.into_iter().enumerate().map(|(place, row)| match (row.blob_id, row.bytes) {
            (Some(blob), Some(bytes)) => Ok((blob, bytes as u64)),
            _ => Err(place),
        });
        Ok(pieces.collect())
    }
}
