//! What ranks send: the planner's formulas beside counts by hand, and beside what an engine's ranks do send.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    thread,
};

use longhaul::{
    bench::shapes,
    domain::{Machine, ModelConfig, training::Precision},
    engine::{
        Error, Result,
        backend::cpu::Cpu,
        comm::{Groups, HostComm, Lost, Message, Transport},
        train::session::Session,
    },
    plan::{self, Forced, Plan, Ranks, Request, Widths, segments, traffic::Traffic},
};

use super::{hopper, request};
use crate::support::model::{self, Tokens};

const WIDTHS: Widths = Widths { storage: 8, wide: 8 };

/// A plan in f64 that keeps nothing but what `forced` says.
fn planned(config: &ModelConfig, ranks: Ranks, tokens: u64, forced: Forced) -> Plan {
    let forced = Forced {
        ranks: Some(ranks),
        chunk_tokens: Some(tokens / 2),
        kept_attention_layers: forced.kept_attention_layers.or(Some(0)),
        kept_qkv_layers: forced.kept_qkv_layers.or(Some(0)),
        kept_gate_up_layers: Some(0),
        checkpoint_slots: forced.checkpoint_slots.or(Some(config.n_layers)),
        ..forced
    };
    model::plan_f64(config, tokens, forced)
}

fn traffic(config: &ModelConfig, plan: &Plan, widths: Widths) -> Traffic {
    Traffic::of(config, widths, plan.tokens, &plan.choice)
}

fn slots(slots: u64) -> Forced {
    Forced { checkpoint_slots: Some(slots), ..Forced::default() }
}

#[test]
fn a_hand_counts_the_same() {
    // h 24, f 40, 5 layers, 6 heads of 8 over 2, 61 words: a layer has 24 * 80 + 48 * 24 + 3 * 24 * 40 + 2 * 24 = 6000
    // parameters, of which each of two ranks owns 3000, in whole 64s 3008; of 1464 for the words 768, of the norm 64.
    let config = model::config(false);
    let widths = Widths { storage: 2, wide: 4 };
    let of = |ranks, tokens, forced| traffic(&config, &planned(&config, ranks, tokens, forced), widths);
    let two = Ranks { sequence: 2, data: 1 };
    // Forward gathers 5 layers; backward finds the last two where they are and gathers 3.
    let plain = of(two, 64, Forced::default());
    assert_eq!(plain.weights, (8 * 3008 + 2 * 768 + 64) * 2);
    assert_eq!(plain.gradients, (5 * 3008 + 2 * 768 + 64) * 4);
    // A row sends q in forward and backward, o in both, do and dq: 6 times 48; k and v twice: 4 times 16; dk and dv wide.
    assert_eq!(plain.heads, 5 * 32 * (6 * 48 * 2 + 4 * 16 * 2 + 2 * 16 * 4) / 2);

    // Segments 0, 1, 2 and 3, 4 re-run layers 3, 0 and 1: 0 1 2 3 4, 3 4 3, 0 1 2 1 0, of which 5 + 0 + 4 are not there.
    assert_eq!(segments::walk(&[0, 3], 5), [0, 1, 2, 3, 4, 3, 4, 3, 0, 1, 2, 1, 0]);
    let again = of(two, 64, slots(2));
    assert_eq!(again.weights, (9 * 3008 + 2 * 768 + 64) * 2);
    assert_eq!(again.gradients, plain.gradients);
    assert_eq!(again.heads - plain.heads, 3 * 32 * (2 * 48 * 2 + 2 * 16 * 2) / 2);

    // Six ranks have a head each and send a kv head to each of three: 48 columns of keys for 16.
    let six = of(Ranks { sequence: 6, data: 1 }, 192, Forced::default());
    assert_eq!(six.heads, 5 * 32 * (6 * 48 * 2 + 4 * 48 * 2 + 2 * 48 * 4) * 5 / 6);
    // Replicas exchange no heads; words that are tied are gathered and summed once.
    assert_eq!(of(Ranks { sequence: 1, data: 2 }, 64, Forced::default()), Traffic { heads: 0, ..plain });
    let tied = model::config(true);
    let tied = traffic(&tied, &planned(&tied, two, 64, Forced::default()), widths);
    assert_eq!(tied.weights, (8 * 3008 + 768 + 64) * 2);
    assert_eq!(tied.gradients, (5 * 3008 + 768 + 64) * 4);
    assert_eq!(of(Ranks::ONE, 64, Forced::default()), Traffic::default());
}

