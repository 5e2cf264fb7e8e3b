//! A group of one: exchanges are copies, and nothing at all where output and input are the same place.

use super::{Comm, same_place};
use crate::engine::{
    backend::{Backend, Stream, Tensor},
    error::Result,
};

/// The only rank.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

/// Queues `to = from` on a stream unless it is so already.
pub(super) fn copy<B: Backend>(b: &mut B, stream: Stream, to: Tensor, from: Tensor) -> Result {
    assert_eq!(to.elements(), from.elements(), "elements that a rank gives itself");
    if same_place(to, from) || to.elements() == 0 {
        return Ok(());
    }
    b.copy(stream, to, from)
}

impl<B: Backend> Comm<B> for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn n_ranks(&self) -> usize {
        1
    }

    fn stream(&self) -> Stream {
        Stream::Gather
    }

    fn all_to_all(&mut self, b: &mut B, to: &[Tensor], from: &[Tensor]) -> Result {
        let ([to], [from]) = (to, from) else { panic!("one tensor for the only rank") };
        copy(b, Stream::Gather, *to, *from)
    }

    fn all_gather(&mut self, b: &mut B, to: Tensor, from: Tensor) -> Result {
        copy(b, Stream::Gather, to, from)
    }

    fn reduce_scatter(&mut self, b: &mut B, to: Tensor, from: Tensor) -> Result {
        copy(b, Stream::Gather, to, from)
    }

    fn all_reduce(&mut self, _: &mut B, _: Tensor) -> Result {
        Ok(())
    }

    fn broadcast(&mut self, _: &mut B, _: Tensor, root: usize) -> Result {
        assert_eq!(root, 0, "the only rank");
        Ok(())
    }

    fn all_reduce_counts(&mut self, _: &mut [u64]) -> Result {
        Ok(())
    }

    fn barrier(&mut self, b: &mut B) -> Result {
        b.synchronize()
    }

    fn split(&mut self, _: u64, _: u64) -> Result<Self> {
        Ok(Self)
    }

    fn abort(&self, _: String) {}

    fn check(&self) -> Result {
        Ok(())
    }
}
