//! Safetensors, tensor by tensor in bounded pieces: no reader or writer here ever holds a whole model.

use std::{
    collections::BTreeMap,
    ops::Range,
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use super::staging::HashingWriter;
use crate::{
    domain::Invalid,
    engine::{Error, Result, backend::DType, file_map::FileMap},
};

/// Elements handed on at once.
const PIECE_ELEMENTS: usize = 1 << 20;

/// A model's weight files, opened.
#[derive(Debug)]
pub struct Weights {
    shards: Vec<Shard>,
    /// Shard of each tensor.
    home: BTreeMap<String, usize>,
}

#[derive(Debug)]
struct Shard {
    map: FileMap,
    path: PathBuf,
    tensors: BTreeMap<String, Stored>,
}

/// Where a tensor lies in its shard.
#[derive(Debug, Clone)]
struct Stored {
    dtype: Dtype,
    shape: Vec<u64>,
    start: usize,
    end: usize,
}

fn refuse<T>(message: String) -> Result<T> {
    Err(Invalid::with_code("invalid_model", "model", message).into())
}

impl Weights {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    pub fn open(folder: &Path) -> Result<Self> {
        let index = folder.join("model.safetensors.index.json");
        let names = if index.is_file() { shard_names(&index)? } else { vec!["model.safetensors".to_owned()] };
        Self::open_files(names.iter().map(|name| folder.join(name)))
    }

    /// Opens these files.
    pub fn open_files(paths: impl IntoIterator<Item = PathBuf>) -> Result<Self> {
        let mut weights = Self { shards: Vec::new(), home: BTreeMap::new() };
        for path in paths {
            let shard = Shard::open(path)?;
            for name in shard.tensors.keys() {
                if weights.home.insert(name.clone(), weights.shards.len()).is_some() {
                    return refuse(format!("{}: tensor {name} is in another shard too", shard.path.display()));
                }
            }
            weights.shards.push(shard);
        }
        Ok(weights)
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.home.keys().map(String::as_str)
    }

    /// Reads a float tensor of this shape as f32 values, in order, in pieces; `sink` gets the index of the first element of
    /// each piece.
    pub fn read(&self, name: &str, shape: &[u64], sink: impl FnMut(u64, &[f32]) -> Result) -> Result {
        self.read_part(name, shape, 0..shape.iter().product(), sink)
    }

    /// Reads these elements of it in the same way, and nothing else of the file.
    ///
    /// # Panics
    /// When a tensor of this shape does not have them.
    pub fn read_part(
        &self,
        name: &str,
        shape: &[u64],
        elements: Range<u64>,
        mut sink: impl FnMut(u64, &[f32]) -> Result,
    ) -> Result {
        let Some(home) = self.home.get(name) else {
            return refuse(format!("tensor {name} is missing from the model's weight files"));
        };
        let shard = &self.shards[*home];
        let stored = &shard.tensors[name];
        if stored.shape != shape {
            let message = format!("tensor {name} has shape {:?} where config.json says {shape:?}", stored.shape);
            return refuse(message);
        }
        if !matches!(stored.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            return refuse(format!(
                "tensor {name} has type {:?}: only bf16, f16 and f32 weights are read",
                stored.dtype
            ));
        }
        let width = width(stored.dtype).expect("open keeps only tensors of a known width");
        let at = |element: u64| element as usize * width;
        let bytes = &shard.map[stored.start..stored.end][at(elements.start)..at(elements.end)];
        let mut piece = Vec::with_capacity(PIECE_ELEMENTS);
        for (i, chunk) in bytes.chunks(PIECE_ELEMENTS * width).enumerate() {
            piece.clear();
            match stored.dtype {
                Dtype::F32 => piece.extend(chunk.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
                Dtype::BF16 => piece.extend(chunk.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
                _ => piece.extend(chunk.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())),
            }
            sink(elements.start + (i * PIECE_ELEMENTS) as u64, &piece)?;
        }
        Ok(())
    }

    /// Raw little-endian bytes of a tensor that must have this type and number of elements.
    pub fn bytes(&self, name: &str, dtype: DType, elements: u64) -> Result<&[u8]> {
        let Some(home) = self.home.get(name) else {
            return refuse(format!("tensor {name} is missing from the checkpoint's resume state"));
        };
        let shard = &self.shards[*home];
        let stored = &shard.tensors[name];
        if stored.dtype != stored_type(dtype) || stored.shape.iter().product::<u64>() != elements {
            let found = format!("{:?} {:?}", stored.dtype, stored.shape);
            return refuse(format!("tensor {name} is {found} where the run needs {elements} of {dtype:?}"));
        }
        Ok(&shard.map[stored.start..stored.end])
    }
}

/// Bytes of an element, for the types that are read.
fn width(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F64 => Some(8),
        Dtype::F32 => Some(4),
        Dtype::BF16 | Dtype::F16 | Dtype::U16 => Some(2),
        _ => None,
    }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self> {
        if !path.is_file() {
            return refuse(format!("{} is missing from the model folder", path.display()));
        }
        let map = FileMap::open(&path)?;
        let broken = |error: safetensors::SafeTensorError| {
            let message = format!("{} is not a sound safetensors file: {error}", path.display());
            Error::from(Invalid::with_code("invalid_model", "model", message))
        };
        let parsed = SafeTensors::deserialize(&map).map_err(broken)?;
        let mut tensors = BTreeMap::new();
        let origin = map.as_ptr() as usize;
        for (name, view) in parsed.iter() {
            if width(view.dtype()).is_none() {
                let message = format!(
                    "{}: tensor {name} has type {:?}: only bf16, f16 and f32 weights are read",
                    path.display(),
                    view.dtype()
                );
                return refuse(message);
            }
            let start = view.data().as_ptr() as usize - origin;
            let shape = view.shape().iter().map(|n| *n as u64).collect();
            tensors
                .insert(name.to_owned(), Stored { dtype: view.dtype(), shape, start, end: start + view.data().len() });
        }
        Ok(Self { map, path, tensors })
    }
}

/// Shard file names of an index: plain names only, an index is untrusted.
fn shard_names(index: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(index).map_err(Error::file(index))?;
    let value: Value = match serde_json::from_str(&text) {
        Ok(value) => value,
        Err(error) => return refuse(format!("{} is not valid JSON: {error}", index.display())),
    };
    let Some(map) = value.get("weight_map").and_then(Value::as_object) else {
        return refuse(format!("{} has no weight_map", index.display()));
    };
    let mut names = Vec::new();
    for value in map.values() {
        let Some(name) = value.as_str().filter(|n| !n.contains(['/', '\\']) && !n.starts_with('.') && !n.is_empty())
        else {
            return refuse(format!("{} names a shard {value}, which is not a plain file name", index.display()));
        };
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct Planned {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
}

impl Planned {
    /// Bytes of its elements.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<u64>() * self.dtype.bytes()
    }
}

fn stored_type(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
        DType::Bf16 => Dtype::BF16,
        DType::I32 => Dtype::I32,
        DType::U16 => Dtype::U16,
    }
}

/// Writes a file of these tensors; `fill` writes the elements of the tensor with that index.
pub fn write(
    writer: &mut HashingWriter,
    tensors: &[Planned],
    mut fill: impl FnMut(&mut HashingWriter, usize) -> Result,
) -> Result {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.bytes();
        let dtype = serde_json::to_value(stored_type(tensor.dtype)).unwrap_or(Value::Null);
        header.insert(
            tensor.name.clone(),
            json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": [offset, end] }),
        );
        offset = end;
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    // Spaces up to a multiple of 8, so that the data that follow are aligned.
    text.resize(text.len().next_multiple_of(8), b' ');
    writer.put(&(text.len() as u64).to_le_bytes())?;
    writer.put(&text)?;
    (0..tensors.len()).try_for_each(|i| fill(writer, i))
}

/// Groups of consecutive tensors of at most `limit` bytes each (one tensor may be larger alone).
pub fn shards(tensors: &[Planned], limit: u64) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = Vec::new();
    let mut bytes = 0;
    for (i, tensor) in tensors.iter().enumerate() {
        match out.last_mut() {
            Some(last) if bytes + tensor.bytes() <= limit => {
                last.end = i + 1;
                bytes += tensor.bytes();
            }
            _ => {
                out.push(i..i + 1);
                bytes = tensor.bytes();
            }
        }
    }
    out
}
