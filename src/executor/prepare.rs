//! Before a trainer starts: its model, its folder, its data files, and the checkpoint to go on from, on local disk.

use std::{
    io,
    path::{Path, PathBuf},
};

use tokio::fs;

use super::{Context, MOST_ATTEMPTS, devices::Seat, fetch};
use crate::{
    domain::{
        FileId, Invalid, JobId, RunSpec,
        run::{DataFile, Place},
    },
    store::{
        self,
        checkpoints::FileSet,
        queue::{Claim, Settlement, Work},
    },
};

/// Why a run could not be prepared.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error("{0}")]
    Store(#[from] store::Error),
    /// The model could not be fetched this time.
    #[error("{0}")]
    Hub(String),
    #[error("{path}: {source}")]
    Disk { path: PathBuf, source: io::Error },
}

impl From<Error> for Settlement {
    fn from(error: Error) -> Self {
        match error {
            Error::Invalid(error) => Self::Failed { error },
            error => retry(with_causes(&error)),
        }
    }
}

/// This attempt failed; the reason is told when no further one helps either.
pub(super) fn retry(message: impl Into<String>) -> Settlement {
    Settlement::Retry {
        most_attempts: MOST_ATTEMPTS,
        error: Invalid { param: String::new(), message: message.into(), code: "server_error".into() },
    }
}

/// An error and everything under it, in one line.
pub(super) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !line.contains(&inner_text) {
            line = format!("{line}: {inner_text}");
        }
        cause = inner.source();
    }
    line
}

/// Folder of a job on this host. Data files and their tokens stay in it from one attempt to the next.
pub(super) fn folder(context: &Context, job: &JobId) -> PathBuf {
    context.settings.work_folder.join("jobs").join(job.as_str())
}

/// Brings everything that the claim needs to local disk.
pub(super) async fn prepare(context: &Context, claim: &Claim, seat: &Seat) -> Result<RunSpec, Error> {
    let model = fetch::model(context, claim).await?;
    let model = std::path::absolute(&model).map_err(disk(&model))?;
    let work_dir = folder(context, &claim.job);
    let work_dir = std::path::absolute(&work_dir).map_err(disk(&work_dir))?;
    for left_over in ["checkpoints", "spill", "resume_from"] {
        remove(&work_dir.join(left_over)).await?;
    }
    let files = work_dir.join("files");
    make(&files).await?;
    let training_files = copy_files(context, &claim.training_files, &files).await?;
    let validation_files = copy_files(context, &claim.validation_files, &files).await?;
    let resume_from = match claim.work {
        Work::Inspect => None,
        Work::Train => copy_checkpoint(context, &claim.job, &work_dir.join("resume_from")).await?,
    };
    Ok(RunSpec {
        job: claim.job.clone(),
        epoch: claim.epoch,
        model,
        model_name: claim.model.clone(),
        created_at: claim.created_at,
        training_files,
        validation_files,
        training: claim.training.clone(),
        sequence_length: claim.sequence_length,
        machine: seat.machine.clone(),
        ranks: seat.ranks,
        place: seat.place.clone().unwrap_or_else(Place::first),
        gpu: seat.gpus.first().copied().unwrap_or_default(),
        libraries: context.settings.libraries.clone(),
        work_dir,
        resume_from,
        inspect_only: claim.work == Work::Inspect,
    })
}

/// Copies uploads out of the database, once: a whole copy has its final name.
async fn copy_files(context: &Context, ids: &[FileId], folder: &Path) -> Result<Vec<DataFile>, Error> {
    let mut files = Vec::with_capacity(ids.len());
    for id in ids {
        let Some(file) = context.store.file(id).await? else {
            let message = format!("the file {id} has been deleted; upload it again and make a new job");
            return Err(Invalid::with_code("file_not_found", "training_file", message).into());
        };
        let path = folder.join(id.as_str());
        if !path.exists() {
            let part = folder.join(format!("{id}.part"));
            remove(&part).await?;
            context.store.copy_file(&file, &part).await?;
            fs::rename(&part, &path).await.map_err(disk(&path))?;
        }
        files.push(DataFile { path, filename: file.filename });
    }
    Ok(files)
}

/// The checkpoint of the job that went furthest, where there is one.
async fn copy_checkpoint(context: &Context, job: &JobId, folder: &Path) -> Result<Option<PathBuf>, Error> {
    let Some(checkpoint) = context.store.latest_checkpoint(job).await? else { return Ok(None) };
    for file in context.store.checkpoint_files(&checkpoint.id, FileSet::All).await? {
        // Paths were made by a trainer of ours and pass through the object store escaped; here they become real.
        let plain = Path::new(&file.path).components().all(|part| matches!(part, std::path::Component::Normal(_)));
        if !plain {
            return Err(store::Error::Corrupt(format!("{} names a file {:?}", checkpoint.id, file.path)).into());
        }
        let target = folder.join(&file.path);
        if let Some(parent) = target.parent() {
            make(parent).await?;
        }
        context.store.weights().copy_out(&checkpoint.id, &file, &target).await?;
    }
    Ok(Some(folder.to_owned()))
}

async fn make(folder: &Path) -> Result<(), Error> {
    fs::create_dir_all(folder).await.map_err(disk(folder))
}

/// Removes a file, or a folder with everything in it; what is not there is no error.
pub(super) async fn remove(path: &Path) -> Result<(), Error> {
    let removed = if path.is_dir() { fs::remove_dir_all(path).await } else { fs::remove_file(path).await };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(disk(path)(error)),
        _ => Ok(()),
    }
}

fn disk(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Disk { path, source }
}
