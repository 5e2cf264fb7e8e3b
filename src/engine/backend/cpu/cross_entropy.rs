//! Cross entropy over rows of logits, gradient in place.

use rayon::prelude::*;

use super::{
    element::{Storage, num::Float},
    simd::vectorised,
};

/// Independent partial results of a row: lets the loops vectorise, and fixes the order of the sum.
const LANES: usize = 16;

/// Adds loss and right guesses to `sums`; with `gradient`, overwrites logits by `(softmax - onehot) * gradient`.
pub(super) fn cross_entropy<S: Storage>(
    sums: &mut [S::Wide],
    logits: &mut [S],
    labels: &[i32],
    vocab: usize,
    gradient: Option<f64>,
) {
    let rows: Vec<(f64, bool)> = logits
        .par_chunks_mut(vocab)
        .zip(labels)
        .map(|(row, label)| {
            if let Ok(label) = usize::try_from(*label) {
                vectorised(|| one_row(row, label, gradient.map(S::Wide::of)))
            } else {
                if gradient.is_some() {
                    row.fill(S::narrow(S::Wide::ZERO));
                }
                (0.0, false)
            }
        })
        .collect();
    // In f64 and in row order: neither cores nor the number of rows changes the sum beyond the last rounding.
    let loss: f64 = rows.iter().map(|(loss, _)| loss).sum();
    let correct = rows.iter().filter(|(_, correct)| *correct).count();
    sums[0] += S::Wide::of(loss);
    sums[1] += S::Wide::of(correct as f64);
}

/// Loss of a row that counts, and whether its largest logit is the label's.
#[inline(always)]
fn one_row<S: Storage>(row: &mut [S], label: usize, gradient: Option<S::Wide>) -> (f64, bool) {
    let max = row.iter().fold(S::Wide::NEG_INFINITY, |max, x| max.max(x.widen()));
    let mut lanes = [S::Wide::ZERO; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest: S::Wide = chunks.remainder().iter().map(|x| (x.widen() - max).exp()).sum();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += (x.widen() - max).exp();
        }
    }
    let sum = lanes.into_iter().sum::<S::Wide>() + rest;
    let target = row[label].widen();
    let loss = (sum.ln() + max - target).f64();
    let correct = target >= max && row[..label].iter().all(|x| x.widen() < max);
    if let Some(gradient) = gradient {
        let scale = gradient / sum;
        for x in row.iter_mut() {
            *x = S::narrow((x.widen() - max).exp() * scale);
        }
        let p = (target - max).exp() / sum;
        row[label] = S::narrow((p - S::Wide::ONE) * gradient);
    }
    (loss, correct)
}
