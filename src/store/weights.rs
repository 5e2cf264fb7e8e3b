//! Bytes of checkpoints, in an object store: a local folder by default.
//!
//! Keys are `checkpoints/<checkpoint id>/<path>`. Whole files go in and are checked against their digest on the way;
//! ranges stream out. Knows nothing of rows: a file is downloadable only when `checkpoints.rs` has recorded it.

use std::{ops::Range, path::Path, sync::Arc, time::SystemTime};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream::BoxStream};
use object_store::{
    GetOptions, GetRange, GetResultPayload, ObjectStore, ObjectStoreExt, WriteMultipart, local::LocalFileSystem,
};
use sha2::{Digest, Sha256};
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt},
};
use tokio_util::io::ReaderStream;

use super::Error;
use crate::domain::{CheckpointId, hex, progress::WrittenFile};

/// Bytes read at a time, in and out.
const BLOCK: usize = 512 << 10;
/// Bytes of one part of a multipart put; remote stores demand at least 5 MiB.
const PART: usize = 8 << 20;
/// Parts under way at once.
const PARTS_IN_FLIGHT: usize = 2;

/// A stream of file contents.
pub type ByteStream = BoxStream<'static, Result<Bytes, Error>>;

/// The object store that holds checkpoints. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Weights {
    objects: Arc<dyn ObjectStore>,
}

impl Weights {
    /// A folder on local disk, made where it is missing. Files and their names are synced before a put returns.
    pub fn local(folder: &Path) -> Result<Self, Error> {
        std::fs::create_dir_all(folder)?;
        let objects = LocalFileSystem::new_with_prefix(folder)?.with_fsync(true).with_automatic_cleanup(true);
        Ok(Self { objects: Arc::new(objects) })
    }

    /// Stores the local file `source` as `file.path` of a checkpoint. Its bytes must have the size and digest that `file`
    /// names, else nothing is stored and the error is [`Error::Corrupt`].
    pub async fn put(&self, checkpoint: &CheckpointId, file: &WrittenFile, source: &Path) -> Result<(), Error> {
        let mut reader = ReaderStream::with_capacity(File::open(source).await?, BLOCK);
        let upload = self.objects.put_multipart(&key(checkpoint, &file.path)).await?;
        let mut upload = WriteMultipart::new_with_chunk_size(upload, PART);
        let mut seen = Seen::default();
        while let Some(block) = reader.next().await {
            let block = match block {
                Ok(block) => block,
                Err(error) => {
                    upload.abort().await?;
                    return Err(error.into());
                }
            };
            seen.add(&block);
            upload.wait_for_capacity(PARTS_IN_FLIGHT).await?;
            upload.put(block);
        }
        if let Err(error) = seen.expect(file) {
            upload.abort().await?;
            return Err(error);
        }
        upload.finish().await?;
        Ok(())
    }

    /// Streams `range` of one file. `None` where there is no such object.
    pub async fn read(
        &self,
        checkpoint: &CheckpointId,
        path: &str,
        range: Range<u64>,
    ) -> Result<Option<ByteStream>, Error> {
        if range.is_empty() {
            return Ok(Some(futures_util::stream::empty().boxed()));
        }
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
        let found = match self.objects.get_opts(&key(checkpoint, path), options).await {
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let range = found.range.clone();
        Ok(Some(match found.payload {
            // The store's own stream reads 8 KiB at a time.
            GetResultPayload::File(file, _) => {
                let mut file = File::from_std(file);
                file.seek(std::io::SeekFrom::Start(range.start)).await?;
                ReaderStream::with_capacity(file.take(range.end - range.start), BLOCK).map_err(Error::from).boxed()
            }
            GetResultPayload::Stream(stream) => stream.map_err(Error::from).boxed(),
        }))
    }

    /// Copies one file out to `target` on local disk, synced and checked against its digest. `target` must not exist.
    pub async fn copy_out(&self, checkpoint: &CheckpointId, file: &WrittenFile, target: &Path) -> Result<(), Error> {
        let Some(mut stream) = self.read(checkpoint, &file.path, 0..file.bytes).await? else {
            return Err(Error::Corrupt(format!("{} of {checkpoint} is missing from the object store", file.path)));
        };
        let mut out = File::create_new(target).await?;
        let mut seen = Seen::default();
        while let Some(block) = stream.try_next().await? {
            seen.add(&block);
            out.write_all(&block).await?;
        }
        out.sync_all().await?;
        seen.expect(file)
    }

    /// Removes every file of a checkpoint; removing what is not there is no error.
    pub async fn delete(&self, checkpoint: &CheckpointId) -> Result<(), Error> {
        let found = self.objects(checkpoint).await?;
        self.delete_objects(found.into_iter().map(|(path, _)| path).collect()).await
    }

    /// Checkpoints that have anything here.
    pub(super) async fn checkpoints(&self) -> Result<Vec<CheckpointId>, Error> {
        let listed = self.objects.list_with_delimiter(Some(&object_store::path::Path::from("checkpoints"))).await?;
        let folders = listed.common_prefixes.iter();
        // What else lies there is not ours to touch.
        Ok(folders.filter_map(|path| path.filename()?.parse().ok()).collect())
    }

    /// Every object of a checkpoint, with the time of its last change.
    pub(super) async fn objects(
        &self,
        checkpoint: &CheckpointId,
    ) -> Result<Vec<(object_store::path::Path, SystemTime)>, Error> {
        let prefix = object_store::path::Path::from_iter(["checkpoints", checkpoint.as_str()]);
        let found = self.objects.list(Some(&prefix));
        Ok(found.map_ok(|meta| (meta.location, meta.last_modified.into())).try_collect().await?)
    }

    /// Removes objects; removing what is not there is no error.
    pub(super) async fn delete_objects(&self, paths: Vec<object_store::path::Path>) -> Result<(), Error> {
        let mut done = self.objects.delete_stream(futures_util::stream::iter(paths).map(Ok).boxed());
        while let Some(gone) = done.next().await {
            match gone {
                Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Each `/`-separated part is escaped where it holds anything special, so `..` stays inside the folder.
pub(super) fn key(checkpoint: &CheckpointId, path: &str) -> object_store::path::Path {
    ["checkpoints", checkpoint.as_str()].into_iter().chain(path.split('/')).collect()
}

/// Size and digest of what has passed by.
#[derive(Default)]
struct Seen {
    bytes: u64,
    sha256: Sha256,
}

impl Seen {
    fn add(&mut self, block: &[u8]) {
        self.bytes += block.len() as u64;
        self.sha256.update(block);
    }

    fn expect(self, file: &WrittenFile) -> Result<(), Error> {
        let digest = hex(&self.sha256.finalize());
        if self.bytes == file.bytes && digest == file.sha256 {
            return Ok(());
        }
        Err(Error::Corrupt(format!(
            "{} should hold {} bytes with sha256 {}, but holds {} with {digest}",
            file.path, file.bytes, file.sha256, self.bytes
        )))
    }
}
