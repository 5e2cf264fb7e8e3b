//! A killed run on a GPU: what `training::killed` demands of every device.

use super::{Gpu, figures};
use crate::training::killed::a_killed_run_continues;

/// What a loss may differ beyond three times the spread of three runs, of itself.
const FLOOR: f64 = 1e-4;

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gpu_run_that_was_killed_continues() {
    let mut gpu = Gpu::open();
    figures("resume", gpu.card());
    let test = "gpu::resume::gpu_run_that_was_killed_continues";
    a_killed_run_continues(&mut gpu, test, FLOOR, |values| figures("resume", values));
}
