//! Which parameters a rank owns, as ranges of the flat order of all parameters.

use std::ops::Range;

/// A rank's parts of all units, which lie one behind the other in its own memory.
#[derive(Debug, Clone)]
pub struct Share {
    parts: Vec<Part>,
}

/// A run of consecutive parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// First parameter in the flat order, and how many.
    pub first: u64,
    pub n: u64,
    /// Where the first lies in the rank's own memory, in parameters.
    pub at: u64,
}

impl Share {
    /// Part `rank` of every unit of so many parameters: `part` gives the size of the parts of a unit, of which the last may reach
    /// beyond its end.
    pub fn new(units: &[u64], rank: u64, part: impl Fn(u64) -> u64) -> Self {
        let (mut unit_start, mut at) = (0, 0);
        let mut parts = Vec::new();
        for unit in units {
            let size = part(*unit);
            let (start, end) = ((rank * size).min(*unit), ((rank + 1) * size).min(*unit));
            parts.push(Part { first: unit_start + start, n: end - start, at });
            unit_start += unit;
            at += size;
        }
        Self { parts }
    }

    /// What the rank owns of a range of the flat order.
    pub fn of(&self, range: Range<u64>) -> impl Iterator<Item = Part> {
        self.parts.iter().filter_map(move |part| {
            let (first, end) = (range.start.max(part.first), range.end.min(part.first + part.n));
            (first < end).then(|| Part { first, n: end - first, at: part.at + first - part.first })
        })
    }
}
