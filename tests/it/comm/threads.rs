//! The transport between threads, and one rank alone.

use std::{convert::Infallible, panic, thread};

use longhaul::engine::{
    Error,
    backend::{Backend, DType, Tensor, cpu::Cpu},
    comm::{Alone, Comm, HostComm, threads},
};

use super::{NO_HANG, collectives, lost, on_threads, within};

#[test]
fn every_collective_is_its_definition() {
    for n in [1, 2, 3, 4, 8] {
        on_threads(threads::group(n), collectives::body);
    }
}

#[test]
fn a_second_run_gives_the_same_bits() {
    let run = || on_threads(threads::group(3), collectives::body);
    assert_eq!(run(), run());
}

fn cpu() -> Cpu<f32> {
    let mut cpu = Cpu::new(1).unwrap();
    cpu.reserve(4096, 4096).unwrap();
    cpu
}

#[test]
fn alone_an_exchange_is_a_copy_or_nothing() {
    let mut b = cpu();
    let (x, y) = (Tensor::device(0, DType::F32, 3, 7), Tensor::device(256, DType::F32, 3, 7));
    b.fill(x, 2.0).unwrap();
    for copy in [
        (|b: &mut Cpu<f32>, y, x| Alone.all_to_all(b, &[y], &[x])) as fn(&mut Cpu<f32>, Tensor, Tensor) -> _,
        |b, y, x| Alone.all_gather(b, y, x),
        |b, y, x| Alone.reduce_scatter(b, y, x),
    ] {
        b.fill(y, 0.0).unwrap();
        copy(&mut b, y, x).unwrap();
        let mut bytes = vec![0; 84];
        b.download(y, &mut bytes).unwrap();
        assert_eq!(bytes, [2.0f32.to_le_bytes(); 21].concat());
        copy(&mut b, x, x).unwrap();
    }
    Alone.all_reduce(&mut b, x).unwrap();
    Alone.broadcast(&mut b, x, 0).unwrap();
    Alone.barrier(&mut b).unwrap();
}

/// Collectives of the world and of pairs of neighbours until one fails.
fn until_it_fails(comm: &mut HostComm<threads::Threads>) -> Result<Infallible, Error> {
    let (mut b, x) = (cpu(), Tensor::device(0, DType::F32, 3, 7));
    comm.all_reduce(&mut b, x)?;
    let mut pair = comm.split(comm.rank() as u64 / 2, 0)?;
    loop {
        pair.all_reduce(&mut b, x)?;
    }
}

/// Rank 2 of four ends so while the others work, rank 3 with it and the rest with each other; what each of them sees.
fn without_rank_2(ending: fn(HostComm<threads::Threads>)) -> Vec<(usize, String)> {
    let rank = move |mut comm: HostComm<threads::Threads>| {
        if comm.rank() == 2 {
            Comm::all_reduce(&mut comm, &mut cpu(), Tensor::device(0, DType::F32, 3, 7)).unwrap();
            comm.split(1, 0).unwrap();
            ending(comm);
            return None;
        }
        let first = lost(until_it_fails(&mut comm));
        assert_eq!(lost(Comm::barrier(&mut comm, &mut cpu())), first, "a later call");
        assert_eq!(lost(comm.split(0, 0)), first, "a later call");
        Some(first)
    };
    let ends = threads::group(4);
    within(NO_HANG, move || {
        let ranks: Vec<_> = ends.into_iter().map(|end| thread::spawn(move || rank(end))).collect();
        ranks.into_iter().filter_map(|rank| rank.join().ok().flatten()).collect()
    })
}

#[test]
fn a_rank_that_panics_is_named_by_the_others() {
    let seen = without_rank_2(|_comm| panic::resume_unwind(Box::new("as planned")));
    assert_eq!(seen.len(), 3);
    for (rank, message) in seen {
        assert_eq!(rank, 2);
        assert!(message.starts_with("rank 2 panicked"), "{message}");
        assert!(message.contains("from the last checkpoint"), "no way out: {message}");
    }
}

#[test]
fn a_rank_that_ends_early_is_named_by_the_others() {
    let seen = without_rank_2(drop);
    assert_eq!(seen.len(), 3);
    for (rank, message) in seen {
        assert_eq!(rank, 2);
        assert!(message.starts_with("rank 2 ended before"), "{message}");
    }
}

#[test]
fn a_rank_that_gives_up_is_named_with_its_cause() {
    let seen = without_rank_2(|comm| comm.abort("failed: the disk is full".into()));
    assert_eq!(seen.len(), 3);
    for (rank, message) in seen {
        assert_eq!(rank, 2);
        assert!(message.starts_with("rank 2 failed: the disk is full;"), "{message}");
    }
}

#[test]
fn leaving_when_all_is_done_takes_nothing_from_the_others() {
    for _ in 0..50 {
        on_threads(threads::group(3), |mut comm| Comm::barrier(&mut comm, &mut cpu()).unwrap());
    }
}

#[test]
fn ranks_that_disagree_on_sizes_are_told() {
    let seen = on_threads(threads::group(2), |mut comm| {
        let x = Tensor::device(0, DType::F32, 1, 4 + comm.rank() as u64 * 2);
        lost(comm.all_gather(&mut cpu(), x.shaped(1, x.elements() / 2 * 2), x.part(0, x.elements() / 2)))
    });
    assert!(seen.iter().any(|(_, message)| message.contains("bytes where")), "{seen:?}");
}
