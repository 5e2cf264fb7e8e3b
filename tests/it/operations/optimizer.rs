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

/// Tensors of an update with wide weights and bf16 moments, all zero but g, and a scale of 1.
fn rounded<B: Backend>(bench: &mut Bench<B>, n: u64) -> (OptimizerState, Tensor, Tensor) {
    let (w, m, v) = (bench.sum(1, n), bench.empty(DType::Bf16, 1, n), bench.empty(DType::Bf16, 1, n));
    let (g, scale) = (bench.sum(1, n), bench.sum(1, 1));
    for (tensor, value) in [(w, 0.0), (m, 0.0), (v, 0.0), (scale, 1.0)] {
        bench.b.fill(tensor, value).unwrap();
    }
    (OptimizerState { w, low: None, m, v }, g, scale)
}

#[test]
fn bf16_moments_are_exact_in_the_mean() {
    let n = 100_000;
    let mut bench = Bench::new(Cpu::<f32>::new(2).unwrap(), 42);
    let (state, g, scale) = rounded(&mut bench, n);
    bench.b.fill(g, 0.34).unwrap();
    bench.b.adamw(state, g, scale, &hyper(1)).unwrap();
    // Where the moments fall between their neighbours in bf16: 0.26 and 0.28 of the way up.
    let mut ups = Vec::new();
    for (name, tensor, exact) in [("m", state.m, 0.1 * 0.34), ("v", state.v, 0.03 * 0.34 * 0.34)] {
        let low = bf16::from_bits((f32::to_bits(exact as f32) >> 16) as u16);
        let high = bf16::from_bits(low.to_bits() + 1);
        let (low, high) = (f64::from(low), f64::from(high));
        let values = bench.get(tensor);
        assert!(values.iter().all(|x| [low, high].contains(x)), "{name} is one of its two neighbours");
        let share = values.iter().filter(|x| **x == high).count() as f64 / n as f64;
        let expected = (exact - low) / (high - low);
        // Five standard deviations of a share of n draws.
        assert!((share - expected).abs() < 5.0 * (0.25 / n as f64).sqrt(), "{name}: {share} up, not {expected}");
        ups.push(values.iter().map(|x| *x == high).collect::<Vec<_>>());
    }
    let share = |which: &dyn Fn(usize) -> bool| (0..n as usize).filter(|i| which(*i)).count() as f64 / n as f64;
    let together = share(&|i| ups[0][i] && ups[1][i]);
    let apart = share(&|i| ups[0][i]) * share(&|i| ups[1][i]);
    assert!((together - apart).abs() < 5.0 * (0.25 / n as f64).sqrt(), "m and v draw bits of their own");
    let neighbours = share(&|i| ups[0][i] && ups[0][(i + 1) % n as usize]);
    let apart = share(&|i| ups[0][i]).powi(2);
    assert!((neighbours - apart).abs() < 5.0 * (0.25 / n as f64).sqrt(), "so do neighbouring elements");
}

#[test]
fn rounding_knows_the_element_and_the_step_not_the_cut() {
    let (n, cut) = (5000, 1237);
    let mut bench = Bench::new(Cpu::<f32>::new(2).unwrap(), 43);
    let mut of = |cuts: &[u64], step: u64, seed: u64| {
        bench.end = 0;
        let (state, g, scale) = rounded(&mut bench, n);
        bench.b.fill(g, 0.34).unwrap();
        for range in cuts.windows(2) {
            let part = |flat: Tensor| Tensor {
                offset: flat.offset + range[0] * flat.dtype.bytes(),
                cols: range[1] - range[0],
                ..flat
            };
            let state = OptimizerState { w: part(state.w), low: None, m: part(state.m), v: part(state.v) };
            let hyper = AdamW { first_index: 17 + range[0], seed, ..hyper(step) };
            bench.b.adamw(state, part(g), scale, &hyper).unwrap();
        }
        (bench.get(state.m), bench.get(state.v))
    };
    let whole = of(&[0, n], 1, 5);
    assert_eq!(of(&[0, cut, n], 1, 5), whole);
    // The first moment of a first gradient does not depend on the step: only its rounding does.
    assert_ne!(of(&[0, n], 2, 5).0, whole.0);
    assert_ne!(of(&[0, n], 1, 6).0, whole.0);
}

#[test]
fn neither_infinity_nor_nan_is_rounded_to_a_number() {
    let mut bench = Bench::new(Cpu::<f32>::new(1).unwrap(), 44);
    let (state, g, scale) = rounded(&mut bench, 3);
    bench.set(g, &[f64::INFINITY, f64::NAN, f64::NEG_INFINITY]);
    bench.b.adamw(state, g, scale, &hyper(1)).unwrap();
    let (m, v) = (bench.get(state.m), bench.get(state.v));
    assert_eq!((m[0], m[2], v[0]), (f64::INFINITY, f64::NEG_INFINITY, f64::INFINITY));
    assert!(m[1].is_nan() && v[1].is_nan());
}

#[test]
fn a_gradient_in_storage_type_is_the_same_gradient() {
    let n = 501;
    let update = |storage: bool| {
        let mut bench = Bench::new(Cpu::<bf16>::new(2).unwrap(), 45);
        let (w, low) = (bench.input(1, n), bench.empty(DType::U16, 1, n));
        bench.b.fill(low, 0.0).unwrap();
        let [m, v, wide, scale] = moments(&mut bench, n);
        let stored = bench.input(1, n);
        bench.b.cast(wide, stored).unwrap();
        let g = if storage { stored } else { wide };
        bench.b.adamw(OptimizerState { w, low: Some(low), m, v }, g, scale, &hyper(3)).unwrap();
        (bench.get(w), bench.get(m), bench.get(v))
    };
    assert_eq!(update(true), update(false));
}
