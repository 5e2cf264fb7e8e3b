//! Calls of many documents, or of a piece of any length: where each lies comes with the call in device memory, so that a plan
//! serves every set of documents up to its shape.
//!
//! The numbers travel among a launch's arguments and a kernel writes the library's lists from them: nothing is copied, nothing
//! waited for. The library has such a call's log-sum-exps as `[rows, heads]`; a kernel turns them.

use super::{
    super::{
        super::{AttentionSaved, Heads, Tensor, Window},
        Cuda,
        cudnn::{Pass, Shape},
        kernels::{
            Argument::{Count, Documents, Flag, Pointer},
            DOCUMENT_LIST, Grid,
        },
    },
    Operands, Sums, THREADS,
    pieces::{Piece, TILE_KEYS},
    shapes::shape_of,
    single::Together,
    workspace::{LIST_BYTES, LISTS, Regions},
};
use crate::engine::{Result, backend::DType};

/// Rows that follow one another in the sequence and in a call's own outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// First row of the outputs, of dq and of dk and dv alike.
    pub(super) place: u64,
    /// First position in the sequence.
    pub(super) query: u64,
    pub(super) key: u64,
    pub(super) queries: u64,
    pub(super) keys: u64,
}

/// The runs of a call's pieces, which its outputs hold one after another.
pub(super) fn runs(pieces: &[Piece]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut place = 0;
    for piece in pieces {
        let (queries, keys) = (piece.n_queries(), piece.n_keys());
        match runs.last_mut() {
            Some(run) if run.query + run.queries == piece.queries.start && run.key + run.keys == piece.keys.start => {
                run.queries += queries;
                run.keys += keys;
            }
            _ => runs.push(Run { place, query: piece.queries.start, key: piece.keys.start, queries, keys }),
        }
        place += queries;
    }
    runs
}

/// Row numbers of a call's documents: in q from the first piece's first query on (and in k from its first key), in the outputs,
/// and how many queries; one more of the first two, where all end.
///
/// The library before 9.25 is wrong about documents of no rows, so what a shape has more than there are pieces repeats the
/// first tile of the last: its rows of o are written again as they are, and its other outputs go to a tile behind all others.
pub(super) fn documents(pieces: &[Piece], shape: Shape) -> [[i32; DOCUMENT_LIST]; 3] {
    let mut lists = [[0; DOCUMENT_LIST]; 3];
    let count = shape.documents.unwrap_or(0) as usize;
    let first = pieces[0].queries.start;
    let mut place = 0;
    for i in 0..count {
        let (piece, repeated) = pieces.get(i).map_or_else(|| (&pieces[pieces.len() - 1], true), |piece| (piece, false));
        let n = if repeated { TILE_KEYS } else { piece.n_queries() };
        let numbers = [piece.queries.start - first, place, n];
        for (list, number) in lists.iter_mut().zip(numbers) {
            list[i] = number as i32;
        }
        place += if repeated { 0 } else { n };
    }
    let last = &pieces[pieces.len() - 1];
    let spare = if count > pieces.len() { TILE_KEYS } else { 0 };
    lists[0][count] = (last.queries.end - first) as i32;
    lists[1][count] = (place + spare) as i32;
    lists
}

/// A call for each of some heads, over the same pieces.
#[derive(Debug)]
struct Set {
    shape: Shape,
    heads: Heads,
    regions: Regions,
    workspace: Tensor,
    /// Of the window's chunk.
    first_row: u64,
    runs: Vec<Run>,
    documents: [[i32; DOCUMENT_LIST]; 3],
    /// Keys of every document more than its queries.
    more_keys: i64,
}

impl Set {
    fn new(
        pass: Pass,
        heads: Heads,
        window: &Window,
        pieces: &[Piece],
        (regions, workspace): (Regions, Tensor),
    ) -> Self {
        let shape = shape_of(heads, pass, window, pieces);
        let more_keys = pieces[0].n_keys() as i64 - pieces[0].n_queries() as i64;
        let (runs, documents) = (runs(pieces), documents(pieces, shape));
        Self { shape, heads, regions, workspace, first_row: window.chunk.start, runs, documents, more_keys }
    }

    /// First query head and first kv head of each call.
    fn calls(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let Shape { kv_heads, heads, .. } = self.shape;
        Together { kv_heads: kv_heads as u64, heads: heads as u64 }.calls(self.heads)
    }

    fn columns(&self) -> (u64, u64) {
        let d = self.heads.head_dim;
        (self.shape.all_heads() as u64 * d, self.shape.kv_heads as u64 * d)
    }

    /// First row of q and first key of k.
    fn start(&self) -> (u64, u64) {
        (self.runs[0].query - self.first_row, self.runs[0].key)
    }

    /// Rows of the call's own outputs.
    fn rows(&self) -> u64 {
        self.runs.iter().map(|run| run.queries).sum::<u64>() + TILE_KEYS
    }
}

impl Cuda {
    /// Writes a set's lists, which serve all its calls.
    fn write_lists(&self, set: &Set) -> Result {
        let lists = self.device.address(set.workspace) + set.regions.lists;
        let (dq_columns, dkv_columns) = set.columns();
        let strides =
            [set.shape.q_stride, set.shape.kv_stride, set.shape.all_heads(), dq_columns as i64, dkv_columns as i64];
        let mut arguments = vec![Pointer(lists), Documents(&set.documents)];
        arguments.extend([set.shape.documents.unwrap_or(0), set.more_keys].map(Count));
        arguments.extend(strides.map(Count));
        let grid = Grid { blocks: 1, threads: THREADS, shared_bytes: 0 };
        self.kernels.launch(&self.device, "attention_documents", grid, &arguments)
    }

