//! How processes that know one address and one secret become a world: rank 0 listens, the others call, everyone learns where
//! everyone else listens, and each calls the ranks before it.

mod door;

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    thread,
    time::{Duration, Instant},
};

use self::door::Door;
use super::{
    HostComm,
    handshake::{self, Failure, Identity, read_by, rest, write_by},
    tcp::{Connection, Heartbeat, Tcp},
};
use crate::engine::error::{Error, Result};

/// What a process must know to find the other ranks of its world.
pub struct Meeting {
    /// `host:port` where rank 0 listens, as every rank reaches it. On several hosts no loopback address: it also tells which
    /// of rank 0's networks the ranks use.
    pub address: String,
    /// A secret of this world. Who knows it can join.
    pub token: String,
    /// This rank, in `0..n_ranks`.
    pub rank: usize,
    pub n_ranks: usize,
    /// How long ranks wait for each other to come.
    pub patience: Duration,
    pub heartbeat: Heartbeat,
}

/// Most ranks of a world.
const MOST_RANKS: usize = 1 << 12;
/// Between two tries to reach a rank that does not listen yet.
const RETRY: Duration = Duration::from_millis(50);
/// Longest try to reach an address.
const CALL: Duration = Duration::from_secs(3);
/// An address in the table: 16 bytes of IPv6 (or IPv4 mapped into it), 2 of port.
const ADDRESS_BYTES: usize = 18;

/// Meets the other ranks; all of them call this. Fails with [`Error::Rendezvous`].
pub fn meet(meeting: &Meeting) -> Result<HostComm<Tcp>> {
    check(meeting)?;
    if meeting.n_ranks > 1 && meeting.rank == 0 {
        let listener = TcpListener::bind(&meeting.address).map_err(|error| {
            let address = &meeting.address;
            failed(format!(
                "rank 0 cannot listen at {address}: {error}; name an address of its own host and a free port"
            ))
        })?;
        return receive(listener, meeting);
    }
    let deadline = Instant::now() + meeting.patience;
    let connections = if meeting.n_ranks > 1 { join(meeting, deadline)? } else { vec![None] };
    start(meeting, connections)
}

/// As [`meet`] for rank 0, over a listener that is bound already.
pub fn receive(listener: TcpListener, meeting: &Meeting) -> Result<HostComm<Tcp>> {
    check(meeting)?;
    assert_eq!(meeting.rank, 0, "rank 0 receives the others");
    let deadline = Instant::now() + meeting.patience;
    let guests = Door::new(listener, own(meeting, 0)).gather(meeting, deadline)?;
    let table: Vec<SocketAddr> = guests.iter().map(|guest| guest.address).collect();
    let bytes: Vec<u8> = table.iter().flat_map(|address| encode(*address)).collect();
    for guest in &guests {
        // One that has gone meanwhile is noticed as any rank that is lost.
        let _ = write_by(&guest.socket, &bytes, deadline);
    }
    let mut connections = vec![None];
    connections.extend(guests.into_iter().map(|guest| Some(connection(guest.socket, guest.rank, guest.address))));
    start(meeting, connections)
}

/// The side of every other rank: connections by rank.
fn join(meeting: &Meeting, deadline: Instant) -> Result<Vec<Option<Connection>>> {
    let (first, listener) = call_first(meeting, deadline)?;
    let lost = |error: io::Error| {
        failed(format!(
            "rank 0 at {} ended or gave up before all ranks had come ({error}): see its log",
            meeting.address
        ))
    };
    let first_address = first.peer_addr().map_err(lost)?;
    let mut table = vec![first_address];
    for _ in 1..meeting.n_ranks {
        table.push(decode(read_by(&first, deadline).map_err(lost)?));
    }
    let mut connections = vec![Some(connection(first, 0, first_address))];
    let port = listener.local_addr().map_err(lost)?.port();
    for (rank, address) in table.iter().enumerate().take(meeting.rank).skip(1) {
        let socket = call(&address.to_string(), rank, &own(meeting, port), deadline)?;
        connections.push(Some(connection(socket, rank, *address)));
    }
    connections.push(None);
    let guests = Door::new(listener, own(meeting, port)).gather(meeting, deadline)?;
    connections.extend(guests.into_iter().map(|guest| Some(connection(guest.socket, guest.rank, table[guest.rank]))));
    Ok(connections)
}

