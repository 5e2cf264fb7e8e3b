//! The transformer, written out.
