//! Which job trains next, and on which of the free devices. Pure: no clock, no I/O.
//!
//! Jobs go in their order. One that waits for GPUs on which others train holds back those behind it, or small jobs would pass a
//! large one for ever; one for which this host has not the devices holds back nobody. A job gets as many GPUs of a kind as it
//! asks for, or as it needs; and more than it needs only while nobody else waits for them and the planner says that they pay.

use super::devices::{Devices, Free, Seat};
use crate::{
    domain::{
        BaseModel, Machine, ModelConfig,
        machine::{DeviceKind, alike},
        run::Ranks,
    },
    plan::{Plan, Request, devices, longest_ranks},
    store::queue::Queued,
};

/// Tokens that a job is planned for whose data decides, where nobody has looked at it yet.
const SHORT: u64 = 128;

/// What there is to choose from.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Situation {
    pub devices: Devices,
    pub free: Free,
    /// GPUs that are left alone for a while: neither free nor waited for.
    pub resting: Vec<usize>,
    pub models: Vec<BaseModel>,
    /// Other hosts that are alive: devices and models.
    pub hosts: Vec<(Vec<Machine>, Vec<BaseModel>)>,
}

/// What a job may hope for.
#[derive(Debug)]
enum Chance {
    Now(Seat),
    /// Once others have ended.
    Later,
    NotHere,
}

/// The first of the queued jobs that can train now, by its place in the queue, and where.
pub(super) fn next(situation: &Situation, queued: &[Queued]) -> Option<(usize, Seat)> {
    let mut free = situation.free.gpus.clone();
    for (place, job) in queued.iter().enumerate() {
        match situation.kind_of(job) {
            DeviceKind::Cpu if situation.free.cpu => return Some((place, situation.on_cpu(job))),
            DeviceKind::Cpu => {}
            DeviceKind::Cuda => {
                let wants_gpus =
                    |(other, job): (usize, &Queued)| other != place && situation.kind_of(job) == DeviceKind::Cuda;
                let alone = !queued.iter().enumerate().any(wants_gpus);
                match situation.on_gpus(job, &free, alone) {
                    Chance::Now(seat) => return Some((place, seat)),
                    Chance::Later => free.clear(),
                    Chance::NotHere => {}
                }
            }
        }
    }
    None
}

impl Situation {
    fn kind_of(&self, job: &Queued) -> DeviceKind {
        self.devices.kind_for(job.training.wanted_device())
    }

    fn on_cpu(&self, job: &Queued) -> Seat {
        let asked = |size: Option<u32>| u64::from(size.unwrap_or(1));
        let (sequence, data) = (job.training.sequence_parallel_size, job.training.data_parallel_size);
        let ranks = Ranks { sequence: asked(sequence), data: asked(data) };
        Seat { machine: self.devices.cpu.clone(), gpus: Vec::new(), ranks }
    }

    fn on_gpus(&self, job: &Queued, free: &[usize], alone: bool) -> Chance {
        let kinds = self.kinds();
        let Some(config) = config(&self.models, &job.model) else {
            // Whoever opens the model says what is wrong with it.
            return free.first().map_or(Chance::Later, |gpu| Chance::Now(self.seat(vec![*gpu], Ranks::ONE)));
        };
        let mut fits = false;
        for kind in &kinds {
            let machine = self.together(kind);
            let Some(fewest) = carried(job, config, &machine) else { continue };
            fits = true;
            let here: Vec<usize> = kind.iter().copied().filter(|gpu| free.contains(gpu)).collect();
            if (here.len() as u64) < fewest.choice.ranks.world() {
                continue;
            }
            let machine = self.together(&here);
            let plan = if alone { devices::worthwhile(&request(job, config, &machine), fewest) } else { fewest };
            let ranks = plan.choice.ranks;
            return Chance::Now(self.seat(here[..ranks.world() as usize].to_vec(), ranks));
        }
        if fits {
            return Chance::Later;
        }
        if self.is_for_others(job, config) {
            return Chance::NotHere;
        }
        self.as_it_is(job, config, &kinds, free)
    }

