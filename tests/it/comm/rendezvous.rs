//! How ranks meet, and what they are told when they do not.

use std::{
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::Duration,
};

use longhaul::engine::{
    Error, Result,
    comm::{
        HostComm,
        rendezvous::{self, Meeting},
        tcp::Tcp,
    },
};

use super::{
    NO_HANG, collectives, on_threads,
    tcp::{listener, meeting, met},
    within,
};

/// Long enough for ranks that come, short where one does not.
const SOON: Duration = Duration::from_secs(2);

/// What a rank that did not meet the others is told.
fn told(met: Result<HostComm<Tcp>>) -> String {
    match met {
        Err(error @ Error::Rendezvous(_)) => error.to_string(),
        Err(error) => panic!("another error: {error}"),
        Ok(end) => panic!("rank {} met the others", end.rank()),
    }
}

fn contains(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "no \"{part}\" in: {message}");
    }
}

#[test]
fn a_wrong_token_is_refused_at_once() {
    let mut met = met(2, |meeting| {
        meeting.patience = SOON;
        if meeting.rank == 1 {
            meeting.token = "a guess".into();
        }
    });
    contains(&told(met.pop().unwrap()), &["rank 0 at 127.0.0.1:", "another token", "give every rank the same"]);
    contains(&told(met.pop().unwrap()), &["rank 1 of 2 did not come", "last turned away: 127.0.0.1:", "token"]);
}

#[test]
fn a_wrong_number_of_ranks_is_refused_at_once() {
    let mut met = met(2, |meeting| {
        meeting.patience = SOON;
        meeting.n_ranks += 3 * meeting.rank;
    });
    contains(&told(met.pop().unwrap()), &["it counts 2 ranks, this rank 5", "same number of ranks"]);
    contains(&told(met.pop().unwrap()), &["rank 1 of 2 did not come", "rank 1 of 5"]);
}

#[test]
fn a_rank_that_is_taken_is_refused_at_once() {
    let mut met = met(3, |meeting| {
        meeting.patience = SOON;
        meeting.rank = meeting.rank.min(1);
    });
    let messages = [told(met.pop().unwrap()), told(met.pop().unwrap())];
    let refused = messages.iter().find(|message| message.contains("another process is rank 1")).expect("a refusal");
    contains(refused, &["give each its own rank"]);
    let waiting = messages.iter().find(|message| *message != refused).expect("the rank that was first");
    contains(waiting, &["rank 0 at 127.0.0.1:", "see its log"]);
    contains(&told(met.pop().unwrap()), &["rank 2 of 3 did not come", "rank 1 of 3"]);
}

#[test]
fn a_rank_that_does_not_come_is_named_at_the_deadline() {
    let message = within(NO_HANG, || {
        let (listener, address) = listener();
        let meeting = Meeting { patience: Duration::from_millis(300), ..meeting(&address, 0, 3) };
        told(rendezvous::receive(listener, &meeting))
    });
    contains(&message, &["rank 1, 2 of 3 did not come to rank 0 within 300ms", "same address, token"]);
}

#[test]
fn an_address_where_nobody_listens_is_named_at_the_deadline() {
    let message = within(NO_HANG, || {
        let (listener, address) = listener();
        drop(listener);
        told(rendezvous::meet(&Meeting { patience: Duration::from_millis(300), ..meeting(&address, 1, 2) }))
    });
    contains(&message, &["rank 0 was not to be reached at 127.0.0.1:", "in time", "same address"]);
}

#[test]
fn an_address_that_is_taken_is_said_at_once() {
    let (_listener, address) = listener();
    contains(&told(rendezvous::meet(&meeting(&address, 0, 2))), &["cannot listen at 127.0.0.1:", "a free port"]);
}

#[test]
fn something_else_that_listens_is_recognised() {
    let message = within(NO_HANG, || {
        let (listener, address) = listener();
        thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            socket.write_all(&[b'x'; 200]).unwrap();
            socket.read_to_end(&mut Vec::new())
        });
        told(rendezvous::meet(&meeting(&address, 1, 2)))
    });
    contains(&message, &["no rank of Longhaul", "check address and port"]);
}

#[test]
fn settings_that_cannot_be_are_refused() {
    let refused = |change: fn(&mut Meeting)| {
        let mut meeting = meeting("127.0.0.1:1", 0, 2);
        change(&mut meeting);
        told(rendezvous::meet(&meeting))
    };
    contains(&refused(|m| m.n_ranks = 0), &["between 1 and 4096 ranks, not 0"]);
    contains(&refused(|m| m.n_ranks = 1 << 20), &["between 1 and 4096 ranks"]);
    contains(&refused(|m| m.rank = 2), &["no rank 2 among 2", "from 0"]);
    contains(&refused(|m| m.heartbeat.patience = m.heartbeat.interval), &["less than two heartbeats"]);
}

/// What strangers say to a port they found: nothing, noise, the language of the web, and half or false greetings.
fn strangers() -> Vec<Vec<u8>> {
    let greeting = |version: u32| {
        let numbers = [version, 1, 2].map(u32::to_le_bytes).concat();
        [&b"longhaul"[..], &numbers, &[0; 18]].concat()
    };
    vec![
        Vec::new(),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        vec![0xff; 1 << 20],
        greeting(1)[..20].to_vec(),
        greeting(1),
        greeting(99),
        [greeting(1), vec![7; 1 << 16]].concat(),
    ]
}

#[test]
fn strangers_do_not_disturb() {
    let (listener, address) = listener();
    let stay: Vec<TcpStream> = strangers()
        .into_iter()
        .chain(strangers())
        .enumerate()
        .map(|(i, words)| {
            let mut socket = TcpStream::connect(&address).unwrap();
            socket.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
            // Whether anyone listens to the end is not the point; half of them hang up.
            let _ = socket.write_all(&words);
            if i % 2 == 0 {
                let _ = socket.shutdown(std::net::Shutdown::Both);
            }
            socket
        })
        .collect();
    let ends = within(NO_HANG, move || {
        let joined = {
            let address = address.clone();
            thread::spawn(move || rendezvous::meet(&meeting(&address, 1, 2)).unwrap())
        };
        let first = rendezvous::receive(listener, &meeting(&address, 0, 2)).unwrap();
        vec![first, joined.join().unwrap()]
    });
    on_threads(ends, collectives::body);
    drop(stay);
}

#[test]
fn a_stranger_of_another_version_is_told_of_at_the_deadline() {
    let message = within(NO_HANG, || {
        let (listener, address) = listener();
        let mut socket = TcpStream::connect(&address).unwrap();
        socket.write_all(&strangers()[5]).unwrap();
        told(rendezvous::receive(listener, &Meeting { patience: SOON, ..meeting(&address, 0, 2) }))
    });
    contains(&message, &["speaks version 99"]);
}
