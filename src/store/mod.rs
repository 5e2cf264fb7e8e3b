//! Postgres rows and file contents; the only SQL.
