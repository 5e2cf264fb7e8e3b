//! A world of processes, on one host or several: a connection for each pair of ranks, made in [`rendezvous`](super::rendezvous).
//!
//! For each peer one thread writes what is queued and one reads into the inbox without being asked, so no rank ever waits for
//! another's call to get rid of what it sends. One more thread sends heartbeats and counts silence: a process that is gone
//! closes its connections, one that hangs (or its host) says nothing. Whoever notices first tells the rest.

use std::{
    io::{self, BufWriter, ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    Lost, Message, Transport,
    frame::{self, Frame, MOST_MESSAGE_BYTES},
    inbox::{Departure, Inbox, Refused},
    outbox::Outbox,
};
use crate::engine::error::{Error, Result};

/// When a peer that says nothing counts as lost. The same for all ranks of a world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    /// Time between signs of life.
    pub interval: Duration,
    /// Time without any that means a peer hangs; at least twice the interval.
    pub patience: Duration,
}

impl Default for Heartbeat {
    fn default() -> Self {
        Self { interval: Duration::from_secs(1), patience: Duration::from_secs(5) }
    }
}

/// One process's end.
#[derive(Debug)]
pub struct Tcp {
    world: Arc<World>,
    threads: Vec<JoinHandle<()>>,
}

/// What the threads of this rank share.
#[derive(Debug)]
struct World {
    rank: usize,
    inbox: Arc<Inbox>,
    /// By rank; none for this one.
    peers: Vec<Option<Peer>>,
    heartbeat: Heartbeat,
}

/// A view of a world's losses that does not keep this rank in it.
#[derive(Debug, Clone)]
pub(super) struct Watch(Arc<World>);

/// A rank on the other end of a connection.
#[derive(Debug)]
struct Peer {
    /// "rank 3 at 10.0.0.5:4242"
    name: String,
    socket: TcpStream,
    outbox: Outbox,
    /// Bytes came since the last look.
    heard: AtomicBool,
}

/// A connection to a rank that has proved who it is, and what the rank is called.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: TcpStream,
    pub(super) name: String,
}

/// What is said of a rank that left in good order, to one that still needs it.
const LEFT_EARLY: &str = "ended before the others were done";
/// How long a rank that knows of a loss waits for the others to hear of it before it closes its connections.
const FAREWELL: Duration = Duration::from_secs(1);
/// Bytes gathered before they are sent.
const BUFFER_BYTES: usize = 64 << 10;

impl Tcp {
    /// Starts the threads over these connections, by rank; none for this one.
    pub(super) fn start(rank: usize, connections: Vec<Option<Connection>>, heartbeat: Heartbeat) -> io::Result<Self> {
        let inbox = Arc::new(Inbox::new(connections.len()));
        let peer = |Connection { socket, name }| {
            let (outbox, heard) = (Outbox::default(), AtomicBool::new(true));
            Peer { name, socket, outbox, heard }
        };
        let peers = connections.into_iter().map(|connection| connection.map(peer)).collect();
        let world = Arc::new(World { rank, inbox, peers, heartbeat });
        let mut tcp = Self { world: Arc::clone(&world), threads: Vec::new() };
        for (peer, _) in world.others() {
            tcp.spawn(format!("from rank {peer}"), move |world| world.read(peer))?;
            tcp.spawn(format!("to rank {peer}"), move |world| world.write(peer))?;
        }
        tcp.spawn("heartbeat".into(), World::watch)?;
        Ok(tcp)
    }

    fn spawn(&mut self, name: String, run: impl FnOnce(&World) + Send + 'static) -> io::Result<()> {
        let world = Arc::clone(&self.world);
        self.threads.push(thread::Builder::new().name(name).spawn(move || run(&world))?);
        Ok(())
    }

    /// For whoever waits for a rank other than by receiving from it.
    pub(super) fn watch(&self) -> Watch {
        Watch(Arc::clone(&self.world))
    }

    fn left_early(&self, rank: usize) -> Error {
        self.give_up(rank, LEFT_EARLY.into())
    }
}

impl Watch {
    /// Waits for the first loss. A rank that left in good order counts as lost when this one has not left as well after
    /// the time that a rank may be silent. `None` when this rank leaves.
    pub(super) fn wait(&self) -> Option<Lost> {
        let Watch(world) = self;
        match world.inbox.wait_for_departure() {
            Departure::Own => None,
            Departure::Lost(lost) => Some(lost),
            Departure::Left(rank) => {
                let lost = self.soon(world.heartbeat.patience);
                let left = || Lost { rank, peer: world.name(rank), cause: LEFT_EARLY.into() };
                lost.or_else(|| (!world.inbox.is_closed()).then(left))
            }
        }
    }

    /// The loss that is known within this time, if one is.
    pub(super) fn soon(&self, patience: Duration) -> Option<Lost> {
        self.0.inbox.wait_for_loss(patience)
    }
}

impl World {
    fn others(&self) -> impl Iterator<Item = (usize, &Peer)> {
        self.peers.iter().enumerate().filter_map(|(rank, peer)| Some((rank, peer.as_ref()?)))
    }

    fn peer(&self, rank: usize) -> &Peer {
        self.peers[rank].as_ref().expect("a rank has no connection to itself")
    }

    fn name(&self, rank: usize) -> String {
        self.peers[rank].as_ref().map_or_else(|| format!("rank {rank} (this one)"), |peer| peer.name.clone())
    }

