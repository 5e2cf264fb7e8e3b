//! The service's API from the command line: `upload`, `jobs`, `watch`, `download`, against a server anywhere.
//!
//! In: parsed flags and the server's address. Out: results on standard output, progress on standard error, a [`Failure`]
//! of one line with an exit status. Knows HTTP and the API's shapes; must not know the store, the engine, or the
//! environment.

pub mod bar;
pub mod create;
pub mod download;
mod failure;
pub mod http;
pub mod jobs;
pub mod multipart;
pub mod partial;
mod parts;
mod plan;
pub mod upload;
pub mod watch;

pub use failure::Failure;

use std::io::Write;

/// Result of a client command.
pub type Result<T = ()> = std::result::Result<T, Failure>;

/// What is printed when a client command is used the wrong way, and in its help.
pub const EXIT_STATUSES: &str = "\
Exit status:
  0  done
  1  something on this side: a file, the disk, a checksum
  2  wrong usage
  3  the server cannot be reached, or is broken
  4  the server refused the request
  5  the job failed
  6  the job was cancelled";

/// Writes one line of results.
fn say(out: &mut dyn Write, line: impl std::fmt::Display) -> Result {
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .map_err(|error| Failure::Local(format!("cannot write to standard output: {error}")))
}
