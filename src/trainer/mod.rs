//! What runs inside the child process: one job, from its first line to its last.
//!
//! The main thread trains. One thread reads orders, one watches the lease's deadline and says that the process is alive; both
//! end the process themselves, since the main thread may be deep in a step. Everything that happens goes to standard output
//! as [`protocol::Report`]s.

use std::{
    io::{BufRead, Write},
    sync::Arc,
};

use protocol::{Order, Report};
use reports::Reports;

use crate::{
    domain::{Invalid, RunSpec},
    engine::{self, train::Outcome},
};

pub mod gpu;
mod life_line;
pub mod protocol;
mod reports;

/// Why a trainer did not begin.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the trainer is started by an executor, which writes its orders as JSON lines: {0}")]
    Orders(String),
    #[error("the trainer's reports cannot be written: {0}")]
    Reports(#[from] std::io::Error),
}

/// Reads the run from the first line of `orders`, trains it, and tells how it went. An error means that there was nobody to
/// train for; a run that failed has said so in a report.
pub fn run(mut orders: impl BufRead + Send + 'static, out: impl Write + Send + 'static) -> Result<(), Error> {
    let run = first_order(&mut orders)?;
    let reports = Arc::new(Reports::new(out));
    let life = life_line::hold(orders, Arc::clone(&reports))?;
    let mut teller = reports::Teller { reports: Arc::clone(&reports), life };
    let last = match engine::train::train(&run, &mut teller) {
        Ok(Outcome::Finished { trained_tokens }) => Report::Finished { trained_tokens },
        Ok(Outcome::Stopped { step }) => Report::Stopped { step },
        Err(error) => failure(&error),
    };
    reports.send(&last);
    Ok(())
}

fn first_order(orders: &mut impl BufRead) -> Result<RunSpec, Error> {
    let line = life_line::line(orders)
        .map_err(|error| Error::Orders(error.to_string()))?
        .ok_or_else(|| Error::Orders("standard input is empty".into()))?;
    match serde_json::from_str(&line) {
        Ok(Order::Start { run }) => Ok(*run),
        Ok(_) => Err(Error::Orders("the first order must be to start".into())),
        Err(error) => Err(Error::Orders(error.to_string())),
    }
}

/// Whether another try may help: not where the input is at fault, nor where the same numbers would come again.
fn failure(error: &engine::Error) -> Report {
    match error {
        engine::Error::Input(invalid) => Report::Refused { error: invalid.clone() },
        engine::Error::NotFinite { .. } => {
            let error = Invalid::with_code("not_finite", "training.learning_rate", error.to_string());
            Report::Refused { error }
        }
        engine::Error::File { .. }
        | engine::Error::OutOfMemory { .. }
        | engine::Error::Device { .. }
        | engine::Error::Missing(_)
        | engine::Error::Rendezvous(_) => Report::Broken { message: error.to_string(), lost: None },
        engine::Error::PeerLost { rank, .. } => Report::Broken { message: error.to_string(), lost: Some(*rank as u64) },
    }
}
