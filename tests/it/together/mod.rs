//! Two ranks, a process each: the golden model, losses beside those of one rank, a state that is saved and brought back.
//!
//! What a rank does is for any device and any way between ranks: here CPUs over TCP, in `nccl` two GPUs.

mod nccl;

use std::{collections::BTreeMap, fs, path::Path};

use longhaul::{
    domain::{
        Machine, ModelConfig,
        model::{Rope, RopeScaling},
        training::{Moments, Precision},
    },
    engine::{
        backend::{AdamW, Backend, cpu::Cpu},
        comm::{Comm, Groups, HostComm, tcp::Tcp},
        model::Batch,
        train::{Progress, saved, session::Session},
    },
    plan::{self, Forced, Plan, Ranks},
};
use serde_json::{Value, json};

use crate::{
    comm::processes::{Rank, say, start},
    golden::{self, bf16},
    support::{
        model::{self, Tokens},
        stage::{hyper, scatter},
    },
};

const SHARING: Ranks = Ranks { sequence: 2, data: 1 };
const REPLICAS: Ranks = Ranks { sequence: 1, data: 2 };
/// Rows that attention on GPUs wants documents and chunks to be multiples of.
const BLOCK: u64 = 128;
/// Most that a loss of two ranks may differ from that of one, of itself: bf16, sums in another order and products of other shapes.
const LOSS: f64 = 2e-3;
/// The same of the mean of all losses.
const MEAN_LOSS: f64 = 5e-4;

/// One rank: its device and its way to the other, from session to session.
struct Member<B, C> {
    b: Option<B>,
    world: Option<C>,
    machine: Machine,
    /// Makes a backend ready for the next session.
    renew: fn(B) -> B,
    /// Steps of which losses are compared.
    steps: u64,
}

/// A model, its sequences in a step, and choices about them.
struct Work<'a> {
    config: &'a ModelConfig,
    tokens: u64,
    sequences: u64,
    forced: Forced,
}

impl Member<Cpu<half::bf16>, HostComm<Tcp>> {
    fn on_cpu(world: HostComm<Tcp>) -> Self {
        let (b, machine) = (Cpu::new(1).unwrap(), model::machine(4 << 30));
        Self { b: Some(b), world: Some(world), machine, renew: |_| Cpu::new(1).unwrap(), steps: 6 }
    }
}

impl<B: Backend, C: Comm<B>> Member<B, C> {
    fn rank(&self) -> usize {
        self.world.as_ref().expect("between sessions").rank()
    }

    fn plan(&self, work: &Work, ranks: Ranks) -> Plan {
        let Work { config: model, tokens, sequences: micro_batches, forced } = *work;
        let (precision, moments, machine) = (Precision::Bf16, Moments::F32, &self.machine);
        let forced = Forced { ranks: Some(ranks), ..forced };
        plan::plan(&plan::Request { model, precision, moments, tokens, micro_batches, machine, forced }).unwrap()
    }

    /// What comes of a session with the other rank.
    fn among<T>(&mut self, work: &Work, ranks: Ranks, does: impl FnOnce(&mut Session<B, C>) -> T) -> T {
        let plan = self.plan(work, ranks);
        let (b, world) = (self.b.take().unwrap(), self.world.take().unwrap());
        let groups = Groups::new::<B>(world, ranks.sequence).unwrap();
        let mut session = Session::among(b, groups, &plan, work.config, &std::env::temp_dir()).unwrap();
        let done = does(&mut session);
        session.groups.world.barrier(&mut session.backend).unwrap();
        self.b = Some((self.renew)(session.backend));
        self.world = Some(session.groups.world);
        done
    }

    /// What comes of a session without it.
    fn alone<T>(&mut self, work: &Work, does: impl FnOnce(&mut Session<B>) -> T) -> T {
        let plan = self.plan(work, Ranks::ONE);
        let b = self.b.take().unwrap();
        let mut session = Session::new(b, &plan, work.config, &std::env::temp_dir()).unwrap();
        let done = does(&mut session);
        self.b = Some((self.renew)(session.backend));
        done
    }

    /// What the process is started for.
    fn run(mut self, work: &str) {
        match work {
            "golden" => self.golden(),
            "losses" => self.losses(),
            "resume" => self.resume(),
            other => panic!("no such work: {other}"),
        }
        self.world.unwrap().barrier(&mut self.b.unwrap()).unwrap();
        say("done");
    }

