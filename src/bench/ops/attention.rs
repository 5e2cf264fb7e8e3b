//! Attention: a query chunk against a prefix of keys, errors at small sizes, operations a second at long ones.

use std::ops::Range;

use serde_json::json;

use super::{
    Report,
    twin::{Twin, Twins},
};
use crate::engine::{
    Result,
    backend::{AttentionGrads, AttentionSaved, Backend, DType, Heads, Tensor, Window},
};

/// Products of bf16 operands, p rounded to bf16, gradients of k and v written in bf16.
const BOUND: f64 = 1e-2;
/// Log-sum-exps stay in f32.
const WIDE_BOUND: f64 = 1e-4;
const ROUNDS: usize = 3;
/// The attention of Llama-3.1-8B.
const HEADS: Heads = Heads { n_heads: 32, n_kv_heads: 8, head_dim: 128 };

/// A chunk at the start, one behind a prefix, lengths that are 64 more than a multiple of 128, packed documents.
pub(super) fn check(twins: &mut Twins, report: &mut Report) -> Result {
    let few = Heads { n_heads: 8, n_kv_heads: 2, head_dim: 128 };
    let single = Heads { n_heads: 2, n_kv_heads: 2, head_dim: 64 };
    one_document(twins, report, "whole sequence", few, 0..1024)?;
    one_document(twins, report, "chunk behind a prefix", few, 3072..4096)?;
    one_document(twins, report, "64 mod 128", few, 1024..1088)?;
    one_document(twins, report, "64 mod 128, longer", few, 1344..1984)?;
    one_document(twins, report, "one query head, d 64", single, 1024..2048)?;
    one_document(twins, report, "heads of an 8B model", HEADS, 1024..1536)?;
    window(twins, report, "packed documents", few, 1024..2048, &[512..1280, 1280..1664, 1664..2432])
}

fn one_document(t: &mut Twins, report: &mut Report, what: &str, heads: Heads, chunk: Range<u64>) -> Result {
    let document = 0..chunk.end;
    window(t, report, what, heads, chunk, &[document])
}

fn window(
    t: &mut Twins,
    report: &mut Report,
    what: &str,
    heads: Heads,
    chunk: Range<u64>,
    documents: &[Range<u64>],
) -> Result {
    t.clear();
    let (c, keys) = (chunk.end - chunk.start, chunk.end);
    let (q_cols, kv_cols) = (heads.n_heads * heads.head_dim, heads.n_kv_heads * heads.head_dim);
    let q = t.storage(c, q_cols, 0.0, 1.0)?;
    let (k, v) = (t.storage(keys, kv_cols, 0.0, 1.0)?, t.storage(keys, kv_cols, 0.0, 1.0)?);
    let d_o = t.storage(c, q_cols, 0.0, 1.0)?;
    let (o, lse) = (t.output(DType::Bf16, c, q_cols)?, t.output(DType::F32, heads.n_heads, c)?);
    let (dq, delta) = (t.output(DType::Bf16, c, q_cols)?, t.output(DType::F32, heads.n_heads, c)?);
    let (dk, dv) = (t.wide(keys, kv_cols)?, t.wide(keys, kv_cols)?);
    let bytes = t.gpu.attention_workspace(heads, c, keys);
    let workspace = Twin { cpu: q.cpu, gpu: t.gpu_only(DType::Bf16, 1, bytes / 2) };
    let window = Window { chunk: chunk.clone(), documents };
    t.cpu.attention(o.cpu, lse.cpu, q.cpu, k.cpu, v.cpu, workspace.cpu, heads, &window)?;
    t.gpu.attention(o.gpu, lse.gpu, q.gpu, k.gpu, v.gpu, workspace.gpu, heads, &window)?;
    let side = |of: fn(Twin) -> Tensor| {
        let grads = AttentionGrads { dq: of(dq), dk: of(dk), dv: of(dv), delta: of(delta) };
        (grads, AttentionSaved { d_o: of(d_o), o: of(o), lse: of(lse), q: of(q), k: of(k), v: of(v) })
    };
    let (grads, saved) = side(|twin| twin.cpu);
    t.cpu.attention_backward(grads, saved, workspace.cpu, heads, &window)?;
    let (grads, saved) = side(|twin| twin.gpu);
    t.gpu.attention_backward(grads, saved, workspace.gpu, heads, &window)?;
    let shape = json!({ "case": what, "chunk": [chunk.start, chunk.end], "documents": documents.len() });
    let errors = [("o", t.error(o)?), ("dq", t.error(dq)?), ("dk", t.error(dk)?), ("dv", t.error(dv)?)];
    report.errors("attention", &shape, &errors, BOUND)?;
    report.errors("attention log-sum-exp", &shape, &[("lse", t.error(lse)?)], WIDE_BOUND)
}

/// Operations a second of whole calls of the backend: all heads, gradients added up in f32.
pub(super) fn measure(t: &mut Twins, report: &mut Report, most_keys: u64) -> Result {
    for keys in [1 << 14, 1 << 15, 1 << 17, 1 << 19, 1 << 20].into_iter().filter(|keys| *keys <= most_keys) {
        for chunk in [8192, 16_384, 32_768].into_iter().filter(|chunk| *chunk <= keys) {
            one_speed(t, report, chunk, keys)?;
        }
    }
    Ok(())
}

fn one_speed(t: &mut Twins, report: &mut Report, c: u64, keys: u64) -> Result {
    t.clear();
    let (q_cols, kv_cols) = (HEADS.n_heads * HEADS.head_dim, HEADS.n_kv_heads * HEADS.head_dim);
    let (q, d_o) = (t.noise_on_gpu(c, q_cols)?, t.noise_on_gpu(c, q_cols)?);
    let (k, v) = (t.noise_on_gpu(keys, kv_cols)?, t.noise_on_gpu(keys, kv_cols)?);
    let (o, dq) = (t.gpu_only(DType::Bf16, c, q_cols), t.gpu_only(DType::Bf16, c, q_cols));
    let (lse, delta) = (t.gpu_only(DType::F32, HEADS.n_heads, c), t.gpu_only(DType::F32, HEADS.n_heads, c));
    let (dk, dv) = (t.gpu_only(DType::F32, keys, kv_cols), t.gpu_only(DType::F32, keys, kv_cols));
    for sums in [dk, dv] {
        t.gpu.device.fill_bytes(sums, 0)?;
    }
    let bytes = t.gpu.attention_workspace(HEADS, c, keys);
    let workspace = t.gpu_only(DType::Bf16, 1, bytes / 2);
    let document = 0..keys;
    let window = Window { chunk: keys - c..keys, documents: std::slice::from_ref(&document) };
    let forward = t.seconds(ROUNDS, |gpu| gpu.attention(o, lse, q, k, v, workspace, HEADS, &window))?;
    let backward = t.seconds(ROUNDS, |gpu| {
        let saved = AttentionSaved { d_o, o, lse, q, k, v };
        gpu.attention_backward(AttentionGrads { dq, dk, dv, delta }, saved, workspace, HEADS, &window)
    })?;
    // Causal: 4 operations for each head, element of a head, query and key it sees; backward 2.5 times that.
    let operations = (4 * HEADS.n_heads * HEADS.head_dim * c) as f64 * (keys as f64 - c as f64 / 2.0);
    report.line(&json!({
        "speed": "attention", "chunk": c, "keys": keys,
        "forward_tflops": operations / forward / 1e12, "backward_tflops": 2.5 * operations / backward / 1e12,
        "forward_seconds": forward, "backward_seconds": backward, "workspace_bytes": bytes,
    }))
}
