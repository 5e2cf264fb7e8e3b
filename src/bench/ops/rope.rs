//! Rotary positions: errors at awkward shapes of heads, bytes a second at those of an 8B model.

use serde_json::json;

use super::{Report, twin::Twins};
use crate::engine::{
    Result,
    backend::{Backend, DType, Heads},
};

/// Rounding one result to bf16 costs up to 2^-9 of it, 0.0017 in the root mean square.
const BOUND: f64 = 3e-3;
/// Angles are f64 on both sides, rounded once.
const TABLE_BOUND: f64 = 1e-7;

/// Frequencies of a head of `d` elements, base 500,000.
fn frequencies(d: u64) -> Vec<f64> {
    (0..d / 2).map(|j| 500_000f64.powf(-2.0 * j as f64 / d as f64)).collect()
}

/// (rows, query heads, kv heads, head size).
pub(super) fn check(t: &mut Twins, report: &mut Report) -> Result {
    for (c, n_heads, n_kv_heads, head_dim) in
        [(1, 1, 1, 2), (7, 3, 1, 6), (65, 8, 8, 80), (130, 4, 2, 128), (33, 32, 8, 64), (9, 2, 1, 256), (300, 5, 5, 34)]
    {
        one(t, report, c, Heads { n_heads, n_kv_heads, head_dim })?;
    }
    Ok(())
}

fn one(t: &mut Twins, report: &mut Report, c: u64, heads: Heads) -> Result {
    t.clear();
    let Heads { n_heads: nq, n_kv_heads: nk, head_dim: d } = heads;
    let shape = json!({ "rows": c, "heads": [nq, nk], "d": d });
    // Positions up to two million, where an angle in f32 would be wrong in every digit.
    let positions: Vec<i32> = (0..c).map(|i| (i * 999_983 % 2_000_003) as i32).collect();
    let (positions, table) = (t.integers(&positions)?, t.output(DType::F32, c, d)?);
    t.cpu.rope_table(table.cpu, positions.cpu, &frequencies(d))?;
    t.gpu.rope_table(table.gpu, positions.gpu, &frequencies(d))?;
    report.errors("rope_table", &shape, &[("table", t.error(table)?)], TABLE_BOUND)?;
    for (case, with_q, with_kv) in [("q, k, v", true, true), ("q", true, false), ("k, v", false, true)] {
        let (q_cols, kv_cols) = (if with_q { nq * d } else { 0 }, if with_kv { nk * d } else { 0 });
        let qkv = t.storage(c, q_cols + 2 * kv_cols, 0.0, 1.0)?;
        let [q, k, v] =
            [t.output(DType::Bf16, c, nq * d)?, t.output(DType::Bf16, c, nk * d)?, t.output(DType::Bf16, c, nk * d)?];
        let (cpu_q, cpu_kv) = (with_q.then_some(q.cpu), with_kv.then_some((k.cpu, v.cpu)));
        t.cpu.rope_split(cpu_q, cpu_kv, qkv.cpu, table.cpu, heads)?;
        let (gpu_q, gpu_kv) = (with_q.then_some(q.gpu), with_kv.then_some((k.gpu, v.gpu)));
        t.gpu.rope_split(gpu_q, gpu_kv, qkv.gpu, table.gpu, heads)?;
        let mut errors = Vec::new();
        for (name, written, twin) in [("q", with_q, q), ("k", with_kv, k), ("v", with_kv, v)] {
            if written {
                errors.push((name, t.error(twin)?));
            }
        }
        report.errors(&format!("rope_split of {case}"), &shape, &errors, BOUND)?;
    }
    let (dq, dk, dv) = (t.storage(c, nq * d, 0.0, 1.0)?, t.wide(c, nk * d)?, t.wide(c, nk * d)?);
    let dqkv = t.output(DType::Bf16, c, (nq + 2 * nk) * d)?;
    t.cpu.rope_merge_backward(dqkv.cpu, dq.cpu, dk.cpu, dv.cpu, table.cpu, heads)?;
    t.gpu.rope_merge_backward(dqkv.gpu, dq.gpu, dk.gpu, dv.gpu, table.gpu, heads)?;
    report.errors("rope_merge_backward", &shape, &[("dqkv", t.error(dqkv)?)], BOUND)
}

/// 131,072 rows of an 8B model.
pub(super) fn measure(t: &mut Twins, report: &mut Report) -> Result {
    t.clear();
    let (c, nq, nk, d) = (131_072, 32, 8, 128);
    let heads = Heads { n_heads: nq, n_kv_heads: nk, head_dim: d };
    let (qkv, q) = (t.noise_on_gpu(c, (nq + 2 * nk) * d)?, t.gpu_only(DType::Bf16, c, nq * d));
    let (k, v) = (t.gpu_only(DType::Bf16, c, nk * d), t.gpu_only(DType::Bf16, c, nk * d));
    let (dk, dv) = (t.gpu_only(DType::F32, c, nk * d), t.gpu_only(DType::F32, c, nk * d));
    let positions: Vec<i32> = (0..c as i32).collect();
    let (positions, table) = (t.integers(&positions)?.gpu, t.gpu_only(DType::F32, c, d));
    let angles = frequencies(d);
    report.speed(t, "rope_table [131072, 128]", table.bytes(), |gpu| gpu.rope_table(table, positions, &angles))?;
    let bytes = 2 * qkv.bytes() + table.bytes();
    report.speed(t, "rope_split [131072, 32 and 8 heads of 128]", bytes, |gpu| {
        gpu.rope_split(Some(q), Some((k, v)), qkv, table, heads)
    })?;
    for (wide, stored) in [(dk, k), (dv, v)] {
        t.gpu.cast(wide, stored)?;
    }
    let bytes = qkv.bytes() + q.bytes() + dk.bytes() + dv.bytes() + table.bytes();
    report.speed(t, "rope_merge_backward [131072, 32 and 8 heads of 128]", bytes, |gpu| {
        gpu.rope_merge_backward(qkv, q, dk, dv, table, heads)
    })
}
