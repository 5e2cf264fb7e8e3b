//! AdamW against the formula of Loshchilov and Hutter, and the split master of bf16 weights against an unsplit one.

use half::bf16;
use longhaul::engine::backend::{
    AdamW, Backend, DType, OptimizerState, Tensor,
    cpu::{Cpu, adamw},
};

use super::{Bench, assert_close, bench_f64};

fn hyper(step: u64) -> AdamW {
    AdamW {
        learning_rate: 0.02,
        beta1: 0.9,
        beta2: 0.97,
        epsilon: 1e-6,
        weight_decay: 0.3,
        step,
        seed: 5,
        first_index: 17,
    }
}

#[test]
fn updates_are_the_formula() {
    let n = 1013;
    let mut bench = bench_f64(40);
    let (w, m, v) = (bench.input(1, n), bench.sum(1, n), bench.sum(1, n));
    let (g, scale) = (bench.sum(1, n), bench.sum(1, 1));
    bench.b.fill(m, 0.0).unwrap();
    bench.b.fill(v, 0.0).unwrap();
    bench.set(scale, &[0.7]);
    let mut weights = bench.get(w);
    let (mut first, mut second) = (vec![0.0; n as usize], vec![0.0; n as usize]);
    for step in 1..=4 {
        bench.scatter(g);
        let gradients = bench.get(g);
        bench.b.adamw(OptimizerState { w, low: None, m, v }, g, scale, &hyper(step)).unwrap();
        for (i, g) in gradients.iter().map(|g| g * 0.7).enumerate() {
            first[i] = 0.9 * first[i] + 0.1 * g;
            second[i] = 0.97 * second[i] + 0.03 * g * g;
            let m_hat = first[i] / (1.0 - 0.9f64.powf(step as f64));
            let v_hat = second[i] / (1.0 - 0.97f64.powf(step as f64));
            weights[i] -= 0.02 * 0.3 * weights[i];
            weights[i] -= 0.02 * m_hat / (v_hat.sqrt() + 1e-6);
        }
        assert_close(&format!("weights of step {step}"), &bench.get(w), &weights, 1e-13);
    }
    assert_close("first moment", &bench.get(m), &first, 1e-13);
    assert_close("second moment", &bench.get(v), &second, 1e-13);
}

#[test]
fn a_split_master_walks_as_an_f32_one() {
    let n = 777;
    let mut split = Bench::new(Cpu::<bf16>::new(2).unwrap(), 41);
    let mut whole = Bench::new(Cpu::<f32>::new(2).unwrap(), 41);
    let (w, low) = (split.output(1, n), split.empty(DType::U16, 1, n));
    let master = whole.input(1, n);
    let start: Vec<f32> = whole.get(master).iter().map(|v| *v as f32).collect();
    let bytes = |parts: Vec<u16>| parts.into_iter().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    split.b.upload(w, &bytes(start.iter().map(|p| adamw::parts(*p).0.to_bits()).collect())).unwrap();
    split.b.upload(low, &bytes(start.iter().map(|p| adamw::parts(*p).1).collect())).unwrap();
    let ([m, v, g, scale], [m2, v2, g2, scale2]) = (moments(&mut split, n), moments(&mut whole, n));
    for step in 1..=3 {
        let gradients = whole.weights(n);
        split.set(g, &gradients);
        whole.set(g2, &gradients);
        split.b.adamw(OptimizerState { w, low: Some(low), m, v }, g, scale, &hyper(step)).unwrap();
        whole.b.adamw(OptimizerState { w: master, low: None, m: m2, v: v2 }, g2, scale2, &hyper(step)).unwrap();
    }
    let mut halves = vec![0; 2 * n as usize];
    let mut words = |tensor| {
        split.b.download(tensor, &mut halves).unwrap();
        halves.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect::<Vec<_>>()
    };
    let (high, low) = (words(w), words(low));
    for ((high, low), expected) in high.into_iter().zip(low).zip(whole.get(master)) {
        let weight = bf16::from_bits(high);
        assert_eq!(f64::from(adamw::master(weight, low)).to_bits(), expected.to_bits(), "the master, bit for bit");
        let distance = (f64::from(weight) - expected).abs();
        assert!(distance <= expected.abs() / 256.0, "the weight is its master rounded to nearest");
    }
}

/// Zero moments, room for a gradient, and a scale of 0.5.
fn moments<B: Backend>(bench: &mut Bench<B>, n: u64) -> [Tensor; 4] {
    let [m, v, g] = [(); 3].map(|()| bench.sum(1, n));
    let scale = bench.sum(1, 1);
    for (tensor, value) in [(m, 0.0), (v, 0.0), (scale, 0.5)] {
        bench.b.fill(tensor, value).unwrap();
    }
    [m, v, g, scale]
}

#[test]
fn any_f32_is_its_two_halves() {
    let edges = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x3f80_7fff, 0x3f80_8000, 0x3f80_ffff, 0x7f7f_7fff, 0x0080_8000];
    let mut random = crate::support::model::Random(9);
    let others = (0..20_000).map(|_| random.next() as u32).filter(|bits| bits & 0x7f80_0000 < 0x7f00_0000);
    for bits in edges.into_iter().chain(others).flat_map(|bits: u32| [bits, bits | 0x8000_0000]) {
        let (weight, low) = adamw::parts(f32::from_bits(bits));
        assert_eq!(adamw::master(weight, low).to_bits(), bits, "{bits:#x}");
    }
}
