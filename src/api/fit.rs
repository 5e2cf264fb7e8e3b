//! Whether a job could run: asked of the hosts that are alive, before anything is queued.
//!
//! Users of other systems find out after hours that a sequence does not fit; here the answer to the create says so, and
//! names the longest that would. Documents are not measured here: an executor does that while it validates the files.

use crate::{
    domain::{
        BaseModel, Event, HubName, Invalid, JobRequest, Level, Machine, ModelConfig, TrainingSpec,
        machine::{DeviceKind, alike},
    },
    plan,
    store::{Store, hosts::Host},
};

use super::{ApiError, error::excerpt};

/// Sequences are padded to a multiple of this.
pub(super) const PADDING: u64 = 128;
/// Names shown when a model is unknown.
const NAMES_SHOWN: usize = 20;

/// Asks every live host for a plan. Answers events for the job's story, or the refusal of the host that comes nearest.
///
/// Without any live host the job is taken and waits, and its story says so: an executor may be restarting, and a queue
/// that refuses work at such a moment loses it.
pub async fn ask_live_hosts(store: &Store, asked: &JobRequest) -> Result<Vec<Event>, ApiError> {
    let hosts = store.live_hosts().await?;
    if hosts.is_empty() {
        let message = "No executor is running at the moment. The job waits until one starts; whether its model and \
                       sequence fit is found out then";
        return Ok(vec![Event::message(Level::Warn, message)]);
    }
    if let Some(name) = fetched(&hosts, &asked.model) {
        let message =
            format!("No host has the base model {name} yet; an executor fetches it from its hub, and judges it then");
        return Ok(vec![Event::message(Level::Info, message)]);
    }
    let asked = (asked.model.clone(), asked.training.clone());
    // Planning is arithmetic, but a good deal of it.
    let answer = tokio::task::spawn_blocking(move || fits_somewhere(&hosts, &asked.0, &asked.1)).await;
    Ok(answer.map_err(ApiError::internal)??)
}

/// The model's name where no host has it, and one would fetch it from a hub.
fn fetched(hosts: &[Host], model: &str) -> Option<HubName> {
    let is_here = hosts.iter().flat_map(|host| &host.models).any(|base| base.name == model);
    let would_fetch = hosts.iter().any(|host| host.fetches);
    if is_here || !would_fetch { None } else { model.parse().ok() }
}

fn fits_somewhere(hosts: &[Host], model: &str, training: &TrainingSpec) -> Result<Vec<Event>, Invalid> {
    let wanted = training.wanted_device();
    let candidates: Vec<(Machine, &ModelConfig)> = hosts_with(hosts, model)?
        .into_iter()
        .flat_map(|(host, config)| alike(&host.machines, wanted).into_iter().map(move |machine| (machine, config)))
        .collect();
    if candidates.is_empty() {
        return Err(no_device(wanted));
    }
    // For the length asked for, or for a short one where the data decides the length.
    let tokens = training.sequence_length.unwrap_or(PADDING).next_multiple_of(PADDING);
    let mut nearest: Option<plan::Refusal> = None;
    let mut unfit: Option<(u64, Invalid)> = None;
    for (machine, config) in &candidates {
        let checked = config.check_on(machine.device).and_then(|()| training.check_ranks(config));
        if let Err(refusal) = checked.and_then(|()| training.check_devices(config, machine)) {
            // That of the host with the most devices: what would work there says most.
            let most = machine.all_devices();
            unfit = unfit.filter(|(devices, _)| *devices >= most).or(Some((most, refusal)));
            continue;
        }
        match plan::devices::fewest_or_why(&plan::Request::of(config, training, machine, tokens)) {
            Ok(_) => return Ok(notes(config, training)),
            Err(refusal) if nearest.as_ref().is_none_or(|other| refusal.longest_tokens > other.longest_tokens) => {
                nearest = Some(refusal);
            }
            Err(_) => {}
        }
    }
    if let Some(notes) = fits_across(&candidates, training, tokens) {
        return Ok(notes);
    }
    Err(nearest.map_or_else(|| unfit.map_or_else(|| no_device(wanted), |(_, refusal)| refusal), Invalid::from))
}