    /// Turns the rows of a set between a call's log-sum-exps and the heads of `lse` from `head` on; `back` writes `lse`.
    fn turn_statistics(&self, set: &Set, lse: Tensor, head: u64, back: bool) -> Result {
        let heads = set.shape.all_heads() as u64;
        let packed = self.device.address(set.workspace) + set.regions.statistics;
        for run in &set.runs {
            let blocks = (run.queries * heads).div_ceil(u64::from(THREADS));
            let arguments = [
                Pointer(packed + run.place * heads * 4),
                Pointer(self.element(lse, head, run.query - set.first_row)),
                Count(run.queries as i64),
                Count(heads as i64),
                Count(lse.cols as i64),
                Flag(i32::from(back)),
            ];
            let grid = Grid { blocks, threads: THREADS, shared_bytes: 0 };
            self.kernels.launch(&self.device, "attention_statistics", grid, &arguments)?;
        }
        Ok(())
    }

    /// Addresses of q, k, v, o and the log-sum-exps of a call, then of the lists that both passes read.
    fn packed_operands(
        &self,
        set: &Set,
        (head, kv_head): (u64, u64),
        operands: Operands,
    ) -> ([u64; 5], [u64; LISTS as usize]) {
        let Operands { q, k, v, o, .. } = operands;
        let d = set.heads.head_dim;
        let ((row, key), start) = (set.start(), self.device.address(set.workspace));
        let tensors = [
            self.element(q, row, head * d),
            self.element(k, key, kv_head * d),
            self.element(v, key, kv_head * d),
            self.element(o, row, head * d),
            start + set.regions.statistics,
        ];
        (tensors, std::array::from_fn(|i| start + set.regions.lists + i as u64 * LIST_BYTES))
    }

    /// Queues a call.
    fn run_packed(&mut self, pass: Pass, set: &Set, tensors: &[u64]) -> Result {
        let bytes = set.regions.library + self.attention.workspace_bytes(pass, set.shape)?;
        assert!(bytes <= set.workspace.bytes(), "cuDNN wants {bytes} bytes of workspace for {:?}", set.shape);
        self.attention.run(pass, set.shape, tensors, self.device.address(set.workspace) + set.regions.library)
    }

    /// Forward of a set of pieces.
    pub(super) fn packed_forward(
        &mut self,
        operands: Operands,
        workspace: Tensor,
        heads: Heads,
        window: &Window,
        pieces: &[Piece],
    ) -> Result {
        let regions = Regions::of(heads, operands.q.rows, operands.k.rows);
        let set = Set::new(Pass::Forward, heads, window, pieces, (regions, workspace));
        self.write_lists(&set)?;
        for (head, kv_head) in set.calls() {
            let (tensors, [q, kv, stats, _, _, queries, keys]) = self.packed_operands(&set, (head, kv_head), operands);
            let tensors = [&tensors[..], &[q, kv, stats, queries, keys]].concat();
            self.run_packed(Pass::Forward, &set, &tensors)?;
            self.turn_statistics(&set, operands.lse, head, true)?;
        }
        Ok(())
    }

    /// Backward of a set of pieces; adds to `sums`.
    pub(super) fn packed_backward(
        &mut self,
        sums: Sums,
        saved: AttentionSaved,
        workspace: Tensor,
        heads: Heads,
        window: &Window,
        pieces: &[Piece],
    ) -> Result {
        let operands = Operands::of(saved);
        let regions = Regions::of(heads, saved.q.rows, saved.k.rows);
        let set = Set::new(Pass::Backward, heads, window, pieces, (regions, workspace));
        let (start, d) = (self.device.address(workspace), heads.head_dim);
        let (dq_columns, dkv_columns) = set.columns();
        let dq_sums = Tensor {
            offset: workspace.offset + regions.dq_sums,
            dtype: DType::F32,
            rows: set.rows(),
            cols: dq_columns,
            ..workspace
        };
        self.write_lists(&set)?;
        for (head, kv_head) in set.calls() {
            self.turn_statistics(&set, saved.lse, head, false)?;
            // Before 9.18 the library left out rows of these.
            self.device.fill_bytes(dq_sums, 0)?;
            let (tensors, [q, kv, stats, dq, dkv, queries, keys]) =
                self.packed_operands(&set, (head, kv_head), operands);
            let mut tensors = tensors.to_vec();
            tensors.push(self.element(saved.d_o, set.start().0, head * d));
            tensors.extend([regions.dq, regions.dk, regions.dv, regions.delta, regions.dq_sums].map(|at| start + at));
            tensors.extend([q, kv, stats, queries, keys, dq, dkv]);
            if set.shape.heads > 1 {
                tensors.extend([start + regions.dk_by_head, start + regions.dv_by_head]);
            }
            self.run_packed(Pass::Backward, &set, &tensors)?;
            for run in &set.runs {
                let (row, dq_part, dkv_part) =
                    (run.query - set.first_row, run.place * dq_columns * 2, run.place * dkv_columns * 2);
                self.add_part((sums.dk, run.key, kv_head * d), start + regions.dk + dkv_part, run.keys, dkv_columns)?;
                self.add_part((sums.dv, run.key, kv_head * d), start + regions.dv + dkv_part, run.keys, dkv_columns)?;
                self.add_part((sums.dq, row, head * d), start + regions.dq + dq_part, run.queries, dq_columns)?;
            }
        }
        Ok(())
    }
}
