//! Uploads: large files in parts, in any order and side by side, and what a client needs to go on with one.

use axum::{
    Json,
    extract::{Multipart, State, multipart::MultipartRejection},
    http::HeaderMap,
};
use serde::Serialize;
use std::time::Duration;
use utoipa::ToSchema;

use super::{
    Api, ApiError, ErrorEnvelope,
    access::Caller,
    error::excerpt,
    extract::{Id, JsonBody, Pairs, no_such_cursor},
    files::{FileObject, no_form},
    upload,
};
use crate::{
    domain::{Invalid, PartId, ProjectId, UploadId, fields::Fields},
    store::{
        files::{File, NewFile},
        uploads::{Added, Completion, MAX_PARTS, NewUpload, Part, Upload, UploadCancellation, UploadStatus},
    },
};

/// Most uploads or parts of one page, and how many there are when nobody says.
const MAX_PAGE: u32 = 1000;
const DEFAULT_PAGE: u32 = 100;
const MAX_MIME_TYPE: usize = 255;
/// Header of a part's digest.
const DIGEST: &str = "x-content-sha256";

/// An upload to be begun.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "describes the body in the contract; create_upload reads it field by field")]
pub struct CreateUpload {
    /// Name of the file that it becomes.
    filename: String,
    /// As for `POST /v1/files`.
    purpose: String,
    /// Size of the whole file.
    #[schema(minimum = 1)]
    bytes: u64,
    /// Kind of the content; kept and shown.
    mime_type: String,
    #[schema(required = false)]
    expires_after: Option<ExpiresAfter>,
}

/// When the file is to be deleted.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "see CreateUpload")]
pub struct ExpiresAfter {
    /// `created_at`.
    anchor: String,
    /// Life of the file.
    #[schema(minimum = 3600, maximum = 2_592_000)]
    seconds: u64,
}

/// What makes a file of parts.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "describes the body in the contract; complete_upload reads it field by field")]
pub struct CompleteUpload {
    /// Ids of the parts in the order of their bytes. Parts that are not named are dropped.
    part_ids: Vec<String>,
    /// MD5 of the whole, hex; the upload is not completed where it differs.
    #[schema(required = false)]
    md5: Option<String>,
}

/// The form of a part.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "describes the form in the contract; upload.rs reads it as a stream")]
pub struct PartForm {
    /// The bytes, at most 64 MiB.
    #[schema(value_type = String, format = Binary)]
    data: Vec<u8>,
}

/// An upload in parts.
#[derive(Debug, Serialize, ToSchema)]
pub struct UploadObject {
    #[schema(example = "upload_4xQm2ZtK8fGz0aB1cD2eF3gH")]
    id: String,
    /// Always `upload`.
    object: &'static str,
    /// Size of the whole file.
    bytes: u64,
    /// Unix seconds.
    created_at: i64,
    /// Unix seconds; an hour after the creation or the last part, whichever came later.
    expires_at: i64,
    filename: String,
    purpose: String,
    /// Kind of the content, as it was given (an extension).
    mime_type: String,
    /// `pending`, `completed`, `cancelled` or `expired`.
    status: &'static str,
    /// The file, once the upload is completed and while the file is there.
    #[schema(required)]
    file: Option<FileObject>,
}

/// A part of an upload.
#[derive(Debug, Serialize, ToSchema)]
pub struct PartObject {
    #[schema(example = "part_4xQm2ZtK8fGz0aB1cD2eF3gH")]
    id: String,
    /// Always `upload.part`.
    object: &'static str,
    /// Unix seconds.
    created_at: i64,
    upload_id: String,
    /// Size of the part (an extension).
    bytes: u64,
    /// Digest of the part, lower-case hex (an extension).
    sha256: String,
}

/// One page of uploads.
#[derive(Debug, Serialize, ToSchema)]
pub struct UploadList {
    /// Always `list`.
    object: &'static str,
    data: Vec<UploadObject>,
    has_more: bool,
}

/// One page of parts.
#[derive(Debug, Serialize, ToSchema)]
pub struct PartList {
    /// Always `list`.
    object: &'static str,
    data: Vec<PartObject>,
    has_more: bool,
}

/// Begins an upload in parts.
///
/// It ends an hour after its last part unless it is completed before.
#[utoipa::path(post, path = "/v1/uploads", tag = "uploads", request_body = CreateUpload,
    responses((status = 200, body = UploadObject), (status = 400, body = ErrorEnvelope), (status = 413, body = ErrorEnvelope)))]
