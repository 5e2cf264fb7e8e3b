//! Collectives over the host: tensors are downloaded, sent as bytes, and uploaded, on any backend.
//!
//! Every exchange is direct: each rank sends to every other what that one needs and sums what it receives in the order of
//! ranks. A rank never runs ahead of another by more than the operation they are both in, which bounds what a transport holds.

use std::sync::Arc;

use super::{Comm, Message, Transport, alone, nth_part, sum::sum};
use crate::engine::{
    backend::{Backend, Tensor},
    error::{Error, Result},
};

/// A rank of a group whose messages go through a transport.
///
/// Groups made by [`Comm::split`] share the transport's one ordered channel for each pair of ranks. That is enough: both ends of
/// a pair make the same calls in the same order, so the next message from a rank always belongs to the call that waits for it.
#[derive(Debug)]
pub struct HostComm<T> {
    transport: Arc<T>,
    /// World rank of each rank of the group.
    members: Vec<usize>,
    rank: usize,
}

impl<T: Transport> HostComm<T> {
    /// The group of all ranks of a transport.
    pub fn world(transport: T) -> Self {
        let (rank, members) = (transport.rank(), (0..transport.n_ranks()).collect());
        Self { transport: Arc::new(transport), members, rank }
    }

    /// This rank, in `0..n_ranks`.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Ranks in the group.
    pub fn n_ranks(&self) -> usize {
        self.members.len()
    }

    /// As [`Comm::check`].
    pub fn check(&self) -> Result {
        self.transport.check()
    }

    /// As [`Comm::all_reduce_counts`].
    pub fn all_reduce_counts(&mut self, counts: &mut [u64]) -> Result {
        let own = counts.iter().flat_map(|count| count.to_le_bytes()).collect();
        let gathered = self.gather_bytes(own)?;
        for from in self.others() {
            self.expect_length(from, &gathered[from], counts.len() as u64 * 8)?;
        }
        counts.fill(0);
        for message in gathered {
            let words = message.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")));
            counts.iter_mut().zip(words).for_each(|(count, word)| *count = count.saturating_add(word));
        }
        Ok(())
    }

    /// As [`Comm::split`].
    pub fn split(&mut self, color: u64, key: u64) -> Result<Self> {
        let gathered = self.gather_bytes([color.to_le_bytes(), key.to_le_bytes()].concat())?;
        let mut same_color = Vec::new();
        for (from, message) in gathered.iter().enumerate() {
            self.expect_length(from, message, 16)?;
            if message[..8] == color.to_le_bytes() {
                let key = u64::from_le_bytes(message[8..].try_into().expect("8 bytes"));
                same_color.push((key, from));
            }
        }
        same_color.sort_unstable();
        let rank = same_color.iter().position(|(_, from)| *from == self.rank).expect("a rank has its own color");
        let members = same_color.into_iter().map(|(_, from)| self.members[from]).collect();
        Ok(Self { transport: Arc::clone(&self.transport), members, rank })
    }

    /// As [`Comm::abort`].
    pub fn abort(&self, cause: String) {
        self.give_up(self.rank, cause);
    }

    /// What every rank gives, of any length, in the order of ranks.
    pub fn gather_bytes(&mut self, own: Vec<u8>) -> Result<Vec<Message>> {
        let own: Message = Arc::new(own);
        for to in self.others() {
            self.send(to, Arc::clone(&own))?;
        }
        (0..self.n_ranks()).map(|from| if from == self.rank { Ok(Arc::clone(&own)) } else { self.take(from) }).collect()
    }

    pub(super) fn transport(&self) -> &T {
        &self.transport
    }

    /// The other ranks, from the next one round: not everyone sends to rank 0 first.
    fn others(&self) -> impl Iterator<Item = usize> + use<T> {
        let (rank, n) = (self.rank, self.n_ranks());
        (1..n).map(move |step| (rank + step) % n)
    }

    fn send(&self, to: usize, message: Message) -> Result {
        self.transport.send(self.members[to], message)
    }

    fn take(&self, from: usize) -> Result<Message> {
        self.transport.receive(self.members[from])
    }

    /// A message that must have this length. Any other means that the ranks make different calls.
    fn take_exactly(&self, from: usize, bytes: u64) -> Result<Message> {
        let message = self.take(from)?;
        self.expect_length(from, &message, bytes)?;
        Ok(message)
    }

    fn expect_length(&self, from: usize, message: &Message, bytes: u64) -> Result {
        if message.len() as u64 == bytes {
            return Ok(());
        }
        let cause = format!("sent {} bytes where {bytes} were due: the ranks do not run the same job", message.len());
        Err(self.give_up(from, cause))
    }

    fn give_up(&self, rank: usize, cause: String) -> Error {
        self.transport.give_up(self.members[rank], cause)
    }

    fn send_tensor<B: Backend>(&self, b: &mut B, to: usize, from: Tensor) -> Result {
        self.send(to, Arc::new(download(b, from)?))
    }

