//! The transport between processes, here between threads with real sockets: collectives, large messages, leaving.

use std::{
    net::TcpListener,
    thread,
    time::{Duration, Instant},
};

use longhaul::engine::{
    Result,
    backend::{ALIGNMENT, Backend, DType, Tensor, cpu::Cpu},
    comm::{
        Comm, HostComm,
        rendezvous::{self, Meeting},
        tcp::{Heartbeat, Tcp},
    },
};

use super::{NO_HANG, collectives, lost, on_threads, within};

/// A free port of this host, bound.
pub fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

pub fn meeting(address: &str, rank: usize, n_ranks: usize) -> Meeting {
    Meeting {
        address: address.into(),
        token: "the secret of this test".into(),
        rank,
        n_ranks,
        patience: Duration::from_mins(1),
        heartbeat: Heartbeat::default(),
    }
}

/// A meeting in which each rank may change what it brings; what comes of it, by rank.
pub fn met(n: usize, change: impl Fn(&mut Meeting) + Send + Sync + 'static) -> Vec<Result<HostComm<Tcp>>> {
    within(NO_HANG, move || {
        let (listener, address) = listener();
        let mut listener = Some(listener);
        thread::scope(|scope| {
            let ranks: Vec<_> = (0..n)
                .map(|rank| {
                    let mut meeting = meeting(&address, rank, n);
                    change(&mut meeting);
                    let listener = listener.take_if(|_| rank == 0);
                    scope.spawn(move || match listener {
                        Some(listener) => rendezvous::receive(listener, &meeting),
                        None => rendezvous::meet(&meeting),
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    })
}

/// A world of `n` ranks, all on this host.
pub fn world(n: usize) -> Vec<HostComm<Tcp>> {
    met(n, |_| ()).into_iter().map(|end| end.unwrap()).collect()
}

#[test]
fn every_collective_is_its_definition() {
    for n in [1, 2, 3, 4, 8] {
        on_threads(world(n), collectives::body);
    }
}

#[test]
fn sockets_and_threads_give_the_same_bits() {
    let threads = on_threads(longhaul::engine::comm::threads::group(4), collectives::body);
    assert_eq!(on_threads(world(4), collectives::body), threads);
    assert_eq!(on_threads(world(4), collectives::body), threads);
}

#[test]
fn large_exchanges_get_through() {
    const BYTES: u64 = 64 << 20;
    on_threads(world(2), |mut comm| {
        let mut b = Cpu::<f32>::new(1).unwrap();
        b.reserve(4 * BYTES, ALIGNMENT).unwrap();
        let place = |i: u64| Tensor::device(i * BYTES, DType::F32, 1, BYTES / 4);
        let (from, to) = ([place(0), place(1)], [place(2), place(3)]);
        for (i, tensor) in from.into_iter().enumerate() {
            b.fill(tensor, (10 * comm.rank() + i) as f64).unwrap();
        }
        comm.all_to_all(&mut b, &to, &from).unwrap();
        let mut bytes = vec![0; BYTES as usize];
        for (peer, tensor) in to.into_iter().enumerate() {
            b.download(tensor, &mut bytes).unwrap();
            let expected = ((10 * peer + comm.rank()) as f32).to_le_bytes();
            assert!(bytes.chunks_exact(4).all(|element| element == expected), "from {peer}");
        }
    });
}

#[test]
fn a_rank_that_gives_up_is_named_with_its_cause() {
    let seen = on_threads(world(4), |mut comm| {
        if comm.rank() == 2 {
            comm.abort("failed: the disk is full".into());
            return None;
        }
        Some(lost(comm.all_reduce_counts(&mut [1])))
    });
    let told: Vec<_> = seen.into_iter().flatten().collect();
    assert_eq!(told.len(), 3);
    for (rank, message) in told {
        assert_eq!(rank, 2);
        assert!(message.starts_with("rank 2") && message.contains(" failed: the disk is full;"), "{message}");
    }
}

#[test]
fn leaving_when_all_is_done_takes_nothing_from_the_others() {
    for _ in 0..5 {
        on_threads(world(3), |mut comm| {
            let mut b = Cpu::<f32>::new(1).unwrap();
            b.reserve(1 << 20, 0).unwrap();
            Comm::all_reduce(&mut comm, &mut b, Tensor::device(0, DType::F32, 1, 1 << 18)).unwrap();
            Comm::barrier(&mut comm, &mut b).unwrap();
        });
    }
}

#[test]
fn leaving_waits_for_nobody_who_stays() {
    let mut ends = world(2);
    let start = Instant::now();
    ends.pop();
    assert!(start.elapsed() < Heartbeat::default().patience, "rank 1 waited for rank 0");
    let (rank, message) = lost(ends[0].all_reduce_counts(&mut [1]));
    assert_eq!(rank, 1);
    assert!(message.starts_with("rank 1 at 127.0.0.1:") && message.contains("ended before"), "{message}");
}

#[test]
fn a_rank_that_panics_is_named_by_the_others() {
    let ranks: Vec<_> = world(3)
        .into_iter()
        .map(|mut comm| {
            thread::spawn(move || {
                if comm.rank() == 1 {
                    std::panic::resume_unwind(Box::new("as planned"));
                }
                lost(comm.all_reduce_counts(&mut [1]))
            })
        })
        .collect();
    let seen = within(NO_HANG, move || ranks.into_iter().filter_map(|rank| rank.join().ok()).collect::<Vec<_>>());
    assert_eq!(seen.len(), 2);
    assert!(seen.iter().all(|(rank, message)| *rank == 1 && message.contains("panicked")), "{seen:?}");
}
