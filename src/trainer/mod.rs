//! What runs inside the child process: one job, from its first line to its last.

pub mod protocol;
