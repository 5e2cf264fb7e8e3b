//! Schedules and clipping around the update.
