//! Checkpoints: OpenAI's list, and, beyond it, their files: a manifest, one file, or the whole as a tar.

use std::collections::BTreeMap;

use axum::{Json, extract::State, http::HeaderMap, response::Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    Api, ApiError, ErrorEnvelope,
    access::Caller,
    download::Download,
    extract::{Id, Pairs, Segments, named, no_such_cursor},
    hub::HubName,
    tar::Archive,
};
use crate::{
    domain::{CheckpointId, Invalid, JobId, progress::WrittenFile},
    store::{
        checkpoints::{Checkpoint, FileSet},
        projects::Kind,
    },
};

/// Most checkpoints of one page, and how many there are when nobody says.
const MAX_PAGE: u32 = 1000;
const DEFAULT_PAGE: u32 = 10;

/// A checkpoint of a job.
#[derive(Debug, Serialize, ToSchema)]
pub struct CheckpointObject {
    id: String,
    /// Always `fine_tuning.job.checkpoint`.
    object: &'static str,
    /// Unix seconds.
    created_at: i64,
    /// Name of the model that this checkpoint is.
    fine_tuned_model_checkpoint: String,
    /// Under `/hf`: the repository and revision that Hugging Face's clients load this checkpoint by (an extension).
    hub: HubName,
    fine_tuning_job_id: String,
    /// Optimizer steps done.
    step_number: u64,
    /// `step`, `train_loss`, `train_mean_token_accuracy`, `full_valid_loss`, ... as far as they were measured.
    #[schema(value_type = BTreeMap<String, f64>)]
    metrics: BTreeMap<String, serde_json::Number>,
}

/// One page of checkpoints.
#[derive(Debug, Serialize, ToSchema)]
pub struct CheckpointList {
    /// Always `list`.
    object: &'static str,
    data: Vec<CheckpointObject>,
    #[schema(required)]
    first_id: Option<String>,
    /// Give it as `after` to get the next page.
    #[schema(required)]
    last_id: Option<String>,
    has_more: bool,
}

/// A file of a checkpoint.
#[derive(Debug, Serialize, ToSchema)]
pub struct CheckpointFile {
    /// Path inside the checkpoint, `/`-separated.
    path: String,
    bytes: u64,
    /// Lower-case hex; also the file's ETag.
    sha256: String,
}

/// The manifest of a checkpoint.
#[derive(Debug, Serialize, ToSchema)]
pub struct CheckpointFiles {
    /// Always `list`.
    object: &'static str,
    /// Every file, by path.
    data: Vec<CheckpointFile>,
    /// Always false: a manifest is never cut.
    has_more: bool,
}

/// Lists a job's checkpoints, newest first.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{job_id}/checkpoints", tag = "fine-tuning",
    params(
        ("job_id" = String, Path),
        ("after" = Option<String>, Query, description = "Id of the last checkpoint already seen."),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Most checkpoints of the page; 10 if absent.")),
    responses((status = 200, body = CheckpointList), (status = 400, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope)))]
pub async fn list_checkpoints(
    State(api): State<Api>,
    Id(job): Id<JobId>,
    pairs: Pairs,
) -> Result<Json<CheckpointList>, ApiError> {
    let page = pairs.page::<CheckpointId>(DEFAULT_PAGE, MAX_PAGE)?;
    if api.store.job(&job).await?.is_none() {
        return Err(ApiError::not_found("fine-tuning job", job.as_str()));
    }
    let listed = api.store.list_checkpoints(&job, &page).await?;
    let listed = listed.ok_or_else(|| no_such_cursor(page.after.as_deref().unwrap_or_default()))?;
    let data: Vec<CheckpointObject> = listed.rows.into_iter().map(Into::into).collect();
    Ok(Json(CheckpointList {
        object: "list",
        first_id: data.first().map(|checkpoint| checkpoint.id.clone()),
        last_id: data.last().map(|checkpoint| checkpoint.id.clone()),
        has_more: listed.has_more,
        data,
    }))
}

/// Lists a checkpoint's files with their sizes and digests (an extension).
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{job_id}/checkpoints/{checkpoint_id}/files", tag = "downloads",
    params(("job_id" = String, Path), ("checkpoint_id" = String, Path),
        ("include" = Option<String>, Query, description = "`model` (if absent), or `all` with the state for continuing the run.")),
    responses((status = 200, body = CheckpointFiles), (status = 404, body = ErrorEnvelope)))]
pub async fn list_checkpoint_files(
    State(api): State<Api>,
    caller: Caller,
    Segments((job, checkpoint)): Segments<(String, String)>,
    pairs: Pairs,
) -> Result<Json<CheckpointFiles>, ApiError> {
    let Open { checkpoint, most } = find(&api, &caller, &job, &checkpoint).await?;
    let files = api.store.checkpoint_files(&checkpoint.id, file_set(&pairs)?.min(most)).await?;
    let data = files.into_iter().map(|WrittenFile { path, bytes, sha256 }| CheckpointFile { path, bytes, sha256 });
    Ok(Json(CheckpointFiles { object: "list", data: data.collect(), has_more: false }))
}

/// Downloads one file of a checkpoint, whole or a range of it (an extension).
///
/// The ETag is the content's sha256: a download that broke off goes on with Range and If-Range.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{job_id}/checkpoints/{checkpoint_id}/files/{*path}", tag = "downloads",
    params(("job_id" = String, Path), ("checkpoint_id" = String, Path), ("path" = String, Path, description = "Path of the manifest."),
        ("Range" = Option<String>, Header, description = "`bytes=first-last`"),
        ("If-Range" = Option<String>, Header), ("If-None-Match" = Option<String>, Header)),
    responses(
        (status = 200, content_type = "application/octet-stream", body = Vec<u8>, description = "the whole content"),
        (status = 206, content_type = "application/octet-stream", body = Vec<u8>, description = "the range asked for"),
        (status = 304, description = "the copy with that ETag is current"),
        (status = 404, body = ErrorEnvelope), (status = 416, body = ErrorEnvelope)))]
