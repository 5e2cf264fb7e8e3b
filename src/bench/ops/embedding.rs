//! Embedding and its backward: bit by bit against the CPU, whose sums have the order of the tokens.

use serde_json::json;

use super::{Report, twin::Twins};
use crate::engine::{
    Result,
    backend::{Backend, DType},
};

/// How a check's ids are spread over the vocabulary.
#[derive(Debug, Clone, Copy)]
enum Ids {
    Spread,
    /// A few ids stand for most tokens, as in any text.
    Skewed,
    Equal,
}

impl Ids {
    fn of(self, n: u64, vocab: u64) -> Vec<i32> {
        // Knuth's multiplicative hash, the upper half of which is evenly spread.
        let spread = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) % vocab;
        let id = |i: u64| match self {
            Self::Spread => spread(i),
            Self::Skewed => spread(i) >> (spread(i * 31 + 7) % 18),
            Self::Equal => vocab - 1,
        };
        (0..n).map(|i| id(i) as i32).collect()
    }
}

/// Few tokens and many, ids of one to three digits, rows odd and long, more tokens than are sorted at once.
pub(super) fn check(t: &mut Twins, report: &mut Report) -> Result {
    let shapes = [(1, 5, 8), (1000, 37, 33), (5000, 300, 264), (4097, 128_256, 66), (70_000, 70_000, 2), (40, 9, 4096)];
    for ids in [Ids::Spread, Ids::Skewed, Ids::Equal] {
        for shape in shapes {
            one(t, report, ids, shape)?;
        }
        one(t, report, ids, (1_200_000, 256, 8))?;
    }
    Ok(())
}

fn one(t: &mut Twins, report: &mut Report, kind: Ids, (n, vocab, h): (u64, u64, u64)) -> Result {
    t.clear();
    let ids = t.same(DType::I32, n, 1, bytemuck::cast_slice(&kind.of(n, vocab)))?;
    let (table, x) = (t.same_noise(DType::Bf16, vocab, h)?, t.same_output(DType::Bf16, n, h)?);
    let (dtable, dx) = (t.same_noise(DType::F32, vocab, h)?, t.same_noise(DType::Bf16, n, h)?);
    t.same.embedding(x.cpu, ids.cpu, table.cpu)?;
    t.gpu.embedding(x.gpu, ids.gpu, table.gpu)?;
    t.same.embedding_backward(dtable.cpu, ids.cpu, dx.cpu)?;
    t.gpu.embedding_backward(dtable.gpu, ids.gpu, dx.gpu)?;
    let shape = json!({ "tokens": n, "vocabulary": vocab, "h": h, "ids": format!("{kind:?}") });
    report.errors("embedding", &shape, &[("x", t.differing(x)?), ("dtable", t.differing(dtable)?)], 0.0)
}

/// 131,072 tokens of an 8B model.
pub(super) fn measure(t: &mut Twins, report: &mut Report) -> Result {
    let (n, vocab, h) = (131_072, 128_256, 4096);
    for kind in [Ids::Spread, Ids::Skewed, Ids::Equal] {
        t.clear();
        let ids = kind.of(n, vocab);
        let mut distinct = ids.clone();
        distinct.sort_unstable();
        distinct.dedup();
        let (ids, table, x) = (t.integers(&ids)?.gpu, t.noise_on_gpu(vocab, h)?, t.noise_on_gpu(n, h)?);
        let dtable = t.gpu_only(DType::F32, vocab, h);
        t.gpu.fill(dtable, 0.0)?;
        let name = format!("embedding [131072, 4096], {kind:?} ids");
        report.speed(t, &name, 2 * x.bytes(), |gpu| gpu.embedding(x, ids, table))?;
        let name = format!("embedding_backward [131072, 4096], {kind:?} ids");
        let bytes = x.bytes() + 2 * distinct.len() as u64 * h * 4;
        report.speed(t, &name, bytes, |gpu| gpu.embedding_backward(dtable, ids, x))?;
    }
    Ok(())
}
