//! A session's state to and from folders: base weights in, checkpoints out, a run resumed.
//!
//! A checkpoint folder is a Hugging Face model, and under `resume/` what continuing needs bit for bit: both moments, the
//! masters' low halves, and how far the run had come. Tensors go by parameter name and whole, so that the layout in memory and
//! the number of ranks are free: each rank reads what it owns, and what each owns is gathered piece by piece to rank 0, which
//! writes. No rank ever holds more than its part.

use std::path::Path;

use super::{gather::gather, job::Progress, session::Session};
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
        comm::Comm,
        model::{params::Named, share::Part},
    },
};

/// Version of the resume state; another version is refused by name rather than misread.
const VERSION: u64 = 1;

/// Loads a base model's folder into the session, checked name by name against the config: of each parameter what the rank owns.
pub fn load_base<B: Backend, C: Comm<B>>(session: &mut Session<B, C>, folder: &Path) -> Result {
    let weights = Weights::open(folder)?;
    let parameters = session.parameters().to_vec();
    for name in weights.names() {
        let tied_head = name == "lm_head.weight" && !parameters.iter().any(|p| p.name == name);
        // Old exports carry the rotary frequencies, which follow from the config.
        let known = tied_head || name.ends_with("rotary_emb.inv_freq") || parameters.iter().any(|p| p.name == name);
        if !known {
            let message = format!("the weight files hold {name}, which a model of this config does not have");
            return Err(Invalid::with_code("invalid_model", "model", message).into());
        }
    }
    let (flat, low) = (session.flat_weights(), session.optimizer().low);
    for parameter in parameters {
        let Part { first, n, at } = own(session, &parameter);
        let first = first - parameter.first;
        weights.read_part(&parameter.name, &parameter.shape, first..first + n, |begin, values| {
            let at = at + begin - first;
            let rows = |flat: Split| flat.rows(at, at + values.len() as u64);
            upload(&mut session.backend, rows(flat), &encode(values, flat.device.dtype))?;
            let Some(low) = low else { return Ok(()) };
            // The master is the stored weight to its last bit, also where storage rounds it.
            let halves: Vec<u8> = values.iter().flat_map(|v| adamw::parts(*v).1.to_le_bytes()).collect();
            upload(&mut session.backend, rows(low), &halves)
        })?;
    }
    Ok(())
}

/// What this rank owns of a parameter: one run, since a parameter lies in one unit, or none of its elements.
fn own<B: Backend, C: Comm<B>>(session: &Session<B, C>, parameter: &Named) -> Part {
    let rank = session.groups.world.rank();
    let own = session.owners(parameter).find(|(owner, _)| *owner == rank);
    own.map_or(Part { first: parameter.first, n: 0, at: 0 }, |(_, part)| part)
}

