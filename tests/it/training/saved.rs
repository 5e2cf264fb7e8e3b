//! What ranks save is what one rank saves, and any number of ranks finds all of it again, each its own part: bit for bit.

use std::path::Path;

use longhaul::{
    cli::model::{Args, init},
    domain::{
        ModelConfig,
        training::{Moments, Precision},
    },
    engine::{
        backend::{DType, Tensor},
        checkpoint::{huggingface, safetensors::Weights},
        model::{Params, params::Named},
        train::{Progress, saved},
    },
    plan::{self, Forced, Plan, Ranks, Slot},
};

use super::{digests, small_model};
use crate::{
    comm::{NO_HANG, within},
    support::{
        Sandbox,
        model::{Tokens, machine, read_bytes},
        ranks::{Rank, failures, on_every_rank},
        stage::hyper,
    },
};

type Bf16 = half::bf16;

/// Eight query heads, and a feed-forward of which a rank's part is larger than a piece.
fn make_model(folder: &Path) -> ModelConfig {
    let sizes = Args { heads: 8, hidden_size: 64, intermediate_size: 1024, ..small_model(folder, "model") };
    init(&sizes).unwrap();
    ModelConfig::from_config_text(&huggingface::config_text(&folder.join("model")).unwrap()).unwrap()
}

fn plan_for(config: &ModelConfig, sequence: u64, moments: Moments, forced: Forced) -> Plan {
    let forced = Forced { ranks: Some(Ranks { sequence, data: 1 }), ..forced };
    let (precision, machine) = (Precision::Bf16, &machine(1 << 30));
    let request = plan::Request { model: config, precision, moments, tokens: 64, micro_batches: 1, machine, forced };
    plan::plan(&request).unwrap()
}

/// A rank's part of weights, moments and low halves: for each of these, and each parameter, runs of bytes by first element.
type Part = Vec<Vec<(u64, Vec<u8>)>>;

fn part(session: &mut Rank<Bf16>) -> Part {
    let (weights, state) = (session.flat_weights(), *session.optimizer());
    let flats = [weights, state.m, state.v, state.low.unwrap()];
    let parameters = session.parameters().to_vec();
    let mut of = |flat, parameter| {
        let places = session.owned(parameter, flat).into_iter();
        places.map(|(first, place)| (first, read_bytes(&mut session.backend, place))).collect()
    };
    flats.iter().flat_map(|flat| parameters.iter().map(|p| of(*flat, p)).collect::<Vec<_>>()).collect()
}

/// All of it, from the parts of all ranks.
fn whole(parts: Vec<Part>) -> Vec<Vec<u8>> {
    let n = parts[0].len();
    let of = |i: usize| {
        let mut runs: Vec<_> = parts.iter().flat_map(|part| part[i].clone()).collect();
        runs.sort();
        runs.into_iter().flat_map(|(_, bytes)| bytes).collect()
    };
    (0..n).map(of).collect()
}

fn step(session: &mut Rank<Bf16>, n: u64) -> f64 {
    let tokens = Tokens::chain(session.config().vocab_size, 64, n);
    session.step(&[tokens.batch()], &hyper(n), 1.0).unwrap().mean_loss()
}

#[test]
fn what_four_ranks_save_any_number_finds_again() {
    let sandbox = Sandbox::new("saved");
    let (base, config) = (sandbox.join("model"), make_model(sandbox.path()));
    let in_host_memory = Forced {
        weights_host_layers: Some(1),
        optimizer_host_elements: Some(60_000),
        staged_elements: Some(10_000),
        ..Forced::default()
    };
    for (moments, name, forced) in [
        (Moments::F32, "f32", Forced::default()),
        (Moments::Bf16, "bf16", Forced::default()),
        (Moments::F32, "host", in_host_memory),
    ] {
        let parent = sandbox.join(name);
        let progress = Progress { step: 3, tokens_seen: 192, train_loss: Some(2.5), valid_loss: None };
        let four = plan_for(&config, 4, moments, forced);
        let room = four.layout.region(Slot::VocabularyWeights).unwrap().bytes;
        assert!(config.intermediate_size * config.hidden_size * 4 / 4 > room, "some parts travel in several pieces");
        let trained = on_every_rank(&config, &four, |session: &mut Rank<Bf16>| {
            saved::load_base(session, &base).unwrap();
            for n in 1..=3 {
                step(session, n);
            }
            let written = saved::write(session, progress, &base, &parent).unwrap();
            let next = (part(session), written);
            (next, step(session, 4))
        });
        let (kept, losses): (Vec<_>, Vec<f64>) = trained.into_iter().unzip();
        let (parts, mut written): (Vec<Part>, Vec<_>) = kept.into_iter().unzip();
        let written = written.remove(0).expect("rank 0 wrote");
        let state = whole(parts);
        let element = if moments == Moments::F32 { 12 } else { 8 };
        assert_eq!(state.iter().map(Vec::len).sum::<usize>() as u64, config.n_params() * element, "all of it");
        assert_files_hold(&parent.join("step-3"), &config, &state);

        for n_ranks in [1, 2, 4, 8] {
            let plan = plan_for(&config, n_ranks, moments, Forced::default());
            let again = sandbox.join(format!("{name}-{n_ranks}"));
            let resumed = on_every_rank(&config, &plan, |session: &mut Rank<Bf16>| {
                let read = saved::resume(session, &parent.join("step-3")).unwrap();
                assert_eq!(read, progress);
                let found = part(session);
                let written = saved::write(session, read, &base, &again).unwrap();
                assert_eq!(written.is_some(), session.groups.world.rank() == 0);
                (found, (written, step(session, 4)))
            });
            let (found, rest): (Vec<Part>, Vec<_>) = resumed.into_iter().unzip();
            let (mut rewritten, next): (Vec<_>, Vec<f64>) = rest.into_iter().unzip();
            assert!(whole(found) == state, "{name}: {n_ranks} ranks find other bits");
            assert_eq!(digests(&rewritten.remove(0).unwrap()), digests(&written), "{name}: files of {n_ranks} ranks");
            // Activations are bf16, and sums of them go in another order.
            assert!(
                (next[0] - losses[0]).abs() <= 2e-3 * losses[0],
                "{name}, {n_ranks}: {} and {}",
                next[0],
                losses[0]
            );
        }
    }
}

