//! Causal attention of a query chunk by blocks, with an online softmax (FlashAttention-2, arXiv 2307.08691).
//!
//! Forward and dq run over blocks of queries, dk and dv over blocks of keys, so that every core writes rows of its own and
//! sums run in an order that neither cores nor chunk size change... but for the grouping of key blocks at a document's
//! start. Heads that share a kv head are stacked: one product serves the whole group.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    element::{Real, Storage, num::Float},
    gemm::{Gemm, View, widened},
    simd::vectorised,
};
use crate::engine::backend::{Heads, Window};

/// Queries of a block.
const BLOCK: usize = 64;
/// Keys of a block: enough for products at full speed, few enough that a block's scores stay in the cache.
const KEY_BLOCK: usize = 256;

/// Sizes of a call as indices.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    nq: usize,
    nk: usize,
    d: usize,
    /// Query heads of a kv head.
    group: usize,
}

impl Sizes {
    fn of(heads: Heads) -> Self {
        let (nq, nk, d) = (heads.n_heads as usize, heads.n_kv_heads as usize, heads.head_dim as usize);
        Self { nq, nk, d, group: nq / nk }
    }

    fn q_row(&self) -> usize {
        self.nq * self.d
    }

    fn kv_row(&self) -> usize {
        self.nk * self.d
    }
}

/// A block of consecutive queries of one document: rows of the chunk, their positions, and the keys they may see.
#[derive(Debug, Clone)]
struct QueryBlock {
    rows: Range<usize>,
    first_position: usize,
    document: Range<usize>,
}

/// The chunk's rows cut at document bounds and every `BLOCK` rows.
fn query_blocks(window: &Window) -> Vec<QueryBlock> {
    let chunk = window.chunk.start as usize..window.chunk.end as usize;
    let mut blocks = Vec::new();
    for document in window.documents {
        let document = document.start as usize..document.end as usize;
        let (start, end) = (document.start.max(chunk.start), document.end.min(chunk.end));
        for first in (start..end).step_by(BLOCK) {
            let last = end.min(first + BLOCK);
            let rows = first - chunk.start..last - chunk.start;
            blocks.push(QueryBlock { rows, first_position: first, document: document.clone() });
        }
    }
    blocks
}

/// Blocks of the keys that a chunk's queries of one document may see.
fn key_blocks(keys: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = keys.end;
    keys.step_by(KEY_BLOCK).map(move |start| start..end.min(start + KEY_BLOCK))
}

/// Splits a slice of rows into one mutable piece per block; blocks are consecutive from row 0.
fn pieces<'a, T>(mut all: &'a mut [T], blocks: &[QueryBlock], row: usize) -> Vec<&'a mut [T]> {
    let mut out = Vec::with_capacity(blocks.len());
    for block in blocks {
        let (piece, rest) = std::mem::take(&mut all).split_at_mut(block.rows.len() * row);
        out.push(piece);
        all = rest;
    }
    out
}

/// Scaled scores of stacked queries `[group * n, d]` against a block of keys, future keys masked.
fn scores<W: Real + Gemm>(
    out: &mut Vec<W>,
    q: &[W],
    k: View<W>,
    (block, keys): (&QueryBlock, &Range<usize>),
    d: usize,
    scale: W,
) {
    let n_keys = keys.len();
    let rows = q.len() / d;
    out.clear();
    out.resize(rows * n_keys, W::ZERO);
    W::gemm(out, n_keys, scale, View::new(q, rows, d, d), k.transposed(), W::ZERO);
    let n = block.rows.len();
    if keys.end > block.first_position + 1 {
        for (i, row) in out.chunks_mut(n_keys).enumerate() {
            let visible = (block.first_position + i % n + 1).saturating_sub(keys.start).min(n_keys);
            row[visible..].fill(W::NEG_INFINITY);
        }
    }
}

