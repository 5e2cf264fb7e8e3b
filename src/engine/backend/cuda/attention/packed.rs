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
        kernels::{
            Argument::{self, Count, Flag, Pointer},
            MOST_STAGED, StagedRows,
        },
    },
    ELEMENTS, Operands, Sums, Together, grid,
    pieces::{Piece, packed_pieces},
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

/// Operands of a set: how a call has them, and where they come from.
struct Stage<'a> {
    shape: Shape,
    heads: Heads,
    /// kv heads of a piece.
    kv_heads: u64,
    /// Of queries, of keys.
    rows: &'a [StagedRows; 2],
    /// First query head and first kv head.
    head: u64,
    kv_head: u64,
}

/// Which rows and heads of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Queries,
    Keys,
}

impl Stage<'_> {
    /// Rows of an entry, elements of a row, and the first column of the tensor.
    fn size(&self, kind: Kind) -> (u64, u64, u64) {
        let d = self.heads.head_dim;
        match kind {
            Kind::Queries => (self.shape.queries as u64, self.shape.heads as u64 * d, self.head * d),
            Kind::Keys => (self.shape.keys as u64, d, self.kv_head * d),
        }
    }

    fn rows(&self, kind: Kind) -> &StagedRows {
        &self.rows[usize::from(kind == Kind::Keys)]
    }
}

impl Cuda {
    /// A kernel between a call's operand at `staged` and these rows and heads of a tensor.
    fn move_staged(&self, kernel: &'static str, stage: &Stage, kind: Kind, staged: u64, tensor: Tensor) -> Result {
        let (rows, width, column) = stage.size(kind);
        let n = stage.shape.kv_heads as u64 * rows * width;
        let mut arguments =
            vec![Pointer(staged), Pointer(self.element(tensor, 0, column)), Argument::StagedRows(stage.rows(kind))];
        arguments.extend([n, rows, width, stage.kv_heads, tensor.cols].map(|count| Count(count as i64)));
        self.kernels.launch(&self.device, kernel, grid(n / ELEMENTS), &arguments)
    }

    /// Copies a call's q, k and v to the workspace; their addresses.
    fn stage_inputs(&self, stage: &Stage, [q, k, v]: [Tensor; 3], to: [u64; 3]) -> Result<[u64; 3]> {
        for (kind, tensor, to) in [(Kind::Queries, q, to[0]), (Kind::Keys, k, to[1]), (Kind::Keys, v, to[2])] {
            self.move_staged("attention_stage", stage, kind, to, tensor)?;
        }
        Ok(to)
    }

    /// The arguments that both kernels on log-sum-exps begin with, and the number of these.
    fn statistics<'a>(&self, stage: &'a Stage, staged: u64, lse: Tensor) -> (Vec<Argument<'a>>, u64) {
        let n = stage.shape.kv_heads as u64 * (stage.shape.heads * stage.shape.queries) as u64;
        let heads = stage.shape.heads as u64;
        let mut arguments = vec![
            Pointer(staged),
            Pointer(self.element(lse, stage.head, 0)),
            Argument::StagedRows(stage.rows(Kind::Queries)),
        ];
        arguments
            .extend([n, stage.shape.queries as u64, heads, stage.kv_heads, lse.cols].map(|count| Count(count as i64)));
        (arguments, n)
    }

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
        let (c, keys) = (q.rows, k.rows);
        let (room, regions) = (Room::of(heads, c, keys), PackedRegions::of(heads, c, keys));
        let at = |offset: u64| self.device.address(workspace) + offset;
        let (inputs, o, statistics) =
            ([regions.q, regions.k, regions.v].map(at), at(regions.o), at(regions.statistics));
        for set in sets(heads, room, window) {
            let (together, shape) = set.shape(heads, room);
            let rows = set.staged_rows(window);
            for (head, kv_head) in together.calls(heads) {
                let stage = Stage { shape, heads, kv_heads: together.kv_heads, rows: &rows, head, kv_head };
                let [q, k, v] = self.stage_inputs(&stage, [q, k, v], inputs)?;
                self.run(Pass::Forward, shape, &[q, k, v, o, statistics], (workspace, regions.library))?;
                self.merge(&stage, (sums, o), (lse, statistics), set.first)?;
            }
        }
        Ok(())
    }

    /// Puts a call's output and log-sum-exps together with what is there.
    fn merge(&self, stage: &Stage, (sums, o): (Tensor, u64), (lse, statistics): (Tensor, u64), first: bool) -> Result {
        let (rows, width, column) = stage.size(Kind::Queries);
        let n = stage.shape.kv_heads as u64 * rows * width;
        let pointers = [o, self.element(sums, 0, column), statistics, self.element(lse, stage.head, 0)];
        let mut arguments: Vec<_> = pointers.map(Pointer).into();
        arguments.push(Argument::StagedRows(stage.rows(Kind::Queries)));
        let counts = [n, rows, width, stage.heads.head_dim, stage.kv_heads, sums.cols, lse.cols];
        arguments.extend(counts.map(|count| Count(count as i64)));
        arguments.push(Flag(first.into()));
        self.kernels.launch(&self.device, "attention_merge", grid(n / ELEMENTS), &arguments)?;
        let (mut arguments, n) = self.statistics(stage, statistics, lse);
        arguments.push(Flag(first.into()));
        self.kernels.launch(&self.device, "attention_merge_statistics", grid(n), &arguments)
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
        let (c, keys) = (q.rows, k.rows);
        let (room, r) = (Room::of(heads, c, keys), PackedRegions::of(heads, c, keys));
        let offsets = [r.q, r.k, r.v, r.o, r.statistics, r.d_o, r.dq, r.dk, r.dv, r.delta, r.dq_sums];
        let tensors = offsets.map(|offset| self.device.address(workspace) + offset);
        let [at_q, at_k, at_v, at_o, statistics, at_d_o, dq, dk, dv, ..] = tensors;
        for set in sets(heads, room, window) {
            let (together, shape) = set.shape(heads, room);
            let rows = set.staged_rows(window);
            for (head, kv_head) in together.calls(heads) {
                let stage = Stage { shape, heads, kv_heads: together.kv_heads, rows: &rows, head, kv_head };
                self.stage_inputs(&stage, [q, k, v], [at_q, at_k, at_v])?;
                self.move_staged("attention_stage", &stage, Kind::Queries, at_o, o)?;
                self.move_staged("attention_stage", &stage, Kind::Queries, at_d_o, d_o)?;
                let (arguments, n) = self.statistics(&stage, statistics, lse);
                self.kernels.launch(&self.device, "attention_stage_statistics", grid(n), &arguments)?;
                self.run(Pass::Backward, shape, &tensors, (workspace, r.library))?;
                for (kind, from, to) in
                    [(Kind::Queries, dq, sums.dq), (Kind::Keys, dk, sums.dk), (Kind::Keys, dv, sums.dv)]
                {
                    self.move_staged("attention_add_staged", &stage, kind, from, to)?;
                }
            }
        }
        Ok(())
    }
}
