//! Every test that is not beside a proof script: one binary, modules by subject.

mod floors;
mod source;
