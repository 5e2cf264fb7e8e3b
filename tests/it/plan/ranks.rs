//! Which ranks the planner makes of the devices it is given.

use longhaul::{
    bench::shapes,
    domain::{
        Machine, ModelConfig,
        machine::Network,
        training::{Moments, Precision},
    },
    plan::{self, Forced, Place, Plan, Ranks, Request},
};

use super::{GIB, hopper, request};
use crate::support::model;

/// A host of so many H200, with 128 GiB beside each.
fn host(n_devices: u32) -> Machine {
    Machine { n_devices, ..hopper(113 * u64::from(n_devices)) }
}

/// So many hosts of eight.
fn hosts(n_hosts: u32, link_bytes: f64) -> Machine {
    Machine { network: Some(Network { n_hosts, link_bytes }), ..host(8) }
}

fn in_bf16<'a>(model: &'a ModelConfig, machine: &'a Machine, tokens: u64, micro_batches: u64) -> Request<'a> {
    Request { precision: Precision::Bf16, micro_batches, ..request(model, machine, tokens) }
}

fn ranks(sequence: u64, data: u64) -> Ranks {
    Ranks { sequence, data }
}

/// The plan and its ranks.
fn planned(name: &str, machine: &Machine, tokens: u64, micro_batches: u64, forced: Forced) -> (Plan, Ranks) {
    let model = shapes::named(name).unwrap();
    let plan = plan::plan(&Request { forced, ..in_bf16(&model, machine, tokens, micro_batches) }).unwrap();
    let ranks = plan.choice.ranks;
    (plan, ranks)
}

fn chosen(name: &str, n_devices: u32, tokens: u64, micro_batches: u64) -> Ranks {
    planned(name, &host(n_devices), tokens, micro_batches, Forced::default()).1
}

#[test]
fn one_sequence_is_shared_by_as_many_devices_as_divide_its_heads() {
    for (name, devices, sequence) in [
        ("llama-3.1-8b", 1, 1),
        ("llama-3.1-8b", 2, 2),
        ("llama-3.1-8b", 3, 2),
        ("llama-3.1-8b", 8, 8),
        ("llama-3.1-8b", 12, 8),
        ("llama-3.2-3b", 3, 3),
        ("llama-3.2-3b", 8, 8),
    ] {
        assert_eq!(chosen(name, devices, 131_072, 1), ranks(sequence, 1), "{name} on {devices}");
    }
}

#[test]
fn replicas_take_equal_shares_of_the_sequences() {
    // Short sequences fit on one device each: nothing is exchanged. Long ones do not.
    assert_eq!(chosen("llama-3.1-8b", 8, 16_384, 8), ranks(1, 8));
    let long = chosen("llama-3.1-8b", 8, 2_000_000, 8);
    assert!(long.sequence > 1 && long.world() == 8, "{long:?}");
    for (devices, micro_batches) in [(8, 3), (8, 6), (4, 2), (6, 4), (8, 12)] {
        let (plan, ranks) = planned("llama-3.1-8b", &host(devices), 16_384, micro_batches, Forced::default());
        assert_eq!(plan.sequences * ranks.data, micro_batches, "{devices} devices");
        assert!(ranks.world() <= devices.into() && 2 * ranks.world() > devices.into(), "{ranks:?} of {devices}");
        assert!(plan.optimizer_step_seconds <= plan.sequences as f64 * plan.step_seconds);
    }
    // Gradients may wait in storage where a replica has one sequence, however many the step has.
    let storage = Forced { ranks: Some(ranks(1, 8)), ..Forced::default() };
    assert_eq!(planned("llama-3.1-8b", &host(8), 16_384, 8, storage).0.sequences, 1);
}

