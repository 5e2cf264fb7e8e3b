//! The workspace that both passes share, by formula: the planner lays it out before there is a device. Offsets in bytes.

use super::{
    super::super::Heads,
    BACKWARD_HEAD_KEYS,
    pieces::{BLOCK_KEYS, MOST_PACKED_BLOCK, TILE_KEYS, longest_padded},
};

/// What cuDNN's workspace for a backward call may need beyond the bf16 gradients of every query head.
const LIBRARY_SLACK_BYTES: u64 = 1 << 20;

fn align(bytes: u64) -> u64 {
    bytes.next_multiple_of(256)
}

/// f32 sums of every query row of the chunk, where a workspace begins.
fn sums(heads: Heads, c: u64) -> u64 {
    align(c * heads.n_heads * heads.head_dim * 4)
}

/// Of backward where documents are not packed: sums of dq in f32, then one call's dk, dv and dq, the library's f32 sums of dq, and
/// its own workspace.
#[derive(Debug, Clone, Copy)]
pub(super) struct Regions {
    pub(super) dk: u64,
    pub(super) dv: u64,
    pub(super) dq: u64,
    pub(super) dq_sums: u64,
    pub(super) library: u64,
    end: u64,
}

/// (query heads) x (keys) of the largest call.
fn most_head_keys(heads: Heads, c: u64, keys: u64) -> u64 {
    let block = keys.min(BLOCK_KEYS.max(c + TILE_KEYS));
    (heads.n_heads * block).min(BACKWARD_HEAD_KEYS.max(heads.n_heads / heads.n_kv_heads * block))
}

impl Regions {
    /// For chunks of up to `c` queries against up to `keys` keys.
    pub(super) fn of(heads: Heads, c: u64, keys: u64) -> Self {
        let Heads { n_heads, n_kv_heads, head_dim } = heads;
        let group = n_heads / n_kv_heads;
        let head_keys = most_head_keys(heads, c, keys);
        let gradients = align(head_keys.div_ceil(group) * head_dim * 2);
        let queries = c * n_heads * head_dim;
        let dk = sums(heads, c);
        let (dv, dq) = (dk + gradients, dk + 2 * gradients);
        let dq_sums = dq + align(queries * 2);
        let library = dq_sums + align(queries * 4);
        // Of every query head a dk and a dv, when a group has more than one.
        let by_head = if group > 1 { 2 * align(head_keys * head_dim * 2) } else { 0 };
        Self { dk, dv, dq, dq_sums, library, end: library + by_head + LIBRARY_SLACK_BYTES }
    }
}

/// How much a call of packed documents may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    /// (query heads) x (rows of queries).
    pub(super) head_queries: u64,
    /// (query heads) x (rows of keys).
    pub(super) head_keys: u64,
    /// (kv heads) x (rows of keys).
    pub(super) keys: u64,
}

impl Room {
    /// As much as fits where other calls' [`Regions`] end, and one head's longest call at least.
    pub(super) fn of(heads: Heads, c: u64, keys: u64) -> Self {
        let group = heads.n_heads / heads.n_kv_heads;
        let longest = longest_padded(c);
        let most_keys = longest.max(MOST_PACKED_BLOCK);
        let head_keys = (most_head_keys(heads, c, keys) / 2).max(most_keys);
        let room = Self { head_queries: 0, head_keys, keys: head_keys.div_ceil(group).max(most_keys) };
        let left = Regions::of(heads, c, keys).end.saturating_sub(PackedRegions::within(heads, c, room).end);
        let each = 12 * heads.head_dim + 8;
        Self { head_queries: (left / each).max(longest), ..room }
    }
}

/// Of calls of packed documents: f32 sums of attention's output or of dq, then one call's operands with rows of their own, its
/// gradients, the library's f32 sums of dq, and its own workspace.
#[derive(Debug, Clone, Copy)]
pub(super) struct PackedRegions {
    pub(super) q: u64,
    pub(super) k: u64,
    pub(super) v: u64,
    pub(super) o: u64,
    pub(super) statistics: u64,
    pub(super) d_o: u64,
    pub(super) dq: u64,
    pub(super) dk: u64,
    pub(super) dv: u64,
    pub(super) delta: u64,
    pub(super) dq_sums: u64,
    pub(super) library: u64,
    end: u64,
}

impl PackedRegions {
    pub(super) fn of(heads: Heads, c: u64, keys: u64) -> Self {
        Self::within(heads, c, Room::of(heads, c, keys))
    }

    fn within(heads: Heads, c: u64, room: Room) -> Self {
        let d = heads.head_dim;
        let mut end = sums(heads, c);
        let mut take = |elements: u64, bytes: u64| {
            end += align(elements * bytes);
            end - align(elements * bytes)
        };
        let [q, o, d_o, dq] = [(); 4].map(|()| take(room.head_queries * d, 2));
        let [k, v, dk, dv] = [(); 4].map(|()| take(room.keys * d, 2));
        let [statistics, delta] = [(); 2].map(|()| take(room.head_queries, 4));
        let dq_sums = take(room.head_queries * d, 4);
        let by_head = if heads.n_heads > heads.n_kv_heads { 2 * room.head_keys * d } else { 0 };
        let library = take(by_head, 2);
        end += LIBRARY_SLACK_BYTES;
        Self { q, k, v, o, statistics, d_o, dq, dk, dv, delta, dq_sums, library, end }
    }
}

/// `Backend::attention_workspace`.
pub fn workspace_bytes(heads: Heads, c: u64, kv: u64) -> u64 {
    Regions::of(heads, c, kv).end.max(PackedRegions::of(heads, c, kv).end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: Heads = Heads { n_heads: 32, n_kv_heads: 8, head_dim: 128 };

    #[test]
    fn packed_calls_take_no_memory_of_their_own_where_chunks_are_long() {
        for (heads, c) in
            [(LLAMA, 4096), (LLAMA, 8192), (LLAMA, 32768), (Heads { n_heads: 16, n_kv_heads: 4, ..LLAMA }, 8192)]
        {
            let (single, packed) = (Regions::of(heads, c, 1 << 17), PackedRegions::of(heads, c, 1 << 17));
            assert!(packed.end <= single.end + 4096, "{heads:?}, chunks of {c}: {packed:?} beside {single:?}");
            let rows = Room::of(heads, c, 1 << 17).head_queries / heads.n_heads;
            assert!(rows >= c / 2, "{rows} rows at once in chunks of {c}");
        }
    }

    #[test]
    fn one_head_always_has_room() {
        for heads in [
            LLAMA,
            Heads { n_heads: 1, n_kv_heads: 1, head_dim: 64 },
            Heads { n_heads: 71, n_kv_heads: 1, head_dim: 64 },
        ] {
            for c in [1, 100, 128, 5000] {
                let room = Room::of(heads, c, c);
                assert!(room.head_queries >= longest_padded(c) && room.head_keys >= longest_padded(c));
                assert!(room.keys >= MOST_PACKED_BLOCK && room.head_keys >= MOST_PACKED_BLOCK);
            }
        }
    }
}
