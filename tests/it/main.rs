//! Every test that is not beside a proof script: one binary, modules by subject.
#![expect(clippy::unwrap_used, reason = "a test that unwraps nothing has failed, and says where")]
#![expect(unreachable_pub, reason = "modules of a test binary share through pub")]

mod floors;
mod http;
mod job_request;
mod openapi;
mod optim;
mod parity;
mod plan;
mod private_postgres;
mod source;
mod store;
mod support;
