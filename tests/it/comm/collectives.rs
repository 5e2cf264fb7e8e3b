//! The body that every transport passes: each collective against its definition over what all ranks put in, in sizes that
//! divide nothing, some of them zero.
//!
//! Every rank can compute what any rank puts in, so each checks its own results alone.

use half::bf16;
use longhaul::engine::{
    backend::{ALIGNMENT, Backend, DType, Space, Tensor, cpu::Cpu},
    comm::{Comm, HostComm, Transport},
};

use crate::support::model::{Random, read_bytes};

const ARENA_BYTES: u64 = 1 << 20;

/// A rank's backend, with a hand that gives out tensors.
struct Bench<B> {
    b: B,
    end: u64,
}

impl<B: Backend> Bench<B> {
    fn new(mut b: B) -> Self {
        b.reserve(ARENA_BYTES, ARENA_BYTES).unwrap();
        for space in [Space::Device, Space::Host] {
            b.fill(Tensor { space, ..Tensor::device(0, DType::F32, 1, ARENA_BYTES / 4) }, f64::NAN).unwrap();
        }
        Self { b, end: 0 }
    }

    /// Poison.
    fn empty(&mut self, dtype: DType, elements: u64) -> Tensor {
        let tensor = Tensor::device(self.end, dtype, 1, elements);
        self.end = (self.end + tensor.bytes()).next_multiple_of(ALIGNMENT);
        tensor
    }

    fn holding(&mut self, dtype: DType, bytes: &[u8]) -> Tensor {
        let tensor = self.empty(dtype, bytes.len() as u64 / dtype.bytes());
        self.set(tensor, bytes);
        tensor
    }

    fn set(&mut self, tensor: Tensor, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.b.upload(tensor, bytes).unwrap();
        }
    }

    fn bytes(&mut self, tensor: Tensor) -> Vec<u8> {
        if tensor.elements() == 0 { Vec::new() } else { read_bytes(&mut self.b, tensor) }
    }
}

/// What a rank puts in: random floats or bytes that depend on rank and subject only.
fn input(dtype: DType, elements: u64, rank: usize, subject: u64) -> Vec<u8> {
    let mut random = Random(0x9e37_79b9 * (rank as u64 + 1) + 0x1234_5677 * (subject + 1));
    let mut element = || {
        let value = random.signed() * [1e-3, 1.0, 1e3][(random.next() % 3) as usize];
        match dtype {
            DType::F32 => (value as f32).to_le_bytes().to_vec(),
            DType::F64 => value.to_le_bytes().to_vec(),
            DType::Bf16 => bf16::from_f64(value).to_le_bytes().to_vec(),
            DType::I32 => (random.next() as i32).to_le_bytes().to_vec(),
            DType::U16 => (random.next() as u16).to_le_bytes().to_vec(),
        }
    };
    (0..elements).flat_map(|_| element()).collect()
}

/// The sum over ranks by its definition, element by element, in the order of ranks.
fn sum(dtype: DType, inputs: &[Vec<u8>]) -> Vec<u8> {
    let size = dtype.bytes() as usize;
    let n = inputs[0].len() / size;
    let element = |i: usize| {
        let parts = inputs.iter().map(|input| &input[i * size..(i + 1) * size]);
        match dtype {
            DType::F32 => parts
                .map(|p| f32::from_le_bytes(p.try_into().unwrap()))
                .reduce(|a, b| a + b)
                .unwrap()
                .to_le_bytes()
                .to_vec(),
            DType::F64 => parts
                .map(|p| f64::from_le_bytes(p.try_into().unwrap()))
                .reduce(|a, b| a + b)
                .unwrap()
                .to_le_bytes()
                .to_vec(),
            DType::Bf16 => {
                let wide = parts.map(|p| bf16::from_le_bytes(p.try_into().unwrap()).to_f32()).reduce(|a, b| a + b);
                bf16::from_f32(wide.unwrap()).to_le_bytes().to_vec()
            }
            other => panic!("{other:?} has no sum"),
        }
    };
    (0..n).flat_map(element).collect()
}

