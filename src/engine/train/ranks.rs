//! The ranks of a run, a process each: all meet at rank 0, which has read the data and planned, and go by what it settled.

use std::{net::TcpListener, time::Duration};

use super::{
    Observer, Outcome, job,
    prepare::{self, Settled},
};
use crate::{
    domain::{ModelConfig, RunSpec},
    engine::{
        Error, Result,
        backend::Backend,
        comm::{
            Comm, Groups, HostComm,
            rendezvous::{self, Meeting},
            tcp::{Heartbeat, Tcp},
        },
    },
};

/// How long ranks wait for each other: a GPU may take a while to open.
const PATIENCE: Duration = Duration::from_mins(2);

/// Trains the run as the rank that this process is, on the device that `open` opens; `join` makes of the connections between
/// processes what tensors travel over. A rank that fails tells the others why, and they fail in the call they are in.
pub(super) fn train<B: Backend, C: Comm<B>>(
    run: &RunSpec,
    config: &ModelConfig,
    observer: &mut dyn Observer,
    open: impl FnOnce() -> Result<B>,
    join: impl FnOnce(&B, HostComm<Tcp>) -> Result<C>,
) -> Result<Outcome> {
    let (backend, comm, data, settled) = if run.place.rank == 0 {
        let (data, settled) = prepare::settle(run, config, observer)?;
        observer.data(&prepare::summary(&data));
        let backend = open()?;
        if run.ranks.world() == 1 {
            return job::train(backend, Groups::alone(), run, config, &settled.plan, &data, observer);
        }
        let mut comm = receive(run, observer)?;
        comm.gather_bytes(serde_json::to_vec(&settled).expect("a plan is made of numbers and words"))?;
        (backend, comm, data, settled)
    } else {
        let backend = open()?;
        let mut comm = rendezvous::meet(&meeting(run, run.place.address.clone()))?;
        let heard = comm.gather_bytes(Vec::new())?;
        let settled = told(&comm, settled(&heard[0]))?;
        let data = told(&comm, prepare::data(run, config, &settled))?;
        (backend, comm, data, settled)
    };
    let groups = Groups::new::<B>(join(&backend, comm)?, run.ranks.sequence)?;
    job::train(backend, groups, run, config, &settled.plan, &data, observer)
}

/// Meets the other ranks as rank 0, once the observer has told them where.
fn receive(run: &RunSpec, observer: &mut dyn Observer) -> Result<HostComm<Tcp>> {
    let address = &run.place.address;
    let failed = |error: std::io::Error| {
        Error::Rendezvous(format!("rank 0 cannot listen at {address}: {error}; name an address of its own host"))
    };
    let listener = TcpListener::bind(address).map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?.to_string();
    observer.meeting(&address);
    rendezvous::receive(listener, &meeting(run, address))
}

fn meeting(run: &RunSpec, address: String) -> Meeting {
    Meeting {
        address,
        token: run.place.token.secret().to_owned(),
        rank: run.place.rank as usize,
        n_ranks: run.ranks.world() as usize,
        patience: PATIENCE,
        heartbeat: Heartbeat::default(),
    }
}

fn settled(message: &[u8]) -> Result<Settled> {
    serde_json::from_slice(message).map_err(|error| {
        Error::Rendezvous(format!("rank 0 sent no plan ({error}): start every rank from the same build"))
    })
}

/// Passes a failure on to the other ranks, unless it is theirs.
fn told<T>(comm: &HostComm<Tcp>, result: Result<T>) -> Result<T> {
    result.inspect_err(|error| comm.abort(format!("failed: {error}")))
}