    /// True for a job that other hosts carry, or this one with GPUs that are away; and for one that asks for more than there are.
    fn is_for_others(&self, job: &Queued, own: &ModelConfig) -> bool {
        let wanted = job.training.wanted_device();
        let others = |(machines, models): &(Vec<Machine>, Vec<BaseModel>)| {
            config(models, &job.model).is_some_and(|config| carry(machines, wanted, job, config))
        };
        job.training.asked_devices() > self.kinds().iter().map(Vec::len).max().unwrap_or(0) as u64
            || carry(&self.devices.had, Some(DeviceKind::Cuda), job, own)
            || self.hosts.iter().any(others)
    }

    /// On all GPUs of the kind that has most: nothing that is alive carries the length that was settled, so whoever trains the job
    /// cuts its documents shorter, or refuses it with the numbers.
    fn as_it_is(&self, job: &Queued, config: &ModelConfig, kinds: &[Vec<usize>], free: &[usize]) -> Chance {
        let Some(kind) = kinds.iter().max_by_key(|kind| kind.len()) else { return Chance::NotHere };
        let ranks = longest_ranks(&request(job, config, &self.together(kind)));
        let here: Vec<usize> =
            kind.iter().copied().filter(|gpu| free.contains(gpu)).take(ranks.world() as usize).collect();
        if (here.len() as u64) < ranks.world() { Chance::Later } else { Chance::Now(self.seat(here, ranks)) }
    }

    /// GPUs that are not resting, those of a kind together.
    fn kinds(&self) -> Vec<Vec<usize>> {
        let name = |gpu: usize| &self.devices.gpus[gpu].device_name;
        let mut kinds: Vec<Vec<usize>> = Vec::new();
        for gpu in (0..self.devices.gpus.len()).filter(|gpu| !self.resting.contains(gpu)) {
            match kinds.iter_mut().find(|kind| name(kind[0]) == name(gpu)) {
                Some(kind) => kind.push(gpu),
                None => kinds.push(vec![gpu]),
            }
        }
        kinds
    }

    fn seat(&self, gpus: Vec<usize>, ranks: Ranks) -> Seat {
        Seat { machine: self.together(&gpus), gpus, ranks }
    }

    /// # Panics
    /// Without GPUs.
    fn together(&self, gpus: &[usize]) -> Machine {
        let machines: Vec<Machine> = gpus.iter().map(|gpu| self.devices.gpus[*gpu].clone()).collect();
        Machine::together(&machines).expect("a kind has a GPU, and so has a seat")
    }
}

fn config<'a>(models: &'a [BaseModel], name: &str) -> Option<&'a ModelConfig> {
    models.iter().find(|model| model.name == name)?.config.as_ref()
}

/// True when the devices of some kind among these carry the job.
fn carry(machines: &[Machine], wanted: Option<DeviceKind>, job: &Queued, config: &ModelConfig) -> bool {
    alike(machines, wanted).iter().any(|machine| carried(job, config, machine).is_some())
}

/// The plan on the fewest of these devices that carry the job, if any do.
fn carried(job: &Queued, config: &ModelConfig, machine: &Machine) -> Option<Plan> {
    let there = job.training.check_devices(config, machine).is_ok();
    there.then(|| devices::fewest(&request(job, config, machine)).ok()).flatten()
}

fn request<'a>(job: &Queued, config: &'a ModelConfig, machine: &'a Machine) -> Request<'a> {
    let tokens = job.training.sequence_length.or(job.sequence_length).unwrap_or(SHORT);
    Request::of(config, &job.training, machine, tokens)
}

#[cfg(test)]
mod tests {
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
        one_left.hosts = vec![(vec![gpu("C"); 4], vec![model()])];
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
}