/// Values as they are stored. In bf16 they round as masters do, so that the low halves belong to them, also of values that lie
/// in the middle between two.
fn encode(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::Bf16 => values.iter().flat_map(|v| adamw::parts(*v).0.to_le_bytes()).collect(),
        DType::F64 => values.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// A tensor of a file: its name, the parameter that it is or belongs to, and in what of each rank its elements are.
struct Stored {
    name: String,
    parameter: Named,
    flat: Split,
}

impl Stored {
    fn dtype(&self) -> DType {
        self.flat.device.dtype
    }

    fn planned(&self) -> Planned {
        Planned { name: self.name.clone(), dtype: self.dtype(), shape: self.parameter.shape.clone() }
    }
}

/// The weights, and what is kept beside them by the parameter's name: moments and the masters' low halves.
fn stored<B: Backend, C: Comm<B>>(session: &Session<B, C>) -> [Vec<Stored>; 2] {
    let of = |prefix: &str, flat: Split| -> Vec<Stored> {
        let named = |p: &Named| Stored { name: format!("{prefix}{}", p.name), parameter: p.clone(), flat };
        session.parameters().iter().map(named).collect()
    };
    let OptimizerOffload { m, v, low, .. } = *session.optimizer();
    let mut state = of("m.", m);
    state.extend(of("v.", v));
    state.extend(low.into_iter().flat_map(|low| of("low.", low)));
    [of("", session.flat_weights()), state]
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

/// Writes the folder `step-N` under `parent`: whole, synced and hashed, or not at all. `base` is the folder the model came
/// from, for config and tokenizer. Every rank calls it between two steps; rank 0 writes and answers what it wrote, and nobody goes
/// on before the folder has its name.
pub fn write<B: Backend, C: Comm<B>>(
    session: &mut Session<B, C>,
    progress: Progress,
    base: &Path,
    parent: &Path,
) -> Result<Option<WrittenCheckpoint>> {
    session.backend.synchronize()?;
    let tensors = stored(session);
    let written = if session.groups.world.rank() == 0 {
        Some(write_folder(session, &tensors, progress, base, parent)?)
    } else {
        // In the order in which rank 0 comes to them.
        for Stored { parameter, flat, .. } in tensors.iter().flatten() {
            gather(session, parameter, *flat, |_| Ok(()))?;
        }
        None
    };
    session.groups.world.barrier(&mut session.backend)?;
    Ok(written)
}

fn write_folder<B: Backend, C: Comm<B>>(
    session: &mut Session<B, C>,
    [weights, state]: &[Vec<Stored>; 2],
    progress: Progress,
    base: &Path,
    parent: &Path,
) -> Result<WrittenCheckpoint> {
    let folder = format!("step-{}", progress.step);
    let planned = |tensors: &[Stored]| -> Vec<Planned> { tensors.iter().map(Stored::planned).collect() };
    let mut staging = Staging::begin(parent, &folder)?;
    huggingface::write_companions(&mut staging, base, session.backend.storage())?;
    let mut fill = |writer: &mut HashingWriter, Stored { parameter, flat, .. }: &Stored| {
        gather(session, parameter, *flat, |bytes| writer.put(bytes))
    };
    huggingface::write_weights(&mut staging, &planned(weights), |writer, i| fill(writer, &weights[i]))?;
    staging.write("resume/optimizer.safetensors", |writer| {
        write_tensors(writer, &planned(state), |writer, i| fill(writer, &state[i]))
    })?;
    let state = serde_json::json!({ "version": VERSION, "progress": progress });
    staging.write_bytes("resume/progress.json", format!("{state:#}\n").as_bytes())?;
    let files = staging.finish()?;
    Ok(WrittenCheckpoint { step: progress.step, folder, files, ..WrittenCheckpoint::default() })
}

/// Brings a session to where a checkpoint left it, however many ranks wrote it.
pub fn resume<B: Backend, C: Comm<B>>(session: &mut Session<B, C>, folder: &Path) -> Result<Progress> {
    let [weights, state] = stored(session);
    read(session, &Weights::open(folder)?, &weights)?;
    read(session, &Weights::open_files([folder.join("resume/optimizer.safetensors")])?, &state)?;
    progress(&folder.join("resume/progress.json"))
}

/// Reads what the rank owns of each tensor.
fn read<B: Backend, C: Comm<B>>(session: &mut Session<B, C>, files: &Weights, tensors: &[Stored]) -> Result {
    for stored in tensors {
        let Stored { name, parameter, flat } = stored;
        let bytes = files.bytes(name, stored.dtype(), parameter.elements())?;
        let Part { first, n, at } = own(session, parameter);
        let (first, byte) = (first - parameter.first, |element: u64| (element * stored.dtype().bytes()) as usize);
        upload(&mut session.backend, flat.rows(at, at + n), &bytes[byte(first)..byte(first + n)])?;
    }
    Ok(())
}

fn progress(path: &Path) -> Result<Progress> {
    let text = std::fs::read_to_string(path).map_err(Error::file(path))?;
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
