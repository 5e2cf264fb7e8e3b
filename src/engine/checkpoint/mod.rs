//! Weights and resume state on disk.