    /// Says how far its part of the gradients is from float64.
    fn golden(&mut self) {
        let config = golden::config(bf16::NAME);
        let sequences = bf16::sequences(BLOCK as usize);
        let tokens = sequences.iter().map(|tokens| tokens.ids.len() as u64).max().unwrap();
        for (what, forced) in bf16::plans(BLOCK) {
            let work = Work { config: &config, tokens, sequences: 1, forced };
            self.among(&work, SHARING, |session| {
                saved::load_base(session, &golden::folder(bf16::NAME)).unwrap();
                let own = bf16::own_errors(session, &sequences[0]);
                say(&format!("errors {}", serde_json::to_string(&own).unwrap()));
                bf16::trained(what, session, &sequences);
            });
        }
    }

    /// Says the losses of one rank, and of two that share sequences, and that take one each.
    fn losses(&mut self) {
        let config = config();
        let sequences: Vec<Tokens> =
            (0..2 * self.steps).map(|n| Tokens::chain(config.vocab_size, 4 * BLOCK, n)).collect();
        let steps: Vec<Vec<Batch>> = sequences.chunks(2).map(|two| two.iter().map(Tokens::batch).collect()).collect();
        // A part of everything is kept, the rest made again; four chunks.
        let forced = Forced {
            chunk_tokens: Some(BLOCK),
            checkpoint_slots: Some(2),
            kept_attention_layers: Some(2),
            kept_qkv_layers: Some(1),
            kept_gate_up_layers: Some(1),
            ..Forced::default()
        };
        let (work, rank) = (Work { config: &config, tokens: 4 * BLOCK, sequences: 2, forced }, self.rank());
        let alone = self.alone(&work, |session| losses(session, &steps));
        let sharing = self.among(&work, SHARING, |session| losses(session, &steps));
        let own: Vec<Vec<Batch>> = steps.iter().map(|two| vec![two[rank]]).collect();
        let replicas = self.among(&work, REPLICAS, |session| losses(session, &own));
        say(&format!("losses {}", json!([alone, sharing, replicas])));
    }

    /// Saves what two ranks have, and again what they, replicas and one rank make of it. Says what a resumed model comes to.
    fn resume(&mut self) {
        let (config, base) = (golden::config(bf16::NAME), golden::folder(bf16::NAME));
        let sequences = bf16::sequences(BLOCK as usize);
        let (first, tokens) = (sequences[0].batch(), sequences[0].ids.len() as u64);
        let forced = Forced { chunk_tokens: Some(BLOCK), ..Forced::default() };
        let work = Work { config: &config, tokens, sequences: 1, forced };
        let two_steps = Progress { step: 2, tokens_seen: 2 * tokens, ..Progress::default() };
        let loss = self.among(&work, SHARING, |session| {
            saved::load_base(session, &base).unwrap();
            for n in 1..=2 {
                session.step(&[first], &hyper(n), 1.0).unwrap();
            }
            saved::write(session, two_steps, &base, Path::new("first")).unwrap();
            session.evaluate([first]).unwrap().loss
        });
        let replicas = Work { sequences: 2, ..work };
        for (parent, work, ranks) in [("sharing", &work, SHARING), ("replicas", &replicas, REPLICAS)] {
            let resumed = self.among(work, ranks, |session| again(session, &base, parent, first));
            if ranks == SHARING {
                assert_eq!(resumed.to_bits(), loss.to_bits());
            }
        }
        if self.rank() == 0 {
            self.alone(&work, |session| again(session, &base, "alone", first));
        }
    }
}

/// Brings a session to where the first left its model and writes it again; the loss that it has.
fn again<B: Backend, C: Comm<B>>(session: &mut Session<B, C>, base: &Path, parent: &str, batch: Batch) -> f64 {
    let progress = saved::resume(session, Path::new("first/step-2")).unwrap();
    saved::write(session, progress, base, Path::new(parent)).unwrap();
    session.evaluate([batch]).unwrap().loss
}

fn losses<B: Backend, C: Comm<B>>(session: &mut Session<B, C>, steps: &[Vec<Batch>]) -> Vec<f64> {
    scatter(session, 0.1, 11);
    let hyper = |step| AdamW { learning_rate: 3e-4, ..hyper(step) };
    (1..).zip(steps).map(|(n, batches)| session.step(batches, &hyper(n), 1.0).unwrap().mean_loss()).collect()
}