pub async fn create_upload(
    State(api): State<Api>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<UploadObject>, ApiError> {
    let new = new_upload(&api, caller.project, &body)?;
    Ok(Json(shown(api.store.create_upload(&new).await?, None)))
}

/// Lists uploads, newest first (an extension).
#[utoipa::path(get, path = "/v1/uploads", tag = "uploads",
    params(
        ("after" = Option<String>, Query, description = "Id of the last upload already seen."),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Most uploads of the page; 100 if absent.")),
    responses((status = 200, body = UploadList), (status = 400, body = ErrorEnvelope)))]
pub async fn list_uploads(State(api): State<Api>, caller: Caller, pairs: Pairs) -> Result<Json<UploadList>, ApiError> {
    let page = pairs.page::<UploadId>(DEFAULT_PAGE, MAX_PAGE)?;
    let listed = api.store.list_uploads(&caller.project, &page).await?;
    let listed = listed.ok_or_else(|| no_such_cursor(page.after.as_deref().unwrap_or_default()))?;
    let mut data = Vec::with_capacity(listed.rows.len());
    for upload in listed.rows {
        data.push(with_file(&api, upload).await?);
    }
    Ok(Json(UploadList { object: "list", data, has_more: listed.has_more }))
}

/// Retrieves an upload (an extension).
#[utoipa::path(get, path = "/v1/uploads/{upload_id}", tag = "uploads", params(("upload_id" = String, Path)),
    responses((status = 200, body = UploadObject), (status = 404, body = ErrorEnvelope)))]
pub async fn retrieve_upload(State(api): State<Api>, Id(id): Id<UploadId>) -> Result<Json<UploadObject>, ApiError> {
    let upload = api.store.upload(&id).await?.ok_or_else(|| absent(&id))?;
    Ok(Json(with_file(&api, upload).await?))
}

/// Adds a part to an upload.
///
/// Parts may come side by side and in any order. A part that is sent again is another part; only those named at the end
/// count. What was answered is on disk.
#[utoipa::path(post, path = "/v1/uploads/{upload_id}/parts", tag = "uploads",
    params(("upload_id" = String, Path),
        ("x-content-sha256" = Option<String>, Header, description = "Digest of the part's bytes, hex; a part that differs is refused (an extension).")),
    request_body(content = PartForm, content_type = "multipart/form-data"),
    responses((status = 200, body = PartObject), (status = 400, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope),
        (status = 409, body = ErrorEnvelope), (status = 413, body = ErrorEnvelope)))]
pub async fn add_part(
    State(api): State<Api>,
    Id(id): Id<UploadId>,
    headers: HeaderMap,
    form: Result<Multipart, MultipartRejection>,
) -> Result<Json<PartObject>, ApiError> {
    let form = form.map_err(|_| no_form("the field data"))?;
    let digest = digest(&headers)?;
    let found = api.store.upload(&id).await?.ok_or_else(|| absent(&id))?;
    if found.status != UploadStatus::Pending {
        return Err(ended(&id, found.status, "takes no more parts"));
    }
    let blob = upload::receive_part(&api.store, form).await?;
    if let Some(digest) = digest.filter(|digest| !digest.eq_ignore_ascii_case(&blob.sha256)) {
        let message = format!("the part's bytes have the sha256 {}, not {digest}: send them again", blob.sha256);
        api.store.discard(blob).await?;
        return Err(Invalid::with_code("checksum_mismatch", DIGEST, message).into());
    }
    // Room for every part a second time, and for one more.
    let most_bytes = 2 * found.bytes + upload::MAX_PART_BYTES;
    match api.store.add_part(&id, blob, most_bytes).await? {
        Added::Part(part) => Ok(Json(part.into())),
        Added::Absent => Err(absent(&id)),
        Added::Ended(status) => Err(ended(&id, status, "takes no more parts")),
        Added::Full => {
            let message = format!(
                "the upload {id} holds as much as it may: {MAX_PARTS} parts, or {most_bytes} bytes, twice its size and \
                 one part; complete it with the parts that count, or cancel it"
            );
            Err(ApiError::conflict("upload_full", message).with_param("data"))
        }
    }
}

