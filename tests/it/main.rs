//! Every test that is not beside a proof script: one binary, modules by subject.
#![expect(clippy::unwrap_used, reason = "a test that unwraps nothing has failed, and says where")]
#![expect(unreachable_pub, reason = "modules of a test binary share through pub")]

mod bad_input;
mod floors;
mod golden;
mod http;
mod job_request;
mod journey;
mod kernels;
mod openapi;
mod operations;
mod optim;
mod parity;
mod plan;
mod private_postgres;
mod source;
mod store;
mod support;
mod training;
mod transformers;
