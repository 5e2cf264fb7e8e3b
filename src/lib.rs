//! Longhaul: a self-hosted service that fine-tunes language models on long documents.
//!
//! Modules in the order a request meets them. `tests/it/floors.rs` holds who may import whom.

pub mod api; // HTTP, by noun
pub mod bench; // what a step costs on this machine
pub mod cli; // subcommands that read, compute and print
pub mod client; // the same API from the command line
pub mod config; // the only reader of the environment
pub mod domain; // the words everyone shares
pub mod engine; // the training engine
pub mod executor; // takes one job from claim to settled
pub mod plan; // what a machine will do about a run: chunks, placements, memory ledger
pub mod store; // Postgres rows and blobs; the only SQL
pub mod telemetry; // logs of all processes
pub mod trainer; // what runs inside the child process
pub mod webhooks; // tells receivers of the end of jobs
