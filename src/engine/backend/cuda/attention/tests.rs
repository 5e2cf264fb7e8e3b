//! What can be known of packed calls without a GPU: every pair of a query and a key it sees is in one call, plans made
//! beforehand serve any documents, and a call's lists and outputs are in order.

use std::ops::Range;

use super::{
    super::{
        super::{Heads, Window},
        cudnn::{Mask, Pass, Shape},
    },
    packed::{documents, runs},
    pieces::{Calls, Piece, TILE_KEYS, backward_pieces, forward_pieces},
    shapes::{shape_of, shapes},
    workspace::Regions,
};

const HEADS: Heads = Heads { n_heads: 32, n_kv_heads: 8, head_dim: 128 };
const PASSES: [Pass; 2] = [Pass::Forward, Pass::Backward];

/// A linear congruential generator (Knuth's constants).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    /// Documents of multiples of `unit` up to `longest` units that cover `tokens`.
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

/// Documents that meet a chunk.
fn met(documents: &[Range<u64>], chunk: &Range<u64>) -> Vec<Range<u64>> {
    documents.iter().filter(|d| d.start < chunk.end && chunk.start < d.end).cloned().collect()
}

fn calls(pass: Pass, window: &Window) -> Calls {
    let pieces = match pass {
        Pass::Forward => forward_pieces(window),
        Pass::Backward => backward_pieces(window),
    };
    Calls::of(HEADS, window, pieces)
}

/// Windows of many kinds: chunk by chunk over sequences of documents.
fn windows(mut each: impl FnMut(&Window)) {
    let mut random = Random(3);
    for (tokens, chunk, unit, longest) in [
        (4096, 1024, 128, 4),
        (4096, 1024, 128, 30),
        (5000, 700, 64, 9),
        (3000, 512, 1, 900),
        (140_000, 8192, 128, 900),
        (90_000, 16_384, 128, 3),
        (1_000_000, 32_768, 128, 7000),
    ] {
        for _ in 0..3 {
            let documents = random.documents(tokens, unit, longest);
            for start in (0..tokens).step_by(chunk as usize) {
                let chunk = start..tokens.min(start + chunk);
                each(&Window { documents: &met(&documents, &chunk), chunk });
            }
        }
    }
}

#[test]
fn every_pair_is_in_one_call() {
    windows(|window| {
        if window.chunk.end > 6000 {
            return;
        }
        for pass in PASSES {
            let Calls { single, packed } = calls(pass, window);
            let mut seen = vec![vec![0; window.chunk.end as usize]; window.chunk.end as usize];
            for Piece { queries, keys, causal } in single.iter().chain(packed.iter().flatten()) {
                for query in queries.clone() {
                    for key in keys.clone().filter(|key| !causal || *key <= query) {
                        seen[query as usize][key as usize] += 1;
                    }
                }
            }
            for document in window.documents {
                for query in document.clone().filter(|query| window.chunk.contains(query)) {
                    let row = &seen[query as usize];
                    let expected = |key: usize| i32::from(document.start <= key as u64 && key as u64 <= query);
                    assert!((0..row.len()).all(|key| row[key] == expected(key)), "{pass:?} {query} of {window:?}");
                }
            }
        }
    });
}

#[test]
fn plans_made_beforehand_serve_any_documents() {
    windows(|window| {
        let prepared = shapes(HEADS, window);
        assert!(prepared.len() < 150, "{} plans", prepared.len());
        for pass in PASSES {
            for pieces in calls(pass, window).packed {
                let shape = shape_of(HEADS, pass, window, &pieces);
                assert!(prepared.contains(&(pass, shape)), "{shape:?} of {pieces:?}");
                let fits =
                    |piece: &Piece| piece.n_queries() as i64 <= shape.queries && piece.n_keys() as i64 <= shape.keys;
                assert!(pieces.iter().all(fits) && shape.documents.is_some_and(|n| pieces.len() as i64 <= n));
            }
        }
    });
}

