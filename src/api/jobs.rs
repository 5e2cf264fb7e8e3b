//! Fine-tuning jobs: create, list, retrieve, cancel, pause, resume.

use axum::{Json, extract::State, http::HeaderMap};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{
    Api, ApiError, ErrorEnvelope,
    access::Caller,
    error::excerpt,
    extract::{Id, JsonBody, Pairs, no_such_cursor},
    fit,
    job_object::{CreateJob, JobList, JobObject},
    upload,
};
use crate::{
    domain::{
        Invalid, JobId, JobRequest, JobStatus, hex, hyperparameters::MAX_SEED, ids::random_suffix, job_request::FileRef,
    },
    store::{
        jobs::{Attempt, Created, MetadataFilter, NewJob},
        projects::Kind,
        steer::Steered,
    },
};

/// Most jobs of one page, and how many there are when nobody says.
const MAX_PAGE: u32 = 1000;
const DEFAULT_PAGE: u32 = 20;
/// Longest `Idempotency-Key`.
const MAX_KEY: usize = 255;

/// Creates a job.
///
/// It is checked here as far as it can be without reading the data: every number's range, that the files exist, that a
/// live host has the model and could carry the sequence. An executor then reads the data while the job is
/// `validating_files`. A request that a client repeats because the answer got lost makes one job, not two.
#[utoipa::path(post, path = "/v1/fine_tuning/jobs", tag = "fine-tuning",
    params(("Idempotency-Key" = Option<String>, Header, description = "Requests with the same key and body make one job.")),
    request_body = CreateJob,
    responses((status = 200, body = JobObject), (status = 400, body = ErrorEnvelope), (status = 409, body = ErrorEnvelope)))]
pub async fn create_job(
    State(api): State<Api>,
    caller: Caller,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Json<JobObject>, ApiError> {
    let mut asked = JobRequest::read(&body.value)?;
    let attempt = attempt(&headers, &body)?;
    for file in asked.training_files.iter().chain(&asked.validation_files) {
        check_file(&api, &caller, file).await?;
    }
    let notes = fit::ask_live_hosts(&api.store, &asked).await?;
    if !asked.seed_given {
        asked.training.seed = random_seed();
    }
    let ids = |files: &[FileRef]| files.iter().map(|file| file.id.clone()).collect();
    let new = NewJob {
        project: caller.project,
        priority: asked.priority,
        model: asked.model,
        training_files: ids(&asked.training_files),
        validation_files: ids(&asked.validation_files),
        request: body.value,
        training: asked.training,
        suffix: asked.suffix,
        metadata: asked.metadata,
        notes,
        attempt,
    };
    match api.store.create_job(&new).await? {
        Created::Job(job) => Ok(Json((*job).into())),
        Created::NoSuchFile(id) => {
            let file = asked.training_files.iter().chain(&asked.validation_files).find(|file| file.id == id);
            Err(file.map_or_else(|| ApiError::not_found("file", id.as_str()), |file| file.missing().into()))
        }
        Created::KeyReused => {
            let message = "this Idempotency-Key was used for another body: send a new key with a new request";
            Err(ApiError::conflict("idempotency_key_reused", message).with_param("Idempotency-Key"))
        }
    }
}

/// Lists jobs, newest first.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs", tag = "fine-tuning",
    params(
        ("after" = Option<String>, Query, description = "Id of the last job already seen."),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Most jobs of the page; 20 if absent."),
        ("metadata" = Option<std::collections::HashMap<String, String>>, Query, style = DeepObject, explode,
            description = "Only jobs whose metadata holds these pairs, written `metadata[key]=value`; `metadata=null` for those without.")),
    responses((status = 200, body = JobList), (status = 400, body = ErrorEnvelope)))]
pub async fn list_jobs(State(api): State<Api>, caller: Caller, pairs: Pairs) -> Result<Json<JobList>, ApiError> {
    let page = pairs.page::<JobId>(DEFAULT_PAGE, MAX_PAGE)?;
    let listed = api.store.list_jobs(&caller.project, &page, &metadata_filter(&pairs)?).await?;
    let listed = listed.ok_or_else(|| no_such_cursor(page.after.as_deref().unwrap_or_default()))?;
    Ok(Json(JobList::new(listed)))
}

/// Retrieves a job.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{job_id}", tag = "fine-tuning", params(("job_id" = String, Path)),
    responses((status = 200, body = JobObject), (status = 404, body = ErrorEnvelope)))]
pub async fn retrieve_job(State(api): State<Api>, Id(id): Id<JobId>) -> Result<Json<JobObject>, ApiError> {
    let job = api.store.job(&id).await?.ok_or_else(|| ApiError::not_found("fine-tuning job", id.as_str()))?;
    Ok(Json(job.into()))
}

/// Cancels a job: at once while nobody runs it, else after its current step. Cancelling again changes nothing.
#[utoipa::path(post, path = "/v1/fine_tuning/jobs/{job_id}/cancel", tag = "fine-tuning", params(("job_id" = String, Path)),
    responses((status = 200, body = JobObject), (status = 404, body = ErrorEnvelope), (status = 409, body = ErrorEnvelope)))]
