//! Bytes of the host on their way to the device while the host goes on: copied to pinned slots, and from there in the order of the
//! compute stream.

use cudarc::driver::CudaEvent;

use super::{device::Device, driver, pinned::Pinned};
use crate::engine::{
    Result,
    backend::{Stream, Tensor},
};

const SLOT_BYTES: usize = 1 << 20;
/// Inputs of one sequence of a million tokens, or of several short ones: as far as the host may be ahead.
const SLOTS: usize = 16;

/// The slots, used in turn. They are pinned at the first use.
#[derive(Debug, Default)]
pub(super) struct Inputs {
    pinned: Option<Pinned>,
    /// Reached when what a slot held has left it.
    left: [Option<CudaEvent>; SLOTS],
    next: usize,
}

impl Inputs {
    /// Pins the slots, unless they are.
    pub(super) fn pin(&mut self) -> Result {
        if self.pinned.is_none() {
            self.pinned = Some(Pinned::take((SLOTS * SLOT_BYTES) as u64)?);
        }
        Ok(())
    }

    /// Queues `to = bytes`. Waits only where all slots are still under way.
    pub(super) fn send(&mut self, device: &Device, to: Tensor, bytes: &[u8]) -> Result {
        assert_eq!(to.bytes(), bytes.len() as u64, "bytes of a tensor");
        let pinned = self.pinned.as_mut().expect("inputs are sent when the arenas are there");
        let mut address = device.address(to);
        for piece in bytes.chunks(SLOT_BYTES) {
            let slot = self.next;
            self.next = (slot + 1) % SLOTS;
            if let Some(left) = &self.left[slot] {
                left.synchronize().map_err(driver("wait for an event"))?;
            }
            let from = pinned.write(slot * SLOT_BYTES, piece);
            device.queue_copy(Stream::Compute, address, from, piece.len() as u64)?;
            self.left[slot] = Some(device.record(Stream::Compute)?);
            address += piece.len() as u64;
        }
        Ok(())
    }
}
