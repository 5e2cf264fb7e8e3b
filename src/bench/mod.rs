//! `longhaul bench`: what a step and its operations cost on this machine, on random data.

pub mod ops;
pub mod shapes;
pub mod step;
