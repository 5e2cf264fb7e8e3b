//! The reference backend: the definition of every operation.
