//! The plain layers: one rank, whole tensors, no policy.
