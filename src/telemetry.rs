//! Logging for all processes.
