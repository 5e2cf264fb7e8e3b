//! Attention of a query chunk within its documents: forward against whole softmax rows, backward against slopes on a small
//! case and against the formula of the softmax's derivative on one that spans several blocks.

use std::ops::Range;

use longhaul::engine::backend::{AttentionGrads, AttentionSaved, Backend, Heads, Tensor, Window, cpu::Cpu};

use super::{Bench, assert_close, bench_f64, dot, minus};

/// A call: heads, tokens of the sequence, its documents, the chunk.
struct Case {
    heads: Heads,
    tokens: u64,
    documents: Vec<Range<u64>>,
    chunk: Range<u64>,
}

impl Case {
    fn of(heads: (u64, u64, u64), lengths: &[u64], chunk: Range<u64>) -> Self {
        let (n_heads, n_kv_heads, head_dim) = heads;
        let mut documents = Vec::new();
        let mut start = 0;
        for length in lengths {
            documents.push(start..start + length);
            start += length;
        }
        Self { heads: Heads { n_heads, n_kv_heads, head_dim }, tokens: start, documents, chunk }
    }

    fn small() -> Vec<Self> {
        vec![
            Self::of((4, 2, 5), &[6, 11, 1, 7], 9..21),
            Self::of((3, 3, 2), &[13], 0..13),
            Self::of((2, 1, 4), &[13], 5..6),
            Self::of((6, 2, 3), &[1, 1, 9], 0..4),
        ]
    }

    /// More than one block of queries and of keys, none of them full at its end.
    fn large() -> Vec<Self> {
        vec![Self::of((4, 2, 7), &[37, 523, 19, 110], 301..650), Self::of((2, 2, 3), &[300], 0..300)]
    }

    /// Documents that meet the chunk.
    fn met(&self) -> Vec<Range<u64>> {
        let meets = |d: &&Range<u64>| d.start < self.chunk.end && self.chunk.start < d.end;
        self.documents.iter().filter(meets).cloned().collect()
    }

    fn c(&self) -> u64 {
        self.chunk.end - self.chunk.start
    }

    /// Keys that the query at a position sees.
    fn seen(&self, position: u64) -> Range<u64> {
        let document = self.documents.iter().find(|d| d.contains(&position)).unwrap();
        document.start..position + 1
    }

    /// Keys that any query of the chunk sees.
    fn any_seen(&self) -> Range<u64> {
        self.met()[0].start..self.chunk.end
    }
}

/// Tensors of a call.
struct Call {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    none: Tensor,
}

impl Call {
    fn new(bench: &mut Bench<Cpu<f64>>, case: &Case) -> Self {
        let Heads { n_heads, n_kv_heads, head_dim } = case.heads;
        let (q, k) = (bench.input(case.c(), n_heads * head_dim), bench.input(case.tokens, n_kv_heads * head_dim));
        let v = bench.input(case.tokens, n_kv_heads * head_dim);
        // Scores that differ: softmax rows far from flat.
        let spread: Vec<f64> = bench.get(q).iter().map(|x| 3.0 * x).collect();
        bench.set(q, &spread);
        let (o, lse) = (bench.output(case.c(), n_heads * head_dim), bench.sum(n_heads, case.c()));
        let none = bench.output(0, 0);
        Self { q, k, v, o, lse, none }
    }

    fn forward(&self, bench: &mut Bench<Cpu<f64>>, case: &Case) -> Vec<f64> {
        let documents = case.met();
        let window = Window { chunk: case.chunk.clone(), documents: &documents };
        bench.b.attention(self.o, self.lse, self.q, self.k, self.v, self.none, case.heads, &window).unwrap();
        bench.get(self.o)
    }

    /// (dq, dk, dv), the latter without what was there before.
    fn backward(&self, bench: &mut Bench<Cpu<f64>>, case: &Case, weights: &[f64]) -> [Vec<f64>; 3] {
        let documents = case.met();
        let window = Window { chunk: case.chunk.clone(), documents: &documents };
        let (d_o, dq) = (bench.output(self.o.rows, self.o.cols), bench.output(self.q.rows, self.q.cols));
        let (dk, dv) = (bench.sum(self.k.rows, self.k.cols), bench.sum(self.v.rows, self.v.cols));
        let delta = bench.sum(self.lse.rows, self.lse.cols);
        bench.set(d_o, weights);
        let before = (bench.get(dk), bench.get(dv));
        let grads = AttentionGrads { dq, dk, dv, delta };
        let saved = AttentionSaved { d_o, o: self.o, lse: self.lse, q: self.q, k: self.k, v: self.v };
        bench.b.attention_backward(grads, saved, self.none, case.heads, &window).unwrap();
        [bench.get(dq), minus(&bench.get(dk), &before.0), minus(&bench.get(dv), &before.1)]
    }
}

/// The definition, one softmax row after another: o, lse, and the gradients of `sum(o * weights)`.
struct Plain {
    o: Vec<f64>,
    lse: Vec<f64>,
    grads: [Vec<f64>; 3],
}

