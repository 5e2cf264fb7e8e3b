//! The three products: forward against a triple loop, both backwards against slopes of the forward.

use longhaul::engine::backend::{Backend, cpu::Cpu};

use super::{Bench, assert_close, bench_f64, dot, minus};

/// (m, n, k): ones, primes, and sizes across the band and register blocks of a GEMM.
const SIZES: [(u64, u64, u64); 4] = [(1, 1, 1), (3, 7, 5), (37, 13, 9), (70, 3, 17)];

#[test]
fn forward_is_the_triple_loop() {
    for (m, n, k) in SIZES {
        for beta in [0.0, 1.0] {
            let mut bench = bench_f64(1);
            let (x, w, y) = (bench.input(m, k), bench.input(n, k), bench.output(m, n));
            let old = if beta == 0.0 { vec![0.0; (m * n) as usize] } else { bench.weights(m * n) };
            if beta != 0.0 {
                bench.set(y, &old);
            }
            bench.b.matmul(y, x, w, beta).unwrap();
            let (xs, ws) = (bench.get(x), bench.get(w));
            let k = k as usize;
            let product = xs.chunks(k).flat_map(|x| ws.chunks(k).map(move |w| dot(x, w)));
            let expected: Vec<f64> = product.zip(old).map(|(p, old)| p + old).collect();
            assert_close(&format!("{m} x {n} x {k}, beta {beta}"), &bench.get(y), &expected, 1e-13);
        }
    }
}

#[test]
fn dx_and_dw_are_slopes() {
    for (m, n, k) in SIZES {
        let mut bench = bench_f64(2);
        let (x, w, y) = (bench.input(m, k), bench.input(n, k), bench.output(m, n));
        let weights = bench.weights(m * n);
        let dy = bench.output(m, n);
        bench.set(dy, &weights);
        let (dx, dw) = (bench.input(m, k), bench.sum(n, k));
        let (dx_before, dw_before) = (bench.get(dx), bench.get(dw));
        let loss = |bench: &mut Bench<Cpu<f64>>| {
            bench.b.matmul(y, x, w, 0.0).unwrap();
            dot(&bench.get(y), &weights)
        };
        let (x_slopes, w_slopes) = (bench.slopes(x, loss), bench.slopes(w, loss));
        bench.b.matmul_dx(dx, dy, w, 1.0).unwrap();
        assert_close("dx added", &minus(&bench.get(dx), &dx_before), &x_slopes, 1e-8);
        bench.b.matmul_dx(dx, dy, w, 0.0).unwrap();
        assert_close("dx written", &bench.get(dx), &x_slopes, 1e-8);
        bench.b.matmul_dw(dw, dy, x).unwrap();
        assert_close("dw", &minus(&bench.get(dw), &dw_before), &w_slopes, 1e-8);
    }
}
