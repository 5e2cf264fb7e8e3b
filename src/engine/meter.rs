//! Tokens per second, model FLOPs, peak memory.