/// Reaches rank 0, and listens for others on the network that leads there.
fn call_first(meeting: &Meeting, deadline: Instant) -> Result<(TcpStream, TcpListener)> {
    let mut listener = None;
    let socket = call_with(&meeting.address, 0, deadline, |socket| {
        let bound = TcpListener::bind((socket.local_addr()?.ip(), 0))?;
        let port = bound.local_addr()?.port();
        listener = Some(bound);
        handshake::call(socket, &own(meeting, port), 0, (Instant::now() + CALL).min(deadline))
    })?;
    Ok((socket, listener.expect("bound before the handshake")))
}

fn call(address: &str, rank: usize, own: &Identity, deadline: Instant) -> Result<TcpStream> {
    // The other end may still be busy with its own calls: its answer comes when it has made them.
    call_with(address, rank, deadline, |socket| handshake::call(socket, own, rank as u32, deadline))
}

/// Connects and shakes hands, again and again until the deadline while there is nobody.
fn call_with(
    address: &str,
    rank: usize,
    deadline: Instant,
    mut shake: impl FnMut(&TcpStream) -> std::result::Result<(), Failure>,
) -> Result<TcpStream> {
    loop {
        match connect(address, deadline).map_err(Failure::Gone).and_then(|socket| shake(&socket).map(|()| socket)) {
            Ok(socket) => return Ok(socket),
            Err(Failure::Refused(why)) => return Err(failed(format!("rank {rank} at {address}: {why}"))),
            Err(Failure::Gone(error)) if rest(deadline).is_err() => {
                return Err(failed(format!(
                    "rank {rank} was not to be reached at {address} in time ({error}): start every rank with the same \
                     address, one that all of them reach, and see that rank's log"
                )));
            }
            Err(Failure::Gone(_)) => thread::sleep(RETRY),
        }
    }
}

fn connect(address: &str, deadline: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::other("the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, rest(deadline)?.min(CALL)) {
            Ok(socket) => {
                socket.set_nodelay(true)?;
                return Ok(socket);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn own(meeting: &Meeting, port: u16) -> Identity {
    Identity { token: meeting.token.as_str().into(), rank: meeting.rank as u32, n_ranks: meeting.n_ranks as u32, port }
}

fn check(meeting: &Meeting) -> Result {
    let Meeting { rank, n_ranks, heartbeat: Heartbeat { interval, patience }, .. } = meeting;
    if *n_ranks == 0 || *n_ranks > MOST_RANKS {
        return Err(failed(format!("a world has between 1 and {MOST_RANKS} ranks, not {n_ranks}")));
    }
    if rank >= n_ranks {
        return Err(failed(format!("there is no rank {rank} among {n_ranks}: number the ranks from 0")));
    }
    if interval.is_zero() || *patience < 2 * *interval {
        return Err(failed(format!("a patience of {patience:?} is less than two heartbeats of {interval:?}")));
    }
    Ok(())
}

fn start(meeting: &Meeting, connections: Vec<Option<Connection>>) -> Result<HostComm<Tcp>> {
    let prepare = |connection: &Connection| {
        connection.socket.set_read_timeout(None)?;
        connection.socket.set_write_timeout(None)
    };
    let tcp = connections
        .iter()
        .flatten()
        .try_for_each(prepare)
        .and_then(|()| Tcp::start(meeting.rank, connections, meeting.heartbeat));
    tcp.map(HostComm::world).map_err(|error| failed(format!("rank {} cannot start its threads: {error}", meeting.rank)))
}

fn connection(socket: TcpStream, rank: usize, address: SocketAddr) -> Connection {
    Connection { socket, name: format!("rank {rank} at {address}") }
}

fn failed(why: String) -> Error {
    Error::Rendezvous(why)
}

fn encode(address: SocketAddr) -> [u8; ADDRESS_BYTES] {
    let ip = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let mut bytes = [0; ADDRESS_BYTES];
    bytes[..16].copy_from_slice(&ip.octets());
    bytes[16..].copy_from_slice(&address.port().to_le_bytes());
    bytes
}

fn decode(bytes: [u8; ADDRESS_BYTES]) -> SocketAddr {
    let (ip, port) = bytes.split_first_chunk::<16>().expect("fixed length");
    let ip = IpAddr::V6(Ipv6Addr::from(*ip)).to_canonical();
    SocketAddr::new(ip, u16::from_le_bytes([port[0], port[1]]))
}