#[test]
fn documents_in_tiles_are_packed_and_others_single() {
    let window = |documents| Window { chunk: 1024..2048, documents };
    let tiled = [0..1152, 1152..1280, 1280..4096];
    let [forward, backward] = PASSES.map(|pass| calls(pass, &window(&tiled)));
    assert!(forward.single.is_empty() && backward.single.is_empty());
    // The first document's fragment, then all that begin in the chunk; backward, the fragment's own keys among these.
    assert_eq!(forward.packed.iter().map(Vec::len).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(backward.packed.iter().map(Vec::len).collect::<Vec<_>>(), [1, 3]);
    let uneven = [0..1088, 1088..1280, 1280..2048];
    let forward = calls(Pass::Forward, &window(&uneven));
    assert_eq!((forward.single.len(), forward.packed.len()), (2, 1));
    let alone = 0..2048;
    let forward = calls(Pass::Forward, &window(std::slice::from_ref(&alone)));
    assert_eq!((forward.single.len(), forward.packed.len()), (1, 0));
}

/// Lists that the library reads: rows of q and of the outputs in order, no document without rows.
fn assert_lists_are_in_order(pieces: &[Piece], shape: Shape) {
    let count = shape.documents.expect("a packed shape") as usize;
    let [starts, places, lengths] = documents(pieces, shape);
    for list in [starts, places] {
        assert!(list[..=count].is_sorted(), "{list:?}");
    }
    assert!(lengths[..count].iter().all(|n| *n > 0 && (*n as u64).is_multiple_of(TILE_KEYS)));
    let total: u64 = pieces.iter().map(Piece::n_queries).sum();
    for (i, piece) in pieces.iter().enumerate() {
        assert_eq!(starts[i] as u64, piece.queries.start - pieces[0].queries.start);
        assert_eq!(lengths[i] as u64, piece.n_queries());
        assert_eq!((places[i] + lengths[i]) as u64, if i + 1 < pieces.len() { places[i + 1] as u64 } else { total });
    }
    // What repeats a tile reads rows of the last document and writes behind all.
    for i in pieces.len()..count {
        assert_eq!((starts[i], places[i] as u64), (starts[pieces.len() - 1], total));
    }
}

#[test]
fn lists_are_in_order_and_outputs_have_their_rows() {
    windows(|window| {
        for pass in PASSES {
            for pieces in calls(pass, window).packed {
                assert_lists_are_in_order(&pieces, shape_of(HEADS, pass, window, &pieces));
                let runs = runs(&pieces);
                let rows: Vec<u64> = runs.iter().flat_map(|run| run.query..run.query + run.queries).collect();
                let expected: Vec<u64> = pieces.iter().flat_map(|piece| piece.queries.clone()).collect();
                assert_eq!(rows, expected);
                let keys: u64 = runs.iter().map(|run| run.keys).sum();
                assert_eq!(keys, pieces.iter().map(Piece::n_keys).sum::<u64>());
            }
        }
    });
}

#[test]
fn calls_fit_the_workspace() {
    windows(|window| {
        for heads in [
            HEADS,
            Heads { n_heads: 4, n_kv_heads: 4, head_dim: 64 },
            Heads { n_heads: 71, n_kv_heads: 1, head_dim: 64 },
        ] {
            let c = window.chunk.end - window.chunk.start;
            let r = Regions::of(heads, c, window.chunk.end);
            for pieces in calls(Pass::Backward, window).packed {
                let shape = shape_of(heads, Pass::Backward, window, &pieces);
                let spare = if shape.mask == Mask::Causal { TILE_KEYS } else { 0 };
                let rows = pieces.iter().map(Piece::n_queries).sum::<u64>() + spare;
                let keys = pieces.iter().map(Piece::n_keys).sum::<u64>() + spare;
                let (all, kv_heads, d) = (shape.all_heads() as u64, shape.kv_heads as u64, heads.head_dim);
                let by_head = if shape.heads > 1 { keys * all * d * 2 } else { 0 };
                for (start, bytes, end) in [
                    (r.statistics, rows * all * 4, r.delta),
                    (r.delta, rows * all * 4, r.dk),
                    (r.dk, keys * kv_heads * d * 2, r.dv),
                    (r.dv, keys * kv_heads * d * 2, r.dq),
                    (r.dq, rows * all * d * 2, r.dq_sums),
                    (r.dq_sums, rows * all * d * 4, r.dk_by_head),
                    (r.dk_by_head, by_head, r.dv_by_head),
                    (r.dv_by_head, by_head, r.library),
                ] {
                    assert!(start + bytes <= end, "{bytes} bytes from {start} to {end} of {shape:?} in {window:?}");
                }
            }
        }
    });
}
