//! Subcommands: those that read, compute and print, and those that put the long-running roles together.

pub mod machine;
pub mod model;
pub mod plan;
pub mod serve;