#[test]
fn a_wish_and_a_fixed_arrangement_override() {
    let wish = |sequence| Forced { sequence_ranks: Some(sequence), ..Forced::default() };
    let machine = host(8);
    let with = |forced, micro_batches| planned("llama-3.1-8b", &machine, 65_536, micro_batches, forced).1;
    assert_eq!(with(wish(4), 1), ranks(4, 1));
    assert_eq!(with(wish(4), 2), ranks(4, 2));
    assert_eq!(with(wish(1), 8), ranks(1, 8));
    assert_eq!(with(wish(7), 1), ranks(4, 1), "the next smaller size");
    assert_eq!(with(Forced { ranks: Some(ranks(2, 1)), ..Forced::default() }, 1), ranks(2, 1));

    let model = shapes::named("llama-3.1-8b").unwrap();
    assert!(plan::ranks::check("p", 8, &model, &machine).is_ok());
    for wish in [0, 3, 16] {
        let refused = plan::ranks::check("p", wish, &model, &machine).unwrap_err();
        assert_eq!(refused.param, "p");
        assert!(refused.message.contains("32 query heads") && refused.message.contains("1, 2, 4, 8"), "{refused:?}");
    }
}

#[test]
fn tokens_and_chunks_are_dealt_evenly_in_whole_blocks() {
    // 24 heads among three: a multiple of 128 that three divide.
    let (plan, ranks) = planned("llama-3.2-3b", &host(3), 100_096, 1, Forced::default());
    assert_eq!(ranks.sequence, 3);
    assert!(plan.tokens.is_multiple_of(384) && (100_096..100_096 + 384).contains(&plan.tokens), "{}", plan.tokens);
    assert!(plan.choice.chunk_tokens.is_multiple_of(384), "{}", plan.choice.chunk_tokens);
}

#[test]
fn one_rank_plans_as_if_there_were_no_others() {
    let model = shapes::named("llama-3.1-8b").unwrap();
    let (machine, several) = (hopper(113), Machine { n_devices: 8, ..hopper(113) });
    for tokens in [32_768, 131_072, 1_500_032] {
        let plan = plan::plan(&in_bf16(&model, &machine, tokens, 1)).unwrap();
        assert_eq!((plan.choice.ranks, plan.tokens, plan.sequences), (Ranks::ONE, tokens, 1));
        assert_eq!((plan.optimizer_step_seconds, plan.traffic_seconds.sum()), (plan.step_seconds, 0.0));
        let forced = Forced { ranks: Some(Ranks::ONE), ..Forced::default() };
        assert_eq!(plan::plan(&Request { forced, ..in_bf16(&model, &several, tokens, 1) }).unwrap(), plan);
    }
    // Sequences one after another share one update.
    let two = plan::plan(&in_bf16(&model, &machine, 32_768, 2)).unwrap();
    assert_eq!(two.sequences, 2);
    assert!((two.step_seconds..2.0 * two.step_seconds).contains(&two.optimizer_step_seconds));
}

#[test]
fn more_devices_carry_no_less_and_take_no_longer() {
    let model = shapes::named("llama-3.1-8b").unwrap();
    let machines = [host(1), host(2), host(3), host(4), host(8), hosts(2, 50e9), hosts(4, 50e9)];
    for micro_batches in [1, 8] {
        let (mut longest, mut seconds) = (0, f64::INFINITY);
        for machine in &machines {
            let n = machine.all_devices();
            let carried = plan::longest(&in_bf16(&model, machine, 128, micro_batches));
            assert!(carried >= longest, "{n} devices carry {carried} after {longest}");
            let plan = plan::plan(&in_bf16(&model, machine, 131_072, micro_batches)).unwrap();
            assert!(plan.optimizer_step_seconds <= seconds, "{n} devices: {}", plan.optimizer_step_seconds);
            (longest, seconds) = (carried, plan.optimizer_step_seconds);
        }
    }
}

#[test]
fn a_slow_network_is_left_alone() {
    let seconds = |machine: &Machine| {
        let (plan, ranks) = planned("llama-3.1-8b", machine, 131_072, 1, Forced::default());
        (plan.optimizer_step_seconds, ranks)
    };
    let (alone, _) = seconds(&host(8));
    assert_eq!(seconds(&hosts(4, 1e6)), (alone, ranks(8, 1)));
    let (fast, among) = seconds(&hosts(4, 275e9));
    assert!(fast < alone && among == ranks(32, 1), "{among:?} in {fast} s");
    let (slower, _) = seconds(&hosts(4, 25e9));
    assert!(fast < slower && slower <= alone, "{slower}");
}

