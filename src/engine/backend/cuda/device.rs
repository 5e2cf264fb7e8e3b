//! One GPU: its context, its streams, the two arenas of tensors (device memory, pinned host memory), and copies.
#![expect(
    unsafe_code,
    reason = "device memory is addressed by number: the driver's copies and fills take raw addresses"
)]

use std::{ffi::c_void, sync::Arc};

use cudarc::driver::{
    CudaContext, CudaEvent, CudaStream,
    result::{self, mem_get_info},
    sys::{self, CUevent_flags},
};

use super::{
    super::{Space, Stream, Tensor},
    driver,
    pinned::Pinned,
};
use crate::engine::{Error, Result};

/// A block of memory: its first address (the driver gives host memory the same address on both sides) and its size.
#[derive(Debug, Clone, Copy, Default)]
struct Block {
    start: u64,
    bytes: u64,
}

/// A GPU. Everything on it is queued: operations on the compute stream, copies where the caller says.
#[derive(Debug)]
pub struct Device {
    pub(in crate::engine) context: Arc<CudaContext>,
    compute: Arc<CudaStream>,
    down: Arc<CudaStream>,
    up: Arc<CudaStream>,
    exchange: Arc<CudaStream>,
    gather: Arc<CudaStream>,
    memory: Block,
    host: Block,
    /// Keeps the memory of `host`.
    pinned: Option<Pinned>,
    /// Free bytes of the card before the arenas were taken.
    free_before: u64,
    multiprocessors: u64,
}

/// A stream whose kernels go before waiting blocks of others: a collective is short and other ranks wait for it, while an operation
/// that fills the device would keep it out until its own end.
fn urgent(context: &Arc<CudaContext>) -> Result<Arc<CudaStream>> {
    context.new_stream_with_priority(URGENT).map_err(driver("make a stream"))
}

/// The driver takes the nearest that the device has; 0 is the least.
const URGENT: i32 = -5;

fn free_bytes() -> u64 {
    mem_get_info().map_or(0, |(free, _)| free as u64)
}

impl Device {
    /// Opens GPU `ordinal` of this process. No memory is taken yet.
    pub(super) fn open(ordinal: usize) -> Result<Self> {
        let context = CudaContext::new(ordinal).map_err(driver("open the GPU"))?;
        // Slices of the bindings would carry events of their own; our streams are ordered by `record` and `wait` alone.
        // SAFETY: no slice of the bindings exists, in this context or later.
        unsafe { context.disable_event_tracking() };
        let stream = || context.new_stream().map_err(driver("make a stream"));
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(attribute).map_err(driver("count multiprocessors"))? as u64;
        let (compute, down, up) = (stream()?, stream()?, stream()?);
        let (exchange, gather) = (urgent(&context)?, urgent(&context)?);
        let (memory, host) = (Block::default(), Block::default());
        Ok(Self {
            context,
            compute,
            down,
            up,
            exchange,
            gather,
            memory,
            host,
            pinned: None,
            free_before: free_bytes(),
            multiprocessors,
        })
    }

    /// Takes the arenas, once: `bytes` of the card's memory and `host_bytes` of pinned host memory. Content is undefined.
    ///
    /// # Panics
    /// When they were taken before.
    pub(super) fn reserve(&mut self, bytes: u64, host_bytes: u64) -> Result {
        assert!(self.memory.bytes == 0 && self.host.bytes == 0, "arenas are taken once, or released in between");
        self.bind()?;
        self.free_before = free_bytes();
        let lacking = |error: cudarc::driver::DriverError| {
            let cause = format!("{error}, {} bytes of device memory are free", free_bytes());
            Error::OutOfMemory { space: "device", bytes, cause }
        };
        // SAFETY: an allocation of its own, freed in `drop` by the context that is current here.
        let start = unsafe { result::malloc_sync(bytes as usize) }.map_err(lacking)?;
        self.memory = Block { start, bytes };
        if host_bytes > 0 {
            let pinned = Pinned::take(host_bytes)?;
            self.host = Block { start: pinned.address(), bytes: host_bytes };
            self.pinned = Some(pinned);
        }
        Ok(())
    }

    /// Gives both arenas back once nothing queued needs them. Others may then be taken, for another model: what the
    /// libraries have loaded and planned stays.
    pub fn release(&mut self) -> Result {
        self.synchronize()?;
        self.bind()?;
        (self.host, self.pinned) = (Block::default(), None);
        let memory = std::mem::take(&mut self.memory);
        if memory.bytes > 0 {
            // SAFETY: allocated in `reserve` and freed nowhere else; no stream has anything left that reads it.
            unsafe { result::free_sync(memory.start) }.map_err(driver("free the arena"))?;
        }
        Ok(())
    }

    /// Bytes of the device arena.
    pub(super) fn arena_bytes(&self) -> u64 {
        self.memory.bytes
    }

    /// Bytes of the card that were taken since just before the arena was, by the driver's count: the arena, and what
    /// libraries took for themselves.
    pub(super) fn taken_bytes(&self) -> u64 {
        if self.bind().is_err() {
            return 0;
        }
        self.free_before.saturating_sub(free_bytes())
    }

    /// Name of the card, as the driver gives it.
    pub fn name(&self) -> Result<String> {
        self.context.name().map_err(driver("name the GPU"))
    }

    /// Free and total bytes of the card now.
    pub fn memory_bytes(&self) -> Result<(u64, u64)> {
        self.bind()?;
        mem_get_info().map(|(free, total)| (free as u64, total as u64)).map_err(driver("measure memory"))
    }

    /// Number of multiprocessors.
    pub fn multiprocessors(&self) -> u64 {
        self.multiprocessors
    }

    /// The stream that operations are queued on.
    pub(super) fn compute(&self) -> &Arc<CudaStream> {
        &self.compute
    }

