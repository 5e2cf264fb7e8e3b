//! Hosts with GPUs that nobody has, and what of their queue trains next on what.

use super::*;
use crate::domain::{
    JobId, TrainingSpec,
    machine::Rates,
    model::{Rope, RopeScaling},
};

const LONG: u64 = 524_288;

fn model() -> BaseModel {
    let config = ModelConfig {
        vocab_size: 32_000,
        hidden_size: 4096,
        intermediate_size: 14_336,
        n_layers: 4,
        n_heads: 32,
        n_kv_heads: 8,
        head_dim: 128,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
        rope: Rope { theta: 500_000.0, scaling: RopeScaling::Default },
        max_position_embeddings: 131_072,
    };
    BaseModel { name: "model".into(), config: Some(config), problem: None }
}

/// A GPU on which a long sequence of the model takes more memory than one has.
fn gpu(name: &str) -> Machine {
    let rates = Rates {
        gemm_flops: 700e12,
        attention_flops: 500e12,
        memory_bytes: 3e12,
        link_bytes: 50e9,
        peer_bytes: 275e9,
        disk_bytes: 1e9,
        source: "assumed".into(),
    };
    Machine {
        device: DeviceKind::Cuda,
        device_name: name.into(),
        n_devices: 1,
        network: None,
        device_bytes: 24 << 30,
        host_bytes: 8 << 30,
        disk_bytes: 0,
        rates,
    }
}

/// A host with GPUs of these kinds, of which these are free.
fn host(kinds: &[&str], free: &[usize]) -> Situation {
    let gpus: Vec<Machine> = kinds.iter().map(|kind| gpu(kind)).collect();
    let cpu = Machine { device: DeviceKind::Cpu, device_name: "CPU".into(), ..gpu("") };
    Situation {
        devices: Devices { cpu, had: gpus.clone(), gpus },
        free: Free { gpus: free.to_vec(), cpu: free.len() == kinds.len() },
        resting: Vec::new(),
        models: vec![model()],
        hosts: Vec::new(),
    }
}

fn job(tokens: u64, mut training: TrainingSpec) -> Queued {
    training.sequence_length = Some(tokens);
    Queued { job: JobId::random(), model: "model".into(), training, sequence_length: None }
}

fn open(tokens: u64) -> Queued {
    job(tokens, TrainingSpec::default())
}

fn asking(sequence: u32, data: u32) -> Queued {
    let (sequence_parallel_size, data_parallel_size) = (Some(sequence), Some(data));
    let sizes = TrainingSpec { sequence_parallel_size, data_parallel_size, ..TrainingSpec::default() };
    job(4096, TrainingSpec { gradient_accumulation_steps: 4, ..sizes })
}

/// Place in the queue and GPUs of what trains next.
fn chosen(situation: &Situation, queued: &[Queued]) -> Option<(usize, Vec<usize>)> {
    next(situation, queued).map(|(place, seat)| {
        assert_eq!(seat.ranks.world(), seat.gpus.len() as u64);
        assert_eq!(seat.machine.all_devices(), seat.ranks.world(), "planned with what it has");
        (place, seat.gpus)
    })
}

#[test]
fn a_job_that_is_alone_takes_more_only_while_they_pay() {
    let all = host(&["A"; 4], &[0, 1, 2, 3]);
    let few = |tokens| fewest_of(&all, tokens);
    assert_eq!((few(65_536), few(LONG)), (1, 2), "what these tests are about");
    assert_eq!(chosen(&all, &[open(65_536)]), Some((0, vec![0, 1, 2, 3])), "the step takes a quarter of the time");
    // So short that weights take longer to travel than to work with.
    assert_eq!(chosen(&all, &[open(128)]), Some((0, vec![0])));
    assert_eq!(chosen(&host(&["A"; 4], &[1, 3]), &[open(65_536)]), Some((0, vec![1, 3])), "only what is free");
}

fn fewest_of(situation: &Situation, tokens: u64) -> u64 {
    let machine = situation.together(&[0, 1, 2, 3]);
    let plan =
        carried(&open(tokens), situation.models[0].config.as_ref().expect("a config"), &machine).expect("a plan");
    plan.choice.ranks.world()
}

