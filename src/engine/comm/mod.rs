//! Collectives between ranks: how tensors and counts travel among the ranks that train one model.
//!
//! [`Comm`] is the specification. [`Alone`] is its definition for one rank, [`HostComm`] the plain form over ordered messages
//! between ranks that are threads ([`threads`]) or processes ([`tcp`], which meet in [`rendezvous`]), [`nccl`] the form that
//! stays on GPUs. Nothing here knows what the tensors mean.

mod alone;
mod frame;
mod groups;
mod handshake;
mod host;
mod inbox;
pub mod nccl;
mod outbox;
pub mod rendezvous;
mod sum;
pub mod tcp;
pub mod threads;
mod transport;

pub use self::{
    alone::Alone,
    groups::{Groups, in_turn, queue},
    host::HostComm,
    transport::{Lost, Message, Transport},
};
use super::{
    backend::{Backend, Stream, Tensor},
    error::Result,
};

/// One rank's place in a group of `n_ranks` ranks, and what the group does together.
///
/// - Every rank of a group makes the same calls in the same order, also across groups that share ranks. Sizes and element
///   types are agreed; each rank may keep its tensors elsewhere.
/// - Tensor operations are queued on [`Comm::stream`], in the order of the calls: those of a world on [`Stream::Gather`], those of
///   groups cut from one on [`Stream::Exchange`], so that neither waits behind the other. A caller whose inputs are made on
///   another stream, or whose outputs are read there, orders the two with events. Transports over the host finish inside the call, after
///   everything queued before it.
/// - Sums are of floats. They are made in the wide type (f32; f64 for f64) in the order of the ranks and rounded once; NCCL
///   chooses order and rounding itself. Either way all ranks hold the same bits, and the same call gives them again.
/// - Outputs may not overlap inputs, except where an operation names the one place where they may be the same.
/// - When a rank is lost, every pending and later call of the others fails with [`Error::PeerLost`](super::Error::PeerLost)
///   naming it. The group does not recover; its ranks are started again.
/// - Dropping it is leaving. A rank leaves once nobody needs it any more, which [`Comm::barrier`] tells; one that leaves
///   earlier is lost to those who still wait for it.
pub trait Comm<B: Backend>: Sized {
    /// This rank, in `0..n_ranks`.
    fn rank(&self) -> usize;
    /// Ranks in the group, at least 1.
    fn n_ranks(&self) -> usize;
    /// Where its tensor operations are queued.
    fn stream(&self) -> Stream;

    /// `from[i]` goes to rank i and `to[i]` receives from rank i: `n_ranks` tensors each, any dtype, any sizes, none also. What
    /// a rank sends and what the other receives have the same bytes. `to[rank]` may be `from[rank]`.
    fn all_to_all(&mut self, b: &mut B, to: &[Tensor], from: &[Tensor]) -> Result;
    /// `to` holds the `from` of every rank in the order of ranks: `n_ranks` times its elements, same dtype (any). `from` may be
    /// this rank's own part of `to`.
    fn all_gather(&mut self, b: &mut B, to: Tensor, from: Tensor) -> Result;
    /// `to = sum over ranks of part `rank` of from`, where `from` is `n_ranks` parts as long as `to`; same float dtype. `to` may
    /// be this rank's own part of `from`.
    fn reduce_scatter(&mut self, b: &mut B, to: Tensor, from: Tensor) -> Result;
    /// `x = sum over ranks of x`, any float dtype.
    fn all_reduce(&mut self, b: &mut B, x: Tensor) -> Result;
    /// `x = x of rank root`, any dtype.
    fn broadcast(&mut self, b: &mut B, x: Tensor, root: usize) -> Result;

    /// Sums whole numbers in host memory over ranks (tokens that count), element by element. Waits for the other ranks, not
    /// for anything queued.
    fn all_reduce_counts(&mut self, counts: &mut [u64]) -> Result;
    /// Waits until everything that any rank queued before is done.
    fn barrier(&mut self, b: &mut B) -> Result;
    /// Cuts the group into one group for each `color`, ranked by `key`, then by rank here (as `MPI_Comm_split`). Every rank of
    /// this group calls it and gets its own new group; this one remains.
    fn split(&mut self, color: u64, key: u64) -> Result<Self>;
    /// Declares this rank lost to all ranks of its world, also those of other groups, as `MPI_Abort`. `cause` reads on from
    /// the rank's name.
    fn abort(&self, cause: String);
    /// Fails if a rank is known to be lost. After waiting for a stream this tells whether what was queued on it was done or
    /// given up.
    fn check(&self) -> Result;
}

/// True when both name the same bytes.
fn same_place(a: Tensor, b: Tensor) -> bool {
    (a.space, a.offset, a.bytes()) == (b.space, b.offset, b.bytes())
}

/// Part `index` of `n` parts of `x`, equally long.
///
/// # Panics
/// When its elements do not divide: a bug in the caller's layout.
fn nth_part(x: Tensor, index: usize, n: usize) -> Tensor {
    let (index, n) = (index as u64, n as u64);
    assert!(x.elements().is_multiple_of(n), "{x:?} is not {n} equal parts");
    let each = x.elements() / n;
    x.part(index * each, each)
}
