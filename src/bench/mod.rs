//! `longhaul bench`: what a step and its operations cost on this machine, on random data.

pub mod calibrate;
pub mod ops;
mod random;
mod ranks;
mod sequence;
pub mod shapes;
pub mod step;
mod timeline;
