//! Where the other ranks come in: takes every caller, keeps those that belong here, and does not let the rest disturb.

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpListener, TcpStream},
    sync::mpsc::{self, Receiver, Sender, TryRecvError},
    thread,
    time::{Duration, Instant},
};

use super::{Meeting, failed};
use crate::engine::{
    comm::handshake::{self, Guest, Identity, Verdict},
    error::Result,
};

/// A rank that has come in.
pub(super) struct Arrival {
    pub(super) rank: usize,
    pub(super) socket: TcpStream,
    /// Where it listens.
    pub(super) address: SocketAddr,
}

/// A listener and who answers there.
pub(super) struct Door {
    listener: TcpListener,
    own: Identity,
    /// Handshakes under way.
    n_callers: usize,
    /// The last caller that was turned away, and why.
    turned_away: Option<String>,
}

type Answered = std::result::Result<(Guest, SocketAddr), String>;

/// Between two looks for callers.
const LOOK: Duration = Duration::from_millis(2);
/// Longest handshake: a caller that says nothing is let go.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Handshakes at a time. Callers beyond are hung up on; those that belong here try again.
const MOST_CALLERS: usize = 256;

impl Door {
    pub(super) fn new(listener: TcpListener, own: Identity) -> Self {
        Self { listener, own, n_callers: 0, turned_away: None }
    }

    /// Waits until every rank after this one has come; they, in order.
    pub(super) fn gather(mut self, meeting: &Meeting, deadline: Instant) -> Result<Vec<Arrival>> {
        let first = meeting.rank + 1;
        let mut arrivals: Vec<Option<Arrival>> = (first..meeting.n_ranks).map(|_| None).collect();
        self.listener.set_nonblocking(true).map_err(|error| failed(format!("cannot listen: {error}")))?;
        let (tell, told) = mpsc::channel();
        while arrivals.iter().any(Option::is_none) && Instant::now() < deadline {
            if !self.accept(&tell, deadline) && !self.admit(&told, first, &mut arrivals, deadline) {
                thread::sleep(LOOK);
            }
        }
        let missing: Vec<String> = (first..)
            .zip(&arrivals)
            .filter(|(_, arrival)| arrival.is_none())
            .map(|(rank, _)| rank.to_string())
            .collect();
        if missing.is_empty() {
            return Ok(arrivals.into_iter().flatten().collect());
        }
        let turned_away = self.turned_away.map_or_else(String::new, |caller| format!("; last turned away: {caller}"));
        Err(failed(format!(
            "rank {} of {} did not come to rank {} within {:?}{turned_away}: start every rank with the same address, token \
             and number of ranks, and see the missing one's log",
            missing.join(", "),
            meeting.n_ranks,
            meeting.rank,
            meeting.patience
        )))
    }

    /// Begins to answer the next caller; false when there is none.
    fn accept(&mut self, tell: &Sender<Answered>, deadline: Instant) -> bool {
        let (socket, address) = match self.listener.accept() {
            Ok(caller) => caller,
            // A caller that hung up before it was answered is no fault of the listener.
            Err(error) => return matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted),
        };
        if self.n_callers < MOST_CALLERS {
            let (own, tell, deadline) = (self.own.clone(), tell.clone(), deadline.min(Instant::now() + HANDSHAKE));
            let answer = move || {
                let guest = socket.set_nonblocking(false).and_then(|()| socket.set_nodelay(true));
                let guest = guest.map_err(|error| error.to_string());
                let guest = guest.and_then(|()| handshake::answer(socket, &own, deadline));
                // Not waited for: the door may be closed by now.
                let _ = tell.send(guest.map(|guest| (guest, address)).map_err(|why| format!("{address} {why}")));
            };
            let builder = thread::Builder::new().name(format!("caller {address}"));
            self.n_callers += usize::from(builder.spawn(answer).is_ok());
        }
        true
    }

    /// Judges the next caller that has been answered; false when there is none.
    fn admit(
        &mut self,
        told: &Receiver<Answered>,
        first: usize,
        arrivals: &mut [Option<Arrival>],
        deadline: Instant,
    ) -> bool {
        let answered = match told.try_recv() {
            Ok(answered) => answered,
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => return false,
        };
        self.n_callers -= 1;
        match answered {
            Ok((guest, address)) => {
                let place = (guest.rank as usize).checked_sub(first).and_then(|index| arrivals.get_mut(index));
                let verdict = self.verdict(&guest, place.as_deref());
                let told = handshake::conclude(&guest.socket, verdict, deadline);
                match (verdict, place) {
                    (Verdict::Welcome, Some(place)) if told.is_ok() => {
                        let address = SocketAddr::new(address.ip(), guest.port);
                        *place = Some(Arrival { rank: guest.rank as usize, socket: guest.socket, address });
                    }
                    _ => self.turned_away = Some(format!("{address}, rank {} of {}", guest.rank, guest.n_ranks)),
                }
            }
            Err(why) => self.turned_away = Some(why),
        }
        true
    }

    fn verdict(&self, guest: &Guest, place: Option<&Option<Arrival>>) -> Verdict {
        match place {
            _ if guest.n_ranks != self.own.n_ranks => Verdict::OtherWorld(self.own.n_ranks),
            None => Verdict::NoSuchRank,
            // A rank that was started again may take the place of the one that died.
            Some(Some(arrival)) if !has_hung_up(&arrival.socket) => Verdict::Taken,
            Some(_) => Verdict::Welcome,
        }
    }
}

fn has_hung_up(socket: &TcpStream) -> bool {
    let look = socket.set_nonblocking(true).and_then(|()| socket.peek(&mut [0]));
    let _ = socket.set_nonblocking(false);
    match look {
        Ok(n) => n == 0,
        Err(error) => error.kind() != ErrorKind::WouldBlock,
    }
}
