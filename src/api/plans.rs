//! Plans: what a job would come to, without making one.
//!
//! An executor reads the data, since the API knows no tokenizer; what it counted is then planned here for every host that is alive
//! at the moment of asking.

use std::time::Duration;

use axum::{Json, extract::State, http::HeaderMap};
use serde::Serialize;
use serde_json::Value;
use tokio::time::{Instant, sleep};
use utoipa::ToSchema;

use super::{
    Api, ApiError, ErrorEnvelope,
    access::Caller,
    extract::{Id, JsonBody},
    fit,
    job_object::CreateJob,
    jobs::check_file,
};
use crate::{
    domain::{
        Invalid, JobRequest, Machine, ModelConfig, PlanId, TrainingSpec, job_request::FileRef, machine::alike,
        progress::DataSummary,
    },
    plan::{self, Category, Plan, Ranks},
    store::{
        hosts::Host,
        plans::{NewPlan, StoredPlan},
    },
};

/// How long a create waits for an answer unless `Prefer: wait=SECONDS` says otherwise, and at most.
const WAIT: Duration = Duration::from_secs(15);
const LONGEST_WAIT: Duration = Duration::from_secs(25);
/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(200);

/// What a job would come to.
#[derive(Debug, Serialize, ToSchema)]
pub struct PlanObject {
    /// `ftplan-` and letters and digits.
    id: String,
    /// Always `fine_tuning.plan`.
    object: &'static str,
    created_at: i64,
    /// `queued` while the data is read, then `ready`; `failed` where the job would fail, and `error` says why.
    status: String,
    model: String,
    /// `code`, `message` and `param`, as a job would have them.
    #[schema(required)]
    error: Option<Value>,
    /// What was counted in the data: `documents`, `tokens`, `valid_labels` (tokens that a loss counts), `longest_document`,
    /// `sequences`, `sequence_length`, `total_steps`, and a `preview` of the first examples with what is trained of them.
    #[schema(required, value_type = Option<Object>)]
    data: Option<DataSummary>,
    /// For every kind of device of every live host that has the model. Hosts that train it only together are not told here.
    hosts: Vec<HostPlan>,
}

/// What one kind of device of a host would do about the job.
#[derive(Debug, Serialize, ToSchema)]
pub struct HostPlan {
    hostname: String,
    device: String,
    /// Devices of this kind that the host has.
    n_devices: u64,
    fits: bool,
    /// Why it does not fit.
    #[schema(required)]
    problem: Option<String>,
    /// The longest sequence that fits on this device, in tokens.
    #[schema(required)]
    longest_sequence: Option<u64>,
    /// On as few devices as carry it.
    #[schema(required)]
    plan: Option<Outlook>,
}

/// A plan in numbers. Bytes are those of each device.
#[derive(Debug, Serialize, ToSchema)]
pub struct Outlook {
    /// Devices that share a sequence, and groups of them.
    sequence_parallel_size: u64,
    data_parallel_size: u64,
    predicted_peak_bytes: u64,
    predicted_host_peak_bytes: u64,
    /// Bytes of the device by what they hold; `host_ledger` likewise of host memory.
    #[schema(value_type = Object)]
    ledger: Value,
    #[schema(value_type = Object)]
    host_ledger: Value,
    disk_bytes: u64,
    /// An optimizer step over full sequences.
    predicted_step_seconds: f64,
    /// All steps of the job, were every sequence full.
    predicted_seconds: f64,
    /// Where the speeds come from: `measured`, `data sheet` or `assumed`.
    rates: String,
}

/// Plans a job without making one.
///
/// Takes the body of a job's creation. An executor reads the data meanwhile; when that takes longer than the request waits
/// (15 seconds, or as `Prefer: wait=SECONDS` says), the plan is `queued` and can be retrieved later.
#[utoipa::path(post, path = "/v1/fine_tuning/plans", tag = "fine-tuning",
    params(("Prefer" = Option<String>, Header, description = "`wait=SECONDS`: how long to wait for the answer, 25 at most.")),
    request_body = CreateJob,
    responses((status = 200, body = PlanObject), (status = 400, body = ErrorEnvelope), (status = 503, body = ErrorEnvelope)))]
pub async fn create_plan(
    State(api): State<Api>,
    caller: Caller,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Json<PlanObject>, ApiError> {
    let asked = JobRequest::read(&body.value)?;
    let patience = patience(&headers)?;
    for file in asked.training_files.iter().chain(&asked.validation_files) {
        check_file(&api, &caller, file).await?;
    }
    if api.store.live_hosts().await?.is_empty() {
        let message =
            "no executor is running at the moment, and one is needed to read the data; start one and ask again";
        return Err(ApiError::unavailable(message, "no live host"));
    }
    fit::ask_live_hosts(&api.store, &asked).await?;
    let ids = |files: &[FileRef]| files.iter().map(|file| file.id.clone()).collect();
    let new = NewPlan {
        project: caller.project,
        training_files: ids(&asked.training_files),
        validation_files: ids(&asked.validation_files),
        model: asked.model,
        training: asked.training,
    };
    let id = api.store.create_plan(&new).await?;
    let until = Instant::now() + patience;
    loop {
        let plan = stored(&api, &id).await?;
        if plan.status != "queued" || Instant::now() >= until || api.stop.is_cancelled() {
            return object(&api, plan).await.map(Json);
        }
        sleep(LOOK).await;
    }
}

/// Retrieves a plan. Its hosts are those that are alive now. Plans are kept for a day.
#[utoipa::path(get, path = "/v1/fine_tuning/plans/{plan_id}", tag = "fine-tuning", params(("plan_id" = String, Path)),
    responses((status = 200, body = PlanObject), (status = 404, body = ErrorEnvelope)))]
