//! Where sessions of bf16 models run, one after another: the CPU here, a GPU in `gpu`. Proofs are written for any stage, so that
//! what a GPU is held to has been seen to hold somewhere.

use longhaul::{
    domain::{
        Machine, ModelConfig,
        training::{Moments, Precision},
    },
    engine::{
        backend::{AdamW, Backend, cpu::Cpu},
        comm::Comm,
        train::session::Session,
    },
    plan::{self, Forced, Plan},
};

use super::model::{self, Random};

/// A device for sessions.
pub trait Stage {
    type Backend: Backend;

    /// The device as the planner knows it.
    fn machine(&self) -> Machine;
    /// A session whose weights are whatever the memory holds.
    fn session(&mut self, config: &ModelConfig, plan: &Plan) -> Session<Self::Backend>;
    /// Ends a session before the next begins.
    fn end(&mut self, session: Session<Self::Backend>, plan: &Plan);

    /// The plan for one sequence a step.
    fn plan(&self, config: &ModelConfig, tokens: u64, forced: Forced) -> Plan {
        let machine = &self.machine();
        let (precision, moments, micro_batches) = (Precision::Bf16, Moments::F32, 1);
        plan::plan(&plan::Request { model: config, precision, moments, tokens, micro_batches, machine, forced })
            .unwrap()
    }
}

/// The CPU backend that stores bf16.
pub struct OnCpu;

impl Stage for OnCpu {
    type Backend = Cpu<half::bf16>;

    fn machine(&self) -> Machine {
        model::machine(4 << 30)
    }

    fn session(&mut self, config: &ModelConfig, plan: &Plan) -> Session<Self::Backend> {
        Session::new(Cpu::new(2).unwrap(), plan, config, &std::env::temp_dir()).unwrap()
    }

    fn end(&mut self, _: Session<Self::Backend>, _: &Plan) {}
}

/// Weights that depend on the seed alone, each rank its own: gains about 1, matrices of this spread; masters are the weights.
pub fn scatter<B: Backend, C: Comm<B>>(session: &mut Session<B, C>, spread: f64, seed: u64) {
    let mut random = Random(seed);
    let (parameters, weights) = (session.parameters().to_vec(), session.flat_weights());
    for parameter in parameters {
        let base = if parameter.shape.len() == 1 { 1.0 } else { 0.0 };
        let values: Vec<f64> = (0..parameter.elements()).map(|_| base + spread * random.signed()).collect();
        for (first, place) in session.owned(&parameter, weights) {
            let values = &values[first as usize..(first + place.elements()) as usize];
            model::write(&mut session.backend, place, values);
        }
    }
    for half in session.optimizer().low.into_iter().flat_map(|low| [low.host, low.device]) {
        session.backend.fill(half, 0.0).unwrap();
    }
}

/// Settings under which every part of an update shows.
pub fn hyper(step: u64) -> AdamW {
    AdamW {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step,
        seed: 9,
        first_index: 0,
    }
}
