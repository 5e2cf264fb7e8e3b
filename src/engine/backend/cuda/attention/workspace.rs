//! The workspace that both passes share, by formula: the planner lays it out before there is a device.

use super::{
    super::{super::Heads, kernels::DOCUMENT_LIST},
    BACKWARD_HEAD_KEYS,
    pieces::{BLOCK_KEYS, TILE_KEYS},
};

/// What cuDNN's workspace for a call may need beyond the bf16 gradients of every query head.
const LIBRARY_SLACK_BYTES: u64 = 1 << 20;
/// Lists of a packed call: five of int64, two of int32, all as far apart.
pub(super) const LISTS: u64 = 7;
pub(super) const LIST_BYTES: u64 = DOCUMENT_LIST as u64 * 8;

/// Offsets in bytes. The f32 sums of dq come first, then what one call has: a packed one its lists, log-sum-exps and deltas;
/// any its dk, dv and dq, the library's f32 sums of dq, and the library's own workspace. A packed call has a tile of rows more
/// than its documents.
#[derive(Debug, Clone, Copy)]
pub(super) struct Regions {
    pub(super) lists: u64,
    pub(super) statistics: u64,
    pub(super) delta: u64,
    pub(super) dk: u64,
    pub(super) dv: u64,
    pub(super) dq: u64,
    pub(super) dq_sums: u64,
    /// Of every query head a dk and a dv, when a group has more than one: the library's own, or a packed call's.
    pub(super) dk_by_head: u64,
    pub(super) dv_by_head: u64,
    /// Behind both.
    pub(super) library: u64,
    pub(super) end: u64,
}

impl Regions {
    /// For chunks of up to `c` queries against up to `keys` keys.
    pub(super) fn of(heads: Heads, c: u64, keys: u64) -> Self {
        let Heads { n_heads, n_kv_heads, head_dim } = heads;
        let group = n_heads / n_kv_heads;
        let align = |bytes: u64| bytes.next_multiple_of(256);
        let spare = n_heads * TILE_KEYS;
        let block = keys.min(BLOCK_KEYS.max(c + TILE_KEYS));
        let head_keys = (n_heads * block).min(BACKWARD_HEAD_KEYS.max(group * block)) + spare;
        let gradients = align(head_keys.div_ceil(group) * head_dim * 2);
        let head_queries = n_heads * c + spare;
        let lists = align(n_heads * c * head_dim * 4);
        let statistics = lists + align(LISTS * LIST_BYTES);
        let delta = statistics + align(head_queries * 4);
        let dk = delta + align(head_queries * 4);
        let (dv, dq) = (dk + gradients, dk + 2 * gradients);
        let dq_sums = dq + align(head_queries * head_dim * 2);
        let dk_by_head = dq_sums + align(head_queries * head_dim * 4);
        let by_head = if group > 1 { align(head_keys * head_dim * 2) } else { 0 };
        let (dv_by_head, library) = (dk_by_head + by_head, dk_by_head + 2 * by_head);
        let end = library + LIBRARY_SLACK_BYTES;
        Self { lists, statistics, delta, dk, dv, dq, dq_sums, dk_by_head, dv_by_head, library, end }
    }
}

/// `Backend::attention_workspace`.
pub fn workspace_bytes(heads: Heads, c: u64, kv: u64) -> u64 {
    Regions::of(heads, c, kv).end
}
