//! Rotary positions: the table against f64 trigonometry, the split against complex products, the merge against slopes.

use longhaul::engine::backend::{Backend, Heads, cpu::Cpu};

use super::{Bench, assert_close, bench_f64, dot};

const HEADS: Heads = Heads { n_heads: 3, n_kv_heads: 1, head_dim: 6 };
const FREQUENCIES: [f64; 3] = [1.0, 0.031, 0.000_7];
const POSITIONS: [i32; 5] = [0, 1, 77, 0, 1_999_999];

#[test]
fn angles_stay_exact_at_millions_of_tokens() {
    let mut bench = Bench::new(Cpu::<f32>::new(1).unwrap(), 8);
    let positions = bench.indices(&POSITIONS);
    let table = bench.sum(5, 6);
    bench.b.rope_table(table, positions, &FREQUENCIES).unwrap();
    let row = |p: &i32| {
        let angles = FREQUENCIES.map(|f| f64::from(*p) * f);
        angles.map(f64::cos).into_iter().chain(angles.map(f64::sin)).collect::<Vec<_>>()
    };
    let expected: Vec<f64> = POSITIONS.iter().flat_map(row).collect();
    assert_close("table", &bench.get(table), &expected, 1e-7);
}

/// Rotates pairs (j, j + d/2) of every head, as complex numbers.
fn rotated(row: &[f64], position: i32) -> Vec<f64> {
    let mut out = row.to_vec();
    for head in out.chunks_mut(6) {
        for j in 0..3 {
            let (sin, cos) = (f64::from(position) * FREQUENCIES[j]).sin_cos();
            let (re, im) = (head[j], head[j + 3]);
            (head[j], head[j + 3]) = (re * cos - im * sin, re * sin + im * cos);
        }
    }
    out
}

#[test]
fn the_split_rotates_queries_and_keys() {
    let mut bench = bench_f64(9);
    let positions = bench.indices(&POSITIONS);
    let (qkv, table) = (bench.input(5, 30), bench.sum(5, 6));
    bench.b.rope_table(table, positions, &FREQUENCIES).unwrap();
    let (q, k, v) = (bench.output(5, 18), bench.output(5, 6), bench.output(5, 6));
    bench.b.rope_split(Some(q), Some((k, v)), qkv, table, HEADS).unwrap();
    let all = bench.get(qkv);
    let rows = || all.chunks(30).zip(POSITIONS);
    let expected_q: Vec<f64> = rows().flat_map(|(row, p)| rotated(&row[..18], p)).collect();
    let expected_k: Vec<f64> = rows().flat_map(|(row, p)| rotated(&row[18..24], p)).collect();
    let expected_v: Vec<f64> = rows().flat_map(|(row, _)| row[24..].to_vec()).collect();
    assert_close("q", &bench.get(q), &expected_q, 1e-12);
    assert_close("k", &bench.get(k), &expected_k, 1e-12);
    assert_eq!(bench.get(v), expected_v);

    // Each half alone, from a narrower projection.
    let (q_alone, kv_alone) = (bench.output(5, 18), bench.output(5, 12));
    let take = |from: usize, to: usize| all.chunks(30).flat_map(|row| row[from..to].to_vec()).collect::<Vec<f64>>();
    bench.set(q_alone, &take(0, 18));
    bench.set(kv_alone, &take(18, 30));
    let (q2, k2, v2) = (bench.output(5, 18), bench.output(5, 6), bench.output(5, 6));
    bench.b.rope_split(Some(q2), None, q_alone, table, HEADS).unwrap();
    bench.b.rope_split(None, Some((k2, v2)), kv_alone, table, HEADS).unwrap();
    for (alone, whole) in [(q2, q), (k2, k), (v2, v)] {
        assert_eq!(bench.get(alone), bench.get(whole));
    }
}

#[test]
fn the_merge_is_the_slope_of_the_split() {
    let mut bench = bench_f64(10);
    let positions = bench.indices(&POSITIONS);
    let (qkv, table) = (bench.input(5, 30), bench.sum(5, 6));
    bench.b.rope_table(table, positions, &FREQUENCIES).unwrap();
    let (q, k, v) = (bench.output(5, 18), bench.output(5, 6), bench.output(5, 6));
    let (dq, dk, dv) = (bench.input(5, 18), bench.sum(5, 6), bench.sum(5, 6));
    let (wq, wk, wv) = (bench.get(dq), bench.get(dk), bench.get(dv));
    let slopes = bench.slopes(qkv, |bench| {
        bench.b.rope_split(Some(q), Some((k, v)), qkv, table, HEADS).unwrap();
        dot(&bench.get(q), &wq) + dot(&bench.get(k), &wk) + dot(&bench.get(v), &wv)
    });
    let dqkv = bench.output(5, 30);
    bench.b.rope_merge_backward(dqkv, dq, dk, dv, table, HEADS).unwrap();
    assert_close("dqkv", &bench.get(dqkv), &slopes, 1e-8);
}
