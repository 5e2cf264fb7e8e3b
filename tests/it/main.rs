//! Every test that is not beside a proof script: one binary, modules by subject.
#![expect(clippy::unwrap_used, reason = "a test that unwraps nothing has failed, and says where")]
#![expect(clippy::float_cmp, reason = "equal to the last bit is what many tests are about")]
#![expect(clippy::case_sensitive_file_extension_comparisons, reason = "names of the tree are as they are written")]
#![expect(clippy::needless_pass_by_value, reason = "tests build their inputs in place")]
#![expect(unreachable_pub, reason = "modules of a test binary share through pub")]

mod bad_input;
mod chat;
mod comm;
mod devices;
mod floors;
mod golden;
mod gpu;
mod http;
mod hub_fetch;
mod job_request;
mod journey;
mod kernels;
mod machine;
mod openapi;
mod operations;
mod optim;
mod parity;
mod plan;
mod private_postgres;
mod source;
mod store;
mod support;
mod together;
mod training;
mod transformers;
mod twenty_steps;
