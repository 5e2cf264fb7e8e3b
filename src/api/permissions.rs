//! Permissions of checkpoints: a project that has one finds the model among its own, looks at it and downloads it, here and
//! under `/hf`. Only administrators of the project that trained it give and take them.

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    Api, ApiError, ErrorEnvelope,
    access::Caller,
    extract::{JsonBody, Pairs, Segments, named, no_such_cursor},
};
use crate::{
    domain::{CheckpointId, Invalid, PermissionId, fields::Fields},
    store::permissions::Permission,
};

/// Most permissions of one page, and how many there are when nobody says.
const MAX_PAGE: u32 = 1000;
const DEFAULT_PAGE: u32 = 10;
/// Most projects of one request.
const MAX_PROJECTS: usize = 100;
const MAX_PROJECT_ID: usize = 128;

/// Projects to be let in.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "describes the body in the contract; create_permissions reads it field by field")]
pub struct CreatePermissions {
    #[schema(min_items = 1, max_items = 100)]
    project_ids: Vec<String>,
}

/// A project's permission to use a checkpoint.
#[derive(Debug, Serialize, ToSchema)]
pub struct PermissionObject {
    id: String,
    /// Always `checkpoint.permission`.
    object: &'static str,
    /// Unix seconds.
    created_at: i64,
    project_id: String,
}

/// One page of permissions.
#[derive(Debug, Serialize, ToSchema)]
pub struct PermissionList {
    /// Always `list`.
    object: &'static str,
    data: Vec<PermissionObject>,
    #[schema(required)]
    first_id: Option<String>,
    #[schema(required)]
    last_id: Option<String>,
    has_more: bool,
}

/// The word that a permission is gone.
#[derive(Debug, Serialize, ToSchema)]
pub struct PermissionDeleted {
    id: String,
    /// Always `checkpoint.permission`.
    object: &'static str,
    /// Always true.
    deleted: bool,
}

/// Opens a checkpoint to projects. Those that have it keep the permission they have.
///
/// They find the model in their list, can look at it and download its files, but not delete it or see its job. Needs a key of
/// the scope admin.
#[utoipa::path(post, path = "/v1/fine_tuning/checkpoints/{model}/permissions", tag = "fine-tuning",
    params(("model" = String, Path, description = "Name of a fine-tuned model, `ft:...`.")), request_body = CreatePermissions,
    responses((status = 200, body = PermissionList), (status = 400, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope)))]
pub async fn create_permissions(
    State(api): State<Api>,
    caller: Caller,
    Segments(model): Segments<String>,
    body: JsonBody,
) -> Result<Json<PermissionList>, ApiError> {
    let projects = projects(&Fields::root(&body.value)?)?;
    let checkpoint = checkpoint(&api, &caller, &model).await?;
    Ok(Json(list(api.store.permit(&checkpoint, &projects).await?, false)))
}

/// Lists the permissions of a checkpoint, newest first.
#[utoipa::path(get, path = "/v1/fine_tuning/checkpoints/{model}/permissions", tag = "fine-tuning",
    params(("model" = String, Path, description = "Name of a fine-tuned model, `ft:...`."),
        ("project_id" = Option<String>, Query, description = "Only the permission of this project."),
        ("after" = Option<String>, Query, description = "Id of the last permission already seen."),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Most permissions of the page; 10 if absent."),
        ("order" = Option<String>, Query, description = "By time: `descending` (if absent) or `ascending`.")),
    responses((status = 200, body = PermissionList), (status = 400, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope)))]
pub async fn list_permissions(
    State(api): State<Api>,
    caller: Caller,
    Segments(model): Segments<String>,
    pairs: Pairs,
) -> Result<Json<PermissionList>, ApiError> {
    let page = pairs.page::<PermissionId>(DEFAULT_PAGE, MAX_PAGE)?;
    let checkpoint = checkpoint(&api, &caller, &model).await?;
    let listed = api.store.list_permissions(&checkpoint, pairs.find("project_id"), &page).await?;
    let listed = listed.ok_or_else(|| no_such_cursor(page.after.as_deref().unwrap_or_default()))?;
    Ok(Json(list(listed.rows, listed.has_more)))
}

/// Takes a permission back.
#[utoipa::path(delete, path = "/v1/fine_tuning/checkpoints/{model}/permissions/{permission_id}", tag = "fine-tuning",
    params(("model" = String, Path, description = "Name of a fine-tuned model, `ft:...`."), ("permission_id" = String, Path)),
    responses((status = 200, body = PermissionDeleted), (status = 404, body = ErrorEnvelope)))]
pub async fn delete_permission(
    State(api): State<Api>,
    caller: Caller,
    Segments((model, id)): Segments<(String, String)>,
) -> Result<Json<PermissionDeleted>, ApiError> {
    let permission: PermissionId = named(&id)?;
    let checkpoint = checkpoint(&api, &caller, &model).await?;
    if !api.store.revoke(&checkpoint, &permission).await? {
        return Err(ApiError::not_found("permission", &id));
    }
    Ok(Json(PermissionDeleted { id, object: "checkpoint.permission", deleted: true }))
}

async fn checkpoint(api: &Api, caller: &Caller, model: &str) -> Result<CheckpointId, ApiError> {
    // The database holds no zero byte in text, and so no such name.
    let found = if model.contains('\0') { None } else { api.store.own_model(&caller.project, model).await? };
    found.map(|checkpoint| checkpoint.id).ok_or_else(|| ApiError::not_found("model", model))
}

fn projects(fields: &Fields) -> Result<Vec<String>, Invalid> {
    fields.only(&["project_ids"])?;
    let list = fields.list("project_ids", MAX_PROJECTS)?;
    if list.is_empty() {
        let message = "you must provide project_ids: the projects to let in";
        return Err(Invalid::with_code("missing_required_parameter", "project_ids", message));
    }
    let mut projects = Vec::with_capacity(list.len());
    for (place, value) in list.iter().enumerate() {
        let sound = |id: &&str| (1..=MAX_PROJECT_ID).contains(&id.len()) && !id.contains('\0');
        let Some(id) = value.as_str().filter(sound) else {
            let param = format!("project_ids[{place}]");
            let message = format!("{param} must be a project's id, 1 to {MAX_PROJECT_ID} bytes of text");
            return Err(Invalid::new(param, message));
        };
        projects.push(id.to_owned());
    }
    projects.sort_unstable();
    projects.dedup();
    Ok(projects)
}

fn list(rows: Vec<Permission>, has_more: bool) -> PermissionList {
    let object = |row: Permission| PermissionObject {
        id: row.id.to_string(),
        object: "checkpoint.permission",
        created_at: row.created_at,
        project_id: row.project,
    };
    let data: Vec<PermissionObject> = rows.into_iter().map(object).collect();
    PermissionList {
        object: "list",
        first_id: data.first().map(|row| row.id.clone()),
        last_id: data.last().map(|row| row.id.clone()),
        has_more,
        data,
    }
}
