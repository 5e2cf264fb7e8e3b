//! The rooms of Arctic Long Sequence Training.
