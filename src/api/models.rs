//! Models: the base models that live hosts have, and the results of jobs.

use std::collections::BTreeMap;

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa::ToSchema;

use super::{Api, ApiError, ErrorEnvelope, access::Caller, extract::Segments, hub::HubName};
use crate::{
    domain::Invalid,
    store::{checkpoints::Checkpoint, retention::ModelDeletion},
};

/// Most fine-tuned models of the list, newest first; OpenAI's shape has no pages here.
const MAX_FINE_TUNED: u32 = 10_000;
/// Owner of everything on a server of one's own.
const OWNER: &str = "longhaul";

/// A model.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelObject {
    /// A base model's name, or `ft:<base>:<org>:<suffix>:<id>`.
    id: String,
    /// Always `model`.
    object: &'static str,
    /// Unix seconds: when the model was made, or for a base model since when a host has shown it.
    created: i64,
    owned_by: &'static str,
    /// Of a fine-tuned model: the job that made it, whose checkpoints can be downloaded (an extension).
    #[serde(skip_serializing_if = "Option::is_none")]
    fine_tuning_job_id: Option<String>,
    /// Of a fine-tuned model: the checkpoint that it is (an extension).
    #[serde(skip_serializing_if = "Option::is_none")]
    checkpoint_id: Option<String>,
    /// Of a fine-tuned model: the name under `/hf` that Hugging Face's clients load it by (an extension).
    #[serde(skip_serializing_if = "Option::is_none")]
    hub: Option<HubName>,
    /// Of a base model that cannot be trained: why (an extension).
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// All models.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelList {
    /// Always `list`.
    object: &'static str,
    data: Vec<ModelObject>,
}

/// The word that a model is gone.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelDeleted {
    id: String,
    /// Always `model`.
    object: &'static str,
    /// Always true.
    deleted: bool,
}

/// Lists the base models that a live host has, by name, and then fine-tuned models, newest first: the results of the project's
/// jobs, and checkpoints that other projects opened to it.
#[utoipa::path(get, path = "/v1/models", tag = "models", responses((status = 200, body = ModelList)))]
pub async fn list_models(State(api): State<Api>, caller: Caller) -> Result<Json<ModelList>, ApiError> {
    let mut data = base_models(&api, false).await?;
    let fine_tuned = api.store.fine_tuned_models(&caller.project, MAX_FINE_TUNED).await?;
    data.extend(fine_tuned.into_iter().map(ModelObject::from));
    Ok(Json(ModelList { object: "list", data }))
}

/// Retrieves a model by its name, percent-encoded where it holds slashes.
#[utoipa::path(get, path = "/v1/models/{model}", tag = "models", params(("model" = String, Path)),
    responses((status = 200, body = ModelObject), (status = 404, body = ErrorEnvelope)))]
pub async fn retrieve_model(
    State(api): State<Api>,
    caller: Caller,
    Segments(name): Segments<String>,
) -> Result<Json<ModelObject>, ApiError> {
    let base = base_models(&api, true).await?.into_iter().find(|model| model.id == name);
    if let Some(model) = base {
        return Ok(Json(model));
    }
    // The database holds no zero byte in text, and so no such name.
    let found = if name.contains('\0') { None } else { api.store.open_model(&caller.project, &name).await? };
    found.map(|checkpoint| Json(checkpoint.into())).ok_or_else(|| ApiError::not_found("model", &name))
}

/// Deletes a fine-tuned model of the project and its weights.
///
/// The name may be that of a job's result or of any other checkpoint; each goes alone. A base model belongs to its host, and
/// what a job may still go on from stays until the job has ended.
#[utoipa::path(delete, path = "/v1/models/{model}", tag = "models", params(("model" = String, Path)),
    responses((status = 200, body = ModelDeleted), (status = 400, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope),
        (status = 409, body = ErrorEnvelope)))]
pub async fn delete_model(
    State(api): State<Api>,
    caller: Caller,
    Segments(name): Segments<String>,
) -> Result<Json<ModelDeleted>, ApiError> {
    if name.contains('\0') {
        return Err(ApiError::not_found("model", &name));
    }
    match api.store.delete_model(&caller.project, &name).await? {
        ModelDeletion::Deleted => Ok(Json(ModelDeleted { id: name, object: "model", deleted: true })),
        ModelDeletion::InUse(job) => {
            let message = format!("job {job} has not ended and may go on from this checkpoint: cancel the job first");
            Err(ApiError::conflict("model_in_use", message).with_param("model"))
        }
        ModelDeletion::Absent if base_models(&api, true).await?.iter().any(|model| model.id == name) => {
            let message = "a base model is a folder of its host: take it out of the host's model folder";
            Err(Invalid::with_code("base_model", "model", message).into())
        }
        ModelDeletion::Absent => Err(ApiError::not_found("model", &name)),
    }
}

async fn base_models(api: &Api, named: bool) -> Result<Vec<ModelObject>, ApiError> {
    let mut models = BTreeMap::new();
    for host in api.store.live_hosts().await? {
        for base in host.models {
            // Fetched at a revision of its own: known by that name, and not listed a second time.
            if !named && base.name.contains('@') {
                continue;
            }
            let model = ModelObject {
                id: base.name.clone(),
                object: "model",
                created: host.started_at,
                owned_by: OWNER,
                fine_tuning_job_id: None,
                checkpoint_id: None,
                hub: None,
                problem: base.problem.filter(|_| base.config.is_none()),
            };
            let known = models.entry(base.name).or_insert_with(|| model);
            known.created = known.created.min(host.started_at);
        }
    }
    Ok(models.into_values().collect())
}

impl From<Checkpoint> for ModelObject {
    fn from(checkpoint: Checkpoint) -> Self {
        Self {
            hub: Some(HubName::of(&checkpoint)),
            id: checkpoint.model_name,
            object: "model",
            created: checkpoint.created_at,
            owned_by: OWNER,
            fine_tuning_job_id: Some(checkpoint.job.to_string()),
            checkpoint_id: Some(checkpoint.id.to_string()),
            problem: None,
        }
    }
}
