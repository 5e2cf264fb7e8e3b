//! Every buffer that two streams touch is handed over by an event, whatever the plan: on a GPU nothing else would order them.

use std::thread;

use longhaul::{
    domain::ModelConfig,
    engine::{
        backend::{Backend, DType, Stream, Tensor, cpu::Cpu},
        comm::{Alone, Comm, Groups, threads},
        model::Batch,
        train::session::Session,
    },
    plan::{Forced, Plan, Ranks},
};

use super::{
    checkpoint_offload::{host_rows, kept_sets},
    documents, plain,
    zero3::weights_in_host_memory,
};
use crate::support::{
    model::{self, Tokens},
    stage::hyper,
    watched::{Watched, WatchedComm},
};

fn watched() -> Watched<Cpu<f64>> {
    Watched::new(Cpu::new(1).unwrap())
}

/// Two steps, of two sequences and of one, and an evaluation; races, and the number of operations that were looked at.
fn steps<C: Comm<Watched<Cpu<f64>>>>(
    groups: Groups<C>,
    config: &ModelConfig,
    plan: &Plan,
    [a, b]: [Batch; 2],
) -> (Vec<String>, u64) {
    let mut session = Session::among(watched(), groups, plan, config, &std::env::temp_dir()).unwrap();
    session.step(&[a, b], &hyper(1), 1.0).unwrap();
    session.step(&[b], &hyper(2), 1.0).unwrap();
    session.evaluate([a]).unwrap();
    session.groups.world.barrier(&mut session.backend).unwrap();
    (std::mem::take(&mut session.backend.races), session.backend.operations)
}

fn assert_ordered(config: &ModelConfig, ranks: Ranks, forced: Forced, batches: [Batch; 2], what: &str) {
    let tokens = batches.iter().map(|batch| batch.ids.len() as u64).max().unwrap();
    let plan = &model::plan_f64(config, tokens, Forced { ranks: Some(ranks), ..forced });
    let found = if ranks.world() == 1 {
        vec![steps(Groups { world: WatchedComm(Alone), sequence: WatchedComm(Alone) }, config, plan, batches)]
    } else {
        thread::scope(|scope| {
            let ranks: Vec<_> = threads::group(ranks.world() as usize)
                .into_iter()
                .map(|comm| {
                    let groups = || Groups::new::<Watched<Cpu<f64>>>(WatchedComm(comm), ranks.sequence).unwrap();
                    scope.spawn(move || steps(groups(), config, plan, batches))
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    };
    for (races, operations) in found {
        assert!(operations > 100);
        assert!(races.is_empty(), "{ranks:?}, {what}: {} races, the first {}", races.len(), races[0]);
    }
}

#[test]
fn a_missing_event_is_seen() {
    let (x, y, z) = (0, 8, 16);
    let at = |place| Tensor::device(place, DType::F64, 1, 1);
    let races = |work: &dyn Fn(&mut Watched<Cpu<f64>>)| {
        let mut b = watched();
        b.reserve(64, 0).unwrap();
        work(&mut b);
        b.races
    };
    let read_late = |b: &mut Watched<Cpu<f64>>| b.copy(Stream::Exchange, at(y), at(x)).unwrap();
    assert_eq!(
        races(&|b| {
            b.fill(at(x), 1.0).unwrap();
            read_late(b);
        }),
        ["copy on Exchange beside fill on Compute"]
    );
    // An event that is too early, and one that orders another stream.
    let stale = races(&|b| {
        let event = b.record(Stream::Compute).unwrap();
        b.fill(at(x), 1.0).unwrap();
        b.wait(Stream::Exchange, &event).unwrap();
        read_late(b);
    });
    assert_eq!(stale.len(), 1);
    let passed_on = races(&|b| {
        b.fill(at(x), 1.0).unwrap();
        let filled = b.record(Stream::Compute).unwrap();
        b.wait(Stream::Gather, &filled).unwrap();
        let passed = b.record(Stream::Gather).unwrap();
        b.wait(Stream::Exchange, &passed).unwrap();
        read_late(b);
        // Two may read at once, and write elsewhere.
        b.copy(Stream::Compute, at(z), at(x)).unwrap();
    });
    assert!(passed_on.is_empty(), "{passed_on:?}");
    let overwritten = races(&|b| {
        read_late(b);
        b.fill(at(x), 1.0).unwrap();
    });
    assert_eq!(overwritten, ["fill on Compute beside copy on Exchange"]);
}

#[test]
fn streams_are_ordered_by_events() {
    let config = model::config(false);
    let sequences = [documents(&config), Tokens::random(config.vocab_size, &[20, 10], 8)];
    let batches = || [sequences[0].batch(), sequences[1].batch()];
    let n = sequences[0].ids.len() as u64;
    // Chunks of a few tokens, so that many are under way; a few; one.
    let base = |chunk| Forced { chunk_tokens: Some(chunk), ..plain(n, &config) };
    let mut plans = kept_sets(Forced { checkpoint_slots: Some(2), ..base(6) });
    plans.extend(host_rows(base(18), config.n_layers, n / 2).into_iter().step_by(4));
    plans.extend(weights_in_host_memory(base(18), &config));
    plans.extend([("plain".to_owned(), base(18)), ("one chunk".to_owned(), base(n))]);
    for (what, forced) in &plans {
        for (sequence, data) in [(1, 1), (2, 1), (1, 2)] {
            assert_ordered(&config, Ranks { sequence, data }, *forced, batches(), what);
        }
    }
    // Ranks with several runs of heads, and replicas of them.
    let cut = ModelConfig { n_heads: 12, n_kv_heads: 4, ..config };
    let sequences = [[11, 30, 7].as_slice(), &[20, 10]].map(|lengths| Tokens::random(cut.vocab_size, lengths, 8));
    for (what, forced) in kept_sets(Forced { chunk_tokens: Some(6), ..plain(48, &cut) }).into_iter().step_by(2) {
        for (sequence, data) in [(3, 1), (2, 2)] {
            let batches = [sequences[0].batch(), sequences[1].batch()];
            assert_ordered(&cut, Ranks { sequence, data }, forced, batches, &what);
        }
    }
}
