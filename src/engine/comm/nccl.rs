//! Collectives between GPUs, through NCCL: everything is queued on the device and moves between devices.
//!
//! The ranks meet over TCP, and those connections stay: the id of NCCL's world and counts travel on them, and they tell when
//! a rank is gone. NCCL alone would wait for it for ever; so a thread watches and gives its communicators up. What was queued
//! then ends undone: [`Comm::check`] after waiting for a stream tells.

mod library;

use std::{io, path::PathBuf, sync::Arc, thread, time::Duration};

use self::library::{Call, Communicators, UniqueId};
use super::{
    Comm, HostComm, alone, nth_part,
    tcp::{Tcp, Watch},
};
use crate::engine::{
    backend::{Backend, Stream, Tensor, cuda::Cuda},
    error::{Error, Result},
};

/// A rank of a group of GPUs, one to a process.
pub struct Nccl {
    communicators: Arc<Communicators>,
    /// This group's communicator.
    index: usize,
    watch: Watch,
    /// The same group between the processes. Dropped last: its end tells the others and the thread that watches.
    control: HostComm<Tcp>,
}

/// How long a failure of NCCL's waits for the connections to say that it is a rank's.
const HINDSIGHT: Duration = Duration::from_secs(2);

impl Nccl {
    /// Joins the GPUs of a world of processes; all of them call this. `folders` are searched for NCCL as by [`Cuda::open`].
    pub fn new(cuda: &Cuda, mut control: HostComm<Tcp>, folders: &[PathBuf]) -> Result<Self> {
        let communicators = Arc::new(Communicators::open(Arc::clone(&cuda.device.context), folders)?);
        let watch = control.transport().watch();
        let (watched, given_up) = (watch.clone(), Arc::clone(&communicators));
        let run = move || watched.wait().into_iter().for_each(|lost| given_up.lose(&lost));
        thread::Builder::new().name("nccl watch".into()).spawn(run).map_err(|error| no_thread(&error))?;

        let own = if control.rank() == 0 { communicators.unique_id()?.to_vec() } else { Vec::new() };
        let gathered = control.gather_bytes(own)?;
        let id: UniqueId = gathered[0].as_slice().try_into().map_err(|_| {
            Error::Rendezvous("rank 0 sent no id of NCCL's: start every rank from the same build".into())
        })?;
        let index =
            communicators.initialize(id, control.rank(), control.n_ranks()).map_err(|error| blame(&watch, error))?;
        Ok(Self { communicators, index, watch, control })
    }

    fn queue(&self, cuda: &mut Cuda, name: &str, calls: &[Call]) -> Result {
        if calls.is_empty() {
            return Ok(());
        }
        let stream = self.control.stream();
        let queued = cuda
            .marked_beside(stream, |cuda| self.communicators.queue(self.index, (&cuda.device, stream), name, calls));
        queued.map_err(|error| blame(&self.watch, error))
    }
}

/// The loss of a rank, where an error is one: NCCL notices a peer's end too, but not whose.
fn blame(watch: &Watch, error: Error) -> Error {
    match error {
        Error::PeerLost { .. } => error,
        error => watch.soon(HINDSIGHT).map_or(error, Error::from),
    }
}

fn no_thread(error: &io::Error) -> Error {
    Error::Device { library: "threads", call: "start one to watch NCCL".into(), cause: error.to_string() }
}

impl Comm<Cuda> for Nccl {
    fn rank(&self) -> usize {
        self.control.rank()
    }

    fn n_ranks(&self) -> usize {
        self.control.n_ranks()
    }

    fn stream(&self) -> Stream {
        self.control.stream()
    }

    /// A group of sends and receives, which is also what `ncclAlltoAll` (2.28 and later, equal pieces only) makes of it.
    fn all_to_all(&mut self, b: &mut Cuda, to: &[Tensor], from: &[Tensor]) -> Result {
        let (rank, n) = (self.rank(), self.n_ranks());
        assert_eq!((to.len(), from.len()), (n, n), "one tensor for each rank");
        alone::copy(b, self.control.stream(), to[rank], from[rank])?;
        let calls = (0..n).filter(|peer| *peer != rank).flat_map(|peer| {
            let send = (from[peer].elements() > 0).then_some(Call::Send { from: from[peer], to: peer });
            let receive = (to[peer].elements() > 0).then_some(Call::Receive { to: to[peer], from: peer });
            send.into_iter().chain(receive)
        });
        self.queue(b, "all_to_all", &calls.collect::<Vec<_>>())
    }

    fn all_gather(&mut self, b: &mut Cuda, to: Tensor, from: Tensor) -> Result {
        assert_eq!(nth_part(to, 0, self.n_ranks()).bytes(), from.bytes(), "a part for each rank");
        self.queue(b, "all_gather", one_on(from, Call::AllGather { to, from }).as_slice())
    }

    fn reduce_scatter(&mut self, b: &mut Cuda, to: Tensor, from: Tensor) -> Result {
        assert_eq!(from.dtype, to.dtype, "element type of a sum");
        assert_eq!(nth_part(from, 0, self.n_ranks()).bytes(), to.bytes(), "a part for each rank");
        self.queue(b, "reduce_scatter", one_on(to, Call::ReduceScatter { to, from }).as_slice())
    }

    fn all_reduce(&mut self, b: &mut Cuda, x: Tensor) -> Result {
        self.queue(b, "all_reduce", one_on(x, Call::AllReduce { x }).as_slice())
    }

    fn broadcast(&mut self, b: &mut Cuda, x: Tensor, root: usize) -> Result {
        self.queue(b, "broadcast", one_on(x, Call::Broadcast { x, root }).as_slice())
    }

    fn all_reduce_counts(&mut self, counts: &mut [u64]) -> Result {
        self.control.all_reduce_counts(counts)
    }

    fn barrier(&mut self, b: &mut Cuda) -> Result {
        b.synchronize().map_err(|error| blame(&self.watch, error))?;
        // Streams also end when their work was given up.
        Comm::<Cuda>::check(self)?;
        self.control.gather_bytes(Vec::new()).map(drop)
    }

    fn split(&mut self, color: u64, key: u64) -> Result<Self> {
        let mut control = self.control.split(color, key)?;
        // NCCL's colors and keys are small numbers: the rank here of a group's first rank tells groups apart.
        let own = (self.rank() as u32).to_le_bytes().to_vec();
        let first = control.gather_bytes(own)?[0].as_slice().try_into().map_or(0, u32::from_le_bytes);
        let index = self.communicators.split(self.index, first as usize, control.rank());
        let index = index.map_err(|error| blame(&self.watch, error))?;
        Ok(Self { communicators: Arc::clone(&self.communicators), index, watch: self.watch.clone(), control })
    }

    fn abort(&self, cause: String) {
        self.control.abort(cause);
    }

    fn check(&self) -> Result {
        self.control.check()?;
        self.communicators.check(self.index).map_err(|error| blame(&self.watch, error))
    }
}

/// The call, unless it is on no elements.
fn one_on(x: Tensor, call: Call) -> Option<Call> {
    (x.elements() > 0).then_some(call)
}

impl Drop for Nccl {
    /// Not `ncclCommDestroy`, which would wait for the other ranks: whoever leaves has passed a barrier, and nothing is queued.
    fn drop(&mut self) {
        self.communicators.give_up(self.index);
    }
}