#[test]
fn ranks_share_their_hosts_memory() {
    let model = shapes::named("llama-3.1-8b").unwrap();
    // The same for each of two, beside one and beside both.
    let (one, both) = (host(2), Machine { host_bytes: 113 * GIB, ..host(2) });
    let longest = |machine| plan::longest(&in_bf16(&model, machine, 128, 1));
    assert!(longest(&both) < longest(&one));
    for machine in [&one, &both] {
        let plan = plan::plan(&in_bf16(&model, machine, longest(machine), 1)).unwrap();
        let ranks = plan.choice.ranks.world();
        assert_eq!(ranks, 2);
        assert!(ranks * plan.predicted_host_peak_bytes <= machine.host_bytes);
        assert!(plan.predicted_peak_bytes <= machine.device_bytes);
    }
    // Two hosts of one each have twice the memory of one host of two.
    let apart = Network { n_hosts: 2, link_bytes: 250e9 };
    let apart = Machine { n_devices: 1, network: Some(apart), ..both.clone() };
    assert_eq!(longest(&apart), longest(&one));
    let together = Machine::together(&[hopper(50), hopper(63)]).unwrap();
    assert_eq!((together.n_devices, together.host_bytes), (2, both.host_bytes));
    assert!(Machine::together(&[]).is_none());
}

#[test]
fn a_refusal_is_that_of_all_devices() {
    let model = shapes::named("llama-3.1-8b").unwrap();
    let alone = plan::longest(&in_bf16(&model, &host(1), 128, 1));
    // What is first in the way: memory of the host that eight share, or of each device where the host has plenty.
    for (host_gib, wall) in [(8 * 113, "host memory"), (4000, "device memory")] {
        let machine = Machine { host_bytes: host_gib * GIB, ..host(8) };
        let longest = plan::longest(&in_bf16(&model, &machine, 128, 1));
        assert!(longest > 5 * alone, "{longest}");
        assert!(plan::plan(&in_bf16(&model, &machine, longest, 1)).is_ok());
        let tokens = longest / 100 * 101;
        let refused = plan::plan(&in_bf16(&model, &machine, tokens, 1)).unwrap_err();
        assert_eq!((refused.tokens, refused.longest_tokens, refused.wall.as_str()), (tokens, longest, wall));
        let available = if wall == "host memory" { machine.host_bytes } else { machine.device_bytes };
        assert_eq!(refused.available_bytes, available);
        assert!((available..available / 2 * 3).contains(&refused.needed_bytes), "{}", refused.needed_bytes);
    }
    let big = shapes::named("llama-3.1-70b").unwrap();
    assert_eq!(plan::plan(&in_bf16(&big, &host(2), 131_072, 1)).unwrap_err().longest_tokens, 0);
    assert!(plan::plan(&in_bf16(&big, &host(8), 131_072, 1)).is_ok());
}

#[test]
fn ranks_of_a_cpu_are_as_many_as_wished_and_share_it() {
    let config = model::config(false);
    let machine = model::machine(GIB);
    let with = |sequence_ranks| {
        let forced = Forced { sequence_ranks, place: Some(Place::Memory), ..Forced::default() };
        let (precision, moments) = (Precision::F32, Moments::F32);
        let (model, machine) = (&config, &machine);
        plan::plan(&Request { model, precision, moments, tokens: 4096, micro_batches: 1, machine, forced }).unwrap()
    };
    let (one, three) = (with(None), with(Some(3)));
    assert_eq!((one.choice.ranks, three.choice.ranks), (Ranks::ONE, ranks(3, 1)));
    assert!(three.tokens == 4098 && three.choice.chunk_tokens.is_multiple_of(3));
    // One process holds all three arenas; its cores are no more than before.
    let process = plan::workspace::process(three.device, three.choice.ranks, three.tokens).device;
    assert_eq!(three.predicted_peak_bytes, 3 * (three.layout.bytes + process));
    assert!(three.predicted_peak_bytes <= machine.device_bytes);
    assert!(three.step_seconds > one.step_seconds);
    assert!(plan::ranks::check("p", 6, &config, &machine).is_ok());
    assert!(plan::ranks::check("p", 4, &config, &machine).is_err());
}
