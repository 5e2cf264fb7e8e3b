//! The planner: pure, no device, no I/O.
