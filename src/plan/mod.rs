//! The planner: what a machine will do about a run. Pure: no device, no I/O, no clock.
//!
//! In: a model, a precision, a sequence length and a machine. Out: the fastest [`Plan`] that fits, with every byte of the
//! arena placed and a predicted step time; or a [`Refusal`] that names the longest sequence that would fit and which
//! memory is the wall. The API refuses with it, the trainer obeys it, the command line prints it.

mod choices;
pub mod cost;
pub mod devices;
pub mod layout;
pub mod ranks;
pub mod search;
pub mod segments;
pub mod shards;
pub mod traffic;
pub mod workspace;

use serde::{Deserialize, Serialize};

pub use crate::domain::run::Ranks;
use crate::domain::{
    Invalid, Machine, ModelConfig, TrainingSpec,
    machine::DeviceKind,
    training::{Moments, Precision},
};
use layout::Element;
pub use layout::{Category, Layout, Region, Slot};
use traffic::{Seconds, Traffic};

/// What is to be planned.
#[derive(Debug, Clone, PartialEq)]
pub struct Request<'a> {
    pub model: &'a ModelConfig,
    pub precision: Precision,
    pub moments: Moments,
    /// Longest sequence, in tokens with padding.
    pub tokens: u64,
    /// Sequences whose gradients add up before an update, over all replicas: a property of the run, not of the devices. Replicas
    /// take equal shares of them at the same time, and their number divides this.
    pub micro_batches: u64,
    /// A plan takes as many of its devices as make it faster.
    pub machine: &'a Machine,
    /// Choices taken away from the search, for tests and benches.
    pub forced: Forced,
}

/// Choices fixed by the caller.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Forced {
    pub ranks: Option<Ranks>,
    /// Ranks that share a sequence, the number of replicas being free; [`ranks::check`] tells whether there are so many.
    pub sequence_ranks: Option<u64>,
    /// Replicas, which divide the step's sequences, the number of ranks that share one being free.
    pub replicas: Option<u32>,
    pub chunk_tokens: Option<u64>,
    pub checkpoint_slots: Option<u64>,
    pub place: Option<Place>,
    /// Rows of kept layer inputs, and parameters whose optimizer state is, in host memory.
    pub checkpoint_host_rows: Option<u64>,
    pub optimizer_host_elements: Option<u64>,
    pub staged_elements: Option<u64>,
    pub weights_host_layers: Option<u64>,
    pub kept_attention_layers: Option<u64>,
    pub kept_qkv_layers: Option<u64>,
    pub kept_gate_up_layers: Option<u64>,
    pub mlp_tile_rows: Option<u64>,
    pub loss_tile_rows: Option<u64>,
    pub gradients: Option<Gradients>,
    /// Element sizes other than the precision's own (an f64 reference run).
    pub widths: Option<Widths>,
}

/// Where kept layer inputs live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// In the arenas: on the device, or a part of them in host memory.
    Memory,
    /// In a file of the run's folder.
    Disk,
}

/// How the gradients of a step wait for its norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gradients {
    /// As the wide sums they are.
    Wide,
    /// Summed in the wide type over one layer at a time, then rounded to storage: half the memory. One micro-batch only.
    Storage,
}

/// Bytes of an element of storage type and of the type of sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Widths {
    pub storage: u64,
    pub wide: u64,
}

impl Widths {
    /// Bytes of an element of a region.
    pub fn of(self, element: Element) -> u64 {
        match element {
            Element::Storage => self.storage,
            Element::Wide => self.wide,
            Element::Index => 4,
            Element::Half | Element::Bf16 => 2,
            Element::Byte => 1,
        }
    }
}

impl From<Precision> for Widths {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self { storage: 4, wide: 4 },
            Precision::Bf16 => Self { storage: 2, wide: 4 },
        }
    }
}

/// The memory choices of a step: design freedom that changes no result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    pub ranks: Ranks,
    /// Tokens of a chunk of the streamed layer, over all ranks that share the sequence.
    pub chunk_tokens: u64,
    /// Rows of a tile of the feed-forward, and of head and loss.
    pub mlp_tile_rows: u64,
    pub loss_tile_rows: u64,
    /// First layers of the segments whose inputs are kept.
    pub segment_starts: Vec<u64>,
    pub checkpoint_place: Place,
    /// Of the rows of all slots, so many from the first on are in host memory.
    pub checkpoint_host_rows: u64,
    pub gradients: Gradients,
    pub moments: Moments,
    /// Of all parameters, so many from the first on have their moments and low halves in host memory.
    pub optimizer_host_elements: u64,
    /// So many of these pass through the device at once.
    pub staged_elements: u64,
    /// Layers (from the first) whose weights live in host memory and visit the device one layer ahead of the work. Their
    /// optimizer state is in host memory too.
    pub weights_host_layers: u64,
    /// Layers (from the first) whose attention output and log-sum-exp, q/k/v, or gate and up are kept for backward.
    pub kept_attention_layers: u64,
    pub kept_qkv_layers: u64,
    pub kept_gate_up_layers: u64,
    /// Bytes of scratch that an attention call may use.
    pub attention_workspace: u64,
    /// Layer inputs held at once.
    pub checkpoint_slots: u64,
}

