//! Each operation of the backend against its definition: finite differences in f64 where it has a derivative, an
//! independent plain formula where it has none. Sizes that divide nothing.

mod attention;
mod cross_entropy;
mod elementwise;
mod layers;
mod matmul;
mod optimizer;
pub mod repeat;
mod rope;

use longhaul::engine::backend::{ALIGNMENT, Backend, DType, Tensor, cpu::Cpu};

use crate::support::model::{Random, read, write};

/// A backend with an arena of a few megabytes, poisoned, and a hand that gives out tensors from it.
struct Bench<B> {
    b: B,
    end: u64,
    random: Random,
}

const ARENA_BYTES: u64 = 4 << 20;
/// Half the distance of a central difference: its error is of the order of the square, rounding's of 1e-16 over it.
const STEP: f64 = 1e-5;

fn bench_f64(seed: u64) -> Bench<Cpu<f64>> {
    Bench::new(Cpu::new(2).unwrap(), seed)
}

impl<B: Backend> Bench<B> {
    fn new(b: B, seed: u64) -> Self {
        Self::sized(b, seed, ARENA_BYTES)
    }

    fn sized(mut b: B, seed: u64, bytes: u64) -> Self {
        b.reserve(bytes, bytes).unwrap();
        b.upload(Tensor::device(0, DType::U16, 1, bytes / 2), &vec![0xff; bytes as usize]).unwrap();
        Self { b, end: 0, random: Random(seed) }
    }

    fn empty(&mut self, dtype: DType, rows: u64, cols: u64) -> Tensor {
        let tensor = Tensor::device(self.end, dtype, rows, cols);
        self.end = (self.end + tensor.bytes()).next_multiple_of(ALIGNMENT);
        tensor
    }

    /// Storage elements, still poison.
    fn output(&mut self, rows: u64, cols: u64) -> Tensor {
        let dtype = self.b.storage();
        self.empty(dtype, rows, cols)
    }

    /// Random storage elements in -1..1.
    fn input(&mut self, rows: u64, cols: u64) -> Tensor {
        let tensor = self.output(rows, cols);
        self.scatter(tensor);
        tensor
    }

    /// Random wide elements in -1..1: the sum that an operation adds to.
    fn sum(&mut self, rows: u64, cols: u64) -> Tensor {
        let dtype = self.b.wide();
        let tensor = self.empty(dtype, rows, cols);
        self.scatter(tensor);
        tensor
    }

    fn indices(&mut self, values: &[i32]) -> Tensor {
        let tensor = self.empty(DType::I32, values.len() as u64, 1);
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.b.upload(tensor, &bytes).unwrap();
        tensor
    }

    fn scatter(&mut self, tensor: Tensor) {
        let values: Vec<f64> = (0..tensor.elements()).map(|_| self.random.signed()).collect();
        self.set(tensor, &values);
    }

    fn set(&mut self, tensor: Tensor, values: &[f64]) {
        write(&mut self.b, tensor, values);
    }

    fn get(&mut self, tensor: Tensor) -> Vec<f64> {
        read(&mut self.b, tensor)
    }

    /// Random weights of a sum over outputs: its slopes are what a backward is asked for.
    fn weights(&mut self, n: u64) -> Vec<f64> {
        (0..n).map(|_| self.random.signed()).collect()
    }

    /// Slope of `f` along every element of `x`, by central differences; leaves x as it was.
    fn slopes(&mut self, x: Tensor, mut f: impl FnMut(&mut Self) -> f64) -> Vec<f64> {
        let mut values = self.get(x);
        let mut out = Vec::with_capacity(values.len());
        for i in 0..values.len() {
            let original = values[i];
            let mut at = |value: f64| {
                values[i] = value;
                self.set(x, &values);
                f(self)
            };
            let slope = (at(original + STEP) - at(original - STEP)) / (2.0 * STEP);
            at(original);
            out.push(slope);
        }
        out
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn minus(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(x, y)| x - y).collect()
}

/// Every element within `tolerance` of its like, absolute for small ones, relative for large.
fn assert_close(what: &str, ours: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(ours.len(), expected.len(), "{what}: number of elements");
    for (i, (a, b)) in ours.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance * b.abs().max(1.0), "{what}[{i}]: {a} against {b}");
    }
}
