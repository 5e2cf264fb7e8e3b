//! Plans on a GPU: what `parity::plans` demands of every device.

use super::{Gpu, figures};
use crate::parity::plans::every_plan_is_the_plainest;

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gpu_plans_are_the_plainest() {
    let mut gpu = Gpu::open();
    figures("parity", gpu.card());
    every_plan_is_the_plainest(&mut gpu, |values| figures("parity", values));
}
