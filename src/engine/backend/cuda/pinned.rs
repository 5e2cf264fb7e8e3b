//! Pinned host memory: pages that the GPU's copy engines reach by themselves.
#![expect(unsafe_code, reason = "memory is mapped, touched and handed to the driver by address")]

use std::ffi::c_void;

use cudarc::driver::{DriverError, sys};
use rayon::prelude::*;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::engine::{Error, Result};

/// Bytes that one thread touches at a time, and of the smallest page.
const STRIDE: usize = 64 << 20;
const PAGE: usize = 4096;

/// A mapping of our own, registered with the driver. Large pages, touched by all cores first: the driver alone, a page after
/// the other on one core, takes ten times as long.
#[derive(Debug)]
pub(super) struct Pinned {
    start: *mut c_void,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone, and nothing here depends on a thread.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Maps, touches and registers `bytes` bytes in the context that is current. They are zeros.
    pub(super) fn take(bytes: u64) -> Result<Self> {
        let lacking = |cause: String| Error::OutOfMemory { space: "pinned host", bytes, cause };
        let size = usize::try_from(bytes).map_err(|_| lacking("more than the address space".into()))?;
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping at an address of the system's choice overlaps nothing.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), size, protection, flags) };
        let start = start.map_err(|error| lacking(error.to_string()))?;
        let pinned = Self { start, bytes: size };
        // SAFETY: our own mapping. Where the system has no large pages small ones do.
        let _ = unsafe { madvise(start, size, Advice::LinuxHugepage) };
        let address = start.expose_provenance();
        (0..size.div_ceil(STRIDE)).into_par_iter().for_each(|i| {
            for at in (i * STRIDE..size.min((i + 1) * STRIDE)).step_by(PAGE) {
                let page = std::ptr::with_exposed_provenance_mut::<u8>(address + at);
                // SAFETY: inside the mapping, which nobody else knows yet; each stride is one thread's.
                unsafe { page.write_volatile(0) };
            }
        });
        // SAFETY: the mapping lives until `drop` has taken it back from the driver.
        let registered = unsafe { sys::cuMemHostRegister_v2(start, size, sys::CU_MEMHOSTREGISTER_PORTABLE) };
        registered.result().map_err(|error: DriverError| lacking(error.to_string()))?;
        Ok(pinned)
    }

    /// Copies bytes to this place; its address.
    ///
    /// # Panics
    /// When they leave the mapping.
    pub(super) fn write(&mut self, at: usize, bytes: &[u8]) -> u64 {
        let end = at.checked_add(bytes.len());
        assert!(end.is_some_and(|end| end <= self.bytes), "{} bytes at {at} of {}", bytes.len(), self.bytes);
        // SAFETY: inside the mapping, which is this value's alone. A copy engine that still read from here would be a bug of the
        // caller's, but reads memory that is there.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.cast::<u8>().add(at), bytes.len()) };
        self.address() + at as u64
    }

    /// First address; the driver gives it the same on both sides.
    pub(super) fn address(&self) -> u64 {
        self.start.expose_provenance() as u64
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // At the end of a process there is nobody left to tell; the system takes the memory back in any case.
        // SAFETY: mapped in `take`, which may have failed to register it; nothing queued reads it any more, for the device
        // waits for its streams before it lets go of its arenas.
        unsafe {
            let _ = sys::cuMemHostUnregister(self.start).result();
            let _ = munmap(self.start, self.bytes);
        }
    }
}