/// `o` and `lse` of a chunk. Rows of q and o are the chunk's, rows of k and v the sequence's.
pub(super) fn forward<S: Storage>(
    (o, lse): (&mut [S], &mut [S::Wide]),
    (q, k, v): (&[S], &[S], &[S]),
    heads: Heads,
    window: &Window,
) where
    S::Wide: Gemm,
{
    let sizes = Sizes::of(heads);
    let blocks = query_blocks(window);
    let c = (window.chunk.end - window.chunk.start) as usize;
    let stats: Vec<Vec<S::Wide>> = pieces(o, &blocks, sizes.q_row())
        .into_par_iter()
        .zip(&blocks)
        .map(|(o, block)| {
            let groups = (0..sizes.nk).map(|kv| group_forward::<S>(o, (q, k, v), sizes, block, kv));
            groups.collect::<Vec<_>>().concat()
        })
        .collect();
    // Each block's statistics come as [nq, rows]; the whole is [nq, c].
    for (block, stats) in blocks.iter().zip(stats) {
        for (head, stats) in stats.chunks(block.rows.len()).enumerate() {
            lse[head * c + block.rows.start..head * c + block.rows.end].copy_from_slice(stats);
        }
    }
}

/// One block of queries against one kv head: writes the group's columns of o, returns its log-sum-exps `[group, rows]`.
fn group_forward<S: Storage>(
    o: &mut [S],
    (q, k, v): (&[S], &[S], &[S]),
    sizes: Sizes,
    block: &QueryBlock,
    kv: usize,
) -> Vec<S::Wide>
where
    S::Wide: Gemm,
{
    let Sizes { d, group, .. } = sizes;
    let n = block.rows.len();
    let stacked = stack::<S>(q, sizes, block, kv);
    let mut sums = vec![S::Wide::ZERO; group * n * d];
    let mut max = vec![S::Wide::NEG_INFINITY; group * n];
    let mut total = vec![S::Wide::ZERO; group * n];
    let mut p = Vec::new();
    let scale = S::Wide::of(1.0 / (d as f64).sqrt());
    for keys in key_blocks(block.document.start..block.first_position + n) {
        let (key_rows, value_rows) = (rows_of(k, sizes, &keys, kv), rows_of(v, sizes, &keys, kv));
        scores(&mut p, &stacked, key_rows.view(), (block, &keys), d, scale);
        for (row, ((max, total), sums)) in
            p.chunks_mut(keys.len()).zip(max.iter_mut().zip(&mut total).zip(sums.chunks_mut(d)))
        {
            vectorised(|| {
                let new_max = lane_max(row, *max);
                let correction = (*max - new_max).exp();
                row.iter_mut().for_each(|x| *x = (*x - new_max).exp());
                *total = *total * correction + lane_sum(row);
                sums.iter_mut().for_each(|s| *s *= correction);
                *max = new_max;
            });
        }
        let p = View::new(&p, group * n, keys.len(), keys.len());
        S::Wide::gemm(&mut sums, d, S::Wide::ONE, p, value_rows.view(), S::Wide::ONE);
    }
    for (i, (sums, total)) in sums.chunks(d).zip(&total).enumerate() {
        let column = (kv * group + i / n) * d;
        let row = &mut o[i % n * sizes.q_row() + column..][..d];
        row.iter_mut().zip(sums).for_each(|(o, s)| *o = S::narrow(*s / *total));
    }
    max.into_iter().zip(total).map(|(max, total)| max + total.ln()).collect()
}

#[inline(always)]
fn lane_max<W: Float>(row: &[W], start: W) -> W {
    let mut lanes = [start; 16];
    for chunk in row.chunks(16) {
        lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane = lane.max(*x));
    }
    lanes.into_iter().fold(start, W::max)
}

#[inline(always)]
fn lane_sum<W: Float>(row: &[W]) -> W {
    let mut lanes = [W::ZERO; 16];
    let chunks = row.chunks_exact(16);
    let rest: W = chunks.remainder().iter().copied().sum();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane += *x);
    }
    lanes.into_iter().sum::<W>() + rest
}

/// Queries of a group stacked head by head: `[group * rows, d]`.
fn stack<S: Storage>(all: &[S], sizes: Sizes, block: &QueryBlock, kv: usize) -> Vec<S::Wide> {
    let Sizes { d, group, .. } = sizes;
    let mut stacked = Vec::with_capacity(group * block.rows.len() * d);
    for head in kv * group..(kv + 1) * group {
        for row in block.rows.clone() {
            let elements = &all[row * sizes.q_row() + head * d..][..d];
            match S::as_wide(elements) {
                Some(wide) => stacked.extend_from_slice(wide),
                None => stacked.extend(elements.iter().map(|e| e.widen())),
            }
        }
    }
    stacked
}