impl Choice {
    /// Tokens of which a rank holds the activations: its piece of every chunk.
    pub fn local(&self, tokens: u64) -> u64 {
        tokens / self.ranks.sequence
    }

    /// Layer inputs held in the arenas at once.
    pub fn memory_slots(&self) -> u64 {
        match self.checkpoint_place {
            Place::Memory => self.checkpoint_slots,
            Place::Disk => 0,
        }
    }

    /// Element type of the moments.
    pub fn moment_element(&self) -> Element {
        match self.moments {
            Moments::F32 => Element::Wide,
            Moments::Bf16 => Element::Bf16,
        }
    }
}

/// What this machine will do about a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub device: DeviceKind,
    pub precision: Precision,
    /// Longest sequence the arena is laid out for.
    pub tokens: u64,
    pub choice: Choice,
    pub layout: Layout,
    /// Bytes of each rank by category; their sum is the device arena, and the host arena.
    pub ledger: Vec<(Category, u64)>,
    pub host_ledger: Vec<(Category, u64)>,
    /// The device arena and what the process needs beside it (library scratch, thread stacks): of a rank on a GPU, of all ranks
    /// on the CPU.
    pub predicted_peak_bytes: u64,
    /// A rank's host arena and what the process needs beside it. 0 on the CPU, where the device is the host.
    pub predicted_host_peak_bytes: u64,
    /// A rank's spill file, when layer inputs go to disk.
    pub disk_bytes: u64,
    /// One forward, backward and update over one full sequence on each replica, whole causal attention.
    pub step_seconds: f64,
    /// Sequences that each replica takes in a step, one after another.
    pub sequences: u64,
    /// Forward and backward over all of these, and one update.
    pub optimizer_step_seconds: f64,
    /// What a rank sends to others in that time, and the seconds of it that this takes.
    pub traffic: Traffic,
    pub traffic_seconds: Seconds,
}

/// Why no plan exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error(
    "a sequence of {tokens} tokens needs {needed_bytes} bytes of {wall} and this machine has {available_bytes}; {}",
    self.way_out()
)]
pub struct Refusal {
    pub tokens: u64,
    /// The longest sequence that fits, 0 when not even a short one does.
    pub longest_tokens: u64,
    /// Which memory is the wall: `host memory`, `device memory`, `disk`.
    pub wall: String,
    pub needed_bytes: u64,
    pub available_bytes: u64,
}

impl Refusal {
    fn way_out(&self) -> String {
        match self.longest_tokens {
            0 => "the model's weights and optimizer states alone do not fit: use a smaller model or a larger machine"
                .into(),
            longest => format!(
                "the longest sequence that fits is {longest} tokens: set training.sequence_length to it or less"
            ),
        }
    }
}

impl From<Refusal> for Invalid {
    fn from(refusal: Refusal) -> Self {
        Self::with_code("sequence_too_long", "training.sequence_length", refusal.to_string())
    }
}

impl<'a> Request<'a> {
    /// A job on this machine, with sequences of so many tokens: ranks as it asks for them.
    pub fn of(model: &'a ModelConfig, job: &TrainingSpec, machine: &'a Machine, tokens: u64) -> Self {
        let (sequence, data) = (job.sequence_parallel_size.map(u64::from), job.data_parallel_size);
        let ranks = sequence.zip(data).map(|(sequence, data)| Ranks { sequence, data: data.into() });
        Self {
            model,
            precision: job.precision_on(machine.device),
            moments: job.moments,
            tokens,
            micro_batches: job.gradient_accumulation_steps.into(),
            machine,
            forced: Forced { ranks, sequence_ranks: sequence, replicas: data, ..Forced::default() },
        }
    }

    /// The ranks that a plan is made for, once they are chosen.
    pub fn ranks(&self) -> Ranks {
        self.forced.ranks.unwrap_or(Ranks::ONE)
    }

    /// Sequences of a step on each replica.
    pub fn sequences(&self) -> u64 {
        self.micro_batches.div_ceil(self.ranks().data).max(1)
    }

    /// Element sizes of the run.
    pub fn widths(&self) -> Widths {
        self.forced.widths.unwrap_or_else(|| self.precision.into())
    }
}

/// The fastest plan that fits.
pub fn plan(request: &Request) -> Result<Plan, Refusal> {
    search::fastest(request).ok_or_else(|| search::refusal(request))
}

/// The longest sequence that this machine carries for this model, in tokens; 0 when none.
pub fn longest(request: &Request) -> u64 {
    search::longest(request).0
}

/// The ranks that carry it.
pub fn longest_ranks(request: &Request) -> Ranks {
    search::longest(request).1
}
