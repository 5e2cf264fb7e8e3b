//! Fine-tuned models as repositories of a Hugging Face Hub, for reading: with `HF_ENDPOINT=http://host:port/hf` its clients load
//! them by name.
//!
//! A job is a repository, `longhaul/<suffix or base model>-<the job's id>`, since names like `ft:...` are none to the clients. Its
//! checkpoints are revisions: `main` the newest, `step-<n>` each, and of each a commit, 40 hex digits that never stand for other
//! bytes. The clients want `ETag` and `X-Repo-Commit` with every file, and `X-Error-Code` with what is not there.

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use sha2::{Digest, Sha256};
use utoipa::ToSchema;

use super::{Api, ApiError, ErrorEnvelope, access::Caller, checkpoints, extract::Segments};
use crate::{
    domain::{CheckpointId, JobId, hex, progress::WrittenFile},
    store::checkpoints::{Checkpoint, FileSet, ORGANIZATION},
};

const COMMIT: HeaderName = HeaderName::from_static("x-repo-commit");
const ERROR_CODE: HeaderName = HeaderName::from_static("x-error-code");
const ERROR_MESSAGE: HeaderName = HeaderName::from_static("x-error-message");
/// What the clients know a wrong key by.
const WRONG_KEY: &str = "Invalid credentials in Authorization header";
/// Hex digits of a commit, as git has them.
const COMMIT_LENGTH: usize = 40;
/// Most characters of a repository's name before the job's id.
const MAX_TITLE: usize = 60;
/// Bytes of the file that stands for a large one in git.
const POINTER_BYTES: u64 = 134;

/// What Hugging Face's clients call a checkpoint.
#[derive(Debug, Serialize, ToSchema)]
pub struct HubName {
    /// `longhaul/<name>`
    repository: String,
    /// `step-<n>`; `main` is the newest of the job.
    revision: String,
}

impl HubName {
    pub(super) fn of(checkpoint: &Checkpoint) -> Self {
        Self { repository: repository_of(checkpoint), revision: format!("step-{}", checkpoint.step) }
    }
}

/// What a repository is at a revision.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct RepositoryInfo {
    id: String,
    model_id: String,
    author: &'static str,
    /// The revision's commit.
    sha: String,
    private: bool,
    gated: bool,
    disabled: bool,
    tags: [&'static str; 2],
    #[serde(rename = "library_name")]
    library_name: &'static str,
    #[serde(rename = "pipeline_tag")]
    pipeline_tag: &'static str,
    siblings: Vec<Sibling>,
}

/// A file of a repository.
#[derive(Debug, Serialize, ToSchema)]
pub struct Sibling {
    /// Path in the repository.
    rfilename: String,
}

/// A file of a listing.
#[derive(Debug, Serialize, ToSchema)]
pub struct TreeEntry {
    /// Always `file`: models have no folders.
    #[serde(rename = "type")]
    kind: &'static str,
    path: String,
    size: u64,
    oid: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    lfs: Option<LargeFile>,
}

/// The content behind a large file.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct LargeFile {
    /// SHA-256, hex.
    oid: String,
    size: u64,
    pointer_size: u64,
}

/// What the clients are told beside the status.
#[derive(Debug, Clone, Copy)]
enum Missing {
    Repository,
    Revision,
    Entry,
}

/// An error with the headers that the clients read.
#[derive(Debug)]
pub struct HubError(ApiError, HeaderMap);

impl HubError {
    fn missing(what: Missing, name: &str) -> Self {
        let (code, noun) = match what {
            Missing::Repository => ("RepoNotFound", "repository"),
            Missing::Revision => ("RevisionNotFound", "revision"),
            Missing::Entry => ("EntryNotFound", "file"),
        };
        let headers = HeaderMap::from_iter([
            (ERROR_CODE, HeaderValue::from_static(code)),
            (ERROR_MESSAGE, HeaderValue::from_static("it is not on this server")),
        ]);
        Self(ApiError::not_found(noun, name), headers)
    }

