//! AdamW: bit by bit against the CPU, which stores what the GPU stores; bytes a second on 256M parameters.

use serde_json::json;

use super::{
    Report,
    elementwise::{BEHIND, PARTS},
    twin::{Twin, Twins},
};
use crate::engine::{
    Result,
    backend::{AdamW, Backend, DType, OptimizerState, Tensor},
};

/// Updates that a check makes.
const STEPS: u64 = 3;

fn hyper(step: u64) -> AdamW {
    AdamW {
        learning_rate: 3e-3,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step,
        seed: 77,
        first_index: (1 << 33) + 5,
    }
}

/// Whole and split weights, moments and gradients of both types.
pub(super) fn check(t: &mut Twins, report: &mut Report) -> Result {
    for part in PARTS {
        for split in [true, false] {
            for moments in [DType::F32, DType::Bf16] {
                for gradient in [DType::F32, DType::Bf16] {
                    updates(t, report, part, split, moments, gradient)?;
                }
            }
        }
    }
    Ok(())
}

fn updates(
    t: &mut Twins,
    report: &mut Report,
    (first, n): (u64, u64),
    split: bool,
    moments: DType,
    gradient: DType,
) -> Result {
    t.clear();
    let length = first + n + BEHIND;
    let (w, low) = if split {
        let [w, low] = t.same_masters(1, length)?;
        (w, Some(low))
    } else {
        (t.same_noise(DType::F32, 1, length)?, None)
    };
    let [m, v] = [t.same_output(moments, 1, length)?, t.same_output(moments, 1, length)?];
    let scale = t.same(DType::F32, 1, 1, &0.7f32.to_le_bytes())?;
    for zero in [m, v] {
        t.same.fill(zero.cpu, 0.0)?;
        t.gpu.fill(zero.gpu, 0.0)?;
    }
    let side = |of: fn(Twin) -> Tensor| {
        let part = |twin: Twin| of(twin.part(first, n));
        OptimizerState { w: part(w), low: low.map(part), m: part(m), v: part(v) }
    };
    for step in 1..=STEPS {
        let g = t.same_noise(gradient, 1, length)?.part(first, n);
        t.same.adamw(side(|twin| twin.cpu), g.cpu, scale.cpu, &hyper(step))?;
        t.gpu.adamw(side(|twin| twin.gpu), g.gpu, scale.gpu, &hyper(step))?;
    }
    let low = if let Some(low) = low { t.differing(low)? } else { 0.0 };
    let errors = [("w", t.differing(w)?), ("low", low), ("m", t.differing(m)?), ("v", t.differing(v)?)];
    let shape = json!({
        "first": first, "n": n, "split": split,
        "moments": format!("{moments:?}"), "gradient": format!("{gradient:?}"),
    });
    report.errors("adamw", &shape, &errors, 0.0)
}

/// 256M parameters with a split master and f32 gradients.
pub(super) fn measure(t: &mut Twins, report: &mut Report) -> Result {
    for (name, dtype) in [("adamw of 256M, f32 moments", DType::F32), ("adamw of 256M, bf16 moments", DType::Bf16)] {
        t.clear();
        let (rows, cols) = (1, 1 << 28);
        let (w, low) = (t.noise_on_gpu(rows, cols)?, t.gpu_only(DType::U16, rows, cols));
        let (m, v) = (t.gpu_only(dtype, rows, cols), t.gpu_only(dtype, rows, cols));
        let (g, scale) = (t.gpu_only(DType::F32, rows, cols), t.wide(1, 1)?.gpu);
        t.gpu.cast(g, w)?;
        t.gpu.fill(scale, 1.0)?;
        for zero in [low, m, v] {
            t.gpu.fill(zero, 0.0)?;
        }
        // All are read, and all but the gradient written.
        let bytes = g.bytes() + 2 * (w.bytes() + low.bytes() + m.bytes() + v.bytes());
        let state = OptimizerState { w, low: Some(low), m, v };
        report.speed(t, name, bytes, |gpu| gpu.adamw(state, g, scale, &hyper(4)))?;
    }
    Ok(())
}
