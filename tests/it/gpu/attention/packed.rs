//! Packed documents: many in a chunk, some that began before it or go on behind it, some that do not fill the library's tiles,
//! against the CPU's in f32; and few plans for documents of any lengths.

use std::ops::Range;

use longhaul::engine::backend::{Backend, Heads, cpu::Cpu};
use serde_json::{Value, json};

use super::{CANCELLED, Call, FAR_BELOW_ZERO, STORED, WIDE};
use crate::{
    gpu::{Gpu, figures},
    support::model::{Random, relative_error},
};

const GROUPS: Heads = Heads { n_heads: 8, n_kv_heads: 2, head_dim: 128 };
/// No groups: the library sums nothing over heads.
const NO_GROUPS: Heads = Heads { n_heads: 2, n_kv_heads: 2, head_dim: 64 };
/// More heads than one call of backward takes.
const MANY: Heads = Heads { n_heads: 32, n_kv_heads: 8, head_dim: 128 };
/// Of a size that is not a power of two.
const ODD: Heads = Heads { n_heads: 6, n_kv_heads: 2, head_dim: 80 };
/// Means and spreads of q, k, v and do: softmax rows far from flat.
const SPREAD: [(f64, f64); 4] = [(0.0, 1.7); 4];

/// A window over documents of these lengths.
struct Case {
    what: &'static str,
    heads: Heads,
    chunk: Range<u64>,
    documents: Vec<Range<u64>>,
    numbers: [(f64, f64); 4],
}

impl Case {
    fn of(what: &'static str, heads: Heads, chunk: Range<u64>, lengths: &[u64]) -> Self {
        let mut start = 0;
        let document = |length: &u64| {
            start += length;
            start - length..start
        };
        let all: Vec<Range<u64>> = lengths.iter().map(document).collect();
        let meets = |document: &Range<u64>| document.start < chunk.end && chunk.start < document.end;
        let documents = all.into_iter().filter(meets).collect();
        Self { what, heads, chunk, documents, numbers: SPREAD }
    }

    fn far_below_zero(self) -> Self {
        Self { numbers: FAR_BELOW_ZERO, ..self }
    }

    /// (o, lse, dq, dk, dv). Keys behind the chunk are there as well, for no query to see.
    fn run<B: Backend>(&self, b: &mut B) -> [Vec<f64>; 5] {
        let keys = self.documents.last().map_or(0, |document| document.end);
        let call = Call::lay(b, self.heads, self.chunk.end - self.chunk.start, keys);
        call.fill(b, self.numbers);
        call.run_within(b, self.chunk.start, &self.documents);
        call.results(b)
    }
}

fn cases() -> Vec<Case> {
    let short = [128; 20];
    let uneven = [128, 384, 256, 1024, 128, 640, 128, 128, 256, 512, 512];
    vec![
        Case::of("short documents", GROUPS, 0..2560, &short),
        Case::of("uneven documents", GROUPS, 0..4096, &uneven),
        Case::of("uneven documents, no groups", NO_GROUPS, 0..4096, &uneven),
        Case::of("uneven documents, heads of 80", ODD, 0..4096, &uneven),
        Case::of("any lengths", GROUPS, 0..4096, &[1, 7, 130, 257, 1000, 33, 64, 90, 2000, 5, 509]),
        Case::of("any lengths, from before the chunk", GROUPS, 1000..2777, &[3, 1700, 500, 574]),
        Case::of("a chunk within a document, 3 behind a block", GROUPS, 1030..2048, &[3, 3000]),
        Case::of("a last chunk, shorter", GROUPS, 2048..2688, &[1024, 1152, 256, 256]),
        Case::of("from before the chunk, and on behind it", GROUPS, 1024..3072, &[512, 1280, 640, 128, 1024]),
        Case::of("the same, no groups", NO_GROUPS, 1024..3072, &[512, 1280, 640, 128, 1024]),
        Case::of("the same, heads of an 8B model", MANY, 512..1024, &[128, 640, 128, 256]),
        Case::of("a chunk within a document", GROUPS, 1024..2048, &[128, 2944]),
        Case::of("some do not fill tiles", GROUPS, 1024..2048, &[512, 576, 192, 64, 320, 128, 256]),
        Case::of("none fills tiles", GROUPS, 0..700, &[64, 192, 60, 320, 64]),
        Case::of("from before, 64 mod 128", GROUPS, 1024..1536, &[64, 1088, 128, 256]),
        Case::of("scores far below zero", GROUPS, 512..1536, &[128, 640, 256, 128, 384]).far_below_zero(),
        Case::of("the same, 64 mod 128", GROUPS, 512..1536, &[128, 576, 192, 320, 320]).far_below_zero(),
    ]
}

