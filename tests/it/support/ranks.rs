//! Ranks of one training as threads on the CPU backend: every thread a session with its part of the model.

use std::thread;

use longhaul::{
    domain::ModelConfig,
    engine::{
        Result,
        backend::{
            Backend, DType, Split, Tensor,
            cpu::{Cpu, element::Storage},
        },
        comm::{Comm, Groups, HostComm, threads},
        model::{Params, params::Named},
        train::session::Session,
    },
    plan::Plan,
};

use super::{model, stage};

/// A rank's session, in f64 unless said otherwise.
pub type Rank<S = f64> = Session<Cpu<S>, HostComm<threads::Threads>>;

/// Runs `work` on every rank of the plan, and gives what each came to in the order of ranks.
pub fn on_every_rank<S: Storage, T: Send>(
    config: &ModelConfig,
    plan: &Plan,
    work: impl Fn(&mut Rank<S>) -> T + Sync,
) -> Vec<T>
where
    Cpu<S>: Backend,
{
    on_sessions(config, plan, |session| {
        let done = work(session);
        // Nobody leaves while another still needs it.
        Comm::barrier(&mut session.groups.world, &mut session.backend).expect("all ranks are there");
        done
    })
}

/// Runs `work`, which fails on every rank, and gives what each says.
pub fn failures<S: Storage>(
    config: &ModelConfig,
    plan: &Plan,
    work: impl Fn(&mut Rank<S>) -> Result + Sync,
) -> Vec<String>
where
    Cpu<S>: Backend,
{
    on_sessions(config, plan, |session| {
        let error = work(session).expect_err("no rank goes on");
        session.groups.give_up::<Cpu<S>>(&error);
        error.to_string()
    })
}

fn on_sessions<S: Storage, T: Send>(
    config: &ModelConfig,
    plan: &Plan,
    work: impl Fn(&mut Rank<S>) -> T + Sync,
) -> Vec<T>
where
    Cpu<S>: Backend,
{
    let ranks = plan.choice.ranks;
    thread::scope(|scope| {
        let started: Vec<_> = threads::group(ranks.world() as usize)
            .into_iter()
            .map(|comm| {
                let work = &work;
                scope.spawn(move || {
                    let cpu = Cpu::<S>::new(1).expect("a CPU");
                    let groups = Groups::new::<Cpu<S>>(comm, ranks.sequence).expect("groups");
                    let spill = std::env::temp_dir();
                    let mut session = Session::among(cpu, groups, plan, config, &spill).expect("a session");
                    work(&mut session)
                })
            })
            .collect();
        started.into_iter().map(|rank| rank.join().expect("a rank that does not panic")).collect()
    })
}

/// The weights of [`model::session_f64`], each rank its own.
pub fn scatter(session: &mut Rank, seed: u64) {
    stage::scatter(session, 0.2, seed);
}

/// What a rank owns of every parameter in one of its flat tensors: parameter by parameter, the first element's index there and
/// the values.
pub type Owned = Vec<Vec<(u64, Vec<f64>)>>;

/// Reads it.
pub fn owned(session: &mut Rank, flat: Split) -> Owned {
    let parameters = session.parameters().to_vec();
    let of = |parameter| {
        let pieces = session.owned(parameter, flat);
        pieces.into_iter().map(|(first, place)| (first, model::read(&mut session.backend, place))).collect()
    };
    parameters.iter().map(of).collect()
}

/// The whole parameters that ranks own parts of. Every element is owned once.
pub fn whole(config: &ModelConfig, ranks: &[Owned]) -> Vec<(String, Vec<f64>)> {
    let flat = Tensor::device(0, DType::F64, 1, config.n_params());
    let named = Params::over(config, flat).named(config);
    let of = |(i, parameter): (usize, Named)| {
        let mut values = vec![f64::NAN; parameter.elements() as usize];
        for (first, piece) in ranks.iter().flat_map(|owned| &owned[i]) {
            let place = &mut values[*first as usize..*first as usize + piece.len()];
            assert!(place.iter().all(|value| value.is_nan()), "{} is owned once", parameter.name);
            place.copy_from_slice(piece);
        }
        assert!(values.iter().all(|value| !value.is_nan()), "{} is owned", parameter.name);
        (parameter.name, values)
    };
    named.into_iter().enumerate().map(of).collect()
}
