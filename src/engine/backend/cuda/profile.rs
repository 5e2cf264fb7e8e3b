//! Where the time of a step goes on the compute stream, and what collectives do beside it, by the device's own clock: a pair of
//! marks around every operation.
//!
//! Marks cost about a microsecond each, so a profiled step is a step of its own and not one whose time is reported.

use cudarc::driver::CudaEvent;

use super::{super::Stream, Cuda};
use crate::engine::Result;

/// What an operation of the compute stream counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    AttentionForward,
    AttentionBackward,
    /// `y = x w^T`, `dx = dy w`, `dw += dy^T x`.
    MatmulForward,
    MatmulDx,
    MatmulDw,
    Norm,
    Rope,
    Swiglu,
    CrossEntropy,
    Embedding,
    /// Fills, casts, additions and copies inside the device.
    Move,
    Optimizer,
    /// Waiting for a copy to or from the host, or for other ranks: what was not hidden.
    Wait,
}

/// Marks of a step under way.
#[derive(Debug, Default)]
pub(super) struct Profile {
    marks: Option<Marks>,
}

#[derive(Debug)]
struct Marks {
    start: CudaEvent,
    /// Collectives are no part of the compute stream.
    operations: Vec<(Stream, Option<Part>, CudaEvent, CudaEvent)>,
}

/// An operation of the compute stream, or collectives beside it. Seconds from the profile's start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    pub stream: Stream,
    pub part: Option<Part>,
    pub start: f64,
    pub end: f64,
}

/// Seconds of a stretch of the compute stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Profiled {
    pub total: f64,
    /// Sums and numbers of operations, by part.
    pub parts: Vec<(Part, f64, u64)>,
    /// In the order in which they were queued.
    pub spans: Vec<Span>,
}

impl Profiled {
    /// Seconds in which no operation ran: launches that came too late, and the work of the host.
    pub fn idle(&self) -> f64 {
        self.total - self.parts.iter().map(|(_, seconds, _)| seconds).sum::<f64>()
    }
}

impl Cuda {
    /// Marks every operation from here on, until [`Self::profiled`].
    pub fn start_profile(&mut self) -> Result {
        self.profile.marks = Some(Marks { start: self.device.mark(Stream::Compute)?, operations: Vec::new() });
        Ok(())
    }

    /// Ends the marking and adds up; waits for the device. Nothing when none was begun.
    pub fn profiled(&mut self) -> Result<Option<Profiled>> {
        let Some(Marks { start, operations }) = self.profile.marks.take() else { return Ok(None) };
        let end = self.device.mark(Stream::Compute)?;
        let total = self.device.seconds_between(&start, &end)?;
        let mut parts: Vec<(Part, f64, u64)> = Vec::new();
        let mut spans = Vec::new();
        for (stream, part, from, to) in &operations {
            let (from, to) = (self.device.seconds_between(&start, from)?, self.device.seconds_between(&start, to)?);
            spans.push(Span { stream: *stream, part: *part, start: from, end: to });
            let Some(part) = part else { continue };
            match parts.iter_mut().find(|(other, ..)| other == part) {
                Some((_, sum, count)) => (*sum, *count) = (*sum + to - from, *count + 1),
                None => parts.push((*part, to - from, 1)),
            }
        }
        parts.sort_by_key(|(part, ..)| *part);
        Ok(Some(Profiled { total, parts, spans }))
    }

    /// Queues an operation, between marks while a profile is made.
    pub(super) fn marked(&mut self, part: Part, queue: impl FnOnce(&mut Self) -> Result) -> Result {
        self.marked_on(Stream::Compute, Some(part), queue)
    }

    /// Queues collectives on their stream, likewise.
    pub(in crate::engine) fn marked_beside(
        &mut self,
        stream: Stream,
        queue: impl FnOnce(&mut Self) -> Result,
    ) -> Result {
        self.marked_on(stream, None, queue)
    }

    fn marked_on(&mut self, stream: Stream, part: Option<Part>, queue: impl FnOnce(&mut Self) -> Result) -> Result {
        if self.profile.marks.is_none() {
            return queue(self);
        }
        let start = self.device.mark(stream)?;
        queue(self)?;
        let end = self.device.mark(stream)?;
        if let Some(marks) = &mut self.profile.marks {
            marks.operations.push((stream, part, start, end));
        }
        Ok(())
    }
}
