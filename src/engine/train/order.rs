//! Which sequences a step takes: one endless walk over epochs, cut into steps. A position is a number, so a resumed run
//! seeks to it and skips through nothing.

/// The walk of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    pub sequences_per_epoch: u64,
    /// Sequences of one optimizer step.
    pub per_step: u64,
    pub total_steps: u64,
    /// Sequences of the whole run: the last step may have fewer than `per_step`.
    total_sequences: u64,
}

impl Order {
    /// A run of whole epochs: the last step takes what is left.
    pub fn epochs(sequences_per_epoch: u64, per_step: u64, epochs: u64) -> Self {
        let total_sequences = sequences_per_epoch * epochs;
        Self { sequences_per_epoch, per_step, total_steps: total_sequences.div_ceil(per_step), total_sequences }
    }

    /// A run of so many full steps, however many epochs that takes.
    pub fn steps(sequences_per_epoch: u64, per_step: u64, total_steps: u64) -> Self {
        Self { sequences_per_epoch, per_step, total_steps, total_sequences: total_steps * per_step }
    }

    /// The sequences of step `step` (the first is 1) as (epoch, index in the epoch).
    pub fn of_step(&self, step: u64) -> impl Iterator<Item = (u64, u64)> + use<> {
        let n = self.sequences_per_epoch;
        let first = (step - 1) * self.per_step;
        (first..self.total_sequences.min(first + self.per_step)).map(move |i| (i / n, i % n))
    }
}
