//! Any number of ranks == one: the same losses, gradients and weights after steps, but for the order of sums.

use longhaul::{
    domain::ModelConfig,
    engine::{data::Sequence, model::Batch, train::session::Totals},
    plan::{Forced, Ranks},
};

use super::{Run, assert_close, checkpoint_offload::kept_sets, documents, plain, run, zero3::weights_in_host_memory};
use crate::support::{
    model::{self, Tokens, config, session_f64},
    ranks::{Rank, on_every_rank, owned, scatter, whole},
    stage::hyper,
};

/// Sums go in another order: f64 leaves 1e-16 an addition, and some gradients are sums that cancel.
const TOLERANCE: f64 = 1e-10;

/// Eight query heads, so that of 8 ranks each has one, and four share a key-value head.
fn eight_heads(tied: bool) -> ModelConfig {
    ModelConfig { n_heads: 8, n_kv_heads: 2, ..config(tied) }
}

fn sharing(sequence: u64) -> Ranks {
    Ranks { sequence, data: 1 }
}

/// Each replica's sequences in a step.
type Replicas<'a> = [Vec<Batch<'a>>];

/// What `work` comes to on every rank, which has its replica's sequences.
fn among<T: Send>(
    config: &ModelConfig,
    ranks: Ranks,
    forced: Forced,
    replicas: &Replicas,
    work: impl Fn(&mut Rank, &[Batch]) -> T + Sync,
) -> Vec<T> {
    let tokens = replicas.iter().flatten().map(|b| b.ids.len() as u64).max().unwrap();
    let plan = model::plan_f64(config, tokens, Forced { ranks: Some(ranks), ..forced });
    on_every_rank(config, &plan, |session| {
        scatter(session, 7);
        let replica = session.groups.world.rank() as u64 / ranks.sequence;
        work(session, &replicas[replica as usize])
    })
}

/// Loss and gradients of all replicas' sequences.
fn run_among(config: &ModelConfig, ranks: Ranks, forced: Forced, replicas: &Replicas) -> Run {
    let done = among(config, ranks, forced, replicas, |session, batches| {
        session.gradients(batches).expect("forward and backward");
        let loss = session.totals().expect("totals").mean_loss();
        let grads = session.flat_grads();
        (loss, owned(session, grads))
    });
    let (losses, owned): (Vec<f64>, Vec<_>) = done.into_iter().unzip();
    assert!(losses.iter().all(|loss| loss.to_bits() == losses[0].to_bits()), "every rank knows the loss: {losses:?}");
    (losses[0], whole(config, &owned))
}

#[test]
fn ranks_that_share_a_sequence_are_one() {
    for tied in [false, true] {
        let config = eight_heads(tied);
        let tokens = documents(&config);
        let n = tokens.ids.len() as u64;
        // Borders of documents fall on and beside the cuts of chunks and ranks.
        for chunk in [8, 24, n] {
            let base = Forced { chunk_tokens: Some(chunk), ..plain(n, &config) };
            let one = run(&config, base, &[tokens.batch()]);
            for ranks in [1, 2, 4, 8] {
                let shared = run_among(&config, sharing(ranks), base, &[vec![tokens.batch()]]);
                assert_close(&shared, &one, TOLERANCE, &format!("{ranks} ranks, chunks of {chunk}"));
            }
        }
    }
}

#[test]
fn ranks_cut_heads_wherever_they_must() {
    // Twelve query heads by threes: of three ranks each has a whole group and a part of another.
    for (n_heads, n_kv_heads, ranks) in [(12, 4, 3), (12, 4, 6), (6, 6, 3), (8, 1, 4), (10, 2, 2), (6, 2, 6)] {
        let config = ModelConfig { n_heads, n_kv_heads, ..config(false) };
        let tokens = Tokens::random(config.vocab_size, &[11, 30, 7], 4);
        let n = tokens.ids.len() as u64;
        let base = Forced { chunk_tokens: Some(18), ..plain(n, &config) };
        let one = run(&config, base, &[tokens.batch()]);
        for (what, forced) in kept_sets(base) {
            let shared = run_among(&config, sharing(ranks), forced, &[vec![tokens.batch()]]);
            assert_close(
                &shared,
                &one,
                TOLERANCE,
                &format!("{n_heads} heads, {n_kv_heads} for keys, {ranks} ranks, {what}"),
            );
        }
    }
}

#[test]
fn replicas_with_unequal_sequences_are_one_rank_with_all() {
    let config = eight_heads(false);
    let sequences: Vec<Tokens> = [&[24, 8][..], &[16], &[3, 5], &[40], &[9, 7], &[8], &[1, 1, 22], &[32]]
        .iter()
        .enumerate()
        .map(|(i, lengths)| Tokens::random(config.vocab_size, lengths, 40 + i as u64))
        .collect();
    let base = Forced { chunk_tokens: Some(16), ..plain(40, &config) };
    let all: Vec<Batch> = sequences.iter().map(Tokens::batch).collect();
    let one = run(&config, base, &all);
    for (data, sequence) in [(1, 4), (2, 2), (4, 1), (2, 4)] {
        let replicas: Vec<Vec<Batch>> = all.chunks(all.len() / data).map(<[Batch]>::to_vec).collect();
        let ranks = Ranks { sequence, data: data as u64 };
        assert_close(&run_among(&config, ranks, base, &replicas), &one, TOLERANCE, &format!("{data} x {sequence}"));
    }
}

