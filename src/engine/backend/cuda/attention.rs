//! Attention of `trait Backend` on CUDA: library calls for each document fragment and some kv heads, gradients added up in
//! f32.
//!
//! Forward is one causal call a fragment. Backward takes the keys before the fragment's own in blocks, which all its queries
//! see, and then its own, causally: the library's causal backward computes every pair of a rectangle, also those behind the
//! mask, and is best at squares. So neither the shapes that need a plan nor the workspace grow with the sequence. Blocks are
//! whole tiles of the library's kernel: without a mask it takes what lies past the last key for scores of 0, whose
//! exponential overflows where log-sum-exps are far below.

use std::ops::Range;

use super::{
    super::{AttentionGrads, AttentionSaved, DType, Heads, Tensor, Window},
    Cuda,
    cudnn::{Pass, Shape},
    kernels::{
        Argument::{Count, Pointer},
        Grid,
    },
};
use crate::engine::Result;

/// (heads of a call) x (keys) x (head size) stays at or below this: past it cuDNN 9.19 writes wrong gradients and says nothing.
const MOST_ELEMENTS: u64 = 1 << 31;
/// (query heads) x (keys) that one call of forward or backward takes, as long as it takes one kv head's group at least: fewer
/// leave multiprocessors idle at the end of a call, more save nothing.
const FORWARD_HEAD_KEYS: u64 = 1 << 20;
const BACKWARD_HEAD_KEYS: u64 = 1 << 19;
/// Keys of a block of backward: enough that reading queries anew for each does not count.
const BLOCK_KEYS: u64 = 1 << 16;
/// Keys of a tile of the library's backward.
const TILE_KEYS: u64 = 128;
/// What cuDNN's workspace for a backward call may need beyond the bf16 gradients of every query head.
const LIBRARY_SLACK_BYTES: u64 = 1 << 20;
/// Elements that one thread of attention_accumulate adds, and threads of its block.
const ACCUMULATED: (u64, u32) = (8, 256);

/// One call: whole groups of some kv heads or a part of one group, rows of the chunk, keys of one document.
#[derive(Debug, Clone, Copy)]
struct Call {
    shape: Shape,
    /// First query head and first kv head.
    head: u64,
    kv_head: u64,
    /// First row of the chunk, first key of the sequence.
    row: u64,
    key: u64,
}

/// How many kv heads a call takes, and how many query heads of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Together {
    kv_heads: u64,
    heads: u64,
}

impl Together {
    /// As many as `head_keys` allows against so many keys.
    fn of(heads: Heads, keys: u64, head_keys: u64) -> Self {
        let Heads { n_heads, n_kv_heads, head_dim } = heads;
        let group = n_heads / n_kv_heads;
        let most = |of: u64, fits: &dyn Fn(u64) -> bool| (1..=of).rev().find(|n| of.is_multiple_of(*n) && fits(*n));
        let in_group = most(group, &|n| n * keys * head_dim <= MOST_ELEMENTS).unwrap_or(1);
        let kv_heads = most(n_kv_heads, &|n| in_group == group && n * group * keys <= head_keys).unwrap_or(1);
        Self { kv_heads, heads: in_group }
    }
}

/// Queries of a chunk and keys of the sequence that one set of calls computes.
struct Piece {
    queries: Range<u64>,
    keys: Range<u64>,
    causal: bool,
}

/// The pieces of a window's document fragments: each fragment's queries against all its keys.
fn forward_pieces(window: &Window) -> Vec<Piece> {
    let fragment = |document: &Range<u64>| {
        let queries = document.start.max(window.chunk.start)..document.end.min(window.chunk.end);
        let keys = document.start..queries.end;
        (!queries.is_empty()).then_some(Piece { queries, keys, causal: true })
    };
    window.documents.iter().filter_map(fragment).collect()
}

/// The same, keys in blocks: those before the fragment, as far as they fill tiles, and then its own.
fn backward_pieces(window: &Window) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for Piece { queries, keys, .. } in forward_pieces(window) {
        let own = queries.start - (queries.start - keys.start) % TILE_KEYS;
        for block in (keys.start..own).step_by(BLOCK_KEYS as usize) {
            let keys = block..own.min(block + BLOCK_KEYS);
            pieces.push(Piece { queries: queries.clone(), keys, causal: false });
        }
        pieces.push(Piece { keys: own..queries.end, queries, causal: true });
    }
    pieces
}

