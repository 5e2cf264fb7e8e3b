//! One GPU: its context, the compute stream, the arena of tensors, and blocking copies between it and the host.
#![expect(
    unsafe_code,
    reason = "device memory is addressed by number: the driver's copies and fills take raw addresses"
)]

use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaEvent, CudaStream,
    result::{self, mem_get_info},
    sys::CUevent_flags,
};

use super::{super::Tensor, driver};
use crate::engine::{Error, Result};

/// A GPU with `bytes` of its memory taken at once.
#[derive(Debug)]
pub struct Device {
    pub(super) context: Arc<CudaContext>,
    pub(super) stream: Arc<CudaStream>,
    arena: u64,
    bytes: u64,
}

impl Device {
    /// Opens GPU `ordinal` of this process and takes `bytes` of its memory. Content is undefined.
    pub(super) fn open(ordinal: usize, bytes: u64) -> Result<Self> {
        let context = CudaContext::new(ordinal).map_err(driver("open the GPU"))?;
        let stream = context.new_stream().map_err(driver("make a stream"))?;
        // SAFETY: an allocation of its own, freed in `drop` by the context that is current here.
        let arena = unsafe { result::malloc_sync(bytes as usize) };
        let arena = arena.map_err(|error| {
            let free = mem_get_info().map_or(String::new(), |(free, _)| format!(", {free} bytes are free"));
            Error::OutOfMemory { space: "device", bytes, cause: format!("{error}{free}") }
        })?;
        Ok(Self { context, stream, arena, bytes })
    }

    /// Name of the card, as the driver gives it.
    pub fn name(&self) -> Result<String> {
        self.context.name().map_err(driver("name the GPU"))
    }

    /// Number of multiprocessors.
    pub fn multiprocessors(&self) -> Result<u64> {
        let attribute = cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        self.context.attribute(attribute).map(|count| count as u64).map_err(driver("count multiprocessors"))
    }

    /// Where a tensor lies in the GPU's memory.
    ///
    /// # Panics
    /// When it leaves the arena: a bug in the caller's layout.
    pub(super) fn address(&self, tensor: Tensor) -> u64 {
        let end = tensor.offset.checked_add(tensor.bytes());
        assert!(end.is_some_and(|end| end <= self.bytes), "{tensor:?} leaves an arena of {} bytes", self.bytes);
        self.arena + tensor.offset
    }

    /// Copies host bytes into a tensor. Blocks.
    ///
    /// # Panics
    /// When the two sides differ in bytes.
    pub fn upload(&self, to: Tensor, bytes: &[u8]) -> Result {
        assert_eq!(to.bytes(), bytes.len() as u64, "bytes of a tensor");
        self.bind()?;
        // SAFETY: the destination holds exactly `bytes.len()` bytes, and the call returns when they are copied.
        unsafe { result::memcpy_htod_sync(self.address(to), bytes) }.map_err(driver("copy to the device"))
    }

    /// Copies a tensor out to host bytes, after everything queued so far. Blocks.
    ///
    /// # Panics
    /// When the two sides differ in bytes.
    pub fn download(&self, from: Tensor, bytes: &mut [u8]) -> Result {
        assert_eq!(from.bytes(), bytes.len() as u64, "bytes of a tensor");
        self.synchronize()?;
        // SAFETY: the source holds exactly `bytes.len()` bytes, nothing writes it now, and the call returns when done.
        unsafe { result::memcpy_dtoh_sync(bytes, self.address(from)) }.map_err(driver("copy from the device"))
    }

    /// Queues `to = from`: same bytes, no overlap.
    ///
    /// # Panics
    /// When the two sides differ in bytes.
    pub fn copy(&self, to: Tensor, from: Tensor) -> Result {
        assert_eq!(to.bytes(), from.bytes(), "bytes of a copy");
        let (to_address, from_address) = (self.address(to), self.address(from));
        self.bind()?;
        // SAFETY: both lie in the arena with the same number of bytes; the stream orders the copy among operations.
        unsafe { result::memcpy_dtod_async(to_address, from_address, to.bytes() as usize, self.stream.cu_stream()) }
            .map_err(driver("copy on the device"))
    }

    /// Queues setting every byte of a tensor: 0 for zeros, 0xff for a NaN in every float.
    pub fn fill_bytes(&self, to: Tensor, byte: u8) -> Result {
        let address = self.address(to);
        self.bind()?;
        // SAFETY: the tensor lies in the arena; the stream orders the fill among operations.
        unsafe { result::memset_d8_async(address, byte, to.bytes() as usize, self.stream.cu_stream()) }
            .map_err(driver("fill"))
    }

    /// Waits until everything queued is done, and reports any error of the past.
    pub fn synchronize(&self) -> Result {
        self.stream.synchronize().map_err(driver("wait for the device"))
    }

    /// A mark after everything queued so far, which keeps the time it was reached.
    pub fn mark(&self) -> Result<CudaEvent> {
        self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(driver("record an event"))
    }

    /// Seconds between two marks, by the device's own clock. Waits for the second.
    pub fn seconds_between(&self, start: &CudaEvent, end: &CudaEvent) -> Result<f64> {
        end.synchronize().map_err(driver("wait for an event"))?;
        start.elapsed_ms(end).map(|milliseconds| f64::from(milliseconds) / 1e3).map_err(driver("read a clock"))
    }

    /// Makes the GPU's context the calling thread's.
    fn bind(&self) -> Result {
        self.context.bind_to_thread().map_err(driver("bind the context"))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.bind().is_ok() && self.stream.synchronize().is_ok() {
            // SAFETY: allocated in `open` and freed nowhere else; the stream has nothing left that reads it.
            // At the end of a process there is nobody left to tell; the driver takes the memory back in any case.
            let _ = unsafe { result::free_sync(self.arena) };
        }
    }
}
