//! What travels on a connection between two ranks that have met: a kind, a length, and so many bytes.

use std::{
    io::{self, ErrorKind, Read, Write},
    sync::Arc,
};

use super::transport::Message;

#[derive(Debug)]
pub(super) enum Frame {
    Message(Message),
    /// Sent when there is nothing else to send.
    Heartbeat,
    /// The last frame of a rank that goes in good order.
    Leave,
    /// The sender knows a rank to be lost.
    Lost {
        rank: u32,
        cause: String,
    },
}

const MESSAGE: u8 = 0;
const HEARTBEAT: u8 = 1;
const LEAVE: u8 = 2;
const LOST: u8 = 3;
const HEADER_BYTES: usize = 9;
/// Longest message: more than the host memory of a large machine can be meant by nobody.
pub(super) const MOST_MESSAGE_BYTES: u64 = 1 << 40;
/// Longest cause of a loss.
const MOST_CAUSE_BYTES: usize = 1 << 10;
/// Memory taken on the word of a header alone. For more, the bytes must come.
const TRUSTED_BYTES: u64 = 64 << 20;

/// Writes a frame; the caller flushes.
pub(super) fn write(to: &mut impl Write, frame: &Frame) -> io::Result<()> {
    match frame {
        Frame::Message(bytes) => {
            write_header(to, MESSAGE, bytes.len())?;
            to.write_all(bytes)
        }
        Frame::Heartbeat => write_header(to, HEARTBEAT, 0),
        Frame::Leave => write_header(to, LEAVE, 0),
        Frame::Lost { rank, cause } => {
            let cause = &cause.as_bytes()[..cause.floor_char_boundary(MOST_CAUSE_BYTES)];
            write_header(to, LOST, 4 + cause.len())?;
            to.write_all(&rank.to_le_bytes())?;
            to.write_all(cause)
        }
    }
}

fn write_header(to: &mut impl Write, kind: u8, bytes: usize) -> io::Result<()> {
    to.write_all(&[kind])?;
    to.write_all(&(bytes as u64).to_le_bytes())
}

/// The next frame. A connection that ends is [`ErrorKind::UnexpectedEof`], one that breaks the protocol is
/// [`ErrorKind::InvalidData`].
pub(super) fn read(from: &mut impl Read) -> io::Result<Frame> {
    let mut header = [0; HEADER_BYTES];
    from.read_exact(&mut header)?;
    let bytes = u64::from_le_bytes(header[1..].try_into().expect("8 bytes"));
    match (header[0], bytes) {
        (MESSAGE, 0..=MOST_MESSAGE_BYTES) => Ok(Frame::Message(Arc::new(body(from, bytes)?))),
        (HEARTBEAT, 0) => Ok(Frame::Heartbeat),
        (LEAVE, 0) => Ok(Frame::Leave),
        (LOST, 4..) if bytes <= (4 + MOST_CAUSE_BYTES) as u64 => {
            let body = body(from, bytes)?;
            let (rank, cause) = body.split_first_chunk().expect("at least 4 bytes");
            let cause = String::from_utf8_lossy(cause).chars().filter(|c| !c.is_control()).collect();
            Ok(Frame::Lost { rank: u32::from_le_bytes(*rank), cause })
        }
        (kind, bytes) => {
            Err(io::Error::new(ErrorKind::InvalidData, format!("a frame of kind {kind} and {bytes} bytes")))
        }
    }
}

fn body(from: &mut impl Read, bytes: u64) -> io::Result<Vec<u8>> {
    let mut body = Vec::with_capacity(bytes.min(TRUSTED_BYTES) as usize);
    from.take(bytes).read_to_end(&mut body)?;
    if (body.len() as u64) < bytes { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(body) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_they_were_written() {
        let mut bytes = Vec::new();
        for frame in [
            Frame::Message(Arc::new(vec![1, 2, 3])),
            Frame::Heartbeat,
            Frame::Lost { rank: 7, cause: "ä".repeat(MOST_CAUSE_BYTES) },
            Frame::Message(Arc::default()),
            Frame::Leave,
        ] {
            write(&mut bytes, &frame).expect("memory");
        }
        let from = &mut bytes.as_slice();
        assert!(matches!(read(from), Ok(Frame::Message(m)) if *m == [1, 2, 3]));
        assert!(matches!(read(from), Ok(Frame::Heartbeat)));
        assert!(matches!(read(from), Ok(Frame::Lost { rank: 7, cause }) if cause.len() == MOST_CAUSE_BYTES));
        assert!(matches!(read(from), Ok(Frame::Message(m)) if m.is_empty()));
        assert!(matches!(read(from), Ok(Frame::Leave)));
        assert_eq!(read(from).expect_err("the end").kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn lengths_from_the_wire_are_not_believed() {
        let header = |kind: u8, bytes: u64| [&[kind][..], &bytes.to_le_bytes()].concat();
        for (kind, bytes) in [(MESSAGE, u64::MAX), (HEARTBEAT, 1), (LEAVE, 1), (LOST, 3), (LOST, 1 << 20), (9, 0)] {
            let error = read(&mut header(kind, bytes).as_slice()).expect_err("nonsense");
            assert_eq!(error.kind(), ErrorKind::InvalidData, "{kind} {bytes}");
        }
        let error = read(&mut header(MESSAGE, MOST_MESSAGE_BYTES).as_slice()).expect_err("nothing follows");
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }
}
