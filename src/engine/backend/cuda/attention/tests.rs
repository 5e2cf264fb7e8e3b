//! What can be known of packed calls without a GPU: every pair of a query and a key that it sees is in one call, calls fit their
//! room, and rows go where they belong.

use std::{collections::BTreeSet, ops::Range};

use super::{
    super::super::{Heads, Window},
    packed::{Set, sets},
    pieces::{Piece, backward_pieces, fragments, packed_pieces},
};
use crate::domain::attention_workspace::Room;

const LLAMA: Heads = Heads { n_heads: 32, n_kv_heads: 8, head_dim: 128 };
const HEADS: [Heads; 4] = [
    LLAMA,
    Heads { n_heads: 4, n_kv_heads: 1, head_dim: 128 },
    Heads { n_heads: 4, n_kv_heads: 4, head_dim: 64 },
    Heads { n_heads: 71, n_kv_heads: 1, head_dim: 64 },
];

/// A linear congruential generator (Knuth's constants).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    /// Documents of up to `longest` units that cover `tokens`.
    fn documents(&mut self, tokens: u64, unit: u64, longest: u64) -> Vec<Range<u64>> {
        let (mut documents, mut start) = (Vec::new(), 0);
        while start < tokens {
            let end = tokens.min(start + unit * (1 + self.below(longest)));
            documents.push(start..end);
            start = end;
        }
        documents
    }
}

/// Windows of many kinds: chunk by chunk over sequences of documents.
fn windows(mut each: impl FnMut(&Window)) {
    let mut random = Random(3);
    for (tokens, chunk, unit, longest) in [
        (2560, 1024, 128, 4),
        (2500, 700, 64, 9),
        (3000, 512, 1, 900),
        (3000, 1100, 1, 4000),
        (140_000, 8192, 128, 900),
        (90_000, 16_384, 128, 3),
        (1_000_000, 32_768, 128, 7000),
    ] {
        for _ in 0..3 {
            let documents = random.documents(tokens, unit, longest);
            for start in (0..tokens).step_by(chunk as usize) {
                let chunk = start..tokens.min(start + chunk);
                let meets = |document: &&Range<u64>| document.start < chunk.end && chunk.start < document.end;
                let documents: Vec<Range<u64>> = documents.iter().filter(meets).cloned().collect();
                each(&Window { documents: &documents, chunk });
            }
        }
    }
}

fn sets_of(heads: Heads, window: &Window) -> (Room, Vec<Set>) {
    let end = window.documents[window.documents.len() - 1].end;
    let room = Room::of(heads, window.chunk.end - window.chunk.start, end);
    (room, sets(heads, room, window))
}

#[test]
fn every_pair_is_in_one_call() {
    windows(|window| {
        if window.chunk.end > 3000 {
            return;
        }
        let in_sets = sets_of(LLAMA, window).1.into_iter().flat_map(|set| set.pieces).collect();
        let packed = packed_pieces(window).into_iter().flatten().collect();
        for pieces in [fragments(window), backward_pieces(window), packed, in_sets] {
            let mut seen = vec![vec![0; window.chunk.end as usize]; window.chunk.end as usize];
            for Piece { queries, keys, causal } in pieces {
                for query in queries {
                    for key in keys.clone().filter(|key| !causal || *key <= query) {
                        seen[query as usize][key as usize] += 1;
                    }
                }
            }
            for document in window.documents {
                for query in document.clone().filter(|query| window.chunk.contains(query)) {
                    let row = &seen[query as usize];
                    let expected = |key: usize| i32::from(document.start <= key as u64 && key as u64 <= query);
                    assert!((0..row.len()).all(|key| row[key] == expected(key)), "{query} of {window:?}");
                }
            }
        }
    });
}

#[test]
fn the_first_set_of_a_query_is_marked_and_no_other() {
    windows(|window| {
        let mut begun = BTreeSet::new();
        for set in sets_of(LLAMA, window).1 {
            for piece in &set.pieces {
                assert_eq!(begun.insert(piece.queries.start), set.first, "{piece:?}");
            }
        }
    });
}

#[test]
fn calls_fit_their_room() {
    for heads in HEADS {
        windows(|window| {
            let (room, sets) = sets_of(heads, window);
            for set in sets {
                let (together, shape) = set.shape(heads, room);
                let (all, queries, keys) =
                    ((shape.kv_heads * shape.heads) as u64, shape.queries as u64, shape.keys as u64);
                assert!(all * queries <= room.head_queries && all * keys <= room.head_keys, "{shape:?} in {room:?}");
                assert!(shape.kv_heads as u64 * keys <= room.keys, "{shape:?} in {room:?}");
                assert!(keys.is_multiple_of(128) && queries.is_multiple_of(128));
                assert_eq!(together.calls(heads).count() as u64 * together.kv_heads * together.heads, heads.n_heads);
            }
        });
    }
}

#[test]
fn rows_go_where_they_belong() {
    windows(|window| {
        for set in sets_of(LLAMA, window).1 {
            let [queries, keys] = set.staged_rows(window);
            let (n_queries, n_keys) = set.rows();
            for (i, piece) in set.pieces.iter().enumerate() {
                for ([first, from, to], n, range) in [
                    (
                        queries[i],
                        n_queries,
                        piece.queries.start - window.chunk.start..piece.queries.end - window.chunk.start,
                    ),
                    (keys[i], n_keys, piece.keys.clone()),
                ] {
                    assert!(0 <= from && from < to && to as u64 <= n, "{from}..{to} of {n}");
                    assert_eq!((first + from) as u64..(first + to) as u64, range);
                }
                // Row r of both is the same token where the mask goes by rows.
                let offset = i64::from(keys[i][0]) - i64::from(queries[i][0]);
                assert!(!piece.causal || offset == window.chunk.start as i64, "{piece:?}");
            }
        }
    });
}

#[test]
fn shapes_are_few_whatever_the_documents() {
    let (mut random, mut shapes) = (Random(11), BTreeSet::new());
    for _ in 0..60 {
        let documents = random.documents(1 << 17, 1, 9000);
        for start in (0..1 << 17).step_by(8192) {
            let chunk = start..start + 8192;
            let meets = |document: &&Range<u64>| document.start < chunk.end && chunk.start < document.end;
            let documents: Vec<Range<u64>> = documents.iter().filter(meets).cloned().collect();
            let room = Room::of(LLAMA, 8192, 1 << 17);
            for set in sets(LLAMA, room, &Window { chunk, documents: &documents }) {
                shapes.insert(format!("{:?}", set.shape(LLAMA, room)));
            }
        }
    }
    assert!(shapes.len() < 200, "{} shapes", shapes.len());
}