/// The calls of these pieces.
fn calls(heads: Heads, chunk: &Range<u64>, pieces: &[Piece], head_keys: u64) -> Vec<Call> {
    let group = heads.n_heads / heads.n_kv_heads;
    let mut calls = Vec::new();
    for Piece { queries, keys, causal } in pieces {
        let together = Together::of(heads, keys.end - keys.start, head_keys);
        let shape = Shape {
            causal: *causal,
            kv_heads: together.kv_heads as i64,
            heads: together.heads as i64,
            head_dim: heads.head_dim as i64,
            queries: (queries.end - queries.start) as i64,
            keys: (keys.end - keys.start) as i64,
            q_stride: (heads.n_heads * heads.head_dim) as i64,
            kv_stride: (heads.n_kv_heads * heads.head_dim) as i64,
            stats_stride: (chunk.end - chunk.start) as i64,
        };
        let (row, key) = (queries.start - chunk.start, keys.start);
        let all = (0..heads.n_heads).step_by((together.kv_heads * together.heads) as usize);
        calls.extend(all.map(|head| Call { shape, head, kv_head: head / group, row, key }));
    }
    calls
}

/// The workspace of backward: sums of dq in f32, then one call's dk, dv and dq, the library's f32 sums of dq, and its own
/// workspace. Offsets in bytes; the sums come first.
#[derive(Debug, Clone, Copy)]
struct Regions {
    dk: u64,
    dv: u64,
    dq: u64,
    dq_sums: u64,
    library: u64,
    end: u64,
}

impl Regions {
    /// For chunks of up to `c` queries against up to `keys` keys.
    fn of(heads: Heads, c: u64, keys: u64) -> Self {
        let Heads { n_heads, n_kv_heads, head_dim } = heads;
        let group = n_heads / n_kv_heads;
        let align = |bytes: u64| bytes.next_multiple_of(256);
        let block = keys.min(BLOCK_KEYS.max(c + TILE_KEYS));
        let head_keys = (n_heads * block).min(BACKWARD_HEAD_KEYS.max(group * block));
        let gradients = align(head_keys.div_ceil(group) * head_dim * 2);
        let queries = c * n_heads * head_dim;
        let dk = align(queries * 4);
        let (dv, dq) = (dk + gradients, dk + 2 * gradients);
        let dq_sums = dq + align(queries * 2);
        let library = dq_sums + align(queries * 4);
        // Of every query head a dk and a dv, when a group has more than one.
        let by_head = if group > 1 { 2 * align(head_keys * head_dim * 2) } else { 0 };
        Self { dk, dv, dq, dq_sums, library, end: library + by_head + LIBRARY_SLACK_BYTES }
    }
}

/// `Backend::attention_workspace`.
pub fn workspace_bytes(heads: Heads, c: u64, kv: u64) -> u64 {
    Regions::of(heads, c, kv).end
}

impl Cuda {
    /// Address of an element of a bf16 or f32 matrix.
    fn element(&self, tensor: Tensor, row: u64, column: u64) -> u64 {
        self.device.address(tensor) + (row * tensor.cols + column) * tensor.dtype.bytes()
    }

    /// Addresses of q, k, v, o and the log-sum-exps of a call.
    fn operands(
        &self,
        call: Call,
        heads: Heads,
        (q, k, v, o, lse): (Tensor, Tensor, Tensor, Tensor, Tensor),
    ) -> [u64; 5] {
        let (column, kv_column) = (call.head * heads.head_dim, call.kv_head * heads.head_dim);
        [
            self.element(q, call.row, column),
            self.element(k, call.key, kv_column),
            self.element(v, call.key, kv_column),
            self.element(o, call.row, column),
            self.element(lse, call.head, call.row),
        ]
    }

