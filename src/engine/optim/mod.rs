//! The update: clipping by the global norm, AdamW over every parameter, and the learning rate of each step.

pub mod schedule;

use super::{
    Result,
    backend::{AdamW, Backend, OptimizerState, Tensor},
};

/// Flat tensors of consecutive parameters and their state, equally long.
#[derive(Debug, Clone, Copy)]
pub struct States {
    pub w: Tensor,
    pub low: Option<Tensor>,
    pub m: Tensor,
    pub v: Tensor,
    /// Wide or storage.
    pub g: Tensor,
}

/// A run of consecutive parameters that are updated alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// First element in the rank's flat layout, and how many.
    pub start: u64,
    pub elements: u64,
    /// The first one's index among all parameters.
    pub first_index: u64,
    /// Norm gains are not decayed: their size is no measure of complexity.
    pub decayed: bool,
}

/// Scalars of an update, each `[1, 1]` wide.
#[derive(Debug, Clone, Copy)]
pub struct Scalars {
    /// Receives the sum of squares of all gradients before clipping.
    pub sum_squares: Tensor,
    /// Receives the factor that brings the norm down to its limit.
    pub scale: Tensor,
}

/// Sum of squares of gradients `g`, into `scalars.sum_squares`.
pub fn sum_squares<B: Backend>(b: &mut B, g: Tensor, scalars: Scalars) -> Result {
    b.fill(scalars.sum_squares, 0.0)?;
    b.sum_squares(scalars.sum_squares, g)
}

/// The factor that brings the norm whose square `scalars.sum_squares` holds down to at most `max_norm` (0: 1).
pub fn clip<B: Backend>(b: &mut B, scalars: Scalars, max_norm: f64) -> Result {
    b.clip_scale(scalars.scale, scalars.sum_squares, max_norm)
}

/// One AdamW update of parameters that lie from element `first` of the flat layout on, with gradients times `scale`.
/// `hyper.weight_decay` holds for decayed groups.
pub fn update<B: Backend>(
    b: &mut B,
    states: &States,
    first: u64,
    groups: &[Group],
    scale: Tensor,
    hyper: &AdamW,
) -> Result {
    let end = first + states.w.elements();
    for group in groups {
        let (start, group_end) = (group.start.max(first), (group.start + group.elements).min(end));
        if start >= group_end {
            continue;
        }
        let part = |flat: Tensor| flat.part(start - first, group_end - start);
        let state =
            OptimizerState { w: part(states.w), low: states.low.map(part), m: part(states.m), v: part(states.v) };
        let weight_decay = if group.decayed { hyper.weight_decay } else { 0.0 };
        let first_index = group.first_index + start - group.start;
        let hyper = AdamW { weight_decay, first_index, ..*hyper };
        b.adamw(state, part(states.g), scale, &hyper)?;
    }
    Ok(())
}

/// Neighbouring groups that are updated alike, joined.
pub fn joined(groups: impl IntoIterator<Item = Group>) -> Vec<Group> {
    let mut joined: Vec<Group> = Vec::new();
    for group in groups {
        match joined.last_mut() {
            Some(last)
                if last.decayed == group.decayed
                    && last.start + last.elements == group.start
                    && last.first_index + last.elements == group.first_index =>
            {
                last.elements += group.elements;
            }
            _ => joined.push(group),
        }
    }
    joined
}