/// Elements that rank `from` sends to rank `to`: none, one, and sizes that divide nothing.
fn piece(from: usize, to: usize) -> u64 {
    [0, 1, 129, 37, 1003, 0, 64][(3 * from + 5 * to) % 7]
}

const FLOATS: [DType; 3] = [DType::F32, DType::F64, DType::Bf16];
const ALL: [DType; 5] = [DType::F32, DType::F64, DType::Bf16, DType::I32, DType::U16];
const SIZES: [u64; 4] = [0, 1, 37, 1003];

/// Every collective of a world of host transports, and of groups of it.
pub fn body<T: Transport>(comm: HostComm<T>) -> Vec<u8> {
    body_on(Cpu::<f32>::new(1).unwrap(), comm)
}

/// Every collective of a world and of groups of it. Answers every byte received, for comparing ranks and runs.
pub fn body_on<B: Backend, C: Comm<B>>(b: B, mut comm: C) -> Vec<u8> {
    let bench = &mut Bench::new(b);
    let mut received = every(bench, &mut comm, 0);
    let (rank, n) = (comm.rank(), comm.n_ranks());
    // Rows and columns of a grid two wide, each ranked backwards in one of them.
    let mut row = comm.split(rank as u64 / 2, rank as u64).unwrap();
    let mut column = comm.split(rank as u64 % 2, u64::MAX - rank as u64).unwrap();
    assert_eq!((row.rank(), row.n_ranks()), (rank % 2, if rank == n - 1 { rank % 2 + 1 } else { 2 }));
    assert_eq!(column.rank(), (n - 1 - rank) / 2);
    received.extend(every(bench, &mut row, 1000 * (rank as u64 / 2 + 1)));
    received.extend(every(bench, &mut column, 9000 * (rank as u64 % 2 + 1)));
    received.extend(every(bench, &mut comm, 7));
    received
}

fn every<B: Backend, C: Comm<B>>(bench: &mut Bench<B>, comm: &mut C, subject: u64) -> Vec<u8> {
    let mut received = Vec::new();
    for (i, dtype) in ALL.into_iter().enumerate() {
        let subject = subject + 100 * i as u64;
        received.extend(exchanges(bench, comm, dtype, subject));
        received.extend(gathers(bench, comm, dtype, subject));
        received.extend(broadcasts(bench, comm, dtype, subject));
        if FLOATS.contains(&dtype) {
            received.extend(sums(bench, comm, dtype, subject));
        }
        bench.end = 0;
    }
    counts(comm);
    comm.barrier(&mut bench.b).unwrap();
    comm.check().unwrap();
    received
}

fn exchanges<B: Backend, C: Comm<B>>(bench: &mut Bench<B>, comm: &mut C, dtype: DType, subject: u64) -> Vec<u8> {
    let (rank, n) = (comm.rank(), comm.n_ranks());
    let sent = |from: usize, to: usize| input(dtype, piece(from, to), from * n + to, subject);
    let from: Vec<Tensor> = (0..n).map(|to| bench.holding(dtype, &sent(rank, to))).collect();
    let to: Vec<Tensor> = (0..n).map(|from| bench.empty(dtype, piece(from, rank))).collect();
    comm.all_to_all(&mut bench.b, &to, &from).unwrap();
    let mut received = Vec::new();
    for (peer, to) in to.iter().enumerate() {
        let bytes = bench.bytes(*to);
        assert_eq!(bytes, sent(peer, rank), "from {peer} to {rank} of {n}, {dtype:?}");
        received.extend(bytes);
    }
    // A rank's own piece may stay where it is; pieces may lie in host memory.
    let host = |peer: usize| Tensor { space: Space::Host, ..to[peer] };
    let to: Vec<Tensor> = (0..n).map(|peer| if peer == rank { from[rank] } else { host(peer) }).collect();
    comm.all_to_all(&mut bench.b, &to, &from).unwrap();
    for (peer, to) in to.iter().enumerate() {
        assert_eq!(bench.bytes(*to), sent(peer, rank));
    }
    received
}

