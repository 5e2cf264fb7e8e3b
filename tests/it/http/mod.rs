//! The service's promises over HTTP, against a real database.

mod access;
mod checkpoints;
mod commands;
mod events;
mod faults;
mod files;
mod hub;
mod injection;
mod job_creation;
mod job_life;
mod metrics;
mod models;
mod page;
mod permissions;
mod plans;
mod projects;
mod quotas;
mod refused_uploads;
mod results;
mod uploads;
mod webhooks;