    /// `Backend::prepare_attention`.
    pub fn prepare_attention(&mut self, heads: Heads, window: &Window) -> Result {
        let forward = calls(heads, &window.chunk, &forward_pieces(window), FORWARD_HEAD_KEYS);
        let backward = calls(heads, &window.chunk, &backward_pieces(window), BACKWARD_HEAD_KEYS);
        for (pass, calls) in [(Pass::Forward, forward), (Pass::Backward, backward)] {
            for call in calls {
                self.attention.workspace_bytes(pass, call.shape)?;
            }
        }
        Ok(())
    }

    /// `Backend::attention`.
    ///
    /// # Panics
    /// When the workspace is smaller than [`workspace_bytes`].
    pub fn attention(
        &mut self,
        o: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        workspace: Tensor,
        heads: Heads,
        window: &Window,
    ) -> Result {
        for call in calls(heads, &window.chunk, &forward_pieces(window), FORWARD_HEAD_KEYS) {
            let tensors = self.operands(call, heads, (q, k, v, o, lse));
            let bytes = self.attention.workspace_bytes(Pass::Forward, call.shape)?;
            assert!(bytes <= workspace.bytes(), "cuDNN wants {bytes} bytes of workspace for {:?}", call.shape);
            self.attention.run(Pass::Forward, call.shape, &tensors, self.device.address(workspace))?;
        }
        Ok(())
    }

    /// `Backend::attention_backward`. The spread of dq, dk and dv between runs is that of cuDNN's atomic additions.
    ///
    /// # Panics
    /// When the workspace is smaller than [`workspace_bytes`].
    pub fn attention_backward(
        &mut self,
        grads: AttentionGrads,
        saved: AttentionSaved,
        workspace: Tensor,
        heads: Heads,
        window: &Window,
    ) -> Result {
        let AttentionGrads { dq, dk, dv, delta } = grads;
        let AttentionSaved { d_o, o, lse, q, k, v } = saved;
        let d = heads.head_dim;
        let regions = Regions::of(heads, dq.rows, k.rows);
        let start = self.device.address(workspace);
        let dq_wide = Tensor { offset: workspace.offset, dtype: DType::F32, ..dq };
        self.device.fill_bytes(dq_wide, 0)?;
        for call in calls(heads, &window.chunk, &backward_pieces(window), BACKWARD_HEAD_KEYS) {
            let Call { shape, head, kv_head, row, key } = call;
            let bytes = regions.library + self.attention.workspace_bytes(Pass::Backward, shape)?;
            assert!(bytes <= workspace.bytes(), "cuDNN wants {bytes} bytes of workspace for {shape:?}");
            let mut tensors = self.operands(call, heads, (q, k, v, o, lse)).to_vec();
            tensors.extend([
                self.element(d_o, row, head * d),
                start + regions.dq,
                start + regions.dk,
                start + regions.dv,
                self.element(delta, head, row),
                start + regions.dq_sums,
            ]);
            self.attention.run(Pass::Backward, shape, &tensors, start + regions.library)?;
            let (keys, columns) = (shape.keys as u64, shape.kv_heads as u64 * d);
            self.add_part((dk, key, kv_head * d), start + regions.dk, keys, columns)?;
            self.add_part((dv, key, kv_head * d), start + regions.dv, keys, columns)?;
            let columns = columns * shape.heads as u64;
            self.add_part((dq_wide, row, head * d), start + regions.dq, shape.queries as u64, columns)?;
        }
        self.cast(dq, dq_wide)
    }

    /// Adds a call's gradient (bf16 `[rows, columns]`, packed, at `part`) to `to` (f32) from this row and column on.
    fn add_part(&self, (to, row, column): (Tensor, u64, u64), part: u64, rows: u64, columns: u64) -> Result {
        assert_eq!(to.dtype, DType::F32, "gradients are added up wide");
        let (each, threads) = ACCUMULATED;
        let grid = Grid { blocks: (rows * columns).div_ceil(each * u64::from(threads)), threads, shared_bytes: 0 };
        let counts = [rows, columns, to.cols].map(|count| Count(count as i64));
        let arguments = [Pointer(self.element(to, row, column)), Pointer(part), counts[0], counts[1], counts[2]];
        self.kernels.launch(&self.device, "attention_accumulate", grid, &arguments)
    }
}
