//! A session's state to and from folders: base weights in, checkpoints out, a run resumed.
//!
//! A checkpoint folder is a Hugging Face model, and under `resume/` what continuing needs bit for bit: both moments, the
//! masters' low halves, and how far the run had come. Tensors go by parameter name, so that the layout in memory is free.

use std::path::Path;

use super::{job::Progress, session::Session};
use crate::{
    domain::{Invalid, ModelConfig, progress::WrittenCheckpoint},
    engine::{
        Error, Result,
        backend::{Backend, DType, Tensor, cpu::adamw},
        checkpoint::{
            huggingface,
            safetensors::{Planned, Weights, write as write_tensors},
            staging::{HashingWriter, Staging},
        },
        model::{Params, params::Named},
        optim::States,
    },
};

/// Bytes moved between device and file at once.
const PIECE_BYTES: u64 = 4 << 20;
/// Version of the resume state; another version is refused by name rather than misread.
const VERSION: u64 = 1;

/// Weights of a base model's folder into the session, checked name by name against the config.
pub fn load_base<B: Backend>(session: &mut Session<B>, folder: &Path) -> Result {
    let weights = Weights::open(folder)?;
    let parameters = session.weights();
    for name in weights.names() {
        let tied_head = name == "lm_head.weight" && !parameters.iter().any(|p| p.name == name);
        // Old exports carry the rotary frequencies, which follow from the config.
        let known = tied_head || name.ends_with("rotary_emb.inv_freq") || parameters.iter().any(|p| p.name == name);
        if !known {
            let message = format!("the weight files hold {name}, which a model of this config does not have");
            return Err(Invalid::with_code("invalid_model", "model", message).into());
        }
    }
    let low = session.states().low;
    let flat = session.states().w;
    for Named { name, shape, tensor } in parameters {
        weights.read(&name, &shape, |first, values| {
            let to = tensor.part(first, values.len() as u64);
            session.backend.upload(to, &encode(values, tensor.dtype))?;
            let Some(low) = low else { return Ok(()) };
            // The master is the stored weight to its last bit, also where storage rounds it.
            let at = (to.offset - flat.offset) / flat.dtype.bytes();
            let halves: Vec<u8> = values.iter().flat_map(|v| adamw::parts(*v).1.to_le_bytes()).collect();
            session.backend.upload(low.part(at, values.len() as u64), &halves)
        })?;
    }
    Ok(())
}

fn encode(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::Bf16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        DType::F64 => values.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// Every parameter of a flat tensor by name.
fn named(flat: Tensor, prefix: &str, config: &ModelConfig) -> Vec<Named> {
    let mut parameters = Params::over(config, flat).named(config);
    for parameter in &mut parameters {
        parameter.name = format!("{prefix}.{}", parameter.name);
    }
    parameters
}

/// What is kept beside the weights, by name.
fn resume_tensors(states: &States, config: &ModelConfig) -> Vec<Named> {
    let mut tensors = named(states.m, "m", config);
    tensors.extend(named(states.v, "v", config));
    tensors.extend(states.low.into_iter().flat_map(|low| named(low, "low", config)));
    tensors
}

fn planned(tensors: &[Named]) -> Vec<Planned> {
    let plan = |t: &Named| Planned { name: t.name.clone(), dtype: t.tensor.dtype, shape: t.shape.clone() };
    tensors.iter().map(plan).collect()
}

/// Writes one tensor's elements from the device.
fn stream<B: Backend>(backend: &mut B, from: Tensor, writer: &mut HashingWriter) -> Result {
    let n = PIECE_BYTES / from.dtype.bytes();
    let mut bytes = Vec::new();
    for first in (0..from.elements()).step_by(n as usize) {
        let part = from.part(first, n.min(from.elements() - first));
        bytes.resize(part.bytes() as usize, 0);
        backend.download(part, &mut bytes)?;
        writer.put(&bytes)?;
    }
    Ok(())
}

/// Writes the folder `step-N` under `parent`: whole, synced and hashed, or not at all. `base` is the folder the model came
/// from, for config and tokenizer.
pub fn write<B: Backend>(
    session: &mut Session<B>,
    progress: Progress,
    base: &Path,
    parent: &Path,
) -> Result<WrittenCheckpoint> {
    session.backend.synchronize()?;
    let folder = format!("step-{}", progress.step);
    let mut staging = Staging::begin(parent, &folder)?;
    let weights = session.weights();
    let dtype = session.backend.storage();
    huggingface::write_companions(&mut staging, base, dtype)?;
    huggingface::write_weights(&mut staging, &planned(&weights), |writer, i| {
        stream(&mut session.backend, weights[i].tensor, writer)
    })?;
    let resume = resume_tensors(session.states(), session.config());
    staging.write("resume/optimizer.safetensors", |writer| {
        write_tensors(writer, &planned(&resume), |writer, i| stream(&mut session.backend, resume[i].tensor, writer))
    })?;
    let state = serde_json::json!({ "version": VERSION, "progress": progress });
    staging.write_bytes("resume/progress.json", format!("{state:#}\n").as_bytes())?;
    let files = staging.finish()?;
    Ok(WrittenCheckpoint { step: progress.step, folder, files, ..WrittenCheckpoint::default() })
}

/// Brings a session to where a checkpoint left it.
pub fn resume<B: Backend>(session: &mut Session<B>, folder: &Path) -> Result<Progress> {
    let weights = Weights::open(folder)?;
    for Named { name, tensor, .. } in session.weights() {
        let bytes = weights.bytes(&name, tensor.dtype, tensor.elements())?;
        session.backend.upload(tensor, bytes)?;
    }
    let state = Weights::open_files([folder.join("resume/optimizer.safetensors")])?;
    for Named { name, tensor, .. } in resume_tensors(session.states(), session.config()) {
        session.backend.upload(tensor, state.bytes(&name, tensor.dtype, tensor.elements())?)?;
    }
    let path = folder.join("resume/progress.json");
    let text = std::fs::read_to_string(&path).map_err(Error::file(&path))?;
    let refuse = |message: String| Error::from(Invalid::with_code("invalid_checkpoint", "checkpoint", message));
    let value: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| refuse(format!("{}: {error}", path.display())))?;
    if value["version"] != VERSION {
        return Err(refuse(format!(
            "{} has version {}, this program writes {VERSION}",
            path.display(),
            value["version"]
        )));
    }
    serde_json::from_value(value["progress"].clone()).map_err(|error| refuse(format!("{}: {error}", path.display())))
}