fn plain(case: &Case, q: &[f64], k: &[f64], v: &[f64], weights: &[f64]) -> Plain {
    let Heads { n_heads, n_kv_heads, head_dim } = case.heads;
    let (nq, nk, d, c) = (n_heads as usize, n_kv_heads as usize, head_dim as usize, case.c() as usize);
    let scale = 1.0 / (d as f64).sqrt();
    let mut out = Plain {
        o: vec![0.0; q.len()],
        lse: vec![0.0; nq * c],
        grads: [vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]],
    };
    for head in 0..nq {
        for i in 0..c {
            let at = (i * nq + head) * d;
            let query = &q[at..at + d];
            let keys: Vec<usize> =
                case.seen(case.chunk.start + i as u64).map(|p| (p as usize * nk + head / (nq / nk)) * d).collect();
            let scores: Vec<f64> = keys.iter().map(|j| scale * dot(query, &k[*j..j + d])).collect();
            let lse = scores.iter().map(|s| s.exp()).sum::<f64>().ln();
            let p: Vec<f64> = scores.iter().map(|s| (s - lse).exp()).collect();
            out.lse[head * c + i] = lse;
            let w = &weights[at..at + d];
            let dp: Vec<f64> = keys.iter().map(|j| dot(w, &v[*j..j + d])).collect();
            let mean = dot(&p, &dp);
            for ((p, dp), j) in p.iter().zip(&dp).zip(&keys) {
                let ds = p * (dp - mean) * scale;
                for e in 0..d {
                    out.o[at + e] += p * v[j + e];
                    out.grads[0][at + e] += ds * k[j + e];
                    out.grads[1][j + e] += ds * query[e];
                    out.grads[2][j + e] += p * w[e];
                }
            }
        }
    }
    out
}

#[test]
fn forward_and_backward_are_the_definition() {
    for (n, case) in Case::small().into_iter().chain(Case::large()).enumerate() {
        let mut bench = bench_f64(20);
        let call = Call::new(&mut bench, &case);
        let weights = bench.weights(call.o.elements());
        let (q, k, v) = (bench.get(call.q), bench.get(call.k), bench.get(call.v));
        let expected = plain(&case, &q, &k, &v, &weights);
        // Rows that no query may see hold NaN: reading one would show.
        let (seen, row) = (case.any_seen(), call.k.cols);
        for tensor in [call.k, call.v] {
            let (start, end) = ((seen.start * row) as usize, (seen.end * row) as usize);
            let mut values = bench.get(tensor);
            values[..start].fill(f64::NAN);
            values[end..].fill(f64::NAN);
            bench.set(tensor, &values);
        }
        assert_close(&format!("case {n}: o"), &call.forward(&mut bench, &case), &expected.o, 1e-12);
        assert_close(&format!("case {n}: lse"), &bench.get(call.lse), &expected.lse, 1e-12);
        let grads = call.backward(&mut bench, &case, &weights);
        for (name, (ours, expected)) in ["dq", "dk", "dv"].iter().zip(grads.iter().zip(&expected.grads)) {
            assert_close(&format!("case {n}: {name}"), ours, expected, 1e-11);
        }
    }
}

#[test]
fn backward_is_the_slope_of_forward() {
    for (n, case) in Case::small().into_iter().enumerate() {
        let mut bench = bench_f64(21);
        let call = Call::new(&mut bench, &case);
        let weights = bench.weights(call.o.elements());
        let loss = |bench: &mut Bench<Cpu<f64>>| dot(&call.forward(bench, &case), &weights);
        let slopes = [call.q, call.k, call.v].map(|x| bench.slopes(x, loss));
        let grads = call.backward(&mut bench, &case, &weights);
        for (name, (ours, slopes)) in ["dq", "dk", "dv"].iter().zip(grads.iter().zip(&slopes)) {
            assert_close(&format!("case {n}: {name}"), ours, slopes, 1e-7);
        }
    }
}

#[test]
fn chunks_add_up_to_the_whole() {
    let whole = Case::of((4, 2, 5), &[30, 101, 9], 0..140);
    let mut bench = bench_f64(22);
    let call = Call::new(&mut bench, &whole);
    let weights = bench.weights(call.o.elements());
    let o = call.forward(&mut bench, &whole);
    let [dq, dk, dv] = call.backward(&mut bench, &whole, &weights);
    let (mut sum_k, mut sum_v) = (vec![0.0; dk.len()], vec![0.0; dv.len()]);
    for start in (0..140).step_by(33) {
        let end = 140.min(start + 33);
        let case = Case { chunk: start..end, documents: whole.documents.clone(), ..whole };
        let part =
            Call { q: call.q.rows(start, end), o: call.o.rows(start, end), lse: bench.sum(4, end - start), ..call };
        let at = |row: u64| (row * call.o.cols) as usize;
        assert_close("o", &part.forward(&mut bench, &case), &o[at(start)..at(end)], 1e-13);
        let [part_q, part_k, part_v] = part.backward(&mut bench, &case, &weights[at(start)..at(end)]);
        assert_close("dq", &part_q, &dq[at(start)..at(end)], 1e-12);
        sum_k.iter_mut().zip(part_k).for_each(|(sum, part)| *sum += part);
        sum_v.iter_mut().zip(part_v).for_each(|(sum, part)| *sum += part);
    }
    assert_close("dk", &sum_k, &dk, 1e-12);
    assert_close("dv", &sum_v, &dv, 1e-12);
}