#[test]
fn jobs_that_wait_get_what_they_need_and_go_side_by_side() {
    let queue = [open(65_536), open(65_536), open(LONG)];
    assert_eq!(chosen(&host(&["A"; 4], &[0, 1, 2, 3]), &queue), Some((0, vec![0])));
    assert_eq!(chosen(&host(&["A"; 4], &[1, 2, 3]), &queue[1..]), Some((0, vec![1])));
    assert_eq!(chosen(&host(&["A"; 4], &[2, 3]), &queue[2..]), Some((0, vec![2, 3])));
    assert_eq!(chosen(&host(&["A"; 4], &[]), &queue), None);
}

#[test]
fn one_that_waits_for_gpus_is_not_passed() {
    let queue = [open(LONG), open(4096)];
    assert_eq!(chosen(&host(&["A"; 4], &[3]), &queue), None, "or small jobs would pass it for ever");
    assert_eq!(chosen(&host(&["A"; 4], &[2, 3]), &queue), Some((0, vec![2, 3])));
    // One for which there are not the GPUs holds nobody back.
    assert_eq!(chosen(&host(&["A"; 4], &[3]), &[asking(4, 2), open(4096)]), Some((1, vec![3])));
}

#[test]
fn sizes_that_are_asked_for_are_given() {
    let all = host(&["A"; 8], &[0, 1, 2, 3, 4, 5, 6, 7]);
    for (sequence, data) in [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2), (8, 1)] {
        let (_, seat) = next(&all, &[asking(sequence, data)]).expect("a seat");
        assert_eq!(seat.ranks, Ranks { sequence: sequence.into(), data: data.into() });
        assert_eq!(seat.gpus.len() as u32, sequence * data);
    }
    let only_sequence = TrainingSpec { sequence_parallel_size: Some(2), ..TrainingSpec::default() };
    assert_eq!(chosen(&all, &[job(65_536, only_sequence)]), Some((0, vec![0, 1])), "one sequence has no replicas");
}

#[test]
fn the_gpus_of_a_job_are_of_one_kind() {
    let mixed = host(&["A", "B", "A", "B", "B"], &[0, 1, 2, 3, 4]);
    assert_eq!(chosen(&mixed, &[asking(2, 1)]), Some((0, vec![0, 2])));
    assert_eq!(chosen(&mixed, &[asking(4, 1)]), None);
    let busy = host(&["A", "B", "A", "B", "B"], &[2, 3, 4]);
    assert_eq!(chosen(&busy, &[asking(2, 1)]), Some((0, vec![3, 4])));
}

#[test]
fn gpus_that_rest_or_are_away_are_not_counted_on() {
    let resting = Situation { resting: vec![0, 1], ..host(&["A"; 4], &[2, 3]) };
    assert_eq!(chosen(&resting, &[asking(4, 1), asking(2, 1)]), Some((1, vec![2, 3])));
    // Those of a long job are away: it waits for them, and is not refused by what is left.
    let mut one_left = host(&["A"; 4], &[0]);
    one_left.devices.gpus.truncate(1);
    assert_eq!(chosen(&one_left, &[open(LONG), open(4096)]), Some((1, vec![0])));
    // Where nothing that was ever seen carries it, whoever trains it says so.
    one_left.devices.had.truncate(1);
    assert_eq!(chosen(&one_left, &[open(LONG), open(4096)]), Some((0, vec![0])));
    // Unless another host does.
    let machines = vec![gpu("C"); 4];
    one_left.hosts = vec![Other { executor: ExecutorId::random(), machines, free: vec![], models: vec![model()] }];
    assert_eq!(chosen(&one_left, &[open(LONG), open(4096)]), Some((1, vec![0])));
}

