//! The ranks of a run on the CPU: threads of this process, among which its cores are shared.

use std::{io, num::NonZero, thread};

use super::{
    Observer, Outcome, Stop,
    job::{self, Data},
};
use crate::{
    domain::{
        Event, ModelConfig, RunSpec,
        progress::{DataSummary, Evaluation, StepMetrics, WrittenCheckpoint},
    },
    engine::{
        Error, Result,
        backend::{
            Backend,
            cpu::{Cpu, element::Storage},
        },
        comm::{
            Groups, HostComm,
            threads::{self, Threads},
        },
    },
    plan::Plan,
};

/// Trains on as many ranks as the plan has. Rank 0 is this thread, and the only one that the observer hears of.
pub(super) fn train<S: Storage>(
    run: &RunSpec,
    config: &ModelConfig,
    plan: &Plan,
    data: &Data,
    observer: &mut dyn Observer,
) -> Result<Outcome>
where
    Cpu<S>: Backend,
{
    let n_ranks = plan.choice.ranks.world() as usize;
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let backend = || Cpu::<S>::new((cores / n_ranks).max(1));
    if n_ranks == 1 {
        return job::train(backend()?, Groups::alone(), run, config, plan, data, observer);
    }
    let rank = |world: HostComm<Threads>, observer: &mut dyn Observer| {
        let groups = Groups::new::<Cpu<S>>(world, plan.choice.ranks.sequence)?;
        job::train(backend().inspect_err(|e| groups.give_up::<Cpu<S>>(e))?, groups, run, config, plan, data, observer)
    };
    on_threads(n_ranks, |world| rank(world, observer), |world| rank(world, &mut Unheard))
}

/// Runs rank 0 here and each of the others on a thread, and waits for all. The outcome is rank 0's, whose error names the rank
/// that was lost, with its cause; but what is wrong with the input stays what it is, whoever noticed.
fn on_threads<T: Send>(
    n_ranks: usize,
    first: impl FnOnce(HostComm<Threads>) -> Result<T>,
    others: impl Fn(HostComm<Threads>) -> Result<T> + Sync,
) -> Result<T> {
    let mut worlds = threads::group(n_ranks).into_iter();
    let (own, others) = (worlds.next().expect("rank 0 is one of them"), &others);
    thread::scope(|scope| {
        let start = |world: HostComm<Threads>| {
            let name = format!("rank {}", world.rank());
            thread::Builder::new().name(name).spawn_scoped(scope, move || others(world))
        };
        // Those that were started already see the others leave.
        let started = worlds.map(start).collect::<io::Result<Vec<_>>>().map_err(|error| no_thread(&error))?;
        let outcome = first(own);
        let ended = started.into_iter().map(thread::ScopedJoinHandle::join).enumerate();
        let ended = ended.map(|(i, ended)| ended.unwrap_or_else(|_| Err(panicked(i + 1))));
        let mut failures = ended.filter_map(Result::err).collect::<Vec<_>>().into_iter();
        match (&outcome, failures.find(is_final)) {
            (Err(error), Some(of_input)) if !is_final(error) => Err(of_input),
            _ => outcome,
        }
    })
}

/// True for what no other try helps with.
fn is_final(error: &Error) -> bool {
    matches!(error, Error::Input(_) | Error::NotFinite { .. })
}

fn panicked(rank: usize) -> Error {
    Error::PeerLost { rank, peer: format!("rank {rank}"), cause: "panicked".into() }
}

fn no_thread(error: &io::Error) -> Error {
    Error::Device { library: "threads", call: "start one for each rank".into(), cause: error.to_string() }
}

/// Listens to the ranks that are not heard: rank 0 tells what there is to tell.
struct Unheard;

impl Observer for Unheard {
    fn event(&mut self, _: Event) {}

    fn data(&mut self, _: &DataSummary) {}

    fn step(&mut self, _: &StepMetrics) {}

    fn evaluation(&mut self, _: &Evaluation) {}

    fn checkpoint(&mut self, _: &WrittenCheckpoint) {}

    fn stop_wanted(&self) -> Option<Stop> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Invalid;

    /// What comes of four ranks that count until one of them does `ending` instead.
    fn when_rank_2(ending: impl Fn() -> Result + Sync) -> Error {
        let rank = |mut world: HostComm<Threads>| {
            for turn in 0.. {
                if world.rank() == 2 && turn == 3 {
                    ending().inspect_err(|error| world.abort(format!("failed: {error}")))?;
                    return Ok(());
                }
                world.all_reduce_counts(&mut [1])?;
            }
            Ok(())
        };
        on_threads(4, rank, rank).expect_err("nobody goes on")
    }

    #[test]
    fn a_rank_that_fails_ends_all_and_is_named_with_its_cause() {
        let error = when_rank_2(|| Err(Error::OutOfMemory { space: "host", bytes: 7, cause: "as planned".into() }));
        assert!(matches!(error, Error::PeerLost { rank: 2, .. }), "{error}");
        assert!(error.to_string().starts_with("rank 2 failed: cannot allocate 7 bytes"), "{error}");
    }

    #[test]
    fn a_rank_that_panics_or_leaves_ends_all_and_is_named() {
        let error = when_rank_2(|| std::panic::resume_unwind(Box::new("as planned")));
        assert!(error.to_string().starts_with("rank 2 panicked"), "{error}");
        let error = when_rank_2(|| Ok(()));
        assert!(error.to_string().starts_with("rank 2 ended before the others"), "{error}");
    }

    #[test]
    fn what_is_wrong_with_the_input_stays_so() {
        let error = when_rank_2(|| Err(Invalid::new("training_file", "as planned").into()));
        assert!(matches!(error, Error::Input(Invalid { ref param, .. }) if param == "training_file"), "{error}");
    }

    #[test]
    fn all_ranks_have_the_outcome_of_rank_0() {
        let outcome = on_threads(4, |world| Ok(world.rank()), |world| Ok(world.rank()));
        assert_eq!(outcome.expect("no rank fails"), 0);
    }
}
