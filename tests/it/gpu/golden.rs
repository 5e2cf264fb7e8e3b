//! The golden model with heads of 64 in bf16 on a GPU: gradients as near to float64 as PyTorch's, whatever the plan.

use longhaul::engine::train::saved;

use super::{BLOCK, Gpu, figures};
use crate::{
    golden::{
        self,
        bf16::{NAME, assert_as_good_as_pytorch, errors, plans, sequences, trained},
    },
    support::stage::Stage,
};

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gpu_gradients_are_as_near_as_pytorchs_in_bf16() {
    let mut gpu = Gpu::open();
    figures("golden", gpu.card());
    let config = golden::config(NAME);
    let sequences = sequences(BLOCK as usize);
    let tokens = sequences.iter().map(|tokens| tokens.ids.len() as u64).max().unwrap();
    for (what, forced) in plans(BLOCK) {
        let plan = gpu.plan(&config, tokens, forced);
        let mut session = gpu.session(&config, &plan);
        saved::load_base(&mut session, &golden::folder(NAME)).unwrap();
        let errors = errors(&mut session, &sequences[0]);
        let mut values = assert_as_good_as_pytorch(what, &errors);
        values["worst_loss_error_of_five_steps"] = trained(what, &mut session, &sequences).into();
        figures("golden", values);
        gpu.end(session, &plan);
    }
}
