//! A session's state to and from folders: base weights in, checkpoints out, a run resumed.
//!
//! A checkpoint folder is a Hugging Face model, and under `resume/` what continuing needs bit for bit: both moments, the
//! masters' low halves, and how far the run had come. Tensors go by parameter name, so that the layout in memory is free.

use std::path::Path;

use super::{job::Progress, session::Session};
use crate::{
    domain::{Invalid, progress::WrittenCheckpoint},
    engine::{
        Error, Result,
        alst::optimizer_offload::OptimizerOffload,
        backend::{Backend, DType, Split, Tensor, cpu::adamw},
        checkpoint::{
            huggingface,
            safetensors::{Planned, Weights, write as write_tensors},
            staging::{HashingWriter, Staging},
        },
        model::params::Named,
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
    let low = session.optimizer().low;
    for Named { name, shape, tensor, first } in parameters {
        weights.read(&name, &shape, |begin, values| {
            let to = tensor.part(begin, values.len() as u64);
            session.backend.upload(to, &encode(values, tensor.dtype))?;
            let Some(low) = low else { return Ok(()) };
            // The master is the stored weight to its last bit, also where storage rounds it.
            let at = first + begin;
            let halves: Vec<u8> = values.iter().flat_map(|v| adamw::parts(*v).1.to_le_bytes()).collect();
            upload(&mut session.backend, low.rows(at, at + values.len() as u64), &halves)
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

/// A tensor of a file: its name and shape, and where its elements are, piece by piece.
struct Stored {
    name: String,
    shape: Vec<u64>,
    pieces: Vec<Tensor>,
}

impl Stored {
    fn dtype(&self) -> DType {
        self.pieces[0].dtype
    }

    fn elements(&self) -> u64 {
        self.pieces.iter().map(Tensor::elements).sum()
    }
}

impl From<Named> for Stored {
    fn from(Named { name, shape, tensor, .. }: Named) -> Self {
        Self { name, shape, pieces: vec![tensor] }
    }
}

/// What is kept beside the weights, by the parameter's name: its moments and its masters' low halves.
fn resume_tensors<B: Backend>(session: &Session<B>) -> Vec<Stored> {
    let of = |prefix: &'static str, state: Split| {
        session.weights().into_iter().map(move |Named { name, shape, tensor, first }| Stored {
            name: format!("{prefix}.{name}"),
            shape,
            pieces: state.rows(first, first + tensor.elements()).collect(),
        })
    };
    let OptimizerOffload { m, v, low, .. } = *session.optimizer();
    let mut tensors: Vec<Stored> = of("m", m).chain(of("v", v)).collect();
    tensors.extend(low.into_iter().flat_map(|low| of("low", low)));
    tensors
}

fn planned(tensors: &[Stored]) -> Vec<Planned> {
    let plan = |t: &Stored| Planned { name: t.name.clone(), dtype: t.dtype(), shape: t.shape.clone() };
    tensors.iter().map(plan).collect()
}

/// Copies host bytes into consecutive tensors.
fn upload<B: Backend>(backend: &mut B, to: impl IntoIterator<Item = Tensor>, mut bytes: &[u8]) -> Result {
    for piece in to {
        let (these, rest) = bytes.split_at(piece.bytes() as usize);
        backend.upload(piece, these)?;
        bytes = rest;
    }
    Ok(())
}

/// Writes one tensor's elements from where they are.
fn stream<B: Backend>(backend: &mut B, from: &Stored, writer: &mut HashingWriter) -> Result {
    let mut bytes = Vec::new();
    for piece in &from.pieces {
        let n = PIECE_BYTES / piece.dtype.bytes();
        for first in (0..piece.elements()).step_by(n as usize) {
            let part = piece.part(first, n.min(piece.elements() - first));
            bytes.resize(part.bytes() as usize, 0);
            backend.download(part, &mut bytes)?;
            writer.put(&bytes)?;
        }
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
    let weights: Vec<Stored> = session.weights().into_iter().map(Stored::from).collect();
    let dtype = session.backend.storage();
    huggingface::write_companions(&mut staging, base, dtype)?;
    huggingface::write_weights(&mut staging, &planned(&weights), |writer, i| {
        stream(&mut session.backend, &weights[i], writer)
    })?;
    let resume = resume_tensors(session);
    staging.write("resume/optimizer.safetensors", |writer| {
        write_tensors(writer, &planned(&resume), |writer, i| stream(&mut session.backend, &resume[i], writer))
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
    for stored in resume_tensors(session) {
        let bytes = state.bytes(&stored.name, stored.dtype(), stored.elements())?;
        upload(&mut session.backend, stored.pieces, bytes)?;
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
