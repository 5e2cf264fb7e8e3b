//! RMSNorm, SwiGLU and cross entropy: errors at awkward sizes, bytes a second at sizes of an 8B model.

use serde_json::json;

use super::{ROUNDS, Report, twin::Twins};
use crate::engine::{
    Result,
    backend::{Backend, DType, Stream},
};

/// Rounding one result to bf16 costs up to 2^-9 of it, 0.0017 in the root mean square.
const BOUND: f64 = 3e-3;
/// Sums stay in f32; what differs is their order and the exponential's last bits.
const WIDE_BOUND: f64 = 2e-5;
const EPS: f64 = 1e-5;

/// Every operation on one row, few columns, columns that are no multiple of 8 or 32, and on more rows than blocks.
pub(super) fn check(twins: &mut Twins, report: &mut Report) -> Result {
    for (rows, cols) in [(1, 8), (3, 1), (5, 33), (37, 1000), (700, 4096), (2050, 264), (9, 14_336), (2, 24_576)] {
        rmsnorm(twins, report, rows, cols)?;
        swiglu(twins, report, rows, cols)?;
    }
    for (rows, vocab) in [(1, 8), (7, 1), (5, 33), (64, 32_001), (300, 2048), (33, 128_256)] {
        for gradient in [None, Some(1.0 / 64.0)] {
            cross_entropy(twins, report, (rows, vocab), gradient)?;
        }
    }
    Ok(())
}

fn rmsnorm(t: &mut Twins, report: &mut Report, n: u64, h: u64) -> Result {
    t.clear();
    let (x, w, dy) = (t.storage(n, h, 0.3, 2.0)?, t.storage(1, h, 1.0, 0.2)?, t.storage(n, h, 0.0, 1.0)?);
    let (y, dx, dw) = (t.output(DType::Bf16, n, h)?, t.storage(n, h, 0.0, 1.0)?, t.wide(1, h)?);
    t.cpu.rmsnorm(y.cpu, x.cpu, w.cpu, EPS)?;
    t.gpu.rmsnorm(y.gpu, x.gpu, w.gpu, EPS)?;
    t.cpu.rmsnorm_backward(dx.cpu, dw.cpu, dy.cpu, x.cpu, w.cpu, EPS)?;
    t.gpu.rmsnorm_backward(dx.gpu, dw.gpu, dy.gpu, x.gpu, w.gpu, EPS)?;
    let errors = [("y", t.error(y)?), ("dx", t.error(dx)?)];
    report.errors("rmsnorm", &json!([n, h]), &errors, BOUND)?;
    report.errors("rmsnorm gain", &json!([n, h]), &[("dw", t.error(dw)?)], WIDE_BOUND)
}

fn swiglu(t: &mut Twins, report: &mut Report, n: u64, f: u64) -> Result {
    t.clear();
    let (gate_up, dact) = (t.storage(n, 2 * f, 0.0, 3.0)?, t.storage(n, f, 0.0, 1.0)?);
    let act = t.output(DType::Bf16, n, f)?;
    t.cpu.swiglu(act.cpu, gate_up.cpu)?;
    t.gpu.swiglu(act.gpu, gate_up.gpu)?;
    t.cpu.swiglu_backward(gate_up.cpu, dact.cpu)?;
    t.gpu.swiglu_backward(gate_up.gpu, dact.gpu)?;
    let errors = [("act", t.error(act)?), ("dgate_up", t.error(gate_up)?)];
    report.errors("swiglu", &json!([n, f]), &errors, BOUND)
}

fn cross_entropy(t: &mut Twins, report: &mut Report, (rows, vocab): (u64, u64), gradient: Option<f64>) -> Result {
    t.clear();
    // Every fifth row counts nothing, every third has the most likely label far up, ties included by bf16.
    let labels: Vec<i32> =
        (0..rows as i32).map(|i| if i % 5 == 4 { -100 } else { (i * 7919) % vocab as i32 }).collect();
    let (logits, labels, sums) = (t.storage(rows, vocab, 0.0, 4.0)?, t.integers(&labels)?, t.wide(1, 2)?);
    t.cpu.cross_entropy(sums.cpu, logits.cpu, labels.cpu, gradient)?;
    t.gpu.cross_entropy(sums.gpu, logits.gpu, labels.gpu, gradient)?;
    let shape = json!([rows, vocab]);
    report.errors("cross_entropy sums", &shape, &[("sums", t.error(sums)?)], WIDE_BOUND)?;
    if gradient.is_some() && vocab > 1 {
        report.errors("cross_entropy gradient", &shape, &[("dlogits", t.error(logits)?)], BOUND)?;
    }
    Ok(())
}

/// What a copy on the device reaches, for the others to be told beside.
pub(super) fn copy(t: &mut Twins, report: &mut Report) -> Result {
    t.clear();
    let (from, to) = (t.noise_on_gpu(1 << 15, 1 << 15)?, t.gpu_only(DType::Bf16, 1 << 15, 1 << 15));
    let seconds = t.seconds(ROUNDS, |gpu| gpu.device.copy(Stream::Compute, to, from))?;
    report.copy_rate = (2 * from.bytes()) as f64 / seconds;
    report.line(&json!({ "speed": "device copy", "gb_per_second": report.copy_rate / 1e9 }))
}

/// Bytes a second at sizes of an 8B model.
pub(super) fn measure(t: &mut Twins, report: &mut Report) -> Result {
    let (n, h, f, rows, vocab) = (65_536, 4096, 14_336, 4096, 128_256);
    t.clear();
    let (x, y, dy, dx) =
        (t.noise_on_gpu(n, h)?, t.gpu_only(DType::Bf16, n, h), t.noise_on_gpu(n, h)?, t.noise_on_gpu(n, h)?);
    let (w, dw) = (t.noise_on_gpu(1, h)?, t.wide(1, h)?.gpu);
    report.speed(t, "rmsnorm [65536, 4096]", 2 * x.bytes(), |gpu| gpu.rmsnorm(y, x, w, EPS))?;
    report
        .speed(t, "rmsnorm_backward [65536, 4096]", 4 * x.bytes(), |gpu| gpu.rmsnorm_backward(dx, dw, dy, x, w, EPS))?;

    t.clear();
    let n = 16_384;
    let (gate_up, act) = (t.noise_on_gpu(n, 2 * f)?, t.noise_on_gpu(n, f)?);
    report.speed(t, "swiglu [16384, 14336]", 3 * act.bytes(), |gpu| gpu.swiglu(act, gate_up))?;
    report.speed(t, "swiglu_backward [16384, 14336]", 5 * act.bytes(), |gpu| gpu.swiglu_backward(gate_up, act))?;

    t.clear();
    let labels: Vec<i32> = (0..rows).collect();
    let (logits, labels, sums) = (t.noise_on_gpu(rows as u64, vocab)?, t.integers(&labels)?.gpu, t.wide(1, 2)?.gpu);
    report.speed(t, "cross_entropy [4096, 128256], loss", logits.bytes(), |gpu| {
        gpu.cross_entropy(sums, logits, labels, None)
    })?;
    report.speed(t, "cross_entropy [4096, 128256], loss and gradient", 2 * logits.bytes(), |gpu| {
        gpu.cross_entropy(sums, logits, labels, Some(1e-3))
    })
}