pub async fn retrieve_plan(State(api): State<Api>, Id(id): Id<PlanId>) -> Result<Json<PlanObject>, ApiError> {
    let plan = stored(&api, &id).await?;
    object(&api, plan).await.map(Json)
}

async fn stored(api: &Api, id: &PlanId) -> Result<StoredPlan, ApiError> {
    api.store.plan(id).await?.ok_or_else(|| ApiError::not_found("plan", id.as_str()))
}

/// The wish of RFC 7240, as far as it is ours.
fn patience(headers: &HeaderMap) -> Result<Duration, ApiError> {
    let preferences = headers.get_all("prefer").iter().filter_map(|value| value.to_str().ok());
    let wait = preferences.flat_map(|value| value.split(',')).find_map(|wish| wish.trim().strip_prefix("wait="));
    let Some(wait) = wait else { return Ok(WAIT) };
    let seconds: u64 = wait.parse().map_err(|_| Invalid::new("Prefer", "wait must be a whole number of seconds"))?;
    Ok(Duration::from_secs(seconds).min(LONGEST_WAIT))
}

async fn object(api: &Api, plan: StoredPlan) -> Result<PlanObject, ApiError> {
    let hosts = match plan.summary.clone() {
        None => Vec::new(),
        Some(summary) => {
            let (hosts, model, training) = (api.store.live_hosts().await?, plan.model.clone(), plan.training.clone());
            // Planning is arithmetic, but a good deal of it.
            let plans = tokio::task::spawn_blocking(move || host_plans(&hosts, &model, &training, &summary)).await;
            plans.map_err(ApiError::internal)?
        }
    };
    Ok(PlanObject {
        id: plan.id.to_string(),
        object: "fine_tuning.plan",
        created_at: plan.created_at,
        status: plan.status,
        model: plan.model,
        error: plan.error,
        data: plan.summary,
        hosts,
    })
}

fn host_plans(hosts: &[Host], model: &str, training: &TrainingSpec, summary: &DataSummary) -> Vec<HostPlan> {
    let Ok(with_model) = fit::hosts_with(hosts, model) else { return Vec::new() };
    let of_host = |(host, config): (&Host, &ModelConfig)| {
        let machines = alike(&host.machines, training.wanted_device());
        machines.iter().map(|machine| host_plan(host, machine, config, training, summary)).collect::<Vec<_>>()
    };
    with_model.into_iter().flat_map(of_host).collect()
}

fn host_plan(
    host: &Host,
    machine: &Machine,
    config: &ModelConfig,
    training: &TrainingSpec,
    summary: &DataSummary,
) -> HostPlan {
    let tokens = summary.sequence_length.next_multiple_of(fit::PADDING);
    let request = plan::Request::of(config, training, machine, tokens);
    let sound = config.check_on(machine.device).and_then(|()| training.check_ranks(config));
    let sound = sound.and_then(|()| training.check_devices(config, machine));
    let longest_sequence = sound.is_ok().then(|| plan::longest(&request));
    let planned = sound.and_then(|()| plan::devices::fewest_or_why(&request).map_err(Invalid::from));
    let (plan, problem) = match planned {
        Ok(plan) => (Some(Outlook::new(&plan, machine, summary.total_steps)), None),
        Err(refusal) => (None, Some(refusal.message)),
    };
    HostPlan {
        hostname: host.hostname.clone(),
        device: machine.device_name.clone(),
        n_devices: machine.all_devices(),
        fits: plan.is_some(),
        problem,
        longest_sequence,
        plan,
    }
}

impl Outlook {
    fn new(plan: &Plan, machine: &Machine, steps: u64) -> Self {
        let Ranks { sequence, data } = plan.choice.ranks;
        Self {
            sequence_parallel_size: sequence,
            data_parallel_size: data,
            predicted_peak_bytes: plan.predicted_peak_bytes,
            predicted_host_peak_bytes: plan.predicted_host_peak_bytes,
            ledger: ledger(&plan.ledger),
            host_ledger: ledger(&plan.host_ledger),
            disk_bytes: plan.disk_bytes,
            predicted_step_seconds: plan.optimizer_step_seconds,
            predicted_seconds: plan.optimizer_step_seconds * steps as f64,
            rates: machine.rates.source.clone(),
        }
    }
}

fn ledger(entries: &[(Category, u64)]) -> Value {
    let entry = |(category, bytes): &(Category, u64)| (format!("{category:?}").to_lowercase(), Value::from(*bytes));
    Value::Object(entries.iter().map(entry).collect())
}