/// Cases too long for a test that runs as a matter of course.
fn long_cases() -> Vec<Case> {
    vec![
        Case::of("more documents than a call takes", NO_GROUPS, 0..128 * 300, &[128; 300]),
        Case::of("behind more than a block of keys", GROUPS, 70_144..70_656, &[128, 70_272, 128, 128]),
        Case::of("within a document, behind more than a block", GROUPS, 70_144..70_656, &[128, 71_000]),
    ]
}

/// Errors of each case against the CPU's in f32, held to bounds.
fn hold(cases: &[Case], mut run: impl FnMut(&Case) -> [Vec<f64>; 5], mut figures: impl FnMut(Value)) {
    let mut wrong = Vec::new();
    for case in cases {
        let theirs = case.run(&mut Cpu::<f32>::new(8).unwrap());
        let ours = run(case);
        let written = ours.iter().all(|values| values.iter().all(|x| x.is_finite()));
        let errors: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| relative_error(a, b)).collect();
        figures(json!({ "case": case.what, "all_written": written, "o_lse_dq_dk_dv": errors }));
        assert!(written, "{}: not all was written, or not with numbers", case.what);
        let cancelled = if case.numbers == FAR_BELOW_ZERO { CANCELLED } else { STORED };
        for (error, bound) in errors.into_iter().zip([STORED, WIDE, cancelled, STORED, STORED]) {
            if error > bound {
                wrong.push(format!("{}: {error} is more than {bound}", case.what));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("; "));
}

#[test]
fn packed_documents_in_bf16() {
    // A few, that are short.
    let cases: Vec<Case> = cases().into_iter().step_by(4).collect();
    hold(&cases, |case| case.run(&mut Cpu::<half::bf16>::new(2).unwrap()), |values| eprintln!("{values}"));
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gpu_attention_of_packed_documents() {
    let mut gpu = Gpu::open();
    figures("packed attention", gpu.card());
    let run = |case: &Case| {
        let found = case.run(gpu.backend());
        gpu.backend().device.release().unwrap();
        found
    };
    let cases: Vec<Case> = cases().into_iter().chain(long_cases()).collect();
    hold(&cases, run, |values| figures("packed attention", values));
}

/// Lengths that fill so many tokens, mostly short and sometimes long.
fn lengths(random: &mut Random, tokens: u64) -> Vec<u64> {
    let mut lengths = Vec::new();
    let mut left = tokens;
    while left > 0 {
        let most = [300, 600, 2000, 25_000][(random.next() % 4) as usize];
        let length = (1 + random.next() % most).min(left);
        lengths.push(length);
        left -= length;
    }
    lengths
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gpu_attention_of_any_documents_makes_few_plans() {
    const CHUNK: u64 = 2048;
    const TOKENS: u64 = 5 * CHUNK - 384;
    let mut gpu = Gpu::open();
    let b = gpu.backend();
    let mut random = Random(7);
    let mut counts = Vec::new();
    for _ in 0..24 {
        // No document is alone in its chunk from the sequence's start on.
        let lengths = [&[1], &lengths(&mut random, TOKENS - 1)[..]].concat();
        for start in (0..TOKENS).step_by(CHUNK as usize) {
            let case = Case::of("", GROUPS, start..TOKENS.min(start + CHUNK), &lengths);
            let found = case.run(b);
            b.device.release().unwrap();
            assert!(found.iter().all(|values| values.iter().all(|x| x.is_finite())));
        }
        counts.push(b.attention_plans());
    }
    figures("packed plans", json!({ "after": counts }));
    // Of each pass: 16 lengths of causal calls, four more where a document began before, powers of 4 of the short ones; 16
    // numbers of queries by four blocks of keys. The shorter last chunk may take other heads together.
    assert!(counts[23] < 300 && counts[23] - counts[15] < counts[3], "{counts:?}");
}
