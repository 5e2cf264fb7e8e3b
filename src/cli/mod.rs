//! Subcommands: those that read, compute and print, those that look into the database, and those that put the long-running
//! roles together.

pub mod database;
pub mod keys;
pub mod machine;
pub mod model;
pub mod plan;
pub mod projects;
pub mod serve;