fn gathers<B: Backend, C: Comm<B>>(bench: &mut Bench<B>, comm: &mut C, dtype: DType, subject: u64) -> Vec<u8> {
    let (rank, n) = (comm.rank(), comm.n_ranks());
    let mut received = Vec::new();
    for elements in SIZES {
        let given = |rank| input(dtype, elements, rank, subject + 1);
        let expected: Vec<u8> = (0..n).flat_map(given).collect();
        let (from, to) = (bench.holding(dtype, &given(rank)), bench.empty(dtype, n as u64 * elements));
        comm.all_gather(&mut bench.b, to, from).unwrap();
        assert_eq!(bench.bytes(to), expected, "{elements} {dtype:?}");
        let in_place = bench.empty(dtype, n as u64 * elements);
        let own = in_place.part(rank as u64 * elements, elements);
        bench.set(own, &given(rank));
        comm.all_gather(&mut bench.b, in_place, own).unwrap();
        assert_eq!(bench.bytes(in_place), expected, "{elements} {dtype:?} in place");
        received.extend(expected);
    }
    received
}

fn sums<B: Backend, C: Comm<B>>(bench: &mut Bench<B>, comm: &mut C, dtype: DType, subject: u64) -> Vec<u8> {
    let (rank, n) = (comm.rank(), comm.n_ranks());
    let mut received = Vec::new();
    for elements in SIZES {
        let given: Vec<Vec<u8>> = (0..n).map(|rank| input(dtype, n as u64 * elements, rank, subject + 2)).collect();
        let expected = sum(dtype, &given);
        let part = expected.len() / n * rank..expected.len() / n * (rank + 1);
        let (from, to) = (bench.holding(dtype, &given[rank]), bench.empty(dtype, elements));
        comm.reduce_scatter(&mut bench.b, to, from).unwrap();
        assert_eq!(bench.bytes(to), expected[part.clone()], "{elements} {dtype:?}");
        assert_eq!(bench.bytes(from), given[rank], "an input is left alone");
        let own = from.part(rank as u64 * elements, elements);
        comm.reduce_scatter(&mut bench.b, own, from).unwrap();
        assert_eq!(bench.bytes(own), expected[part], "{elements} {dtype:?} in place");

        let given: Vec<Vec<u8>> = (0..n).map(|rank| input(dtype, elements, rank, subject + 3)).collect();
        let x = bench.holding(dtype, &given[rank]);
        comm.all_reduce(&mut bench.b, x).unwrap();
        let bytes = bench.bytes(x);
        assert_eq!(bytes, sum(dtype, &given), "{elements} {dtype:?}");
        received.extend(bytes);
    }
    received
}

fn broadcasts<B: Backend, C: Comm<B>>(bench: &mut Bench<B>, comm: &mut C, dtype: DType, subject: u64) -> Vec<u8> {
    let (rank, n) = (comm.rank(), comm.n_ranks());
    let mut received = Vec::new();
    for root in 0..n {
        let elements = SIZES[root % SIZES.len()];
        let x = bench.holding(dtype, &input(dtype, elements, rank, subject + 4));
        comm.broadcast(&mut bench.b, x, root).unwrap();
        let bytes = bench.bytes(x);
        assert_eq!(bytes, input(dtype, elements, root, subject + 4));
        received.extend(bytes);
    }
    received
}

fn counts<B: Backend, C: Comm<B>>(comm: &mut C) {
    let (rank, n) = (comm.rank() as u64, comm.n_ranks() as u64);
    let mut counts = [1, rank, 1 << 40, 0];
    comm.all_reduce_counts(&mut counts).unwrap();
    assert_eq!(counts, [n, n * (n - 1) / 2, n << 40, 0]);
    comm.all_reduce_counts(&mut []).unwrap();
}