#[test]
fn the_cpu_takes_what_is_the_cpus() {
    let of_cpu = |sizes: TrainingSpec| job(128, TrainingSpec { device: Some(DeviceKind::Cpu), ..sizes });
    let sizes = TrainingSpec { sequence_parallel_size: Some(2), ..TrainingSpec::default() };
    let queue = [of_cpu(sizes), of_cpu(TrainingSpec::default())];
    let (place, seat) = next(&host(&["A"; 2], &[0, 1]), &queue).expect("a seat");
    assert_eq!((place, seat.ranks, seat.gpus.len()), (0, Ranks { sequence: 2, data: 1 }, 0));
    assert!(next(&host(&["A"; 2], &[1]), &queue).is_none(), "it trains alone");
}

fn other(gpus: &[&str], free: &[usize]) -> Other {
    let machines = gpus.iter().map(|kind| gpu(kind)).collect();
    Other { executor: ExecutorId::random(), machines, free: free.to_vec(), models: vec![model()] }
}

#[test]
fn a_job_that_no_host_carries_takes_the_free_gpus_of_several() {
    let three = other(&["A"; 3], &[0, 1, 2]);
    let hosts = vec![other(&["B"; 4], &[0, 1, 2, 3]), other(&["A"; 2], &[0, 1]), three.clone()];
    let here = Situation { hosts, ..host(&["A"; 2], &[0, 1]) };
    let (place, seat) = next(&here, &[asking(4, 1)]).expect("a seat");
    assert_eq!((place, seat.here.clone(), seat.gpus.clone()), (0, 0..2, vec![0, 1]));
    assert_eq!(seat.others, [(three.executor.clone(), 2..4)], "the fewest hosts, the largest first");
    assert_eq!((seat.ranks.world(), seat.machine.n_devices, seat.machine.all_devices()), (4, 2, 4));
    // More hosts where two are not enough; and by what a job needs as well as by what it asks for.
    let (_, seat) = next(&here, &[asking(4, 2)]).map_or((0, None), |(place, seat)| (place, Some(seat)));
    assert!(seat.is_none(), "two of three hosts have two, which makes six");
    let few = Situation { hosts: vec![other(&["A"], &[0])], ..host(&["A"], &[0]) };
    let (_, seat) = next(&few, &[open(LONG)]).expect("a seat");
    assert_eq!((seat.here, seat.others[0].1.clone()), (0..1, 1..2));
    assert_eq!(chosen_here(&few, &[open(4096)]), Some(vec![0]), "what one host carries stays on it");
}

fn chosen_here(situation: &Situation, queued: &[Queued]) -> Option<Vec<usize>> {
    let (_, seat) = next(situation, queued)?;
    assert!(seat.others.is_empty() && seat.here == (0..seat.ranks.world()));
    Some(seat.gpus)
}

#[test]
fn a_job_for_several_hosts_waits_for_them_and_holds_back_nobody() {
    let busy = Situation { hosts: vec![other(&["A"; 2], &[1])], ..host(&["A"; 2], &[0, 1]) };
    assert_eq!(chosen(&busy, &[asking(4, 1), open(4096)]).map(|(place, _)| place), Some(1));
    // Without the model a host is none.
    let mut without = Situation { hosts: vec![other(&["A"; 2], &[0, 1])], ..host(&["A"; 2], &[0, 1]) };
    without.hosts[0].models.clear();
    assert_eq!(chosen(&without, &[asking(4, 1)]), None);
}

#[test]
fn data_is_inspected_for_the_devices_that_carry_the_job() {
    let here = Situation { hosts: vec![other(&["A"; 2], &[])], ..host(&["A", "A"], &[]) };
    let all_devices = |job: &Queued| desk(&here, job).expect("a desk").machine.all_devices();
    assert_eq!((all_devices(&open(4096)), all_devices(&asking(2, 1)), all_devices(&asking(4, 1))), (2, 2, 4));
    let of_cpu = job(128, TrainingSpec { device: Some(DeviceKind::Cpu), ..TrainingSpec::default() });
    assert_eq!(desk(&here, &of_cpu).expect("a desk").machine.device, DeviceKind::Cpu);
    assert!(
        desk(&host(&[], &[]), &job(128, TrainingSpec { device: Some(DeviceKind::Cuda), ..TrainingSpec::default() }))
            .is_none()
    );
}
