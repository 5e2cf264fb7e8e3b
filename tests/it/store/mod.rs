//! The store's promises, against a real database.

mod fencing;
mod queue;
mod retention;
