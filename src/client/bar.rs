//! Progress on standard error, drawn only where that is a terminal, and numbers as people read them.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// How often a bar that waits moves.
const TICK: Duration = Duration::from_millis(120);
/// Marks of a full, a partial and an empty cell.
const CELLS: &str = "=> ";
const BYTES: &str = "{prefix:.bold} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
const STEPS: &str = "[{bar:24}] {pos}/{len} {msg}";
const WAIT: &str = "{spinner} {msg} {elapsed}";

/// A bar for so many bytes of one thing.
pub fn bytes(name: &str, length: u64) -> ProgressBar {
    let bar = ProgressBar::new(length).with_prefix(name.to_owned());
    bar.set_style(style(BYTES));
    bar
}

/// A bar for a job: waits until [`steps`] is called.
pub fn job() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    bar.set_style(style(WAIT));
    bar.enable_steady_tick(TICK);
    bar
}

/// Turns a waiting bar into one that counts steps.
pub fn steps(bar: &ProgressBar, total: u64) {
    bar.set_style(style(STEPS));
    bar.set_length(total);
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template).expect("the templates of this file are well formed");
    style.progress_chars(CELLS)
}

/// `812 B`, `3.4 MiB`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `42s`, `3m05s`, `2h07m`, `3d04h`.
pub fn human_seconds(seconds: f64) -> String {
    if !seconds.is_finite() {
        return "?".to_owned();
    }
    let s = seconds.max(0.0).round() as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..86_400 => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
        _ => format!("{}d{:02}h", s / 86_400, s % 86_400 / 3600),
    }
}

/// `1,234,567`.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let first = digits.len() % 3;
    let mut out = digits[..first].to_owned();
    for group in digits.as_bytes()[first..].chunks(3) {
        if !out.is_empty() {
            out.push(',');
        }
        out.extend(group.iter().map(|b| char::from(*b)));
    }
    out
}