/// Rows of keys or values of one kv head: in place where storage is wide, else a widened copy.
struct Rows<'a, W: Clone> {
    data: std::borrow::Cow<'a, [W]>,
    n: usize,
    d: usize,
    stride: usize,
}

impl<W: Clone> Rows<'_, W> {
    fn view(&self) -> View<'_, W> {
        View::new(&self.data, self.n, self.d, self.stride)
    }
}

fn rows_of<'a, S: Storage>(all: &'a [S], sizes: Sizes, keys: &Range<usize>, kv: usize) -> Rows<'a, S::Wide> {
    let (row, column) = (sizes.kv_row(), kv * sizes.d);
    let span = &all[keys.start * row + column..(keys.end - 1) * row + column + sizes.d];
    Rows { data: widened(span), n: keys.len(), d: sizes.d, stride: row }
}

/// Tensors that backward reads.
pub(super) struct Saved<'a, S: Storage> {
    pub d_o: &'a [S],
    pub o: &'a [S],
    pub lse: &'a [S::Wide],
    pub q: &'a [S],
    pub k: &'a [S],
    pub v: &'a [S],
}

/// `delta` is written, dq is written, dk and dv (wide, rows of the sequence) are added to.
pub(super) fn backward<S: Storage>(
    (dq, dk, dv): (&mut [S], &mut [S::Wide], &mut [S::Wide]),
    delta: &mut [S::Wide],
    saved: &Saved<S>,
    heads: Heads,
    window: &Window,
) where
    S::Wide: Gemm,
{
    let sizes = Sizes::of(heads);
    let c = (window.chunk.end - window.chunk.start) as usize;
    delta.par_chunks_mut(c).enumerate().for_each(|(head, delta)| {
        for (i, delta) in delta.iter_mut().enumerate() {
            let at = i * sizes.q_row() + head * sizes.d;
            let pairs = saved.d_o[at..at + sizes.d].iter().zip(&saved.o[at..at + sizes.d]);
            *delta = pairs.map(|(a, b)| a.widen() * b.widen()).sum();
        }
    });
    let delta = &*delta;
    let blocks = query_blocks(window);
    pieces(dq, &blocks, sizes.q_row()).into_par_iter().zip(&blocks).for_each(|(dq, block)| {
        for kv in 0..sizes.nk {
            query_gradient(dq, saved, delta, (sizes, c), block, kv);
        }
    });
    key_gradients((dk, dv), saved, delta, (sizes, c), &blocks);
}

/// Probabilities and score gradients of one block pair, stacked `[group * rows, keys]`.
struct Pair<W> {
    p: Vec<W>,
    ds: Vec<W>,
}

impl<W: Real + Gemm> Pair<W> {
    /// `p = exp(s - lse)`, `ds = p (do v^T - delta) scale`.
    fn compute<S: Storage<Wide = W>>(
        &mut self,
        saved: &Saved<S>,
        (q, d_o): (&[W], &[W]),
        delta: &[W],
        (sizes, c): (Sizes, usize),
        (block, keys): (&QueryBlock, &Range<usize>),
        kv: usize,
    ) {
        let Sizes { d, group, .. } = sizes;
        let n = block.rows.len();
        let scale = W::of(1.0 / (d as f64).sqrt());
        let (key_rows, value_rows) = (rows_of(saved.k, sizes, keys, kv), rows_of(saved.v, sizes, keys, kv));
        scores(&mut self.p, q, key_rows.view(), (block, keys), d, scale);
        self.ds.clear();
        self.ds.resize(group * n * keys.len(), W::ZERO);
        let d_o = View::new(d_o, group * n, d, d);
        W::gemm(&mut self.ds, keys.len(), W::ONE, d_o, value_rows.view().transposed(), W::ZERO);
        for (i, (p, ds)) in self.p.chunks_mut(keys.len()).zip(self.ds.chunks_mut(keys.len())).enumerate() {
            let at = (kv * group + i / n) * c + block.rows.start + i % n;
            let (lse, delta) = (saved.lse[at], delta[at]);
            vectorised(|| {
                for (p, ds) in p.iter_mut().zip(ds) {
                    *p = (*p - lse).exp();
                    *ds = *p * (*ds - delta) * scale;
                }
            });
        }
    }
}

