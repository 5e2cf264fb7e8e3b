//! Calls for packed documents: rows are copied, padded to one of a few numbers, so that plans serve all lengths and several
//! short documents share a call.
//!
//! Padding does nothing. Behind the last query and key the mask hides it from what is there, and its own queries have no
//! gradient and a log-sum-exp so high that they see nothing; likewise before the first query, where a document began before the
//! chunk. Keys before the chunk come in blocks that need none. Their parts of the output are put together in f32 by their
//! log-sum-exps (as FlashDecoding does: Dao et al. 2023).

use std::collections::BTreeMap;

use super::{
    super::{
        super::{AttentionSaved, Heads, Tensor, Window},
        Cuda,
        cudnn::{Pass, Shape},
        kernels::{MOST_STAGED, StagedRows},
    },
    Operands, Sums, Together,
    pieces::{Piece, packed_pieces},
    staged::Staged,
};
use crate::{
    domain::attention_workspace::{PackedRegions, Room, padded},
    engine::Result,
};

/// Pieces of one size that share calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Set {
    pub(super) pieces: Vec<Piece>,
    /// Nothing of their queries' output is there yet.
    pub(super) first: bool,
}

/// The sets of a window, those of one fragment in order. Whole fragments of a length go together, as powers of 4: few plans.
pub(super) fn sets(heads: Heads, room: Room, window: &Window) -> Vec<Set> {
    let mut sets = Vec::new();
    let mut whole: BTreeMap<u64, Vec<Piece>> = BTreeMap::new();
    for pieces in packed_pieces(window) {
        match <[Piece; 1]>::try_from(pieces) {
            Ok([piece]) if piece.queries == piece.keys => {
                whole.entry(padded(piece.n_keys())).or_default().push(piece);
            }
            Ok(piece) => sets.push(Set { pieces: piece.to_vec(), first: true }),
            Err(pieces) => {
                let set = |(i, piece)| Set { pieces: vec![piece], first: i == 0 };
                sets.extend(pieces.into_iter().enumerate().map(set));
            }
        }
    }
    for (rows, pieces) in whole {
        let most = (room.head_queries.min(room.head_keys) / (rows * heads.n_heads)).clamp(1, MOST_STAGED as u64);
        let mut rest = &pieces[..];
        while !rest.is_empty() {
            let (set, others) = rest.split_at(4usize.pow(most.min(rest.len() as u64).ilog(4)));
            sets.push(Set { pieces: set.to_vec(), first: true });
            rest = others;
        }
    }
    sets
}

impl Set {
    /// Rows of an entry's queries and of its keys.
    pub(super) fn rows(&self) -> (u64, u64) {
        let piece = &self.pieces[0];
        if piece.causal {
            (padded(piece.n_keys()), padded(piece.n_keys()))
        } else {
            (padded(piece.n_queries()), piece.n_keys())
        }
    }

    /// Of the calls that it takes, each for some heads.
    pub(super) fn shape(&self, heads: Heads, room: Room) -> (Together, Shape) {
        let (queries, keys) = self.rows();
        let n = self.pieces.len() as u64;
        let fits = |heads: u64| n * heads * queries <= room.head_queries && n * heads * keys <= room.head_keys;
        let group = heads.n_heads / heads.n_kv_heads;
        let together = Together::most(heads, fits, |kv_heads| fits(kv_heads * group));
        let shape = Shape {
            causal: self.pieces[0].causal,
            staged: true,
            kv_heads: (n * together.kv_heads) as i64,
            heads: together.heads as i64,
            head_dim: heads.head_dim as i64,
            queries: queries as i64,
            keys: keys as i64,
            q_stride: (together.heads * heads.head_dim) as i64,
            kv_stride: heads.head_dim as i64,
            stats_stride: queries as i64,
        };
        (together, shape)
    }

    /// Where rows of queries are in the chunk, and of keys in the sequence. Queries of a causal piece have their keys' places.
    pub(super) fn staged_rows(&self, window: &Window) -> [StagedRows; 2] {
        let mut rows = [[[0; 3]; MOST_STAGED]; 2];
        for (i, piece) in self.pieces.iter().enumerate() {
            let before = if piece.causal { piece.queries.start - piece.keys.start } else { 0 };
            let first = piece.queries.start as i64 - window.chunk.start as i64 - before as i64;
            rows[0][i] = [first as i32, before as i32, (before + piece.n_queries()) as i32];
            rows[1][i] = [piece.keys.start as i32, 0, piece.n_keys() as i32];
        }
        rows
    }
}