    /// The same as the libraries take it.
    pub(super) fn compute_stream(&self) -> sys::CUstream {
        self.compute.cu_stream()
    }

    /// A stream as libraries take it.
    pub(in crate::engine) fn raw_stream(&self, stream: Stream) -> sys::CUstream {
        self.stream(stream).cu_stream()
    }

    fn stream(&self, stream: Stream) -> &Arc<CudaStream> {
        match stream {
            Stream::Compute => &self.compute,
            Stream::Down => &self.down,
            Stream::Up => &self.up,
            Stream::Exchange => &self.exchange,
            Stream::Gather => &self.gather,
        }
    }

    /// Where a tensor lies.
    ///
    /// # Panics
    /// When it leaves its arena: a bug in the caller's layout.
    pub(crate) fn address(&self, tensor: Tensor) -> u64 {
        let arena = match tensor.space {
            Space::Device => self.memory,
            Space::Host => self.host,
        };
        let end = tensor.offset.checked_add(tensor.bytes());
        assert!(end.is_some_and(|end| end <= arena.bytes), "{tensor:?} leaves an arena of {} bytes", arena.bytes);
        arena.start + tensor.offset
    }

    /// Copies host bytes into a tensor, after everything queued so far. Blocks.
    ///
    /// # Panics
    /// When the two sides differ in bytes.
    pub fn upload(&self, to: Tensor, bytes: &[u8]) -> Result {
        assert_eq!(to.bytes(), bytes.len() as u64, "bytes of a tensor");
        let address = self.address(to);
        self.synchronize()?;
        let from = bytes.as_ptr().expose_provenance() as u64;
        self.queue_copy(Stream::Compute, address, from, bytes.len() as u64)?;
        self.compute.synchronize().map_err(driver("copy to the device"))
    }

    /// Copies a tensor out to host bytes, after everything queued so far. Blocks.
    ///
    /// # Panics
    /// When the two sides differ in bytes.
    pub fn download(&self, from: Tensor, bytes: &mut [u8]) -> Result {
        assert_eq!(from.bytes(), bytes.len() as u64, "bytes of a tensor");
        let address = self.address(from);
        self.synchronize()?;
        let to = bytes.as_mut_ptr().expose_provenance() as u64;
        self.queue_copy(Stream::Compute, to, address, bytes.len() as u64)?;
        self.compute.synchronize().map_err(driver("copy from the device"))
    }

    /// Queues `to = from` on a stream: same bytes, no overlap, either arena.
    ///
    /// # Panics
    /// When the two sides differ in bytes.
    pub fn copy(&self, stream: Stream, to: Tensor, from: Tensor) -> Result {
        assert_eq!(to.bytes(), from.bytes(), "bytes of a copy");
        self.queue_copy(stream, self.address(to), self.address(from), to.bytes())
    }

    /// Both addresses must hold `bytes` bytes until the stream has passed.
    pub(super) fn queue_copy(&self, stream: Stream, to: u64, from: u64, bytes: u64) -> Result {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the callers checked both sides: arenas and the slots of inputs live as long as anything is queued, host slices
        // are waited for.
        unsafe { sys::cuMemcpyAsync(to, from, bytes as usize, self.raw_stream(stream)) }
            .result()
            .map_err(driver("copy"))
    }

    /// Queues setting every byte of a tensor: 0 for zeros, 0xff for a NaN in every float.
    pub fn fill_bytes(&self, to: Tensor, byte: u8) -> Result {
        let address = self.address(to);
        self.bind()?;
        // SAFETY: the tensor lies in the arena; the stream orders the fill among operations.
        unsafe { result::memset_d8_async(address, byte, to.bytes() as usize, self.compute_stream()) }
            .map_err(driver("fill"))
    }

    /// A mark after everything queued on a stream; cheap, keeps no time.
    pub(super) fn record(&self, stream: Stream) -> Result<CudaEvent> {
        self.stream(stream).record_event(None).map_err(driver("record an event"))
    }

    /// Lets a stream wait for a mark.
    pub(super) fn wait(&self, stream: Stream, event: &CudaEvent) -> Result {
        self.stream(stream).wait(event).map_err(driver("wait for an event"))
    }

    /// Queues a call on the host: the stream goes on when it has returned. It must not use the device, nor panic.
    pub fn call(&self, stream: Stream, work: impl FnOnce() + Send + 'static) -> Result {
        unsafe extern "C" fn run<F: FnOnce()>(work: *mut c_void) {
            // SAFETY: the box that was leaked for this call, which is made once.
            let work = unsafe { Box::from_raw(work.cast::<F>()) };
            work();
        }
        fn pair<F: FnOnce()>(work: F) -> (unsafe extern "C" fn(*mut c_void), *mut c_void) {
            (run::<F>, Box::into_raw(Box::new(work)).cast())
        }
        let (run, work) = pair(work);
        self.bind()?;
        // SAFETY: `run` takes the box that `work` is; what it holds may be sent to the driver's thread.
        unsafe { result::stream::launch_host_function(self.raw_stream(stream), run, work) }
            .map_err(driver("queue a call"))
    }

    /// Waits until everything queued on every stream is done, and reports any error of the past.
    pub fn synchronize(&self) -> Result {
        for stream in [&self.compute, &self.down, &self.up, &self.exchange, &self.gather] {
            stream.synchronize().map_err(driver("wait for the device"))?;
        }
        Ok(())
    }

    /// A mark on a stream that keeps the time it was reached.
    pub fn mark(&self, stream: Stream) -> Result<CudaEvent> {
        self.stream(stream).record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(driver("record an event"))
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
        // At the end of a process there is nobody left to tell; the driver takes the memory back in any case.
        let _ = self.release();
    }
}