pub async fn checkpoint_file(
    State(api): State<Api>,
    caller: Caller,
    Segments((job, checkpoint, path)): Segments<(String, String, String)>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let Open { checkpoint, most } = find(&api, &caller, &job, &checkpoint).await?;
    let files = api.store.checkpoint_files(&checkpoint.id, most).await?;
    // Only what the manifest names exists; a path goes nowhere near a file system before it was found there.
    let Some(file) = files.into_iter().find(|file| file.path == path) else {
        return Err(ApiError::not_found("file of this checkpoint", &path));
    };
    send(&api, &checkpoint.id, file, &headers).await
}

/// Answers with a file that the manifest names.
pub(super) async fn send(
    api: &Api,
    checkpoint: &CheckpointId,
    file: WrittenFile,
    headers: &HeaderMap,
) -> Result<Response, ApiError> {
    let download = Download {
        bytes: file.bytes,
        tag: file.sha256,
        content_type: "application/octet-stream",
        filename: file.path.rsplit('/').next().unwrap_or_default().to_owned(),
    };
    let open = async |range| {
        let stream = api.store.weights().read(checkpoint, &file.path, range).await?;
        stream.ok_or_else(|| ApiError::internal(format!("{} of {checkpoint} is missing", file.path)))
    };
    download.answer(headers, open).await
}

/// Downloads a checkpoint as one tar archive (an extension).
///
/// The same checkpoint gives the same bytes, with a length and an ETag, so Range and If-Range work here too.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{job_id}/checkpoints/{checkpoint_id}/archive", tag = "downloads",
    params(("job_id" = String, Path), ("checkpoint_id" = String, Path),
        ("include" = Option<String>, Query, description = "`model` (if absent), or `all` with the state for continuing the run."),
        ("Range" = Option<String>, Header, description = "`bytes=first-last`")),
    responses(
        (status = 200, content_type = "application/x-tar", body = Vec<u8>, description = "the whole archive"),
        (status = 206, content_type = "application/x-tar", body = Vec<u8>, description = "the range asked for"),
        (status = 304, description = "the copy with that ETag is current"),
        (status = 404, body = ErrorEnvelope), (status = 416, body = ErrorEnvelope)))]
pub async fn checkpoint_archive(
    State(api): State<Api>,
    caller: Caller,
    Segments((job, checkpoint)): Segments<(String, String)>,
    pairs: Pairs,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let Open { checkpoint, most } = find(&api, &caller, &job, &checkpoint).await?;
    let files = api.store.checkpoint_files(&checkpoint.id, file_set(&pairs)?.min(most)).await?;
    let archive = Archive::of(&files);
    let download = Download {
        bytes: archive.bytes(),
        tag: archive.tag().to_owned(),
        content_type: "application/x-tar",
        filename: format!("{}.tar", checkpoint.id),
    };
    download.answer(&headers, async |range| Ok(archive.read(api.store.weights(), &checkpoint.id, range))).await
}

/// A checkpoint that the caller may download.
struct Open {
    checkpoint: Checkpoint,
    /// What of it: the state for continuing is for the project that trained it.
    most: FileSet,
}

/// A checkpoint, if it is one of that job, and the caller's or open to it.
async fn find(api: &Api, caller: &Caller, job: &str, checkpoint: &str) -> Result<Open, ApiError> {
    let job: JobId = named(job)?;
    let id: CheckpointId = named(checkpoint)?;
    let open = api.store.open_checkpoints(&caller.project, &job).await?;
    let found = open.into_iter().find(|checkpoint| checkpoint.id == id);
    let found = found.ok_or_else(|| ApiError::not_found("checkpoint", checkpoint))?;
    let own = api.store.owns(&caller.project, Kind::Job, job.as_str()).await?;
    Ok(Open { checkpoint: found, most: if own { FileSet::All } else { FileSet::Model } })
}

fn file_set(pairs: &Pairs) -> Result<FileSet, ApiError> {
    match pairs.find("include") {
        None | Some("model") => Ok(FileSet::Model),
        Some("all") => Ok(FileSet::All),
        Some(_) => Err(Invalid::new("include", "include must be model or all").into()),
    }
}

impl From<Checkpoint> for CheckpointObject {
    fn from(checkpoint: Checkpoint) -> Self {
        let number = |value: f64| {
            let whole = value.fract() == 0.0 && value.abs() < 9e15;
            if whole { Some((value as i64).into()) } else { serde_json::Number::from_f64(value) }
        };
        let hub = HubName::of(&checkpoint);
        let mut metrics: BTreeMap<_, _> =
            checkpoint.metrics.into_iter().filter_map(|(name, value)| Some((name, number(value)?))).collect();
        metrics.insert("step".into(), checkpoint.step.into());
        Self {
            id: checkpoint.id.to_string(),
            object: "fine_tuning.job.checkpoint",
            created_at: checkpoint.created_at,
            hub,
            fine_tuned_model_checkpoint: checkpoint.model_name,
            fine_tuning_job_id: checkpoint.job.to_string(),
            step_number: checkpoint.step,
            metrics,
        }
    }
}
