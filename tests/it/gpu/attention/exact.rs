//! Single rows of attention and of its gradients in f64, from inputs that are made where they are needed: millions of keys are
//! never in memory at once.

use half::bf16;
use longhaul::engine::{backend::Heads, data::pack::mix};
use rayon::prelude::*;

/// Keys that one core takes at once.
const BLOCK: u64 = 1 << 14;

/// A tensor of bf16 noise, near normal with deviation 1: each element follows from its index alone, so that no part of the
/// tensor is like another.
#[derive(Debug, Clone, Copy)]
pub struct Noise(u64);

impl Noise {
    fn element(self, index: u64) -> bf16 {
        let bits = mix(self.0 ^ index);
        // Four uniform numbers have a variance of a third.
        let sum: u64 = (0..4).map(|i| bits >> (16 * i) & 0xffff).sum();
        bf16::from_f32((sum as f32 / 65_536.0 - 2.0) * 3f32.sqrt())
    }

    /// `n` elements from `first` on.
    pub fn elements(self, first: u64, n: u64) -> Vec<bf16> {
        (first..first + n).into_par_iter().map(|i| self.element(i)).collect()
    }
}

/// Inputs of a call: the last `c` queries of one document of `keys` tokens.
pub struct Inputs {
    heads: Heads,
    c: u64,
    keys: u64,
    pub q: Noise,
    pub k: Noise,
    pub v: Noise,
    pub d_o: Noise,
}

/// A query's row in one head.
pub struct Row {
    pub o: Vec<f64>,
    pub lse: f64,
    pub dq: Vec<f64>,
}

/// A key's gradients in one kv head.
pub struct Key {
    pub dk: Vec<f64>,
    pub dv: Vec<f64>,
}

/// What a backward reads of the forward: `[c, nq d]` and `[nq, c]`.
pub struct Saved<'a> {
    pub o: &'a [f64],
    pub lse: &'a [f64],
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn add(to: &mut [f64], x: &[f64], times: f64) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += x * times);
}

fn sum(mut a: Vec<f64>, b: Vec<f64>) -> Vec<f64> {
    add(&mut a, &b, 1.0);
    a
}

impl Inputs {
    pub fn new(heads: Heads, c: u64, keys: u64) -> Self {
        let [q, k, v, d_o] = [1, 2, 3, 4].map(|seed| Noise(mix(seed)));
        Self { heads, c, keys, q, k, v, d_o }
    }

    /// Rows of the chunk and heads: first and last ones, and some between.
    pub fn sampled_rows(&self) -> Vec<(u64, u64)> {
        let (rows, heads) = (self.c, self.heads.n_heads);
        vec![
            (0, 0),
            (rows - 1, heads - 1),
            (rows / 2, 1),
            (rows - 2, heads / 2),
            (rows / 3, heads - 2),
            (17, heads / 3),
        ]
    }

    /// Keys and kv heads: both ends, where the elements pass 2^31 (of a group of heads, and of all kv heads), between.
    pub fn sampled_keys(&self) -> Vec<(u64, u64)> {
        let d = self.heads.head_dim;
        let group = self.heads.n_heads / self.heads.n_kv_heads;
        let mut keys = vec![0, 1, self.keys / 3, self.keys - self.c, self.keys - 2];
        for width in [group * d, self.heads.n_kv_heads * d] {
            let border = (1 << 31) / width;
            keys.extend([border / 2, border - 1, border, border + 1, border + 1023]);
        }
        keys.retain(|key| *key < self.keys);
        let last = self.heads.n_kv_heads - 1;
        keys.into_iter().flat_map(|key| [(key, 0), (key, last)]).collect()
    }

    fn scale(&self) -> f64 {
        1.0 / (self.heads.head_dim as f64).sqrt()
    }

    fn read(&self, noise: Noise, row: u64, head: u64, n_heads: u64) -> Vec<f64> {
        let d = self.heads.head_dim;
        let first = (row * n_heads + head) * d;
        (first..first + d).map(|i| noise.element(i).into()).collect()
    }

    fn query(&self, noise: Noise, row: u64, head: u64) -> Vec<f64> {
        self.read(noise, row, head, self.heads.n_heads)
    }

    fn key_row(&self, noise: Noise, key: u64, kv_head: u64) -> Vec<f64> {
        self.read(noise, key, kv_head, self.heads.n_kv_heads)
    }

    /// A query's row by the definition. `saved_o` is the o that a backward reads.
    pub fn row(&self, row: u64, head: u64, saved_o: &[f64]) -> Row {
        let d = self.heads.head_dim as usize;
        let kv_head = head / (self.heads.n_heads / self.heads.n_kv_heads);
        let seen = self.keys - self.c + row + 1;
        let (q, d_o) = (self.query(self.q, row, head), self.query(self.d_o, row, head));
        let scores: Vec<f64> =
            (0..seen).into_par_iter().map(|j| dot(&q, &self.key_row(self.k, j, kv_head)) * self.scale()).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = most + scores.iter().map(|s| (s - most).exp()).sum::<f64>().ln();
        let delta = dot(&d_o, saved_o);
        let parts = (0..seen.div_ceil(BLOCK)).into_par_iter().map(|block| {
            let (mut o, mut dq) = (vec![0.0; d], vec![0.0; d]);
            for j in block * BLOCK..seen.min((block + 1) * BLOCK) {
                let (k, v) = (self.key_row(self.k, j, kv_head), self.key_row(self.v, j, kv_head));
                let p = (scores[j as usize] - lse).exp();
                add(&mut o, &v, p);
                add(&mut dq, &k, p * (dot(&d_o, &v) - delta) * self.scale());
            }
            (o, dq)
        });
        let nothing = || (vec![0.0; d], vec![0.0; d]);
        let (o, dq) = parts.reduce(nothing, |a, b| (sum(a.0, b.0), sum(a.1, b.1)));
        Row { o, lse, dq }
    }

    /// A key's gradients by the definition, over every query and head that sees it.
    pub fn key(&self, key: u64, kv_head: u64, saved: &Saved) -> Key {
        let d = self.heads.head_dim as usize;
        let group = self.heads.n_heads / self.heads.n_kv_heads;
        let (k, v) = (self.key_row(self.k, key, kv_head), self.key_row(self.v, key, kv_head));
        let (mut dk, mut dv) = (vec![0.0; d], vec![0.0; d]);
        for row in (0..self.c).filter(|row| key <= self.keys - self.c + row) {
            for head in kv_head * group..(kv_head + 1) * group {
                let (q, d_o) = (self.query(self.q, row, head), self.query(self.d_o, row, head));
                let place = (row * self.heads.n_heads + head) as usize * d;
                let p = (dot(&q, &k) * self.scale() - saved.lse[(head * self.c + row) as usize]).exp();
                let delta = dot(&d_o, &saved.o[place..place + d]);
                add(&mut dv, &d_o, p);
                add(&mut dk, &q, p * (dot(&d_o, &v) - delta) * self.scale());
            }
        }
        Key { dk, dv }
    }
}