/// The shape of every call of a window.
pub(super) fn shapes(heads: Heads, window: &Window) -> Vec<(Pass, Shape)> {
    let keys = window.documents.last().map_or(0, |document| document.end);
    let room = Room::of(heads, window.chunk.end - window.chunk.start, keys);
    let of = |set: &Set| [Pass::Forward, Pass::Backward].map(|pass| (pass, set.shape(heads, room).1));
    sets(heads, room, window).iter().flat_map(of).collect()
}

/// One call: its shape, and which rows and heads it takes.
struct Call {
    shape: Shape,
    queries: Staged,
    keys: Staged,
    /// Nothing of its queries' output is there yet.
    first: bool,
}

/// The calls of a window, in order.
fn calls(heads: Heads, room: Room, window: &Window) -> Vec<Call> {
    let mut calls = Vec::new();
    for set in sets(heads, room, window) {
        let (together, shape) = set.shape(heads, room);
        let [of_queries, of_keys] = set.staged_rows(window);
        let documents = set.pieces.len() as u64;
        let staged = |head: u64, heads_of_group: u64, rows: i64, at: StagedRows| Staged {
            documents,
            groups: together.kv_heads,
            rows: rows as u64,
            heads: heads_of_group,
            head_dim: heads.head_dim,
            head,
            at,
        };
        calls.extend(together.calls(heads).map(|(head, kv_head)| Call {
            shape,
            queries: staged(head, together.heads, shape.queries, of_queries),
            keys: staged(kv_head, 1, shape.keys, of_keys),
            first: set.first,
        }));
    }
    calls
}

impl Cuda {
    /// Forward of a window into f32 `sums`, laid out as o.
    pub(super) fn packed_forward(
        &mut self,
        operands: Operands,
        sums: Tensor,
        workspace: Tensor,
        heads: Heads,
        window: &Window,
    ) -> Result {
        let Operands { q, k, v, lse, .. } = operands;
        let (room, regions) = (Room::of(heads, q.rows, k.rows), PackedRegions::of(heads, q.rows, k.rows));
        let at = |offset: u64| self.device.address(workspace) + offset;
        let [at_q, at_k, at_v, o, statistics] =
            [regions.q, regions.k, regions.v, regions.o, regions.statistics].map(at);
        for Call { shape, queries, keys, first } in calls(heads, room, window) {
            self.stage(&queries, at_q, q)?;
            self.stage(&keys, at_k, k)?;
            self.stage(&keys, at_v, v)?;
            self.run(Pass::Forward, shape, &[at_q, at_k, at_v, o, statistics], (workspace, regions.library))?;
            self.merge_output(&queries, (sums, o), (lse, statistics), first)?;
            self.merge_statistics(&queries, (lse, statistics), first)?;
        }
        Ok(())
    }

    /// Backward of a window; adds to `sums`.
    pub(super) fn packed_backward(
        &mut self,
        sums: Sums,
        saved: AttentionSaved,
        workspace: Tensor,
        heads: Heads,
        window: &Window,
    ) -> Result {
        let AttentionSaved { d_o, o, lse, q, k, v } = saved;
        let (room, r) = (Room::of(heads, q.rows, k.rows), PackedRegions::of(heads, q.rows, k.rows));
        let offsets = [r.q, r.k, r.v, r.o, r.statistics, r.d_o, r.dq, r.dk, r.dv, r.delta, r.dq_sums];
        let tensors = offsets.map(|offset| self.device.address(workspace) + offset);
        let [at_q, at_k, at_v, at_o, statistics, at_d_o, dq, dk, dv, ..] = tensors;
        for Call { shape, queries, keys, .. } in calls(heads, room, window) {
            for (staged, to, from) in
                [(&queries, at_q, q), (&keys, at_k, k), (&keys, at_v, v), (&queries, at_o, o), (&queries, at_d_o, d_o)]
            {
                self.stage(staged, to, from)?;
            }
            self.stage_statistics(&queries, statistics, lse)?;
            self.run(Pass::Backward, shape, &tensors, (workspace, r.library))?;
            for (staged, from, to) in [(&queries, dq, sums.dq), (&keys, dk, sums.dk), (&keys, dv, sums.dv)] {
                self.add_staged(staged, from, to)?;
            }
        }
        Ok(())
    }
}
