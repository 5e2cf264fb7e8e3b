//! Reports to the executor, a JSON line each, and the engine's observer that makes them.

use std::{
    fmt,
    io::Write,
    process,
    sync::{Arc, Mutex, PoisonError},
};

use super::{life_line::LifeLine, protocol::Report};
use crate::{
    domain::{
        Event,
        progress::{DataSummary, Evaluation, StepMetrics, WrittenCheckpoint},
    },
    engine::train::{Observer, Stop},
};

/// Exit status when nobody reads the reports any more.
const UNHEARD: i32 = 74;

/// Where reports go; shared between the threads of the process.
pub(super) struct Reports(Mutex<Box<dyn Write + Send>>);

impl fmt::Debug for Reports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reports")
    }
}

impl Reports {
    pub(super) fn new(out: impl Write + Send + 'static) -> Self {
        Self(Mutex::new(Box::new(out)))
    }

    /// Writes one line. Ends the process when that fails: a trainer that nobody hears works for nobody.
    pub(super) fn send(&self, report: &Report) {
        let mut line = serde_json::to_string(report).expect("a report is made of strings and numbers");
        line.push('\n');
        let mut out = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = out.write_all(line.as_bytes()).and_then(|()| out.flush()) {
            tracing::error!(%error, "reports cannot be written, the trainer ends");
            process::exit(UNHEARD);
        }
    }
}

/// Turns what the engine observes into reports.
#[derive(Debug)]
pub(super) struct Teller {
    pub(super) reports: Arc<Reports>,
    pub(super) life: Arc<LifeLine>,
}

impl Observer for Teller {
    fn meeting(&mut self, address: &str) {
        self.reports.send(&Report::Meeting { address: address.to_owned() });
    }

    fn event(&mut self, event: Event) {
        self.reports.send(&Report::Event { event });
    }

    fn data(&mut self, summary: &DataSummary) {
        self.reports.send(&Report::Data { summary: summary.clone() });
    }

    fn step(&mut self, metrics: &StepMetrics) {
        self.reports.send(&Report::Step { metrics: metrics.clone() });
    }

    fn evaluation(&mut self, evaluation: &Evaluation) {
        self.reports.send(&Report::Evaluation { evaluation: evaluation.clone() });
    }

    fn checkpoint(&mut self, checkpoint: &WrittenCheckpoint) {
        self.reports.send(&Report::Checkpoint { checkpoint: checkpoint.clone() });
    }

    fn stop_wanted(&self) -> Option<Stop> {
        self.life.stop_wanted()
    }
}
