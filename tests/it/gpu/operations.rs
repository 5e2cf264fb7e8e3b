//! Every operation on a GPU: the bits of a second run are those of the first, but for the backward of attention; the numbers are
//! those of the CPU backend.

use longhaul::{
    bench::ops,
    engine::backend::{DType, cpu::Cpu},
};
use serde_json::json;

use super::{Gpu, figures};
use crate::{
    operations::repeat::{EVEN, ODD, Output, Shapes, Which, outputs},
    support::model::relative_error,
};

/// Results in storage type: two roundings apart, and gradients of keys written in bf16 before they are added.
const STORED: f64 = 1e-2;
/// Results in f32: products of bf16 summed in another order. Scattered sums of a few numbers are exact.
const WIDE: f64 = 1e-4;
/// Rounded as IEEE 754 says, operation by operation, on both sides.
const SAME_BITS: [&str; 7] = ["fill", "cast", "accumulate", "copy_columns", "add_columns", "adamw", "embedding"];
/// The only operation that a library adds up in no fixed order.
const UNORDERED: &str = "attention_backward";

fn run(gpu: &mut Gpu, shapes: Shapes, which: Which) -> Vec<Output> {
    let cuda = gpu.cuda.take().unwrap();
    let (mut cuda, written) = outputs(cuda, shapes, which);
    cuda.device.release().unwrap();
    gpu.cuda = Some(cuda);
    written
}

fn first_word(name: &str) -> &str {
    name.split(' ').next().unwrap()
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gpu_operations_repeat_themselves_bit_for_bit() {
    let mut gpu = Gpu::open();
    figures("operations", gpu.card());
    for (what, shapes) in [("even", EVEN), ("odd", ODD)] {
        let first = run(&mut gpu, shapes, Which::All);
        let mut spread = Vec::new();
        for _ in 0..3 {
            for (a, b) in first.iter().zip(run(&mut gpu, shapes, Which::All)) {
                if first_word(a.operation) == UNORDERED {
                    spread.push((a.operation, relative_error(&b.values(), &a.values())));
                } else {
                    assert!(a.bytes == b.bytes, "{what}: {} wrote other bits the second time", a.operation);
                }
            }
        }
        assert!(spread.iter().all(|(_, error)| *error <= STORED), "{what}: {spread:?}");
        figures("operations", json!({ "shapes": what, "repeated": first.len(), "attention_backward_spread": spread }));
    }
}

/// Without any kernel of a library, so that a sanitizer need not be told which kernels to watch.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gpu_kernels_of_our_own_repeat_themselves() {
    let mut gpu = Gpu::open();
    for shapes in [EVEN, ODD] {
        let (first, second) = (run(&mut gpu, shapes, Which::Own), run(&mut gpu, shapes, Which::Own));
        for (a, b) in first.iter().zip(second) {
            assert!(a.bytes == b.bytes && a.values().iter().all(|x| x.is_finite()), "{}", a.operation);
        }
    }
}

/// The copies and sums around the library's attention, which no operation does alone, against plain loops.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gpu_copies_of_packed_attention_are_right() {
    let _gpu = Gpu::open();
    let args = ops::Args {
        device: "cuda".to_owned(),
        libraries: Vec::new(),
        memory: 1,
        keys: 0,
        only: Some("packed".to_owned()),
        check_only: true,
        threads: None,
    };
    let mut out = Vec::new();
    ops::run(&args, &mut out).unwrap();
    let lines = String::from_utf8(out).unwrap();
    let checks = lines.lines().filter(|line| line.contains("\"check\"")).count();
    assert!(checks > 12, "{lines}");
    figures("operations", json!({ "checks_of_packed_copies": checks }));
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gpu_operations_compute_what_the_cpu_does() {
    let mut gpu = Gpu::open();
    for (what, shapes) in [("even", EVEN), ("odd", ODD)] {
        let (_, reference) = outputs(Cpu::<half::bf16>::new(8).unwrap(), shapes, Which::All);
        let mut errors = Vec::new();
        for (ours, theirs) in run(&mut gpu, shapes, Which::All).iter().zip(&reference) {
            let name = ours.operation;
            let error = relative_error(&ours.values(), &theirs.values());
            errors.push((name, error));
            let narrow = ours.dtype == DType::Bf16 || first_word(name) == UNORDERED;
            assert!(error <= if narrow { STORED } else { WIDE }, "{what}: {name} differs by {error}");
            if SAME_BITS.contains(&first_word(name)) {
                assert!(ours.bytes == theirs.bytes, "{what}: {name} has other bits than the CPU's");
            }
        }
        errors.sort_by(|a, b| b.1.total_cmp(&a.1));
        errors.truncate(8);
        figures("operations", json!({ "shapes": what, "compared": reference.len(), "largest_errors": errors }));
    }
}