/// Lists the parts of a pending upload, so that a client can go on with it (an extension).
///
/// Once the upload has ended the list is empty.
#[utoipa::path(get, path = "/v1/uploads/{upload_id}/parts", tag = "uploads",
    params(
        ("upload_id" = String, Path),
        ("after" = Option<String>, Query, description = "Id of the last part already seen."),
        ("order" = Option<String>, Query, description = "By time of arrival: `desc` (if absent) or `asc`."),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Most parts of the page; 100 if absent.")),
    responses((status = 200, body = PartList), (status = 400, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope)))]
pub async fn list_parts(
    State(api): State<Api>,
    Id(id): Id<UploadId>,
    pairs: Pairs,
) -> Result<Json<PartList>, ApiError> {
    let page = pairs.page::<PartId>(DEFAULT_PAGE, MAX_PAGE)?;
    if api.store.upload(&id).await?.is_none() {
        return Err(absent(&id));
    }
    let listed = api.store.list_parts(&id, &page).await?;
    let listed = listed.ok_or_else(|| no_such_cursor(page.after.as_deref().unwrap_or_default()))?;
    let data = listed.rows.into_iter().map(Into::into).collect();
    Ok(Json(PartList { object: "list", data, has_more: listed.has_more }))
}

/// Makes the file of the parts.
///
/// Nothing is copied: the bytes are read once for their digests. Sent again with the same parts, it answers the same.
#[utoipa::path(post, path = "/v1/uploads/{upload_id}/complete", tag = "uploads", params(("upload_id" = String, Path)),
    request_body = CompleteUpload,
    responses((status = 200, body = UploadObject), (status = 400, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope),
        (status = 409, body = ErrorEnvelope)))]
pub async fn complete_upload(
    State(api): State<Api>,
    Id(id): Id<UploadId>,
    body: JsonBody,
) -> Result<Json<UploadObject>, ApiError> {
    let fields = Fields::root(&body.value)?;
    fields.only(&["part_ids", "md5"])?;
    let part_ids = part_ids(&fields)?;
    let md5 = fields.text("md5", 32..=32)?;
    if md5.is_some_and(|md5| !md5.bytes().all(|b| b.is_ascii_hexdigit())) {
        return Err(fields.refuse("md5", "must be 32 hexadecimal digits").into());
    }
    match api.store.complete_upload(&id, &part_ids, md5).await? {
        Completion::Done(upload, file) => Ok(Json(shown(*upload, file.map(|file| *file)))),
        Completion::Absent => Err(absent(&id)),
        Completion::Ended(status) => Err(ended(&id, status, "cannot be completed (again, with other parts)")),
        Completion::NoSuchPart(place) => {
            let param = format!("part_ids[{place}]");
            let message = format!("{param}: the upload {id} has no part {}", excerpt(&part_ids[place]));
            Err(Invalid::with_code("part_not_found", param, message).into())
        }
        Completion::WrongSize { promised, found } => {
            let message = format!(
                "the named parts hold {found} bytes and the upload was to have {promised}: name every part once, or begin \
                 an upload of the right size"
            );
            Err(Invalid::with_code("wrong_size", "part_ids", message).into())
        }
        Completion::WrongMd5(md5) => {
            let message =
                format!("the named parts in this order have the md5 {md5}: check their order and their bytes");
            Err(Invalid::with_code("checksum_mismatch", "md5", message).into())
        }
    }
}

/// Cancels an upload and deletes its parts. Cancelling again changes nothing.
#[utoipa::path(post, path = "/v1/uploads/{upload_id}/cancel", tag = "uploads", params(("upload_id" = String, Path)),
    responses((status = 200, body = UploadObject), (status = 404, body = ErrorEnvelope), (status = 409, body = ErrorEnvelope)))]
pub async fn cancel_upload(State(api): State<Api>, Id(id): Id<UploadId>) -> Result<Json<UploadObject>, ApiError> {
    match api.store.cancel_upload(&id).await? {
        UploadCancellation::Done(upload) => Ok(Json(shown(*upload, None))),
        UploadCancellation::Absent => Err(absent(&id)),
        UploadCancellation::Ended(status) => Err(ended(&id, status, "cannot be cancelled")),
    }
}

