//! Embedding, RMSNorm and SwiGLU: forward against the formula, backward against slopes.

use longhaul::engine::backend::{Backend, cpu::Cpu};

use super::{Bench, assert_close, bench_f64, dot, minus};

#[test]
fn embedding_looks_up_and_adds_back() {
    let (vocab, h) = (11, 7);
    let ids = [3, 0, 3, 10, 3, 0];
    let mut bench = bench_f64(3);
    let (table, ids_at, x) = (bench.input(vocab, h), bench.indices(&ids), bench.output(6, h));
    bench.b.embedding(x, ids_at, table).unwrap();
    let rows = bench.get(table);
    let expected: Vec<f64> = ids.iter().flat_map(|id| rows[*id as usize * 7..][..7].to_vec()).collect();
    assert_eq!(bench.get(x), expected);

    let weights = bench.weights(6 * h);
    let (dx, dtable) = (bench.output(6, h), bench.sum(vocab, h));
    bench.set(dx, &weights);
    let before = bench.get(dtable);
    let slopes = bench.slopes(table, |bench| {
        bench.b.embedding(x, ids_at, table).unwrap();
        dot(&bench.get(x), &weights)
    });
    bench.b.embedding_backward(dtable, ids_at, dx).unwrap();
    assert_close("dtable", &minus(&bench.get(dtable), &before), &slopes, 1e-9);
}

#[test]
fn rmsnorm_and_its_backward() {
    // Across the 16 lanes of a row and the 64 rows of a block; an epsilon that shows.
    for (n, h, eps) in [(1, 1, 1e-5), (3, 19, 1e-2), (5, 32, 1e-6), (67, 5, 0.1)] {
        let mut bench = bench_f64(4);
        let (x, w, y) = (bench.input(n, h), bench.input(1, h), bench.output(n, h));
        bench.b.rmsnorm(y, x, w, eps).unwrap();
        let gains = bench.get(w);
        let row = |x: &[f64]| {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / h as f64;
            x.iter().zip(&gains).map(|(x, w)| x / (mean + eps).sqrt() * w).collect::<Vec<_>>()
        };
        let expected: Vec<f64> = bench.get(x).chunks(h as usize).flat_map(row).collect();
        assert_close("y", &bench.get(y), &expected, 1e-13);

        let weights = bench.weights(n * h);
        let dy = bench.output(n, h);
        bench.set(dy, &weights);
        let (dx, dw) = (bench.input(n, h), bench.sum(1, h));
        let (dx_before, dw_before) = (bench.get(dx), bench.get(dw));
        let loss = |bench: &mut Bench<Cpu<f64>>| {
            bench.b.rmsnorm(y, x, w, eps).unwrap();
            dot(&bench.get(y), &weights)
        };
        let (x_slopes, w_slopes) = (bench.slopes(x, loss), bench.slopes(w, loss));
        bench.b.rmsnorm_backward(dx, dw, dy, x, w, eps).unwrap();
        // A one-element row of a small epsilon is a step function: its slope is steep beside zero.
        assert_close(&format!("dx of {n} x {h}"), &minus(&bench.get(dx), &dx_before), &x_slopes, 1e-6);
        assert_close(&format!("dw of {n} x {h}"), &minus(&bench.get(dw), &dw_before), &w_slopes, 1e-7);
    }
}

#[test]
fn swiglu_and_its_backward() {
    for (n, f) in [(1, 1), (5, 3), (2, 37)] {
        let mut bench = bench_f64(5);
        let (gate_up, act) = (bench.input(n, 2 * f), bench.output(n, f));
        // Gates of both signs, some large.
        let wide: Vec<f64> = bench.get(gate_up).iter().map(|x| x * 6.0).collect();
        bench.set(gate_up, &wide);
        bench.b.swiglu(act, gate_up).unwrap();
        let row = |row: &[f64]| {
            let (gate, up) = row.split_at(f as usize);
            gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect::<Vec<_>>()
        };
        let expected: Vec<f64> = wide.chunks(2 * f as usize).flat_map(row).collect();
        assert_close("act", &bench.get(act), &expected, 1e-13);

        let weights = bench.weights(n * f);
        let dact = bench.output(n, f);
        bench.set(dact, &weights);
        let slopes = bench.slopes(gate_up, |bench| {
            bench.b.swiglu(act, gate_up).unwrap();
            dot(&bench.get(act), &weights)
        });
        bench.b.swiglu_backward(gate_up, dact).unwrap();
        assert_close("gradient of gate and up", &bench.get(gate_up), &slopes, 1e-8);
    }
}
