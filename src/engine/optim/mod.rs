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
    /// First element in the flat layout, and how many.
    pub start: u64,
    pub elements: u64,
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

/// Norm of all gradients `g`, and the factor that brings it down to at most `max_norm` (0: 1).
pub fn clip<B: Backend>(b: &mut B, g: Tensor, scalars: Scalars, max_norm: f64) -> Result {
    b.fill(scalars.sum_squares, 0.0)?;
    b.sum_squares(scalars.sum_squares, g)?;
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
        let hyper = AdamW { weight_decay, first_index: start, ..*hyper };
        b.adamw(state, part(states.g), scale, &hyper)?;
    }
    Ok(())
}

/// Groups of a list of parameters in flat order, `(elements, is a norm gain)` each; neighbours that are updated alike are
/// joined.
pub fn groups(parameters: impl IntoIterator<Item = (u64, bool)>) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut start = 0;
    for (elements, norm) in parameters {
        match groups.last_mut() {
            Some(last) if last.decayed != norm => last.elements += elements,
            _ => groups.push(Group { start, elements, decayed: !norm }),
        }
        start += elements;
    }
    groups
}
