//! Files: upload, list, retrieve, download, delete.

use axum::{
    Json,
    extract::{Multipart, State, multipart::MultipartRejection},
    http::HeaderMap,
    response::Response,
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    Api, ApiError, ErrorEnvelope,
    access::Caller,
    download::Download,
    error::excerpt,
    extract::{Id, Pairs, no_such_cursor},
    upload,
};
use crate::{
    domain::FileId,
    store::files::{Deletion, File},
};

/// Most files of one page, and how many there are when nobody says.
const MAX_PAGE: u32 = 10_000;

/// An uploaded file.
#[derive(Debug, Serialize, ToSchema)]
pub struct FileObject {
    #[schema(example = "file-4xQm2ZtK8fGz0aB1cD2eF3gH")]
    id: String,
    /// Always `file`.
    object: &'static str,
    bytes: u64,
    /// Unix seconds.
    created_at: i64,
    /// Unix seconds; the file is deleted soon after.
    #[schema(required)]
    expires_at: Option<i64>,
    filename: String,
    purpose: String,
    /// `uploaded`, `processed` or `error`.
    status: String,
    #[schema(required)]
    status_details: Option<String>,
    /// Digest of the content, lower-case hex (an extension).
    sha256: String,
}

/// One page of files.
#[derive(Debug, Serialize, ToSchema)]
pub struct FileList {
    /// Always `list`.
    object: &'static str,
    data: Vec<FileObject>,
    #[schema(required)]
    first_id: Option<String>,
    /// Give it as `after` to get the next page.
    #[schema(required)]
    last_id: Option<String>,
    has_more: bool,
}

/// The word that a file is gone.
#[derive(Debug, Serialize, ToSchema)]
pub struct FileDeleted {
    id: String,
    /// Always `file`.
    object: &'static str,
    /// Always true.
    deleted: bool,
}

/// The form of an upload; its fields may come in any order.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "describes the form in the contract; upload.rs reads it as a stream")]
pub struct UploadForm {
    /// The content. A training file is named `.txt` or `.md` (one document), or `.jsonl`: a line is an object with `text`, with
    /// `prompt` and `completion` (which alone is trained), or with `messages` and perhaps `tools` (the assistant's turns are
    /// trained, but for those with `weight` 0).
    #[schema(value_type = String, format = Binary)]
    file: Vec<u8>,
    /// `fine-tune` for training and validation files; also `assistants`, `batch`, `evals`, `user_data`, `vision`.
    purpose: String,
    /// `created_at`.
    #[schema(rename = "expires_after[anchor]")]
    expires_after_anchor: Option<String>,
    /// Life of the file in seconds, 3600 to 2592000. Without it the file stays.
    #[schema(rename = "expires_after[seconds]")]
    expires_after_seconds: Option<u64>,
}

/// Uploads a file.
///
/// The body is streamed: memory does not grow with the file, its length need not be known, and nothing stays of an upload
/// that does not come to its end.
#[utoipa::path(post, path = "/v1/files", tag = "files",
    request_body(content = UploadForm, content_type = "multipart/form-data"),
    responses((status = 200, body = FileObject), (status = 400, body = ErrorEnvelope), (status = 413, body = ErrorEnvelope)))]
pub async fn create_file(
    State(api): State<Api>,
    caller: Caller,
    form: Result<Multipart, MultipartRejection>,
) -> Result<Json<FileObject>, ApiError> {
    let form = form.map_err(|_| no_form("the fields file and purpose"))?;
    let file = upload::receive(&api.store, &api.settings, &caller.project, form).await?;
    Ok(Json(file.into()))
}

/// The refusal of a body that is no form; `fields` says what it should hold.
pub(super) fn no_form(fields: &str) -> ApiError {
    let message = format!("the body must be a multipart/form-data form with {fields}");
    ApiError::bad_request("invalid_multipart", message).with_param("body")
}

