//! Collectives between two GPUs, a process each: the body that every transport passes, and a rank that is killed. Ignored where
//! tests run as a matter of course; `it --ignored nccl` runs them.

use longhaul::engine::{
    Error,
    backend::{Backend, DType, Tensor, cuda::Cuda},
    comm::{Comm, HostComm, nccl::Nccl, tcp::Tcp},
};
use rustix::process::Signal;

use super::{
    collectives::body_on,
    processes::{say, start},
};

pub fn joined(control: HostComm<Tcp>) -> (Cuda, Nccl) {
    let cuda = Cuda::open(control.rank(), &[]).unwrap();
    let nccl = Nccl::new(&cuda, control, &[]).unwrap();
    (cuda, nccl)
}

/// What a rank of the first test does. Two ranks: the sum of two numbers is the same in either order.
pub fn collectives(control: HostComm<Tcp>) {
    let (cuda, nccl) = joined(control);
    let received = body_on(cuda, nccl);
    say(&format!("received {} bytes", received.len()));
}

/// What a rank of the second test does: sums on the GPU until one fails.
pub fn until_lost(control: HostComm<Tcp>) -> Error {
    let (mut cuda, mut nccl) = joined(control);
    cuda.reserve(64 << 20, 0).unwrap();
    let x = Tensor::device(0, DType::F32, 1, 16 << 20);
    let mut sum = |n: usize| {
        if n == 10 {
            say("working");
        }
        nccl.all_reduce(&mut cuda, x)?;
        cuda.synchronize()?;
        Comm::<Cuda>::check(&nccl)
    };
    (0..).find_map(|n| sum(n).err()).expect("a rank is lost before the numbers end")
}

#[test]
#[ignore = "needs two NVIDIA GPUs"]
fn every_collective_is_its_definition() {
    let ranks = start(2, "nccl");
    for rank in &ranks {
        eprintln!("received {}", rank.says("received"));
    }
}

#[test]
#[ignore = "needs two NVIDIA GPUs"]
fn a_killed_process_is_named_by_the_others() {
    let ranks = start(2, "nccl-until-lost");
    ranks.iter().for_each(|rank| drop(rank.says("working")));
    ranks[1].send(Signal::KILL);
    let message = ranks[0].says("lost");
    assert!(message.starts_with("1 rank 1 at 127.0.0.1:") && message.contains("closed its connection"), "{message}");
}