    /// Of this commit, so that clients remember what is not there.
    fn at(mut self, commit: &str) -> Self {
        self.1.extend(HeaderValue::from_str(commit).ok().map(|commit| (COMMIT, commit)));
        self
    }
}

impl<E: Into<ApiError>> From<E> for HubError {
    fn from(error: E) -> Self {
        Self(error.into(), HeaderMap::new())
    }
}

impl IntoResponse for HubError {
    fn into_response(self) -> Response {
        let mut response = self.0.into_response();
        response.headers_mut().extend(self.1);
        response
    }
}

/// A request that is not let in, as the clients understand it: of a wrong key they know the words; without a key and without a
/// code they take the repository for one that others may see.
pub(super) fn refused(refusal: ApiError, key_given: bool) -> Response {
    let mut response = refusal.into_response();
    if response.status() == StatusCode::UNAUTHORIZED {
        let message = if key_given { WRONG_KEY } else { "a key is needed: give it as HF_TOKEN" };
        response.headers_mut().insert(ERROR_MESSAGE, HeaderValue::from_static(message));
    }
    response
}

/// Says what a repository is at its newest revision.
#[utoipa::path(get, path = "/hf/api/models/{namespace}/{name}", tag = "hub",
    params(("namespace" = String, Path), ("name" = String, Path)),
    responses((status = 200, body = RepositoryInfo), (status = 404, body = ErrorEnvelope)))]
pub async fn repository(
    State(api): State<Api>,
    caller: Caller,
    Segments((namespace, name)): Segments<(String, String)>,
) -> Result<Json<RepositoryInfo>, HubError> {
    info(&api, &caller, (&namespace, &name), "main").await
}

/// Says what a repository is at a revision.
#[utoipa::path(get, path = "/hf/api/models/{namespace}/{name}/revision/{revision}", tag = "hub",
    params(("namespace" = String, Path), ("name" = String, Path),
        ("revision" = String, Path, description = "`main`, `step-<n>`, or a commit.")),
    responses((status = 200, body = RepositoryInfo), (status = 404, body = ErrorEnvelope)))]
pub async fn repository_revision(
    State(api): State<Api>,
    caller: Caller,
    Segments((namespace, name, revision)): Segments<(String, String, String)>,
) -> Result<Json<RepositoryInfo>, HubError> {
    info(&api, &caller, (&namespace, &name), &revision).await
}

/// Lists a repository's files at a revision.
#[utoipa::path(get, path = "/hf/api/models/{namespace}/{name}/tree/{revision}", tag = "hub",
    params(("namespace" = String, Path), ("name" = String, Path), ("revision" = String, Path)),
    responses((status = 200, body = Vec<TreeEntry>), (status = 404, body = ErrorEnvelope)))]
pub async fn repository_tree(
    State(api): State<Api>,
    caller: Caller,
    Segments((namespace, name, revision)): Segments<(String, String, String)>,
) -> Result<Json<Vec<TreeEntry>>, HubError> {
    let checkpoint = find(&api, &caller, (&namespace, &name), &revision).await?;
    let files = api.store.checkpoint_files(&checkpoint.id, FileSet::Model).await?;
    Ok(Json(files.into_iter().map(TreeEntry::from).collect()))
}

/// Lists a folder of a repository. A model has none.
#[utoipa::path(get, path = "/hf/api/models/{namespace}/{name}/tree/{revision}/{*path}", tag = "hub",
    params(("namespace" = String, Path), ("name" = String, Path), ("revision" = String, Path), ("path" = String, Path)),
    responses((status = 200, body = Vec<TreeEntry>), (status = 404, body = ErrorEnvelope)))]