    /// Records a loss. The first one is told to everyone.
    fn lose(&self, rank: usize, cause: &str) {
        self.inbox.lose(Lost { rank, peer: self.name(rank), cause: cause.into() }, || {
            for (_, peer) in self.others() {
                peer.outbox.put(Frame::Lost { rank: rank as u32, cause: cause.into() });
            }
        });
    }

    /// Takes in what a peer sends until it leaves or is lost.
    fn read(&self, rank: usize) {
        let peer = self.peer(rank);
        let mut from = Listening { socket: &peer.socket, heard: &peer.heard };
        loop {
            match frame::read(&mut from) {
                Ok(Frame::Message(message)) => self.inbox.put(rank, message),
                Ok(Frame::Heartbeat) => {}
                Ok(Frame::Lost { rank: lost, cause }) if (lost as usize) < self.peers.len() => {
                    self.lose(lost as usize, &cause);
                }
                Ok(Frame::Lost { rank: other, .. }) => {
                    return self.lose(rank, &format!("spoke of a rank {other} that does not exist"));
                }
                Ok(Frame::Leave) => {
                    self.inbox.leave(rank);
                    peer.outbox.close();
                    // Nothing will be read from here on. The end of the connection tells the peer that all it sent has arrived.
                    let _ = peer.socket.shutdown(Shutdown::Both);
                    return;
                }
                Err(_) if self.inbox.is_closed() => return,
                Err(error) => return self.lose(rank, &ending(&error)),
            }
        }
    }

    /// Sends a peer what is queued until the queue is closed.
    fn write(&self, rank: usize) {
        let peer = self.peer(rank);
        let mut to = BufWriter::with_capacity(BUFFER_BYTES, &peer.socket);
        while let Some((frame, more)) = peer.outbox.take() {
            let sent = frame::write(&mut to, &frame).and_then(|()| if more { Ok(()) } else { to.flush() });
            if let Err(error) = sent {
                // What the peer did not want any more is no loss.
                if !self.inbox.is_closed() && !self.inbox.has_left(rank) {
                    self.lose(rank, &ending(&error));
                }
                break;
            }
        }
        // What a broken connection could not take must not be tried again.
        drop(to.into_parts());
        let _ = peer.socket.shutdown(Shutdown::Write);
    }

    /// Sends heartbeats and counts, in looks rather than by the clock, how long each peer has been silent: where this process
    /// itself was stopped, the time it missed says nothing of the others.
    fn watch(&self) {
        let Heartbeat { interval, patience } = self.heartbeat;
        let mut silent = vec![Duration::ZERO; self.peers.len()];
        while !self.inbox.wait_until_closed(interval) {
            for (rank, peer) in self.others().filter(|(rank, _)| !self.inbox.has_left(*rank)) {
                peer.outbox.put_if_empty(Frame::Heartbeat);
                silent[rank] =
                    if peer.heard.swap(false, Ordering::Relaxed) { Duration::ZERO } else { silent[rank] + interval };
                if silent[rank] >= patience {
                    self.lose(rank, &format!("has been silent for {patience:?}"));
                }
            }
        }
    }
}

/// How a connection ended, to follow a peer's name.
fn ending(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::UnexpectedEof
        | ErrorKind::ConnectionReset
        | ErrorKind::ConnectionAborted
        | ErrorKind::BrokenPipe => "closed its connection".into(),
        ErrorKind::InvalidData => format!("sent what no rank sends: {error}"),
        _ => format!("cannot be reached any more: {error}"),
    }
}

/// A socket that notes every sign of life, also in the middle of a long message.
struct Listening<'a> {
    socket: &'a TcpStream,
    heard: &'a AtomicBool,
}

impl Read for Listening<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.socket.read(into)?;
        self.heard.store(true, Ordering::Relaxed);
        Ok(n)
    }
}

impl Transport for Tcp {
    fn rank(&self) -> usize {
        self.world.rank
    }

    fn n_ranks(&self) -> usize {
        self.world.peers.len()
    }

    fn send(&self, to: usize, message: Message) -> Result {
        assert!(message.len() as u64 <= MOST_MESSAGE_BYTES, "{} bytes in one message", message.len());
        self.check()?;
        if self.world.inbox.has_left(to) {
            return Err(self.left_early(to));
        }
        self.world.peer(to).outbox.put(Frame::Message(message));
        Ok(())
    }

    fn receive(&self, from: usize) -> Result<Message> {
        self.world.inbox.take(from).map_err(|refused| match refused {
            Refused::Lost(lost) => lost.into(),
            Refused::Left => self.left_early(from),
        })
    }

    fn check(&self) -> Result {
        self.world.inbox.lost().map_or(Ok(()), |lost| Err(lost.into()))
    }

    fn give_up(&self, rank: usize, cause: String) -> Error {
        self.world.lose(rank, &cause);
        self.world.inbox.lost().expect("a rank was just lost").into()
    }
}

impl Drop for Tcp {
    /// Leaves: sends what is queued, waits until the others have it, and closes. A peer that does not take it is not waited
    /// for longer than it may be silent.
    fn drop(&mut self) {
        if thread::panicking() {
            self.world.lose(self.world.rank, "panicked");
        }
        let lost = self.world.inbox.lost().is_some();
        self.world.inbox.close();
        for (_, peer) in self.world.others() {
            if !lost {
                peer.outbox.put(Frame::Leave);
            }
            peer.outbox.close();
        }
        let end = Instant::now() + if lost { FAREWELL } else { self.world.heartbeat.patience };
        while self.threads.iter().any(|thread| !thread.is_finished()) && Instant::now() < end {
            thread::sleep(Duration::from_millis(2));
        }
        for (_, peer) in self.world.others() {
            let _ = peer.socket.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
