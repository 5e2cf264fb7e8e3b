//! What several tests need: folders that clean up after themselves, a private Postgres for the whole run, small models,
//! the service in process, jobs and checkpoints in the store.

pub mod database;
pub mod form;
pub mod model;
pub mod rows;
pub mod sandbox;
pub mod server;
pub mod service;

pub use database::{Database, cluster_settings, database};
pub use sandbox::Sandbox;
