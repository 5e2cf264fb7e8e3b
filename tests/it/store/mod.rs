//! The store's promises, against a real database.

mod calls;
mod fencing;
mod queue;
mod retention;
mod shares;
