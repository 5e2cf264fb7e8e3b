//! Proofs on an NVIDIA GPU, ignored where tests run as a matter of course: `it --ignored gpu` runs them all.
//!
//! The binary may be carried to the machine that has the GPU, with `tests/reference` beside it (see `support::tree`). Every
//! proof prints the figures it read, a JSON line each, also when it passes.

mod attention;
mod golden;
mod operations;
mod parity;
mod queue;
mod resume;
mod twenty_steps;

use std::{
    io::Write,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use cudarc::driver::CudaContext;
use longhaul::{
    domain::{Machine, ModelConfig, machine::DeviceKind},
    engine::{
        backend::{DType, Tensor, cuda::Cuda},
        train::session::Session,
    },
    plan::Plan,
};
use serde_json::{Value, json};

use crate::support::{model, stage::Stage};

/// Rows that attention on GPUs wants documents and chunks to be multiples of.
const BLOCK: u64 = 128;
/// Device memory that the small models of these proofs may plan with.
const MODEL_BYTES: u64 = 16 << 30;

/// One test at a time has the GPU.
static TURN: Mutex<()> = Mutex::new(());
/// The card's context stays from test to test: the libraries hold on to it.
static CONTEXT: OnceLock<Arc<CudaContext>> = OnceLock::new();

/// The GPU of this machine for one test. Sessions follow one another on it, each with an arena of its own.
struct Gpu {
    cuda: Option<Cuda>,
    _turn: MutexGuard<'static, ()>,
}

impl Gpu {
    fn open() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let cuda = Cuda::open(0, &[]).unwrap();
        CONTEXT.get_or_init(|| CudaContext::new(0).unwrap());
        Self { cuda: Some(cuda), _turn: turn }
    }

    /// The backend itself, for operations without a model.
    fn backend(&mut self) -> &mut Cuda {
        self.cuda.as_mut().expect("the last session was ended")
    }

    /// What the figures were read on.
    fn card(&self) -> Value {
        let cuda = self.cuda.as_ref().expect("no session has it");
        json!({ "card": cuda.device.name().unwrap(), "cudnn": cuda.cudnn_version() })
    }
}

impl Stage for Gpu {
    type Backend = Cuda;

    fn machine(&self) -> Machine {
        Machine { device: DeviceKind::Cuda, host_bytes: MODEL_BYTES, ..model::machine(MODEL_BYTES) }
    }

    fn session(&mut self, config: &ModelConfig, plan: &Plan) -> Session<Cuda> {
        let cuda = self.cuda.take().expect("the last session was ended");
        Session::new(cuda, plan, config, &std::env::temp_dir()).unwrap()
    }

    /// Leaves the memory full of NaN for the next session.
    fn end(&mut self, session: Session<Cuda>, plan: &Plan) {
        let mut cuda = session.backend;
        cuda.device.fill_bytes(Tensor::device(0, DType::U16, 1, plan.layout.bytes / 2), 0xff).unwrap();
        cuda.device.release().unwrap();
        self.cuda = Some(cuda);
    }
}

/// A line of figures. Past the test harness, which shows what a test prints only when it fails.
fn figures(proof: &str, values: Value) {
    let line = json!({ "proof": proof, "figures": values });
    writeln!(std::io::stdout().lock(), "\n{line}").unwrap();
}
