//! Subcommands that neither serve nor train: they read, compute and print.

pub mod model;
pub mod plan;
