//! Twenty steps of a model of medium size beside transformers on the same GPU.
//!
//! The Python is `LONGHAUL_REFERENCE_PYTHON`, or else the `python3` on the path, which is where cuDNN is looked for too.

use std::path::PathBuf;

use super::{Gpu, figures};
use crate::{
    support::PYTHON,
    twenty_steps::{Sizes, beside_transformers},
};

const SIZES: Sizes = Sizes {
    learning_rate: 2e-4,
    layers: 4,
    hidden: 512,
    intermediate: 1536,
    heads: 8,
    kv_heads: 4,
    vocab: 304,
    tokens: 2048,
};

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gpu_twenty_steps_are_transformers() {
    let python = std::env::var_os(PYTHON).map_or_else(|| PathBuf::from("python3"), PathBuf::from);
    let mut gpu = Gpu::open();
    figures("twenty steps", gpu.card());
    figures("twenty steps", beside_transformers(&mut gpu, "cuda", &python, &SIZES));
}
