//! How two ends of a fresh connection make sure of each other: same protocol, same secret, same world, which rank.
//!
//! The caller says hello with a nonce; the host answers with its own and proves that it knows the secret; the caller checks that
//! and proves the same; the host gives a verdict. The secret itself never travels. Every part has a fixed length and a time
//! limit, so a stranger can send what it likes.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::TcpStream,
    sync::Arc,
    time::Instant,
};

use sha2::{Digest, Sha256};

const MAGIC: [u8; 8] = *b"longhaul";
/// Raised with every change of what ranks send each other, here, in frames or in the collectives.
const VERSION: u32 = 1;
const NONCE_BYTES: usize = 16;
const PROOF_BYTES: usize = 32;
const HELLO_BYTES: usize = 8 + 4 + 4 + 4 + 2 + NONCE_BYTES;
const ANSWER_BYTES: usize = 8 + 4 + 4 + NONCE_BYTES + PROOF_BYTES;

type Nonce = [u8; NONCE_BYTES];
type Proof = [u8; PROOF_BYTES];

/// What an end knows of itself and of its world.
#[derive(Clone)]
pub(super) struct Identity {
    pub(super) token: Arc<str>,
    pub(super) rank: u32,
    pub(super) n_ranks: u32,
    /// Where this end listens for others.
    pub(super) port: u16,
}

/// A caller that has proved itself.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) socket: TcpStream,
    pub(super) rank: u32,
    pub(super) n_ranks: u32,
    pub(super) port: u16,
}

/// Why there is no connection.
#[derive(Debug)]
pub(super) enum Failure {
    /// The other end is not there, not yet or not any more: another try may help.
    Gone(io::Error),
    /// The two ends will never agree.
    Refused(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Gone(error)
    }
}

/// What the host makes of a caller that has proved itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Welcome,
    /// The host's number of ranks, which is another.
    OtherWorld(u32),
    /// There is no such rank here to be.
    NoSuchRank,
    /// Another has taken the rank.
    Taken,
}

impl Verdict {
    fn code(self) -> (u8, u32) {
        match self {
            Self::Welcome => (0, 0),
            Self::OtherWorld(n_ranks) => (1, n_ranks),
            Self::NoSuchRank => (2, 0),
            Self::Taken => (3, 0),
        }
    }

    fn of(code: u8, detail: u32) -> Option<Self> {
        [Self::Welcome, Self::OtherWorld(detail), Self::NoSuchRank, Self::Taken]
            .into_iter()
            .find(|verdict| verdict.code() == (code, detail))
    }
}

/// Calls on rank `host` over a fresh connection; returns once that one has agreed.
pub(super) fn call(socket: &TcpStream, own: &Identity, host: u32, deadline: Instant) -> Result<(), Failure> {
    let mut nonce = Nonce::default();
    getrandom::fill(&mut nonce).map_err(io::Error::other)?;
    let mut hello = Vec::with_capacity(HELLO_BYTES);
    hello.extend(MAGIC);
    for number in [VERSION, own.rank, own.n_ranks] {
        hello.extend(number.to_le_bytes());
    }
    hello.extend(own.port.to_le_bytes());
    hello.extend(nonce);
    write_by(socket, &hello, deadline)?;

    let answer: [u8; ANSWER_BYTES] = read_by(socket, deadline)?;
    let (magic, rest) = answer.split_first_chunk::<8>().expect("fixed length");
    let (version, rest) = number(rest);
    let (rank, rest) = number(rest);
    let (host_nonce, proof) = rest.split_at(NONCE_BYTES);
    if *magic != MAGIC {
        return Err(Failure::Refused("what listens there is no rank of Longhaul: check address and port".into()));
    }
    if version != VERSION {
        let versions = format!("it speaks version {version} of the protocol between ranks, this rank {VERSION}");
        return Err(Failure::Refused(format!("{versions}: start every rank from the same build")));
    }
    if proof != prove(&own.token, b"host", &hello, host_nonce) {
        return Err(Failure::Refused("it has another token: give every rank the same".into()));
    }
    if rank != host {
        return Err(Failure::Refused(format!("rank {rank} listens where rank {host} should")));
    }
    write_by(socket, &prove(&own.token, b"caller", &hello, host_nonce), deadline)?;

    let [code, detail @ ..] = read_by::<5>(socket, deadline)?;
    match Verdict::of(code, u32::from_le_bytes(detail)) {
        Some(Verdict::Welcome) => Ok(()),
        Some(Verdict::OtherWorld(theirs)) => Err(Failure::Refused(format!(
            "it counts {theirs} ranks, this rank {}: start every rank with the same number of ranks",
            own.n_ranks
        ))),
        Some(Verdict::NoSuchRank) => {
            Err(Failure::Refused(format!("it waits for no rank {}: number the ranks from 0", own.rank)))
        }
        Some(Verdict::Taken) => {
            Err(Failure::Refused(format!("another process is rank {} already: give each its own rank", own.rank)))
        }
        None => Err(Failure::Refused("its verdict makes no sense".into())),
    }
}