pub async fn repository_folder(
    State(api): State<Api>,
    caller: Caller,
    Segments((namespace, name, revision, path)): Segments<(String, String, String, String)>,
) -> Result<Json<Vec<TreeEntry>>, HubError> {
    let checkpoint = find(&api, &caller, (&namespace, &name), &revision).await?;
    let folder = format!("{}/", path.trim_end_matches('/'));
    let files = api.store.checkpoint_files(&checkpoint.id, FileSet::Model).await?;
    let inside: Vec<TreeEntry> =
        files.into_iter().filter(|file| file.path.starts_with(&folder)).map(TreeEntry::from).collect();
    if inside.is_empty() {
        return Err(HubError::missing(Missing::Entry, &path).at(&commit(&checkpoint.id)));
    }
    Ok(Json(inside))
}

/// Downloads a file of a repository, whole or a range of it.
#[utoipa::path(get, path = "/hf/{namespace}/{name}/resolve/{revision}/{*path}", tag = "hub",
    params(("namespace" = String, Path), ("name" = String, Path), ("revision" = String, Path), ("path" = String, Path),
        ("Range" = Option<String>, Header, description = "`bytes=first-last`")),
    responses(
        (status = 200, content_type = "application/octet-stream", body = Vec<u8>, description = "the whole content"),
        (status = 206, content_type = "application/octet-stream", body = Vec<u8>, description = "the range asked for"),
        (status = 304, description = "the copy with that ETag is current"),
        (status = 404, body = ErrorEnvelope), (status = 416, body = ErrorEnvelope)))]
pub async fn repository_file(
    State(api): State<Api>,
    caller: Caller,
    Segments((namespace, name, revision, path)): Segments<(String, String, String, String)>,
    headers: HeaderMap,
) -> Result<Response, HubError> {
    let checkpoint = find(&api, &caller, (&namespace, &name), &revision).await?;
    let commit = commit(&checkpoint.id);
    let files = api.store.checkpoint_files(&checkpoint.id, FileSet::Model).await?;
    let Some(file) = files.into_iter().find(|file| file.path == path) else {
        return Err(HubError::missing(Missing::Entry, &path).at(&commit));
    };
    let mut response = checkpoints::send(&api, &checkpoint.id, file, &headers).await?;
    response.headers_mut().extend(HeaderValue::from_str(&commit).ok().map(|commit| (COMMIT, commit)));
    Ok(response)
}

async fn info(
    api: &Api,
    caller: &Caller,
    repository: (&str, &str),
    revision: &str,
) -> Result<Json<RepositoryInfo>, HubError> {
    let checkpoint = find(api, caller, repository, revision).await?;
    let files = api.store.checkpoint_files(&checkpoint.id, FileSet::Model).await?;
    let id = repository_of(&checkpoint);
    Ok(Json(RepositoryInfo {
        model_id: id.clone(),
        id,
        author: ORGANIZATION,
        sha: commit(&checkpoint.id),
        private: caller.key.is_some(),
        gated: false,
        disabled: false,
        tags: ["transformers", "safetensors"],
        library_name: "transformers",
        pipeline_tag: "text-generation",
        siblings: files.into_iter().map(|file| Sibling { rfilename: file.path }).collect(),
    }))
}

/// The checkpoint that is this revision, among those that the caller's project may see.
async fn find(
    api: &Api,
    caller: &Caller,
    (namespace, name): (&str, &str),
    revision: &str,
) -> Result<Checkpoint, HubError> {
    let wanted = format!("{namespace}/{name}");
    let no_repository = || HubError::missing(Missing::Repository, &wanted);
    let job: JobId = name
        .rsplit('-')
        .next()
        .and_then(|id| format!("{}{id}", JobId::PREFIX).parse().ok())
        .ok_or_else(no_repository)?;
    let checkpoints = api.store.open_checkpoints(&caller.project, &job).await?;
    if checkpoints.first().is_none_or(|newest| repository_of(newest) != wanted) {
        return Err(no_repository());
    }
    let is_wanted = |checkpoint: &Checkpoint| match revision {
        "main" => true,
        commit_of if commit_of.len() == COMMIT_LENGTH => commit(&checkpoint.id) == commit_of,
        step => step.strip_prefix("step-") == Some(checkpoint.step.to_string().as_str()),
    };
    checkpoints.into_iter().find(is_wanted).ok_or_else(|| HubError::missing(Missing::Revision, revision))
}