/// Whether hosts carry together what none does alone: those with devices of a kind, the largest first.
fn fits_across(candidates: &[(Machine, &ModelConfig)], training: &TrainingSpec, tokens: u64) -> Option<Vec<Event>> {
    let same = |a: &Machine, b: &Machine| {
        a.device == b.device && (a.device == DeviceKind::Cpu || a.device_name == b.device_name)
    };
    let kinds = candidates
        .iter()
        .enumerate()
        .filter(|(place, (first, _))| !candidates[..*place].iter().any(|(earlier, _)| same(earlier, first)));
    kinds.map(|(_, first)| first).find_map(|(first, config)| {
        let alike = candidates.iter().filter(|(machine, _)| same(machine, first));
        let mut hosts: Vec<Machine> = alike.map(|(machine, _)| machine.clone()).collect();
        hosts.sort_by_key(|machine| std::cmp::Reverse(machine.all_devices()));
        let fits = config.check_on(first.device).and_then(|()| training.check_ranks(config)).is_ok();
        fits.then(|| plan::devices::across(config, training, &hosts, tokens)).flatten().map(|_| notes(config, training))
    })
}

/// Hosts that have the model, each with the model's numbers.
pub(super) fn hosts_with<'a>(hosts: &'a [Host], model: &str) -> Result<Vec<(&'a Host, &'a ModelConfig)>, Invalid> {
    let mut found = Vec::new();
    let mut problem = None;
    for host in hosts {
        let Some(base) = host.models.iter().find(|base| base.name == model) else { continue };
        match &base.config {
            Some(config) => found.push((host, config)),
            None => problem = Some(base.problem.clone().unwrap_or_else(|| "its config cannot be read".into())),
        }
    }
    match problem {
        _ if !found.is_empty() => Ok(found),
        Some(problem) => {
            let message = format!("the model {} cannot be trained: {problem}", excerpt(model));
            Err(Invalid::with_code("model_not_trainable", "model", message))
        }
        None => Err(unknown_model(hosts, model)),
    }
}

fn unknown_model(hosts: &[Host], model: &str) -> Invalid {
    let mut names: Vec<&str> =
        hosts.iter().flat_map(|host| &host.models).map(|BaseModel { name, .. }| &**name).collect();
    names.sort_unstable();
    names.dedup();
    let known = match names.len() {
        0 => "no host has any model yet: put one into the model folder of a host".to_owned(),
        count if count > NAMES_SHOWN => format!("{} and {} more", names[..NAMES_SHOWN].join(", "), count - NAMES_SHOWN),
        _ => names.join(", "),
    };
    let message = format!("there is no base model {}; there is: {known}", excerpt(model));
    Invalid::with_code("model_not_found", "model", message)
}

fn no_device(device: Option<DeviceKind>) -> Invalid {
    let message = match device {
        Some(DeviceKind::Cuda) => {
            "no live host that has this model has a GPU; leave training.device out to train on what there is"
        }
        Some(DeviceKind::Cpu) => "no live host that has this model trains on its CPU; leave training.device out",
        None => "no live host that has this model has a device to train on",
    };
    Invalid::with_code("no_such_device", "training.device", message)
}

/// What the customer should know though the job is accepted.
fn notes(model: &ModelConfig, training: &TrainingSpec) -> Vec<Event> {
    let made_for = model.max_position_embeddings;
    let beyond = training.sequence_length.filter(|length| *length > made_for);
    let note = |length| {
        let message = format!("The model was made for sequences of {made_for} tokens; this job trains on {length}");
        Event::message(Level::Warn, message)
    };
    beyond.map(note).into_iter().collect()
}