/// Two key-value heads, so that each of two ranks has one.
fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 304,
        hidden_size: 128,
        intermediate_size: 256,
        n_layers: 4,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 64,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::Default },
        max_position_embeddings: 2048,
    }
}

/// What a process does that is started as one of two ranks on such a device.
pub fn rank(work: &str, device: &str, control: HostComm<Tcp>) {
    match device {
        "cpu" => Member::on_cpu(control).run(work),
        "gpu" => nccl::member(control).run(work),
        other => panic!("no such device: {other}"),
    }
}

/// Both ranks came to their end.
fn end(ranks: &[Rank]) {
    ranks.iter().for_each(|rank| drop(rank.says("done")));
}

/// Two ranks are as near to float64 as PyTorch in bf16, whatever the plan.
fn assert_golden(device: &str) -> Vec<Value> {
    let ranks = start(2, &format!("golden-{device}"));
    let of_plan = |(what, _): (&str, Forced)| {
        let own = ranks.iter().map(|rank| serde_json::from_str(&rank.says("errors")).unwrap()).collect();
        bf16::assert_as_good_as_pytorch(what, &bf16::Errors::of_ranks(own))
    };
    let figures = bf16::plans(BLOCK).into_iter().map(of_plan).collect();
    end(&ranks);
    figures
}

/// Two ranks learn as one does.
fn assert_losses(device: &str) -> Value {
    let ranks = start(2, &format!("losses-{device}"));
    let said: Vec<[Vec<f64>; 3]> =
        ranks.iter().map(|rank| serde_json::from_str(&rank.says("losses")).unwrap()).collect();
    end(&ranks);
    assert_eq!(said[0][1..], said[1][1..], "both ranks know the loss");
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let [alone, others @ ..] = &said[0];
    assert!(alone[alone.len() - 1] < alone[0] - 0.03, "it learns: {alone:?}");
    let mut figures = json!({ "one_rank": alone });
    for (what, losses) in ["sharing", "replicas"].into_iter().zip(others) {
        let apart = losses.iter().zip(alone).map(|(a, b)| (a - b).abs() / b).fold(0.0, f64::max);
        let means = (mean(losses) - mean(alone)).abs() / mean(alone);
        figures[what] = json!({ "largest_difference": apart, "difference_of_means": means });
        assert!(apart <= LOSS && means <= MEAN_LOSS, "{figures}: {losses:?}");
    }
    figures
}

/// What two ranks saved is, to the last bit, what two, replicas and one make of it.
fn assert_resumed(device: &str) {
    let ranks = start(2, &format!("resume-{device}"));
    end(&ranks);
    let files = |parent: &str| files(&ranks[0], &format!("{parent}/step-2"));
    let saved = files("first");
    assert!(saved.contains_key("resume/optimizer.safetensors"), "{:?}", saved.keys());
    for parent in ["sharing", "replicas", "alone"] {
        let again = files(parent);
        assert!(again.keys().eq(saved.keys()), "{parent}: {:?}", again.keys());
        let changed: Vec<_> =
            saved.iter().filter(|(name, bytes)| again[*name] != **bytes).map(|(name, _)| name).collect();
        assert!(changed.is_empty(), "{parent}: {changed:?} differ");
    }
}

/// Every file below a folder of the ranks, by its name there.
fn files(rank: &Rank, folder: &str) -> BTreeMap<String, Vec<u8>> {
    let root = rank.folder().join(folder);
    let below = |folder: &str| {
        let entries = fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.is_file()).collect::<Vec<_>>()
    };
    let named = |path: &Path| (path.strip_prefix(&root).unwrap().display().to_string(), fs::read(path).unwrap());
    below("").into_iter().chain(below("resume")).map(|path| named(&path)).collect()
}

#[test]
fn two_processes_are_as_near_as_pytorch_in_bf16() {
    assert_golden("cpu").iter().for_each(|figures| eprintln!("{figures}"));
}

#[test]
fn two_processes_learn_as_one() {
    eprintln!("{}", assert_losses("cpu"));
}

#[test]
fn a_state_saved_by_two_processes_is_that_of_any_number() {
    assert_resumed("cpu");
}
