//! The other ranks of a bench: processes of this same program that carry out the plan which rank 0 made.

use std::{
    fs,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    domain::{Invalid, hex},
    engine::{
        Error, Result,
        comm::{
            HostComm,
            rendezvous::{self, Meeting},
            tcp::{Heartbeat, Tcp},
        },
    },
    plan::Plan,
};

/// How long ranks wait for each other: a GPU may take a while to open.
const PATIENCE: Duration = Duration::from_mins(2);

/// A rank's place, as rank 0 hands it to the process that it starts (`--place`).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Place {
    pub(super) rank: usize,
    n_ranks: usize,
    address: String,
    token: String,
    /// A file with the plan.
    plan: PathBuf,
}

impl Place {
    /// Reads the flag.
    pub(super) fn parse(text: &str) -> Result<Self> {
        serde_json::from_str(text).map_err(|error| Invalid::new("--place", error.to_string()).into())
    }

    /// The plan of all ranks.
    pub(super) fn plan(&self) -> Result<Plan> {
        let text = fs::read(&self.plan).map_err(Error::file(&self.plan))?;
        serde_json::from_slice(&text).map_err(|error| Invalid::new("--place", error.to_string()).into())
    }

    /// Meets the other ranks.
    pub(super) fn meet(&self) -> Result<HostComm<Tcp>> {
        rendezvous::meet(&self.meeting())
    }

    fn meeting(&self) -> Meeting {
        Meeting {
            address: self.address.clone(),
            token: self.token.clone(),
            rank: self.rank,
            n_ranks: self.n_ranks,
            patience: PATIENCE,
            heartbeat: Heartbeat::default(),
        }
    }
}

/// Processes of ranks 1 and up; they end with this.
#[derive(Debug)]
pub(super) struct Others {
    processes: Vec<Child>,
    plan: PathBuf,
}

impl Drop for Others {
    fn drop(&mut self) {
        for process in &mut self.processes {
            // A rank that has ended already cannot be killed.
            let _ = process.kill();
            let _ = process.wait();
        }
        let _ = fs::remove_file(&self.plan);
    }
}

/// Starts ranks 1 and up of `n_ranks` with this process's own arguments, and meets them as rank 0.
pub(super) fn start(n_ranks: usize, plan: &Plan, scratch: &Path) -> Result<(Others, HostComm<Tcp>)> {
    let socket = |error: std::io::Error| Error::Rendezvous(format!("no port of this host can be listened on: {error}"));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(socket)?;
    let address = listener.local_addr().map_err(socket)?.to_string();
    let path = scratch.join(format!("longhaul-bench-plan-{}", std::process::id()));
    fs::write(&path, serde_json::to_vec(plan).expect("a plan is JSON")).map_err(Error::file(&path))?;
    let mut others = Others { processes: Vec::new(), plan: path.clone() };
    let own = Place { rank: 0, n_ranks, address, token: token()?, plan: path };
    let program = std::env::current_exe().map_err(Error::file(Path::new("this program")))?;
    for rank in 1..n_ranks {
        let place = serde_json::to_string(&Place { rank, ..own.clone() }).expect("a place is JSON");
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1)).args(["--place", &place]).stdout(Stdio::null());
        others.processes.push(command.spawn().map_err(Error::file(&program))?);
    }
    let comm = rendezvous::receive(listener, &own.meeting())?;
    Ok((others, comm))
}

/// A secret for this run alone.
fn token() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| Error::Rendezvous(format!("no random token: {error}")))?;
    Ok(hex::hex(&bytes))
}