/// Lists files, newest first.
#[utoipa::path(get, path = "/v1/files", tag = "files",
    params(
        ("purpose" = Option<String>, Query, description = "Only files of this purpose."),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 10000, description = "Most files of the page; 10000 if absent."),
        ("order" = Option<String>, Query, description = "By time of upload: `desc` (if absent) or `asc`."),
        ("after" = Option<String>, Query, description = "Id of the last file already seen.")),
    responses((status = 200, body = FileList), (status = 400, body = ErrorEnvelope)))]
pub async fn list_files(State(api): State<Api>, caller: Caller, pairs: Pairs) -> Result<Json<FileList>, ApiError> {
    let page = pairs.page::<FileId>(MAX_PAGE, MAX_PAGE)?;
    let listed = api.store.list_files(&caller.project, &page, pairs.find("purpose")).await?;
    let listed = listed.ok_or_else(|| no_such_cursor(page.after.as_deref().unwrap_or_default()))?;
    let data: Vec<FileObject> = listed.rows.into_iter().map(Into::into).collect();
    Ok(Json(FileList {
        object: "list",
        first_id: data.first().map(|file| file.id.clone()),
        last_id: data.last().map(|file| file.id.clone()),
        has_more: listed.has_more,
        data,
    }))
}

/// Retrieves a file's facts.
#[utoipa::path(get, path = "/v1/files/{file_id}", tag = "files", params(("file_id" = String, Path)),
    responses((status = 200, body = FileObject), (status = 404, body = ErrorEnvelope)))]
pub async fn retrieve_file(State(api): State<Api>, Id(id): Id<FileId>) -> Result<Json<FileObject>, ApiError> {
    Ok(Json(find(&api, &id).await?.into()))
}

/// Downloads a file's content, whole or a range of it.
#[utoipa::path(get, path = "/v1/files/{file_id}/content", tag = "files",
    params(("file_id" = String, Path), ("Range" = Option<String>, Header, description = "`bytes=first-last`")),
    responses(
        (status = 200, content_type = "application/octet-stream", body = Vec<u8>, description = "the whole content"),
        (status = 206, content_type = "application/octet-stream", body = Vec<u8>, description = "the range asked for"),
        (status = 304, description = "the copy with that ETag is current"),
        (status = 404, body = ErrorEnvelope), (status = 416, body = ErrorEnvelope)))]
pub async fn file_content(
    State(api): State<Api>,
    Id(id): Id<FileId>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let file = find(&api, &id).await?;
    let download = Download {
        bytes: file.bytes,
        tag: file.sha256.clone(),
        content_type: "application/octet-stream",
        filename: file.filename.clone(),
    };
    download.answer(&headers, async |range| Ok(api.store.read_file(&file, range))).await
}

/// Deletes a file, unless a job that has not ended needs it.
#[utoipa::path(delete, path = "/v1/files/{file_id}", tag = "files", params(("file_id" = String, Path)),
    responses((status = 200, body = FileDeleted), (status = 404, body = ErrorEnvelope), (status = 409, body = ErrorEnvelope)))]
pub async fn delete_file(State(api): State<Api>, Id(id): Id<FileId>) -> Result<Json<FileDeleted>, ApiError> {
    match api.store.delete_file(&id).await? {
        Deletion::Deleted => Ok(Json(FileDeleted { id: id.to_string(), object: "file", deleted: true })),
        Deletion::Absent => Err(ApiError::not_found("file", id.as_str())),
        Deletion::InUse(job) => {
            let message = format!("job {job} needs the file {id}: cancel the job first, or wait for its end");
            Err(ApiError::conflict("file_in_use", message).with_param("file_id"))
        }
    }
}

async fn find(api: &Api, id: &FileId) -> Result<File, ApiError> {
    api.store.file(id).await?.ok_or_else(|| ApiError::not_found("file", &excerpt(id.as_str())))
}

impl From<File> for FileObject {
    fn from(file: File) -> Self {
        Self {
            id: file.id.to_string(),
            object: "file",
            bytes: file.bytes,
            created_at: file.created_at,
            expires_at: file.expires_at,
            filename: file.filename,
            purpose: file.purpose,
            status: file.status,
            status_details: file.status_details,
            sha256: file.sha256,
        }
    }
}
