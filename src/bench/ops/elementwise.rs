//! Fills, casts, sums and squares over flat arrays: bit by bit at awkward sizes and places, bytes a second on large ones.

use serde_json::json;

use super::{Report, twin::Twins};
use crate::engine::{
    Result,
    backend::{Backend, DType},
};

/// Sums of squares end in f32, and begin in f32 for at most 32 elements.
const SUM_BOUND: f64 = 1e-6;
/// (first element, elements): one, fewer than a vector, vectors with a rest, more than a turn of all blocks; on the boundary
/// of a vector and off it.
pub(super) const PARTS: [(u64, u64); 8] =
    [(0, 1), (4, 3), (0, 4), (8, 1021), (1, 1024), (3, 70_001), (16, 5_000_003), (2, 4_400_000)];
/// Elements behind a part, which no operation may touch.
pub(super) const BEHIND: u64 = 9;
const BOTH: [DType; 2] = [DType::F32, DType::Bf16];

/// Every operation in every combination of types.
pub(super) fn check(t: &mut Twins, report: &mut Report) -> Result {
    for part in PARTS {
        for dtype in [DType::F32, DType::Bf16, DType::I32, DType::U16] {
            for value in [0.0, 3.0, 257.0] {
                fill(t, report, part, dtype, value)?;
            }
        }
        for to in BOTH {
            for from in BOTH {
                cast_and_accumulate(t, report, part, (to, from))?;
            }
            sum_squares(t, report, part, to)?;
        }
    }
    Ok(())
}

fn fill(t: &mut Twins, report: &mut Report, (first, n): (u64, u64), dtype: DType, value: f64) -> Result {
    t.clear();
    let whole = t.same_output(dtype, 1, first + n + BEHIND)?;
    let part = whole.part(first, n);
    t.same.fill(part.cpu, value)?;
    t.gpu.fill(part.gpu, value)?;
    let shape = json!({ "first": first, "n": n, "type": format!("{dtype:?}"), "value": value });
    report.errors("fill", &shape, &[("x", t.differing(whole)?)], 0.0)
}

fn cast_and_accumulate(
    t: &mut Twins,
    report: &mut Report,
    (first, n): (u64, u64),
    (to_type, from_type): (DType, DType),
) -> Result {
    t.clear();
    let length = first + n + BEHIND;
    let shape = json!({ "first": first, "n": n, "types": format!("{to_type:?} {from_type:?}") });
    let from = t.same_noise(from_type, 1, length)?.part(first, n);
    if to_type != from_type {
        let whole = t.same_output(to_type, 1, length)?;
        let to = whole.part(first, n);
        t.same.cast(to.cpu, from.cpu)?;
        t.gpu.cast(to.gpu, from.gpu)?;
        report.errors("cast", &shape, &[("to", t.differing(whole)?)], 0.0)?;
    }
    let whole = t.same_noise(to_type, 1, length)?;
    let to = whole.part(first, n);
    t.same.accumulate(to.cpu, from.cpu)?;
    t.gpu.accumulate(to.gpu, from.gpu)?;
    report.errors("accumulate", &shape, &[("to", t.differing(whole)?)], 0.0)
}

fn sum_squares(t: &mut Twins, report: &mut Report, (first, n): (u64, u64), dtype: DType) -> Result {
    t.clear();
    let length = first + n + BEHIND;
    let whole = if dtype == DType::F32 { t.wide(1, length)? } else { t.storage(1, length, 0.1, 2.0)? };
    let (x, sum, again) = (whole.part(first, n), t.wide(1, 1)?, t.output(DType::F32, 1, 1)?);
    t.cpu.fill(sum.cpu, 0.25)?;
    t.gpu.fill(sum.gpu, 0.25)?;
    t.cpu.sum_squares(sum.cpu, x.cpu)?;
    t.gpu.sum_squares(sum.gpu, x.gpu)?;
    let shape = json!({ "first": first, "n": n, "type": format!("{dtype:?}") });
    report.errors("sum_squares", &shape, &[("sum", t.error(sum)?)], SUM_BOUND)?;
    for max_norm in [0.0, 1.0, 1e9] {
        let scale = t.output(DType::F32, 1, 1)?;
        t.cpu.clip_scale(scale.cpu, sum.cpu, max_norm)?;
        t.gpu.clip_scale(scale.gpu, sum.gpu, max_norm)?;
        let shape = json!({ "n": n, "max_norm": max_norm });
        report.errors("clip_scale", &shape, &[("scale", t.error(scale)?)], SUM_BOUND)?;
    }
    // The same sum again, on the GPU against itself: no bit may move.
    t.gpu.fill(again.gpu, 0.25)?;
    t.gpu.sum_squares(again.gpu, x.gpu)?;
    let mut bytes = [[0u8; 4]; 2];
    t.gpu.device.download(sum.gpu, &mut bytes[0])?;
    t.gpu.device.download(again.gpu, &mut bytes[1])?;
    let moved = if bytes[0] == bytes[1] { 0.0 } else { 1.0 };
    report.errors("sum_squares again", &shape, &[("sum", moved)], 0.0)
}

/// 512M elements.
pub(super) fn measure(t: &mut Twins, report: &mut Report) -> Result {
    t.clear();
    let (rows, cols) = (1 << 14, 1 << 15);
    let (stored, wide) = (t.noise_on_gpu(rows, cols)?, t.gpu_only(DType::F32, rows, cols));
    let (other, sum) = (t.gpu_only(DType::Bf16, rows, cols), t.wide(1, 1)?.gpu);
    let n = stored.elements();
    report.speed(t, "cast to f32 of 512M", 6 * n, |gpu| gpu.cast(wide, stored))?;
    report.speed(t, "cast to bf16 of 512M", 6 * n, |gpu| gpu.cast(other, wide))?;
    report.speed(t, "accumulate f32 += bf16 of 512M", 10 * n, |gpu| gpu.accumulate(wide, stored))?;
    report.speed(t, "accumulate bf16 += bf16 of 512M", 6 * n, |gpu| gpu.accumulate(other, stored))?;
    report.speed(t, "sum_squares of 512M f32", 4 * n, |gpu| gpu.sum_squares(sum, wide))?;
    report.speed(t, "sum_squares of 512M bf16", 2 * n, |gpu| gpu.sum_squares(sum, stored))?;
    report.speed(t, "fill 512M f32 with 1", 4 * n, |gpu| gpu.fill(wide, 1.0))
}