/// The repository that holds a checkpoint: `<namespace>/<name>`, where clients allow letters, digits and single `-`, `_`, `.`.
fn repository_of(checkpoint: &Checkpoint) -> String {
    // ft:<base>:<org>:<suffix>:<short id>[:ckpt-step-<n>]
    let name = &checkpoint.model_name;
    let name = name.rsplit_once(":ckpt-step-").map_or(name.as_str(), |(name, _)| name);
    let mut parts = name.rsplitn(4, ':').skip(1);
    let suffix = parts.next().unwrap_or_default();
    let base = parts.nth(1).and_then(|base| base.rsplit(['/', ':']).next()).unwrap_or_default();
    let id = checkpoint.job.as_str().trim_start_matches(JobId::PREFIX);
    let title = [suffix, base, "model"].into_iter().map(title).find(|title| !title.is_empty()).unwrap_or_default();
    format!("{ORGANIZATION}/{title}-{id}")
}

/// Text as part of a repository's name.
fn title(text: &str) -> String {
    let mut title = String::new();
    for letter in text.chars() {
        let letter = if letter.is_ascii_alphanumeric() {
            letter
        } else if letter == '_' {
            '_'
        } else {
            '-'
        };
        if letter.is_ascii_alphanumeric() || !title.is_empty() && !title.ends_with(['-', '_']) {
            title.push(letter);
        }
    }
    title.truncate(MAX_TITLE);
    title.trim_end_matches(['-', '_']).to_owned()
}

/// A checkpoint's bytes never change, so its id stands for them.
fn commit(id: &CheckpointId) -> String {
    let mut digest = hex(&Sha256::digest(id.as_str()));
    digest.truncate(COMMIT_LENGTH);
    digest
}

impl From<WrittenFile> for TreeEntry {
    fn from(WrittenFile { path, bytes, sha256 }: WrittenFile) -> Self {
        let lfs = path.ends_with(".safetensors").then(|| LargeFile {
            oid: sha256.clone(),
            size: bytes,
            pointer_size: POINTER_BYTES,
        });
        let mut oid = sha256;
        oid.truncate(COMMIT_LENGTH);
        Self { kind: "file", path, size: bytes, oid, lfs }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn of(model_name: &str) -> String {
        repository_of(&Checkpoint {
            id: "ftckpt_a".parse().expect("an id"),
            job: "ftjob-Zz19".parse().expect("an id"),
            step: 3,
            model_name: model_name.to_owned(),
            last: true,
            metrics: BTreeMap::new(),
            created_at: 0,
        })
    }

    #[test]
    fn repositories_have_names_that_clients_take() {
        assert_eq!(of("ft:small:longhaul:my-suffix:Zz19"), "longhaul/my-suffix-Zz19");
        assert_eq!(of("ft:small:longhaul:my-suffix:Zz19:ckpt-step-12"), "longhaul/my-suffix-Zz19");
        assert_eq!(of("ft:org/small.v2:longhaul::Zz19"), "longhaul/small-v2-Zz19");
        assert_eq!(of("ft:small:longhaul:--a..b / \u{fc}_:Zz19"), "longhaul/a-b-Zz19");
        assert_eq!(of("ft:...:longhaul:\u{fc}\u{fc}:Zz19"), "longhaul/model-Zz19");
        let long = of(&format!("ft:small:longhaul:{}:Zz19", "x".repeat(64)));
        assert_eq!(long, format!("longhaul/{}-Zz19", "x".repeat(MAX_TITLE)));
    }

    #[test]
    fn a_commit_looks_like_one_of_git() {
        let commit = commit(&"ftckpt_a".parse().expect("an id"));
        assert!(commit.len() == 40 && commit.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)));
    }
}
