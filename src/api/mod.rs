//! HTTP by noun: one file holds router, types and handlers.
