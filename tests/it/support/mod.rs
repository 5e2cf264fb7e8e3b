//! What several tests need: folders that clean up after themselves, a private Postgres for the whole run, small models.

pub mod database;
pub mod model;
pub mod sandbox;
pub mod server;

pub use database::{Database, cluster_settings, database};
pub use sandbox::Sandbox;
