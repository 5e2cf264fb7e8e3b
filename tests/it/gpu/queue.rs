//! A step is queued as a whole before the host waits for anything: no allocation, no blocking copy, no wait inside it.

use std::{
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use longhaul::{
    domain::ModelConfig,
    engine::{
        backend::{Backend, Stream},
        comm::{Alone, Groups},
        train::session::Session,
    },
    plan::{Forced, Gradients, Plan},
};
use serde_json::json;

use super::{Gpu, figures};
use crate::{
    parity::{
        checkpoint_offload::kept_sets,
        plain,
        plans::{config, in_host_memory},
    },
    support::{
        model::Tokens,
        stage::{Stage, hyper},
        watched::{Watched, WatchedComm},
    },
};

/// Far longer than a small step takes to be queued.
const PATIENCE: Duration = Duration::from_mins(1);

/// Holds a stream until the host is about to wait.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<Passed>, Condvar)>);

#[derive(Default)]
struct Passed {
    open: bool,
    /// Nobody opened it in time.
    given_up: bool,
}

impl Gate {
    fn open(&self) {
        self.0.0.lock().unwrap().open = true;
        self.0.1.notify_all();
    }

    fn hold(&self) {
        let (passed, changed) = &*self.0;
        // A poisoned lock lets the stream go: the test has failed already.
        let Ok(passed) = passed.lock() else { return };
        if let Ok((mut passed, timeout)) = changed.wait_timeout_while(passed, PATIENCE, |passed| !passed.open) {
            passed.given_up |= timeout.timed_out();
        }
    }

    fn given_up(&self) -> bool {
        self.0.0.lock().unwrap().given_up
    }
}

fn assert_queued(gpu: &mut Gpu, (config, plan): (&ModelConfig, &Plan), what: &str, sequences: &[Tokens]) {
    let batches: Vec<_> = sequences.iter().map(Tokens::batch).collect();
    let cuda = Watched::new(gpu.cuda.take().unwrap());
    let groups = Groups { world: WatchedComm(Alone), sequence: WatchedComm(Alone) };
    let mut session = Session::among(cuda, groups, plan, config, &std::env::temp_dir()).unwrap();
    // Plans and algorithms are made when a shape is new.
    for step in 1..=2 {
        session.step(&batches, &hyper(step), 1.0).unwrap();
    }
    session.backend.synchronize().unwrap();
    let (free, pinned) = (session.backend.b.device.memory_bytes().unwrap().0, session.backend.peak_host_bytes());
    let gate = Gate::default();
    for stream in [Stream::Compute, Stream::Down, Stream::Up] {
        let gate = gate.clone();
        session.backend.b.device.call(stream, move || gate.hold()).unwrap();
    }
    let operations = session.backend.operations;
    session.backend.waits = Some(Box::new({
        let gate = gate.clone();
        move || gate.open()
    }));
    session.step(&batches, &hyper(3), 1.0).unwrap();
    session.backend.waits = None;
    let queued = session.backend.operations - operations;
    assert!(!gate.given_up(), "{what}: the host waited inside the step");
    let free_after = session.backend.b.device.memory_bytes().unwrap().0;
    assert_eq!(free_after, free, "{what}: free device memory after the step and before");
    let grown = session.backend.peak_host_bytes() - pinned;
    assert!(grown < 4 << 20, "{what}: the process grew by {grown} bytes in the step");
    figures("queue", json!({ "plan": what, "operations_queued_while_the_device_stood_still": queued }));
    let mut cuda = session.backend.b;
    cuda.device.release().unwrap();
    gpu.cuda = Some(cuda);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gpu_steps_are_queued_without_waiting() {
    let mut gpu = Gpu::open();
    // Few layers: the driver itself waits when about a thousand operations are under way.
    let config = ModelConfig { n_layers: 2, ..config() };
    let sequence = |lengths: &[u64]| Tokens::random(config.vocab_size, lengths, 9);
    let base = Forced { chunk_tokens: Some(128), ..plain(256, &config) };
    let mut plans = in_host_memory(base, &config, 256);
    plans.extend(kept_sets(base));
    assert!(plans.len() > 6);
    for (what, forced) in &plans {
        let plan = gpu.plan(&config, 256, *forced);
        assert_queued(&mut gpu, (&config, &plan), what, &[sequence(&[256])]);
    }
    let plan = gpu.plan(&config, 256, Forced { gradients: Some(Gradients::Wide), ..base });
    assert_queued(&mut gpu, (&config, &plan), "packed documents", &[sequence(&[128, 128])]);
    assert_queued(&mut gpu, (&config, &plan), "two sequences", &[sequence(&[256]), sequence(&[128])]);
}