pub async fn cancel_job(State(api): State<Api>, Id(id): Id<JobId>) -> Result<Json<JobObject>, ApiError> {
    steered(&id, "cancel", api.store.cancel_job(&id).await?)
}

/// Pauses a job: at once while nobody runs it, else after its current step, with a checkpoint to go on from.
///
/// Pausing again changes nothing.
#[utoipa::path(post, path = "/v1/fine_tuning/jobs/{job_id}/pause", tag = "fine-tuning", params(("job_id" = String, Path)),
    responses((status = 200, body = JobObject), (status = 404, body = ErrorEnvelope), (status = 409, body = ErrorEnvelope)))]
pub async fn pause_job(State(api): State<Api>, Id(id): Id<JobId>) -> Result<Json<JobObject>, ApiError> {
    steered(&id, "pause", api.store.pause_job(&id).await?)
}

/// Lets a paused job go on from its last checkpoint. Resuming a job that is not paused changes nothing.
#[utoipa::path(post, path = "/v1/fine_tuning/jobs/{job_id}/resume", tag = "fine-tuning", params(("job_id" = String, Path)),
    responses((status = 200, body = JobObject), (status = 404, body = ErrorEnvelope), (status = 409, body = ErrorEnvelope)))]
pub async fn resume_job(State(api): State<Api>, Id(id): Id<JobId>) -> Result<Json<JobObject>, ApiError> {
    steered(&id, "resume", api.store.resume_job(&id).await?)
}

fn steered(id: &JobId, verb: &str, steered: Steered) -> Result<Json<JobObject>, ApiError> {
    match steered {
        Steered::Accepted(job) => Ok(Json((*job).into())),
        Steered::Absent => Err(ApiError::not_found("fine-tuning job", id.as_str())),
        Steered::Ended(status) => Err(ApiError::conflict(
            "job_ended",
            format!("job {id} has already {}; there is nothing to {verb}", past(status)),
        )),
        Steered::Cancelling => {
            let message =
                format!("job {id} is being cancelled; there is nothing to {verb}: make a new job to train on");
            Err(ApiError::conflict("job_cancelling", message))
        }
    }
}

/// How a sentence says that a job came to its end.
fn past(status: JobStatus) -> &'static str {
    if status == JobStatus::Cancelled { "been cancelled" } else { status.as_str() }
}

/// What tells a first request from one that a client sends again.
fn attempt(headers: &HeaderMap, body: &JsonBody) -> Result<Attempt, ApiError> {
    let text = |name: &str| headers.get(name).map(|value| value.to_str());
    let key = match text("idempotency-key") {
        None => None,
        Some(Ok(key)) if (1..=MAX_KEY).contains(&key.len()) => Some(key.to_owned()),
        Some(_) => {
            let message = format!("Idempotency-Key must be 1 to {MAX_KEY} plain characters");
            return Err(Invalid::new("Idempotency-Key", message).into());
        }
    };
    let retries = text("x-stainless-retry-count").and_then(Result::ok).and_then(|count| count.parse::<u32>().ok());
    Ok(Attempt {
        body_sha256: hex(&Sha256::digest(&body.bytes)),
        idempotency_key: key,
        is_retry: retries.is_some_and(|count| count > 0),
    })
}

/// A file of a job exists in the caller's project, is meant for training, and has a name that says how to read it.
pub(super) async fn check_file(api: &Api, caller: &Caller, named: &FileRef) -> Result<(), ApiError> {
    let own = api.store.owns(&caller.project, Kind::File, named.id.as_str()).await?;
    let file = api.store.file(&named.id).await?.filter(|_| own).ok_or_else(|| named.missing())?;
    if file.purpose != upload::PURPOSES[0] {
        let message = format!(
            "{} was uploaded for the purpose {}; upload it again with purpose {}",
            file.id,
            file.purpose,
            upload::PURPOSES[0]
        );
        return Err(Invalid::with_code("wrong_purpose", &named.param, message).into());
    }
    Ok(upload::check_format(&file.filename, &named.param)?)
}

fn metadata_filter(pairs: &Pairs) -> Result<MetadataFilter, ApiError> {
    let members = pairs.members("metadata");
    match pairs.find("metadata") {
        Some("null") if members.is_empty() => return Ok(MetadataFilter::None),
        None | Some("") => {}
        Some(other) => {
            let message = format!("metadata is written metadata[key]=value, or metadata=null; not {}", excerpt(other));
            return Err(Invalid::new("metadata", message).into());
        }
    }
    if members.is_empty() {
        return Ok(MetadataFilter::Any);
    }
    let object = members.into_iter().map(|(key, value)| (key.to_owned(), json!(value))).collect();
    Ok(MetadataFilter::Holds(Value::Object(object)))
}

/// A seed for a job that names none; it is shown in the job, so that the run can be repeated.
fn random_seed() -> u64 {
    let digest: [u8; 32] = Sha256::digest(random_suffix()).into();
    u64::from_le_bytes([digest[0], digest[1], digest[2], digest[3], 0, 0, 0, 0]) & MAX_SEED
}
