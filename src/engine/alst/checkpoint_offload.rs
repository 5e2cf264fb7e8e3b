//! What a step keeps for its backward: layer inputs at segment starts, and optionally some layers' intermediates.
//!
//! Memory: slots x T x h for inputs (ALST section 3.2 keeps all L of them on the host; segments keep fewer), and per kept
//! layer T (nq d) for the attention output, T (nq + 2 nk) d for q, k, v, T (2 f) for gate and up. Price: a layer's forward
//! for every input that is rebuilt, or the traffic of writing inputs out and reading them back.
//! The layer loop asks no memory option: it puts inputs, fetches them, and is handed whatever rows are kept.
//! Test: `parity::checkpoint_offload`.

use std::{fs::File, ops::Range};

use crate::engine::{
    Result,
    backend::{Backend, Stream, Tensor},
};

/// Where the slots are.
#[derive(Debug)]
pub enum Slots {
    /// `[slots * T, h]` in the device arena.
    Device(Tensor),
    /// A file that nobody else has; row r of slot s lies `(s * T + r) * h` elements in.
    Disk { file: File, slots: u64 },
}

/// The room.
#[derive(Debug)]
pub struct CheckpointOffload {
    slots: Slots,
    /// T of the longest sequence: rows of a slot.
    rows: u64,
    /// Layer held by each slot.
    held: Vec<Option<u64>>,
    kept: Kept,
}

/// Kept intermediates of the first layers, each tensor one layer after another.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kept {
    /// `[layers * T, nq d]` and `[layers * T, nq]` wide.
    pub attention: Option<(Tensor, Tensor)>,
    /// `[layers * T, nq d]` and twice `[layers * T, nk d]`.
    pub qkv: Option<(Tensor, Tensor, Tensor)>,
    /// `[layers * T, 2 f]`.
    pub gate_up: Option<Tensor>,
}

/// What is kept of one layer: whole-sequence tensors, or nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct KeptLayer {
    /// o `[T, nq d]`, and the log-sum-exp with `[nq, c]` of each chunk in the chunk's rows of `[T, nq]`.
    pub attention: Option<(Tensor, Tensor)>,
    /// q `[T, nq d]`, k and v `[T, nk d]`.
    pub qkv: Option<(Tensor, Tensor, Tensor)>,
    /// `[T, 2 f]`.
    pub gate_up: Option<Tensor>,
}

impl CheckpointOffload {
    /// A room for sequences of up to `rows` tokens.
    pub fn new(slots: Slots, rows: u64, kept: Kept) -> Self {
        let n = match &slots {
            Slots::Device(tensor) => tensor.rows / rows,
            Slots::Disk { slots, .. } => *slots,
        };
        Self { slots, rows, held: vec![None; n as usize], kept }
    }

    /// Keeps rows of a layer's input. The rows may be overwritten once the compute stream has passed this call.
    ///
    /// # Panics
    /// When every slot is taken: the plan's segments promise that this cannot be.
    pub fn put<B: Backend>(&mut self, b: &mut B, layer: u64, rows: &Range<u64>, x: Tensor) -> Result {
        let slot = if let Some(slot) = self.slot_of(layer) {
            slot
        } else {
            let free = self.held.iter().position(Option::is_none).expect("the plan has a slot for every kept input");
            self.held[free] = Some(layer);
            free as u64
        };
        let first = slot * self.rows + rows.start;
        match &self.slots {
            Slots::Device(all) => b.copy(Stream::Compute, all.rows(first, first + x.rows), x),
            Slots::Disk { file, .. } => b.spill(Stream::Compute, file, first * x.cols * x.dtype.bytes(), x),
        }
    }

    /// Brings a layer's whole input back into `x` and frees its slot unless `keep` is set.
    ///
    /// # Panics
    /// When the input was never put.
    pub fn fetch<B: Backend>(&mut self, b: &mut B, layer: u64, x: Tensor, keep: bool) -> Result {
        let slot = self.slot_of(layer).expect("a layer's input is put before it is fetched");
        if !keep {
            self.held[slot as usize] = None;
        }
        let first = slot * self.rows;
        match &self.slots {
            Slots::Device(all) => b.copy(Stream::Compute, x, all.rows(first, first + x.rows)),
            Slots::Disk { file, .. } => b.unspill(Stream::Compute, file, first * x.cols * x.dtype.bytes(), x),
        }
    }

    /// True when this layer's input waits in a slot.
    pub fn holds(&self, layer: u64) -> bool {
        self.slot_of(layer).is_some()
    }

    /// What is kept of a layer beside its input.
    pub fn layer(&self, layer: u64) -> KeptLayer {
        let of = |all: Tensor| {
            let start = layer * self.rows;
            (start < all.rows).then(|| all.rows(start, start + self.rows))
        };
        KeptLayer {
            attention: self.kept.attention.and_then(|(o, lse)| Some((of(o)?, of(lse)?))),
            qkv: self.kept.qkv.and_then(|(q, k, v)| Some((of(q)?, of(k)?, of(v)?))),
            gate_up: self.kept.gate_up.and_then(of),
        }
    }

    fn slot_of(&self, layer: u64) -> Option<u64> {
        self.held.iter().position(|held| *held == Some(layer)).map(|slot| slot as u64)
    }
}
