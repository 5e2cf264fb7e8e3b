//! What a step keeps for its backward: layer inputs at segment starts, and optionally some layers' intermediates.
//!
//! Memory: slots x T x h for inputs (ALST section 3.2 keeps all L of them on the host; segments keep fewer), and per kept
//! layer T (nq d) for the attention output, T (nq + 2 nk) d for q, k, v, T (2 f) for gate and up. Price: a layer's forward
//! for every input that is rebuilt, or the traffic of writing inputs out and reading them back.
//! Inputs go out and come back a chunk of rows at a time, so that copies over the link run beside the layer's work: out of
//! rows that are about to be overwritten, and into rows that a backward is done with. The layer loop asks no memory option: it
//! puts inputs, fetches them, and is handed whatever rows are kept.
//! Test: `parity::checkpoint_offload`.

use std::{fs::File, ops::Range};

use crate::engine::{
    Result,
    backend::{Backend, Space, Split, Stream, Tensor},
};

/// Where the slots are.
#[derive(Debug)]
pub enum Slots {
    /// `[slots * T, h]` in the arenas.
    Memory(Split),
    /// A file that nobody else has; row r of slot s lies `(s * T + r) * h` elements in.
    Disk { file: File, slots: u64 },
}

/// The room.
#[derive(Debug)]
pub struct CheckpointOffload {
    slots: Slots,
    /// Of the longest sequence the rows that this rank has, which are the rows of a slot, and all.
    rows: u64,
    sequence_rows: u64,
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
    /// A room for sequences of up to `sequence_rows` tokens, of which the rank has `rows`.
    pub fn new(slots: Slots, (rows, sequence_rows): (u64, u64), kept: Kept) -> Self {
        let n = match &slots {
            Slots::Memory(split) => split.n_rows() / rows,
            Slots::Disk { slots, .. } => *slots,
        };
        Self { slots, rows, sequence_rows, held: vec![None; n as usize], kept }
    }

    /// Keeps rows of a layer's input. The rows may be overwritten once the compute stream has passed this call, and the
    /// event that it may answer.
    ///
    /// # Panics
    /// When every slot is taken: the plan's segments promise that this cannot be.
    pub fn put<B: Backend>(&mut self, b: &mut B, layer: u64, rows: &Range<u64>, x: Tensor) -> Result<Option<B::Event>> {
        let slot = if let Some(slot) = self.slot_of(layer) {
            slot
        } else {
            let free = self.held.iter().position(Option::is_none).expect("the plan has a slot for every kept input");
            self.held[free] = Some(layer);
            free as u64
        };
        let first = slot * self.rows + rows.start;
        let mut gone = None;
        for (kept, x) in pieces(&self.slots, first, x) {
            match kept {
                Piece::Memory(to) if to.space == Space::Device => b.copy(Stream::Compute, to, x)?,
                Piece::Memory(to) => {
                    let there = b.record(Stream::Compute)?;
                    b.wait(Stream::Down, &there)?;
                    b.copy(Stream::Down, to, x)?;
                    gone = Some(b.record(Stream::Down)?);
                }
                Piece::Disk(file, at) => b.spill(Stream::Compute, file, at, x)?,
            }
        }
        Ok(gone)
    }

    /// Brings rows of a layer's input back into `x`, which the compute stream must be done with. The rows are there once the
    /// compute stream has passed this call, and the event that it may answer.
    ///
    /// # Panics
    /// When the input was never put.
    pub fn fetch<B: Backend>(&self, b: &mut B, layer: u64, rows: &Range<u64>, x: Tensor) -> Result<Option<B::Event>> {
        let slot = self.slot_of(layer).expect("a layer's input is put before it is fetched");
        let mut here = None;
        for (kept, x) in pieces(&self.slots, slot * self.rows + rows.start, x) {
            match kept {
                Piece::Memory(from) if from.space == Space::Device => b.copy(Stream::Compute, x, from)?,
                Piece::Memory(from) => {
                    let free = b.record(Stream::Compute)?;
                    b.wait(Stream::Up, &free)?;
                    b.copy(Stream::Up, x, from)?;
                    here = Some(b.record(Stream::Up)?);
                }
                Piece::Disk(file, at) => b.unspill(Stream::Compute, file, at, x)?,
            }
        }
        Ok(here)
    }

    /// Frees the slot of a layer's input, if it has one. Everything fetched from it must have been waited for.
    pub fn release(&mut self, layer: u64) {
        if let Some(slot) = self.slot_of(layer) {
            self.held[slot as usize] = None;
        }
    }

    /// True when this layer's input waits in a slot.
    pub fn holds(&self, layer: u64) -> bool {
        self.slot_of(layer).is_some()
    }

    /// What is kept of a layer beside its input.
    pub fn layer(&self, layer: u64) -> KeptLayer {
        let nth = |all: Tensor, rows: u64| {
            let start = layer * rows;
            (start < all.rows).then(|| all.rows(start, start + rows))
        };
        let of = |all| nth(all, self.sequence_rows);
        KeptLayer {
            attention: self.kept.attention.and_then(|(o, lse)| Some((of(o)?, of(lse)?))),
            qkv: self.kept.qkv.and_then(|(q, k, v)| Some((of(q)?, of(k)?, of(v)?))),
            gate_up: self.kept.gate_up.and_then(|all| nth(all, self.rows)),
        }
    }

    fn slot_of(&self, layer: u64) -> Option<u64> {
        self.held.iter().position(|held| *held == Some(layer)).map(|slot| slot as u64)
    }
}

/// Where rows of a slot lie.
enum Piece<'a> {
    Memory(Tensor),
    /// From this byte of the file on.
    Disk(&'a File, u64),
}

/// Rows from `first` of all slots on, as many as `x` has, piece by piece with the rows of `x` that belong there.
fn pieces(slots: &Slots, first: u64, x: Tensor) -> Vec<(Piece<'_>, Tensor)> {
    match slots {
        Slots::Memory(split) => {
            let mut done = 0;
            let piece = |kept: Tensor| {
                let rows = x.rows(done, done + kept.rows);
                done += kept.rows;
                (Piece::Memory(kept), rows)
            };
            split.rows(first, first + x.rows).map(piece).collect()
        }
        Slots::Disk { file, .. } => vec![(Piece::Disk(file, first * x.cols * x.dtype.bytes()), x)],
    }
}