    fn receive_tensor<B: Backend>(&self, b: &mut B, to: Tensor, from: usize) -> Result {
        let message = self.take_exactly(from, to.bytes())?;
        upload(b, to, &message)
    }

    /// Sends each rank its part and answers the sum of this rank's own over all ranks.
    fn sum_parts<B: Backend>(&self, b: &mut B, part: impl Fn(usize) -> Tensor) -> Result<Vec<u8>> {
        for to in self.others() {
            self.send_tensor(b, to, part(to))?;
        }
        let own = part(self.rank);
        let mut pieces = Vec::with_capacity(self.n_ranks());
        for from in 0..self.n_ranks() {
            pieces.push(if from == self.rank {
                Arc::new(download(b, own)?)
            } else {
                self.take_exactly(from, own.bytes())?
            });
        }
        let pieces: Vec<&[u8]> = pieces.iter().map(|piece| piece.as_slice()).collect();
        Ok(sum(own.dtype, &pieces))
    }
}

fn download<B: Backend>(b: &mut B, from: Tensor) -> Result<Vec<u8>> {
    let mut bytes = vec![0; from.bytes() as usize];
    if !bytes.is_empty() {
        b.download(from, &mut bytes)?;
    }
    Ok(bytes)
}

fn upload<B: Backend>(b: &mut B, to: Tensor, bytes: &[u8]) -> Result {
    if bytes.is_empty() { Ok(()) } else { b.upload(to, bytes) }
}

/// Part `index` of `n` parts of x, as equal as whole elements allow.
fn even_part(x: Tensor, index: usize, n: usize) -> Tensor {
    let bound = |i: usize| (u128::from(x.elements()) * i as u128 / n as u128) as u64;
    x.part(bound(index), bound(index + 1) - bound(index))
}

impl<B: Backend, T: Transport> Comm<B> for HostComm<T> {
    fn rank(&self) -> usize {
        self.rank()
    }

    fn n_ranks(&self) -> usize {
        self.n_ranks()
    }

    fn all_to_all(&mut self, b: &mut B, to: &[Tensor], from: &[Tensor]) -> Result {
        assert_eq!((to.len(), from.len()), (self.n_ranks(), self.n_ranks()), "one tensor for each rank");
        for peer in self.others() {
            self.send_tensor(b, peer, from[peer])?;
        }
        alone::copy(b, to[self.rank], from[self.rank])?;
        self.others().try_for_each(|peer| self.receive_tensor(b, to[peer], peer))
    }

    fn all_gather(&mut self, b: &mut B, to: Tensor, from: Tensor) -> Result {
        let part = |rank| nth_part(to, rank, self.n_ranks());
        let own = Arc::new(download(b, from)?);
        for peer in self.others() {
            self.send(peer, Arc::clone(&own))?;
        }
        alone::copy(b, part(self.rank), from)?;
        self.others().try_for_each(|peer| self.receive_tensor(b, part(peer), peer))
    }

    fn reduce_scatter(&mut self, b: &mut B, to: Tensor, from: Tensor) -> Result {
        let total = self.sum_parts(b, |rank| nth_part(from, rank, self.n_ranks()))?;
        assert_eq!(to.bytes(), total.len() as u64, "bytes of a sum");
        upload(b, to, &total)
    }

    /// Each rank sums a part and gives it to all: every rank holds what one rank rounded.
    fn all_reduce(&mut self, b: &mut B, x: Tensor) -> Result {
        let part = |rank| even_part(x, rank, self.n_ranks());
        let total = Arc::new(self.sum_parts(b, part)?);
        for peer in self.others() {
            self.send(peer, Arc::clone(&total))?;
        }
        upload(b, part(self.rank), &total)?;
        self.others().try_for_each(|peer| self.receive_tensor(b, part(peer), peer))
    }

    fn broadcast(&mut self, b: &mut B, x: Tensor, root: usize) -> Result {
        if self.rank != root {
            self.receive_tensor(b, x, root)?;
            return self.send(root, Message::default());
        }
        let bytes = Arc::new(download(b, x)?);
        for peer in self.others() {
            self.send(peer, Arc::clone(&bytes))?;
        }
        // Nothing comes back from a broadcast: without these a root would run ahead of the others by any number of them.
        self.others().try_for_each(|peer| self.take_exactly(peer, 0).map(drop))
    }

    fn all_reduce_counts(&mut self, counts: &mut [u64]) -> Result {
        self.all_reduce_counts(counts)
    }

    fn barrier(&mut self, b: &mut B) -> Result {
        b.synchronize()?;
        self.gather_bytes(Vec::new()).map(drop)
    }

    fn split(&mut self, color: u64, key: u64) -> Result<Self> {
        self.split(color, key)
    }

    fn abort(&self, cause: String) {
        self.abort(cause);
    }

    fn check(&self) -> Result {
        self.check()
    }
}