#[test]
fn lengths_that_ranks_do_not_divide_are_padded() {
    let config = eight_heads(false);
    let tokens = Tokens::random(config.vocab_size, &[13, 22, 2], 5);
    let n = tokens.ids.len() as u64;
    let base = Forced { chunk_tokens: Some(16), ..plain(n, &config) };
    let one = run(&config, base, &[tokens.batch()]);
    for ranks in [2, 4, 8] {
        let mut padded = Sequence {
            ids: tokens.ids.clone(),
            labels: tokens.labels.clone(),
            positions: tokens.positions.clone(),
            documents: tokens.documents.clone(),
            n_tokens: n,
        };
        padded.pad(ranks);
        let batch = Batch {
            ids: &padded.ids,
            labels: &padded.labels,
            positions: &padded.positions,
            documents: &padded.documents,
        };
        assert_close(&run_among(&config, sharing(ranks), base, &[vec![batch]]), &one, TOLERANCE, "padded");
    }
}

#[test]
fn the_forward_of_a_row_has_the_same_bits_on_any_rank() {
    let config = eight_heads(false);
    let tokens = documents(&config);
    let n = tokens.ids.len() as u64;
    let base = Forced { chunk_tokens: Some(16), ..plain(n, &config) };
    // With one label in all the loss is that of one row, to the last bit; and of eight ranks seven have no label.
    for kept in [3, 29, 47, 62] {
        let mut one_label = documents(&config);
        one_label.labels.iter_mut().enumerate().for_each(|(i, label)| {
            if i != kept {
                *label = -100;
            }
        });
        assert!(one_label.labels[kept] >= 0, "row {kept} has a label");
        let one = run(&config, base, &[one_label.batch()]);
        for ranks in [2, 4, 8] {
            let shared = run_among(&config, sharing(ranks), base, &[vec![one_label.batch()]]);
            assert_eq!(shared.0.to_bits(), one.0.to_bits(), "{ranks} ranks: {} against {}", shared.0, one.0);
            assert_close(&shared, &one, TOLERANCE, &format!("{ranks} ranks, the label of row {kept}"));
        }
    }
}

#[test]
fn weights_after_steps_are_those_of_one_rank() {
    let config = eight_heads(true);
    let tokens: Vec<Tokens> = (0..5).map(|i| Tokens::random(config.vocab_size, &[17, 41, 6], 70 + i)).collect();
    let n = tokens[0].ids.len() as u64;
    let base = Forced { chunk_tokens: Some(16), ..plain(n, &config) };
    let mut alone = session_f64(&config, &model::plan_f64(&config, n, base), 7);
    let step = |i: usize, totals: &Totals| (totals.mean_loss(), totals.grad_norm, totals.valid_labels, i);
    let expected: Vec<_> = tokens
        .iter()
        .enumerate()
        .map(|(i, tokens)| step(i, &alone.step(&[tokens.batch()], &hyper(i as u64 + 1), 0.5).unwrap()))
        .collect();
    let weights: Vec<(String, Vec<f64>)> = alone
        .weights()
        .into_iter()
        .map(|parameter| (parameter.name, model::read(&mut alone.backend, parameter.tensor)))
        .collect();
    let one: Run = (expected[4].0, weights);
    let mut plans = vec![("resident".to_owned(), base)];
    plans.extend(weights_in_host_memory(base, &config));
    for (what, forced) in plans {
        for ranks in [Ranks { sequence: 4, data: 1 }, Ranks { sequence: 1, data: 2 }, Ranks { sequence: 2, data: 2 }] {
            let replica: Vec<Batch> = vec![tokens[0].batch()];
            let replicas = vec![replica; ranks.data as usize];
            let done = among(&config, ranks, forced, &replicas, |session, _| {
                let mut last = 0.0;
                for (i, tokens) in tokens.iter().enumerate() {
                    let totals = session.step(&[tokens.batch()], &hyper(i as u64 + 1), 0.5).expect("a step");
                    let (loss, norm, valid, _) = expected[i];
                    assert_eq!(totals.valid_labels, valid * ranks.data);
                    assert!((totals.mean_loss() - loss).abs() <= TOLERANCE * loss);
                    assert!((totals.grad_norm - norm).abs() <= TOLERANCE * norm);
                    last = totals.mean_loss();
                }
                let weights = session.flat_weights();
                (last, owned(session, weights))
            });
            let (losses, owned): (Vec<f64>, Vec<_>) = done.into_iter().unzip();
            assert_close(&(losses[0], whole(&config, &owned)), &one, 1e-8, &format!("{ranks:?}, {what}"));
        }
    }
}