fn named(config: &ModelConfig) -> Vec<Named> {
    Params::over(config, Tensor::device(0, DType::Bf16, 1, config.n_params())).named(config)
}

/// The files' tensors are these bytes, in the order of weights, m, v, low, and of parameters in each.
fn assert_files_hold(folder: &Path, config: &ModelConfig, state: &[Vec<u8>]) {
    let named = named(config);
    let weights = Weights::open(folder).unwrap();
    let resume = Weights::open_files([folder.join("resume/optimizer.safetensors")]).unwrap();
    for (prefix, bytes) in ["", "m.", "v.", "low."].into_iter().zip(state.chunks(named.len())) {
        for (parameter, bytes) in named.iter().zip(bytes) {
            let n = parameter.elements();
            let dtype = match (prefix, bytes.len() as u64 / n) {
                ("low.", _) => DType::U16,
                (_, 2) => DType::Bf16,
                _ => DType::F32,
            };
            let files = if prefix.is_empty() { &weights } else { &resume };
            let name = format!("{prefix}{}", parameter.name);
            assert!(files.bytes(&name, dtype, n).unwrap() == bytes, "{name}");
        }
    }
}

/// Weights and low halves together are the file's own f32.
#[test]
fn every_rank_loads_its_part_of_the_base_model() {
    let sandbox = Sandbox::new("base");
    let (base, config) = (sandbox.join("model"), make_model(sandbox.path()));
    let mut expected = Vec::new();
    let files = Weights::open(&base).unwrap();
    for parameter in named(&config) {
        let sink = |_, values: &[f32]| {
            expected.extend(values.iter().map(|v| v.to_bits()));
            Ok(())
        };
        files.read(&parameter.name, &parameter.shape, sink).unwrap();
    }
    assert!(expected.iter().any(|bits| bits & 0xffff != 0), "storage rounds some of them");
    for n_ranks in [1, 2, 8] {
        let plan = plan_for(&config, n_ranks, Moments::F32, Forced::default());
        let parts = on_every_rank(&config, &plan, |session: &mut Rank<Bf16>| {
            saved::load_base(session, &base).unwrap();
            part(session)
        });
        let state = whole(parts).into_iter();
        let n = named(&config).len();
        let halves = |parameters: Vec<Vec<u8>>| -> Vec<u32> {
            let bytes: Vec<u8> = parameters.concat();
            bytes.chunks_exact(2).map(|half| u16::from_le_bytes([half[0], half[1]]).into()).collect()
        };
        let (weights, low) = (halves(state.clone().take(n).collect()), halves(state.skip(3 * n).collect()));
        let masters = weights.into_iter().zip(low).map(|(w, low)| ((w - (low >> 15)) << 16) | low);
        assert!(masters.eq(expected.iter().copied()), "{n_ranks} ranks");
    }
}

#[test]
fn a_rank_that_cannot_write_names_its_reason_to_all() {
    let sandbox = Sandbox::new("unwritable");
    let (base, config) = (sandbox.join("model"), make_model(sandbox.path()));
    // No place to begin, and a name that is taken when everything is written.
    let (file, folder) = (sandbox.join("file"), sandbox.join("folder"));
    std::fs::create_dir(&folder).unwrap();
    for path in [file.clone(), folder.join("step-0")] {
        std::fs::write(path, "no folder").unwrap();
    }
    for (parent, reason) in [(file, "file/step-0.tmp"), (folder, "folder/step-0")] {
        let (base, config) = (base.clone(), config.clone());
        let seen = within(NO_HANG, move || {
            let plan = plan_for(&config, 4, Moments::F32, Forced::default());
            failures(&config, &plan, |session: &mut Rank<Bf16>| {
                saved::load_base(session, &base).unwrap();
                saved::write(session, Progress::default(), &base, &parent).map(drop)
            })
        });
        assert!(seen[0].contains(reason), "{}", seen[0]);
        for other in &seen[1..] {
            assert!(other.starts_with("rank 0 failed: ") && other.contains(reason), "{other}");
        }
    }
}