#[test]
fn what_goes_beside_work_adds_little() {
    let config = shapes::named("llama-3.1-8b").unwrap();
    let seconds = |chunk, peer_bytes, kept_qkv| {
        let mut machine = Machine { n_devices: 2, ..hopper(240) };
        machine.rates.peer_bytes = peer_bytes;
        let forced = Forced {
            ranks: Some(Ranks { sequence: 2, data: 1 }),
            chunk_tokens: Some(chunk),
            kept_qkv_layers: Some(kept_qkv),
            ..Forced::default()
        };
        let of_precision = Request { precision: Precision::Bf16, ..request(&config, &machine, 65_536) };
        plan::plan(&Request { forced, ..of_precision }).unwrap().traffic_seconds
    };
    let (many, one) = (seconds(4096, 275e9, 0), seconds(65_536, 275e9, 0));
    // One chunk has nothing beside it; of sixteen one stands alone, and columns are sorted in either case.
    assert!(many.heads < 0.4 * one.heads && many.heads > one.heads / 16.0, "{many:?}, {one:?}");
    // Sums of gradients go beside keys and values that are projected again.
    let kept = seconds(4096, 275e9, 32);
    assert!(many.gradients < 0.8 * kept.gradients, "{many:?}, {kept:?}");
    // Over a slow link all is longer than the work beside it.
    let (slow, slower) = (seconds(4096, 1e8, 0), seconds(4096, 5e7, 0));
    let twice = |a: f64, b: f64| (1.9..2.3).contains(&(b / a));
    assert!(twice(slow.heads, slower.heads) && twice(slow.weights, slower.weights), "{slow:?}, {slower:?}");
}

#[test]
fn ranks_send_what_is_planned() {
    let kept = |attention, qkv, slots| Forced {
        kept_attention_layers: Some(attention),
        kept_qkv_layers: Some(qkv),
        checkpoint_slots: Some(slots),
        ..Forced::default()
    };
    for tied in [false, true] {
        let config = model::config(tied);
        for (sequence, data) in [(2, 1), (3, 1), (6, 1), (1, 2), (2, 2)] {
            for forced in [Forced::default(), slots(2), kept(2, 1, 2), kept(1, 3, 3), kept(5, 5, 5)] {
                let (ranks, tokens) = (Ranks { sequence, data }, 48);
                let plan = planned(&config, ranks, tokens, forced);
                let Traffic { weights, gradients, heads } = traffic(&config, &plan, WIDTHS);
                let n = ranks.world();
                // And labels are counted, and two sums made of what all have.
                let small = n * (n - 1) * 8 + 2 * (n - 1) * 16;
                // Planned is a rank's mean, in whole bytes.
                let (sent, planned) = (sent(&config, &plan, tokens), n * (weights + gradients + heads) + small);
                assert!((planned..planned + n).contains(&sent), "{sent}, {planned}: {ranks:?} {tied} {forced:?}");
            }
        }
    }
}

/// Bytes that all ranks send in one forward and backward over a sequence on each replica.
fn sent(config: &ModelConfig, plan: &Plan, tokens: u64) -> u64 {
    let ranks = plan.choice.ranks;
    let (counted, all) = Counted::group(ranks.world() as usize);
    let sequence = Tokens::random(config.vocab_size, &[tokens], 3);
    let barrier = std::sync::Barrier::new(ranks.world() as usize);
    let before = AtomicU64::new(0);
    thread::scope(|scope| {
        for transport in counted {
            scope.spawn(|| {
                let groups = Groups::new::<Cpu<f64>>(HostComm::world(transport), ranks.sequence).unwrap();
                let cpu = Cpu::<f64>::new(1).unwrap();
                let mut session = Session::among(cpu, groups, plan, config, &std::env::temp_dir()).unwrap();
                if barrier.wait().is_leader() {
                    before.store(all.load(Ordering::SeqCst), Ordering::SeqCst);
                }
                barrier.wait();
                session.gradients(&[sequence.batch()]).unwrap();
                barrier.wait();
            });
        }
    });
    all.load(Ordering::SeqCst) - before.load(Ordering::SeqCst)
}

/// Threads that count the bytes they send.
struct Counted {
    rank: usize,
    to: Vec<Sender<Message>>,
    from: Vec<std::sync::Mutex<Receiver<Message>>>,
    sent: Arc<AtomicU64>,
}

impl Counted {
    fn group(n: usize) -> (Vec<Self>, Arc<AtomicU64>) {
        let sent = Arc::new(AtomicU64::new(0));
        let mut ranks: Vec<Self> =
            (0..n).map(|rank| Self { rank, to: vec![], from: vec![], sent: Arc::clone(&sent) }).collect();
        for sender in 0..n {
            for receiver in 0..n {
                let (to, from) = mpsc::channel();
                ranks[sender].to.push(to);
                ranks[receiver].from.push(from.into());
            }
        }
        (ranks, sent)
    }
}

impl Transport for Counted {
    fn rank(&self) -> usize {
        self.rank
    }

    fn n_ranks(&self) -> usize {
        self.to.len()
    }

    fn send(&self, to: usize, message: Message) -> Result {
        self.sent.fetch_add(message.len() as u64, Ordering::SeqCst);
        self.to[to].send(message).map_err(|_| self.give_up(to, "left".into()))
    }

    fn receive(&self, from: usize) -> Result<Message> {
        self.from[from].lock().unwrap().recv().map_err(|_| self.give_up(from, "left".into()))
    }

    fn check(&self) -> Result {
        Ok(())
    }

    fn give_up(&self, rank: usize, cause: String) -> Error {
        Lost { rank, peer: format!("rank {rank}"), cause }.into()
    }
}
