//! The same on two GPUs through NCCL. Ignored where tests run as a matter of course; `it --ignored nccl --test-threads 1` runs them.

use std::io::Write;

use longhaul::{
    domain::{Machine, machine::DeviceKind},
    engine::{
        backend::cuda::Cuda,
        comm::{HostComm, nccl::Nccl, tcp::Tcp},
    },
};
use serde_json::{Value, json};

use super::{Member, assert_golden, assert_losses, assert_resumed};
use crate::{comm::nccl::joined, support::model};

/// Device and host memory that the small models of these proofs may plan with.
const BYTES: u64 = 16 << 30;

pub(super) fn member(control: HostComm<Tcp>) -> Member<Cuda, Nccl> {
    let (cuda, world) = joined(control);
    let machine = Machine { device: DeviceKind::Cuda, n_devices: 2, host_bytes: BYTES, ..model::machine(BYTES) };
    let renew = |mut cuda: Cuda| {
        cuda.device.release().unwrap();
        cuda
    };
    Member { b: Some(cuda), world: Some(world), machine, renew, steps: 20 }
}

/// A line of figures. Past the test harness, which shows what a test prints only when it fails.
fn figures(proof: &str, values: Value) {
    let line = json!({ "proof": proof, "figures": values });
    writeln!(std::io::stdout().lock(), "\n{line}").unwrap();
}

#[test]
#[ignore = "needs two NVIDIA GPUs"]
fn two_cards_are_as_near_as_pytorch_in_bf16() {
    figures("golden, two ranks", assert_golden("gpu").into());
}

#[test]
#[ignore = "needs two NVIDIA GPUs"]
fn two_cards_learn_as_one() {
    figures("losses of two ranks", assert_losses("gpu"));
}

#[test]
#[ignore = "needs two NVIDIA GPUs"]
fn a_state_saved_by_two_cards_is_that_of_any_number() {
    assert_resumed("gpu");
    figures("resume, two ranks", "same bytes".into());
}