/// Answers a caller on a fresh connection until it has proved itself; the verdict is still owed. An error says what the
/// caller did wrong.
pub(super) fn answer(socket: TcpStream, own: &Identity, deadline: Instant) -> Result<Guest, String> {
    let silent = |error: io::Error| match error.kind() {
        ErrorKind::UnexpectedEof => "hung up before it had proved that it knows the token".to_owned(),
        _ => format!("did not prove that it knows the token: {error}"),
    };
    let hello: [u8; HELLO_BYTES] = read_by(&socket, deadline).map_err(silent)?;
    let (magic, rest) = hello.split_first_chunk::<8>().expect("fixed length");
    let (version, rest) = number(rest);
    let (rank, rest) = number(rest);
    let (n_ranks, rest) = number(rest);
    let port = u16::from_le_bytes([rest[0], rest[1]]);
    if *magic != MAGIC {
        return Err("is no rank of Longhaul".into());
    }
    let mut nonce = Nonce::default();
    getrandom::fill(&mut nonce).map_err(|error| error.to_string())?;
    let mut reply = Vec::with_capacity(ANSWER_BYTES);
    reply.extend(MAGIC);
    reply.extend(VERSION.to_le_bytes());
    reply.extend(own.rank.to_le_bytes());
    reply.extend(nonce);
    reply.extend(prove(&own.token, b"host", &hello, &nonce));
    write_by(&socket, &reply, deadline).map_err(silent)?;
    if version != VERSION {
        return Err(format!("speaks version {version} of the protocol between ranks, this rank {VERSION}"));
    }
    let proof: Proof = read_by(&socket, deadline).map_err(silent)?;
    // Both nonces are fresh, so what the time of a comparison may tell is of no use in another try.
    if proof != prove(&own.token, b"caller", &hello, &nonce) {
        return Err("has another token".into());
    }
    Ok(Guest { socket, rank, n_ranks, port })
}

/// Tells a guest the verdict.
pub(super) fn conclude(socket: &TcpStream, verdict: Verdict, deadline: Instant) -> io::Result<()> {
    let (code, detail) = verdict.code();
    let [a, b, c, d] = detail.to_le_bytes();
    write_by(socket, &[code, a, b, c, d], deadline)
}

/// Shows knowledge of the token for one side of one handshake.
fn prove(token: &str, side: &[u8], hello: &[u8], host_nonce: &[u8]) -> Proof {
    let mut digest = Sha256::new();
    digest.update(Sha256::digest(token));
    digest.update(Sha256::digest(side));
    digest.update(hello);
    digest.update(host_nonce);
    digest.finalize().into()
}

fn number(bytes: &[u8]) -> (u32, &[u8]) {
    let (number, rest) = bytes.split_first_chunk().expect("fixed length");
    (u32::from_le_bytes(*number), rest)
}

/// Reads exactly `N` bytes before the deadline, however slowly they come.
pub(super) fn read_by<const N: usize>(mut socket: &TcpStream, deadline: Instant) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        socket.set_read_timeout(Some(rest(deadline)?))?;
        match socket.read(&mut bytes[filled..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => filled += n,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(ErrorKind::TimedOut.into()),
            Err(error) => return Err(error),
        }
    }
    Ok(bytes)
}

/// Writes bytes that fit a socket's buffer.
pub(super) fn write_by(mut socket: &TcpStream, bytes: &[u8], deadline: Instant) -> io::Result<()> {
    socket.set_write_timeout(Some(rest(deadline)?))?;
    socket.write_all(bytes)
}

/// Time until the deadline; an error when there is none left.
pub(super) fn rest(deadline: Instant) -> io::Result<std::time::Duration> {
    let rest = deadline.saturating_duration_since(Instant::now());
    if rest.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(rest) }
}
