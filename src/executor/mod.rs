//! Takes one job from claim to settled: lease, trainer process, checkpoints.

pub mod host;