fn new_upload(api: &Api, project: ProjectId, body: &JsonBody) -> Result<NewUpload, ApiError> {
    let fields = Fields::root(&body.value)?;
    fields.only(&["filename", "purpose", "bytes", "mime_type", "expires_after"])?;
    let needed = |name: &str| {
        let message = format!("you must provide {name}");
        ApiError::from(Invalid::with_code("missing_required_parameter", name, message))
    };
    let filename = fields.text("filename", 1..=usize::MAX)?.ok_or_else(|| needed("filename"))?;
    let filename = upload::label(filename, "filename")?;
    let purpose = fields.text("purpose", 1..=usize::MAX)?.ok_or_else(|| needed("purpose"))?;
    upload::check_purpose(purpose)?;
    if purpose == upload::PURPOSES[0] {
        upload::check_format(&filename, "filename")?;
    }
    let bytes = fields.whole("bytes", 1..=i64::MAX as u64)?.ok_or_else(|| needed("bytes"))?;
    let most = api.settings.max_upload_bytes;
    if bytes > most {
        return Err(ApiError::too_large("the file", most, "max_upload_bytes").with_param("bytes"));
    }
    let mime_type = fields.text("mime_type", 1..=MAX_MIME_TYPE)?.ok_or_else(|| needed("mime_type"))?;
    let expires_after = match fields.object("expires_after")? {
        None => None,
        Some(life) => {
            life.only(&["anchor", "seconds"])?;
            life.word("anchor", &[("created_at", ())])?;
            life.whole("seconds", upload::LIFE_SECONDS)?.map(Duration::from_secs)
        }
    };
    let file = NewFile { project, filename, purpose: purpose.to_owned(), expires_after };
    Ok(NewUpload { file, mime_type: mime_type.to_owned(), bytes })
}

fn part_ids(fields: &Fields) -> Result<Vec<String>, Invalid> {
    let list = fields.list("part_ids", MAX_PARTS as usize)?;
    if list.is_empty() {
        let message = "you must provide part_ids: the ids of the parts in the order of their bytes";
        return Err(Invalid::with_code("missing_required_parameter", "part_ids", message));
    }
    let mut ids: Vec<String> = Vec::with_capacity(list.len());
    let mut seen = std::collections::HashSet::with_capacity(list.len());
    for (place, value) in list.iter().enumerate() {
        let param = format!("part_ids[{place}]");
        let Some(id) = value.as_str().filter(|id| id.parse::<PartId>().is_ok()) else {
            let message = format!("{param} must be the id of a part, as POST /v1/uploads/.../parts answered it");
            return Err(Invalid::with_code("part_not_found", param, message));
        };
        if !seen.insert(id) {
            let message = format!("{param} names {id} a second time");
            return Err(Invalid::new(param, message));
        }
        ids.push(id.to_owned());
    }
    Ok(ids)
}

fn digest(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(value) = headers.get(DIGEST) else { return Ok(None) };
    match value.to_str() {
        Ok(text) if text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit()) => Ok(Some(text.to_owned())),
        _ => Err(Invalid::new(DIGEST, format!("{DIGEST} must be 64 hexadecimal digits")).into()),
    }
}

fn absent(id: &UploadId) -> ApiError {
    ApiError::not_found("upload", id.as_str())
}

fn ended(id: &UploadId, status: UploadStatus, what: &str) -> ApiError {
    let message = format!("the upload {id} is {} and {what}: begin another", status.as_str());
    ApiError::conflict("upload_ended", message).with_param("upload_id")
}

async fn with_file(api: &Api, upload: Upload) -> Result<UploadObject, ApiError> {
    let file = match &upload.file {
        Some(id) => api.store.file(id).await?,
        None => None,
    };
    Ok(shown(upload, file))
}

fn shown(upload: Upload, file: Option<File>) -> UploadObject {
    UploadObject {
        id: upload.id.to_string(),
        object: "upload",
        bytes: upload.bytes,
        created_at: upload.created_at,
        expires_at: upload.expires_at,
        filename: upload.filename,
        purpose: upload.purpose,
        mime_type: upload.mime_type,
        status: upload.status.as_str(),
        file: file.map(Into::into),
    }
}

impl From<Part> for PartObject {
    fn from(part: Part) -> Self {
        Self {
            id: part.id.to_string(),
            object: "upload.part",
            created_at: part.created_at,
            upload_id: part.upload.to_string(),
            bytes: part.bytes,
            sha256: part.sha256,
        }
    }
}
