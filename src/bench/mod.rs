//! `longhaul bench`: what a step costs on this machine, on random weights and random tokens.

pub mod shapes;
pub mod step;
