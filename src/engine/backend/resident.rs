//! What the operating system says of this process's memory.

use std::fs;

/// Bytes of a line of `/proc/self/status`, such as `VmHWM`.
fn status_bytes(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib: Option<u64> = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse().ok());
    kib.unwrap_or(0) * 1024
}

/// Resident bytes now.
pub(super) fn resident_bytes() -> u64 {
    status_bytes("VmRSS")
}

/// The most bytes that were ever resident.
pub(super) fn peak_resident_bytes() -> u64 {
    status_bytes("VmHWM")
}

/// Resident bytes of an address range, by the kernel's count of its mapping.
pub(super) fn resident_bytes_of(range: std::ops::Range<usize>) -> u64 {
    let maps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let mut inside = false;
    let mut total = 0;
    for line in maps.lines() {
        let head = line.split(' ').next().unwrap_or_default();
        if let Some((start, end)) = head.split_once('-')
            && let (Ok(start), Ok(end)) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16))
        {
            inside = start < range.end && range.start < end;
        } else if inside && let Some(rest) = line.strip_prefix("Rss:") {
            let kib: u64 = rest.trim().trim_end_matches("kB").trim().parse().unwrap_or(0);
            total += kib * 1024;
        }
    }
    total
}