/// The group's columns of dq of one block.
fn query_gradient<S: Storage>(
    dq: &mut [S],
    saved: &Saved<S>,
    delta: &[S::Wide],
    (sizes, c): (Sizes, usize),
    block: &QueryBlock,
    kv: usize,
) where
    S::Wide: Gemm,
{
    let Sizes { d, group, .. } = sizes;
    let n = block.rows.len();
    let (q, d_o) = (stack(saved.q, sizes, block, kv), stack(saved.d_o, sizes, block, kv));
    let mut sums = vec![S::Wide::ZERO; group * n * d];
    let mut pair = Pair { p: Vec::new(), ds: Vec::new() };
    for keys in key_blocks(block.document.start..block.first_position + n) {
        pair.compute(saved, (&q, &d_o), delta, (sizes, c), (block, &keys), kv);
        let ds = View::new(&pair.ds, group * n, keys.len(), keys.len());
        S::Wide::gemm(&mut sums, d, S::Wide::ONE, ds, rows_of(saved.k, sizes, &keys, kv).view(), S::Wide::ONE);
    }
    for (i, sums) in sums.chunks(d).enumerate() {
        let column = (kv * group + i / n) * d;
        let row = &mut dq[i % n * sizes.q_row() + column..][..d];
        row.iter_mut().zip(sums).for_each(|(to, from)| *to = S::narrow(*from));
    }
}

/// dk and dv of every key the chunk sees: blocks of keys over the cores, queries in order within each.
fn key_gradients<S: Storage>(
    (dk, dv): (&mut [S::Wide], &mut [S::Wide]),
    saved: &Saved<S>,
    delta: &[S::Wide],
    (sizes, c): (Sizes, usize),
    blocks: &[QueryBlock],
) where
    S::Wide: Gemm,
{
    let row = sizes.kv_row();
    let mut documents: Vec<(Range<usize>, &[QueryBlock])> = Vec::new();
    for of_document in blocks.chunk_by(|a, b| a.document == b.document) {
        let last = &of_document[of_document.len() - 1];
        documents.push((last.document.start..last.first_position + last.rows.len(), of_document));
    }
    for (keys, queries) in documents {
        let dk = &mut dk[keys.start * row..keys.end * row];
        let dv = &mut dv[keys.start * row..keys.end * row];
        let pieces = dk.par_chunks_mut(KEY_BLOCK * row).zip(dv.par_chunks_mut(KEY_BLOCK * row));
        pieces.enumerate().for_each(|(i, (dk, dv))| {
            let start = keys.start + i * KEY_BLOCK;
            let keys = start..start + dk.len() / row;
            let mut pair = Pair { p: Vec::new(), ds: Vec::new() };
            for block in queries.iter().filter(|b| b.first_position + b.rows.len() > keys.start) {
                // Keys past the block's last query are masked in every row.
                let keys = keys.start..keys.end.min(block.first_position + block.rows.len());
                for kv in 0..sizes.nk {
                    let (q, d_o) = (stack(saved.q, sizes, block, kv), stack(saved.d_o, sizes, block, kv));
                    pair.compute(saved, (&q, &d_o), delta, (sizes, c), (block, &keys), kv);
                    let n = sizes.group * block.rows.len();
                    let transposed = |m| View::new(m, n, keys.len(), keys.len()).transposed();
                    let column = kv * sizes.d;
                    let one = S::Wide::ONE;
                    S::Wide::gemm(
                        &mut dv[column..],
                        row,
                        one,
                        transposed(&pair.p),
                        View::new(&d_o, n, sizes.d, sizes.d),
                        one,
                    );
                    S::Wide::gemm(
                        &mut dk[column..],
                        row,
                        one,
                        transposed(&pair.ds),
                        View::new(&q, n, sizes.d, sizes.d),
                        one,
                    );
                }
            }
        });
    }
}
