//! The workspace of attention on a GPU, by formula: the planner lays it out before there is a device, and the backend's calls
//! keep to it. Both passes share it. Offsets in bytes.

use super::heads::Heads;

/// (query heads) x (keys) that one call of backward takes, as long as it takes one kv head's group at least.
pub const BACKWARD_HEAD_KEYS: u64 = 1 << 19;
/// Keys of a tile of the library's backward: chunks, and documents of jobs on a GPU, are multiples of it.
pub const TILE_KEYS: u64 = 128;
/// Keys of a block of backward where documents are not packed: enough that reading queries anew for each does not count.
pub const BLOCK_KEYS: u64 = 1 << 16;
/// Where documents are packed, keys before a fragment come in blocks of powers of two from the one to the other of these.
pub const LEAST_PACKED_BLOCK: u64 = 1 << 10;
pub const MOST_PACKED_BLOCK: u64 = 1 << 14;
/// What cuDNN's workspace for a backward call may need beyond the bf16 gradients of every query head.
const LIBRARY_SLACK_BYTES: u64 = 1 << 20;

/// A number of rows that a call of packed documents has, where `n` are needed: whole tiles, and few different numbers.
pub fn padded(n: u64) -> u64 {
    n.next_multiple_of(TILE_KEYS.max(n.next_power_of_two() / 16))
}

/// The most rows of a causal call of packed documents in chunks of `c`.
fn longest_padded(c: u64) -> u64 {
    padded(c + LEAST_PACKED_BLOCK - 1)
}

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
pub struct Regions {
    pub dk: u64,
    pub dv: u64,
    pub dq: u64,
    pub dq_sums: u64,
    pub library: u64,
    end: u64,
}

/// (query heads) x (keys) of the largest call.
fn most_head_keys(heads: Heads, c: u64, keys: u64) -> u64 {
    let block = keys.min(BLOCK_KEYS.max(c + TILE_KEYS));
    (heads.n_heads * block).min(BACKWARD_HEAD_KEYS.max(heads.n_heads / heads.n_kv_heads * block))
}

impl Regions {
    /// For chunks of up to `c` queries against up to `keys` keys.
    pub fn of(heads: Heads, c: u64, keys: u64) -> Self {
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
pub struct Room {
    /// (query heads) x (rows of queries).
    pub head_queries: u64,
    /// (query heads) x (rows of keys).
    pub head_keys: u64,
    /// (kv heads) x (rows of keys).
    pub keys: u64,
}

impl Room {
    /// As much as fits where other calls' [`Regions`] end, and one head's longest call at least.
    pub fn of(heads: Heads, c: u64, keys: u64) -> Self {
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
pub struct PackedRegions {
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub o: u64,
    pub statistics: u64,
    pub d_o: u64,
    pub dq: u64,
    pub dk: u64,
    pub dv: u64,
    pub delta: u64,
    pub dq_sums: u64,
    pub library: u64,
    end: u64,
}

impl PackedRegions {
    /// As [`Regions::of`].
    pub fn of(heads: Heads, c: u64, keys: u64) -> Self {
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

/// Bytes of the workspace for chunks of up to `c` queries against up to `keys` keys.
pub fn bytes(heads: Heads, c: u64, keys: u64) -> u64 {
    Regions::of(heads, c, keys).end.max(PackedRegions::of(heads, c, keys).end)
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
