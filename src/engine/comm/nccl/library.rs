//! NCCL itself: its functions, found at run time, and the communicators that this process has in it.
//!
//! Communicators do not block: a call returns at once and is asked after until NCCL has queued it. So a call that waits for a
//! rank that is gone can be given up, and nothing of NCCL is ever waited for with the lock held.
#![expect(unsafe_code, reason = "NCCL takes communicators as handles and device memory by address")]

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    path::PathBuf,
    ptr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use cudarc::{
    driver::CudaContext,
    nccl::sys::{cudaStream_t, ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId},
};

use crate::engine::{
    backend::{
        DType, Stream, Tensor,
        cuda::{Device, libraries},
    },
    comm::Lost,
    error::{Error, Result},
};

type Send = unsafe extern "C" fn(*const c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> ncclResult_t;
type Receive =
    unsafe extern "C" fn(*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> ncclResult_t;
type AllGather =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, ncclDataType_t, ncclComm_t, cudaStream_t) -> ncclResult_t;
type Reduce = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    ncclDataType_t,
    ncclRedOp_t,
    ncclComm_t,
    cudaStream_t,
) -> ncclResult_t;
type Broadcast = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    ncclDataType_t,
    c_int,
    ncclComm_t,
    cudaStream_t,
) -> ncclResult_t;
type Initialize = unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> ncclResult_t;
type Split = unsafe extern "C" fn(ncclComm_t, c_int, c_int, *mut ncclComm_t, *mut ncclConfig_t) -> ncclResult_t;

/// The functions by their C names without the prefix. Types are the bindings'; the bindings' own loader asks for file names
/// that NCCL's packages do not have.
struct Library {
    get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> ncclResult_t,
    comm_init_rank_config: Initialize,
    comm_split: Split,
    comm_abort: unsafe extern "C" fn(ncclComm_t) -> ncclResult_t,
    comm_get_async_error: unsafe extern "C" fn(ncclComm_t, *mut ncclResult_t) -> ncclResult_t,
    get_error_string: unsafe extern "C" fn(ncclResult_t) -> *const c_char,
    group_start: unsafe extern "C" fn() -> ncclResult_t,
    group_end: unsafe extern "C" fn() -> ncclResult_t,
    send: Send,
    receive: Receive,
    all_gather: AllGather,
    reduce_scatter: Reduce,
    all_reduce: Reduce,
    broadcast: Broadcast,
}

/// What all ranks of a world start from; rank 0 makes it.
pub(super) type UniqueId = [u8; 128];

/// One operation on a communicator. Data that only moves counts as bytes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Call {
    Send { from: Tensor, to: usize },
    Receive { to: Tensor, from: usize },
    AllGather { to: Tensor, from: Tensor },
    ReduceScatter { to: Tensor, from: Tensor },
    AllReduce { x: Tensor },
    Broadcast { x: Tensor, root: usize },
}

/// Every communicator of this process: of the world, and of groups cut from it.
pub(super) struct Communicators {
    library: Library,
    context: Arc<CudaContext>,
    state: Mutex<State>,
}

struct State {
    /// By index; none once given up.
    handles: Vec<Option<Handle>>,
    /// Why all were given up.
    lost: Option<Lost>,
}

/// A communicator.
#[derive(Clone, Copy)]
struct Handle(ncclComm_t);

// SAFETY: NCCL lets any thread use a communicator, one at a time; `Communicators` uses handles under its lock only.
unsafe impl std::marker::Send for Handle {}

/// Between two questions whether a call has been queued.
const ASK: Duration = Duration::from_micros(20);
/// The configuration's first magic number, and the version whose fields it has (2.28.0).
const CONFIG_MAGIC: u32 = 0xcafe_beef;
const CONFIG_VERSION: u32 = 22_800;

impl Library {
    fn open(folders: &[PathBuf]) -> Result<Self> {
        let library = libraries::nccl(folders)?;
        /// A function of the library by its C name.
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the field's type is the function's, as NVIDIA's header declares it for every version 2; the library
                // is never closed.
                *unsafe { library.get($name) }
                    .map_err(|error| Error::Missing(format!("NCCL is too old, 2.18 has what is needed: {error}")))?
            };
        }
        Ok(Self {
            get_unique_id: function!(b"ncclGetUniqueId"),
            comm_init_rank_config: function!(b"ncclCommInitRankConfig"),
            comm_split: function!(b"ncclCommSplit"),
            comm_abort: function!(b"ncclCommAbort"),
            comm_get_async_error: function!(b"ncclCommGetAsyncError"),
            get_error_string: function!(b"ncclGetErrorString"),
            group_start: function!(b"ncclGroupStart"),
            group_end: function!(b"ncclGroupEnd"),
            send: function!(b"ncclSend"),
            receive: function!(b"ncclRecv"),
            all_gather: function!(b"ncclAllGather"),
            reduce_scatter: function!(b"ncclReduceScatter"),
            all_reduce: function!(b"ncclAllReduce"),
            broadcast: function!(b"ncclBroadcast"),
        })
    }

    /// An error unless the call succeeded or goes on by itself.
    fn accepted(&self, call: &str, result: ncclResult_t) -> Result {
        if matches!(result, ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress) {
            return Ok(());
        }
        // SAFETY: NCCL answers a constant text, also for numbers that it does not know.
        let cause = unsafe { CStr::from_ptr((self.get_error_string)(result)) };
        let cause = format!("{}; NCCL_DEBUG=WARN in the environment makes it say more", cause.to_string_lossy());
        Err(Error::Device { library: "NCCL", call: call.to_owned(), cause })
    }
}

impl Communicators {
    /// Opens NCCL for the GPU of this context. `folders` as for [`Cuda::open`](crate::engine::backend::cuda::Cuda::open).
    pub(super) fn open(context: Arc<CudaContext>, folders: &[PathBuf]) -> Result<Self> {
        let state = Mutex::new(State { handles: Vec::new(), lost: None });
        Ok(Self { library: Library::open(folders)?, context, state })
    }

    pub(super) fn unique_id(&self) -> Result<UniqueId> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: writes the id it is given.
        let result = unsafe { (self.library.get_unique_id)(&raw mut id) };
        self.library.accepted("ncclGetUniqueId", result)?;
        Ok(bytemuck::cast(id.internal))
    }

    /// Makes the world's communicator; waits for the other ranks. Its index.
    pub(super) fn initialize(&self, id: UniqueId, rank: usize, n_ranks: usize) -> Result<usize> {
        let id = ncclUniqueId { internal: bytemuck::cast(id) };
        let mut config = configuration();
        self.make("ncclCommInitRankConfig", None, |_, slot| {
            // SAFETY: slot and configuration are valid; the GPU's context is current.
            unsafe { (self.library.comm_init_rank_config)(slot, n_ranks as c_int, id, rank as c_int, &raw mut config) }
        })
    }

    /// Cuts a communicator; waits for its other ranks. The new one's index. `color` and `key` are small.
    pub(super) fn split(&self, index: usize, color: usize, key: usize) -> Result<usize> {
        self.make("ncclCommSplit", Some(index), |parent, slot| {
            // SAFETY: the parent is a communicator with nothing in progress, the slot is valid. Without a configuration the new
            // one has the parent's, and so does not block either.
            unsafe { (self.library.comm_split)(parent, color as c_int, key as c_int, slot, ptr::null_mut()) }
        })
    }

    /// Makes a communicator, from a parent or from nothing.
    fn make(
        &self,
        call: &str,
        parent: Option<usize>,
        make: impl FnOnce(ncclComm_t, *mut ncclComm_t) -> ncclResult_t,
    ) -> Result<usize> {
        // Never freed: NCCL's own thread writes it when the communicator is ready, and may do so after this call was given up.
        let slot: *mut ncclComm_t = Box::into_raw(Box::new(ptr::null_mut()));
        self.bind()?;
        let mut state = self.state()?;
        let parent_handle = parent.map_or(Ok(ptr::null_mut()), |index| state.handle(index))?;
        self.library.accepted(call, make(parent_handle, slot))?;
        let index = state.handles.len();
        state.handles.push(None);
        let Some(parent) = parent else {
            // SAFETY: a communicator made from nothing is there at once, so that it can be asked after and given up.
            state.handles[index] = Some(Handle(unsafe { *slot }));
            drop(state);
            return self.settle(index, call).map(|()| index);
        };
        drop(state);
        // One that is cut is there when its parent is ready again.
        self.settle(parent, call)?;
        let mut state = self.state()?;
        // SAFETY: the parent is ready, so NCCL has written the slot and is done with it.
        state.handles[index] = Some(Handle(unsafe { *slot }));
        drop(state);
        self.settle(index, call).map(|()| index)
    }

    /// Queues calls as one group on a stream of the device. Calls on no elements are none.
    pub(super) fn queue(&self, index: usize, at: (&Device, Stream), call: &str, calls: &[Call]) -> Result {
        self.bind()?;
        let state = self.state()?;
        let handle = state.handle(index)?;
        // SAFETY: takes nothing. Every way out of here ends the group.
        self.library.accepted("ncclGroupStart", unsafe { (self.library.group_start)() })?;
        let queued = calls.iter().try_for_each(|one| self.library.accepted(call, self.queue_one(handle, at, *one)));
        // SAFETY: a group was started on this thread.
        let ended = self.library.accepted(call, unsafe { (self.library.group_end)() });
        drop(state);
        queued.and(ended)?;
        self.settle(index, call)
    }

    fn queue_one(&self, comm: ncclComm_t, (device, stream): (&Device, Stream), call: Call) -> ncclResult_t {
        let stream: cudaStream_t = device.raw_stream(stream).cast();
        let address = |tensor| ptr::with_exposed_provenance_mut::<c_void>(device.address(tensor) as usize);
        let bytes = |tensor: Tensor| (tensor.bytes() as usize, ncclDataType_t::ncclUint8);
        let elements = |tensor: Tensor| (tensor.elements() as usize, sum_type(tensor.dtype));
        let sum = ncclRedOp_t::ncclSum;
        let library = &self.library;
        // SAFETY, of each call: the tensors were checked to lie in the device's arenas, which live as long as it; their sizes are
        // agreed among the ranks and were checked against each other by the caller; the stream is the device's own.
        match call {
            Call::Send { from, to } => {
                let (n, dtype) = bytes(from);
                // SAFETY: above.
                unsafe { (library.send)(address(from), n, dtype, to as c_int, comm, stream) }
            }
            Call::Receive { to, from } => {
                let (n, dtype) = bytes(to);
                // SAFETY: above.
                unsafe { (library.receive)(address(to), n, dtype, from as c_int, comm, stream) }
            }
            Call::AllGather { to, from } => {
                let (n, dtype) = bytes(from);
                // SAFETY: above.
                unsafe { (library.all_gather)(address(from), address(to), n, dtype, comm, stream) }
            }
            Call::ReduceScatter { to, from } => {
                let (n, dtype) = elements(to);
                // SAFETY: above.
                unsafe { (library.reduce_scatter)(address(from), address(to), n, dtype, sum, comm, stream) }
            }
            Call::AllReduce { x } => {
                let (n, dtype) = elements(x);
                // SAFETY: above.
                unsafe { (library.all_reduce)(address(x), address(x), n, dtype, sum, comm, stream) }
            }
            Call::Broadcast { x, root } => {
                let (n, dtype) = bytes(x);
                // SAFETY: above.
                unsafe { (library.broadcast)(address(x), address(x), n, dtype, root as c_int, comm, stream) }
            }
        }
    }

    /// Fails if NCCL has met an error on its own, or all was given up.
    pub(super) fn check(&self, index: usize) -> Result {
        self.progress(index, "a collective").map(drop)
    }

    /// Waits until NCCL has queued what it was given.
    fn settle(&self, index: usize, call: &str) -> Result {
        while self.progress(index, call)? == ncclResult_t::ncclInProgress {
            thread::sleep(ASK);
        }
        Ok(())
    }

    fn progress(&self, index: usize, call: &str) -> Result<ncclResult_t> {
        let state = self.state()?;
        let mut progress = ncclResult_t::ncclSuccess;
        // SAFETY: a communicator that is not given up, under the lock.
        let asked = unsafe { (self.library.comm_get_async_error)(state.handle(index)?, &raw mut progress) };
        self.library.accepted("ncclCommGetAsyncError", asked)?;
        self.library.accepted(call, progress).map(|()| progress)
    }

    /// Gives up every communicator because a rank is lost: what is on its way on the GPU ends undone, later calls fail.
    pub(super) fn lose(&self, lost: &Lost) {
        let handles: Vec<Handle> = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.lost.get_or_insert_with(|| lost.clone());
            // Groups first: a group that is being cut belongs to its parent's work.
            state.handles.iter_mut().rev().filter_map(Option::take).collect()
        };
        handles.into_iter().for_each(|handle| self.abort(handle));
    }

    /// Gives up one communicator. What is on its way ends undone.
    pub(super) fn give_up(&self, index: usize) {
        let handle = self.state.lock().unwrap_or_else(PoisonError::into_inner).handles[index].take();
        handle.into_iter().for_each(|handle| self.abort(handle));
    }

    fn abort(&self, Handle(comm): Handle) {
        // On a thread of its own the GPU's context may not be current. There is nobody to tell if this fails: the process ends.
        let _ = self.bind();
        // SAFETY: the handle was taken out under the lock, so nobody uses it now or later. NCCL waits for its own threads.
        let _ = unsafe { (self.library.comm_abort)(comm) };
    }

    /// The handles, unless all were given up.
    fn state(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &state.lost {
            Some(lost) => Err(lost.clone().into()),
            None => Ok(state),
        }
    }

    fn bind(&self) -> Result {
        self.context.bind_to_thread().map_err(|error| Error::Device {
            library: "CUDA driver",
            call: "bind the context".into(),
            cause: error.to_string(),
        })
    }
}

impl State {
    fn handle(&self, index: usize) -> Result<ncclComm_t> {
        let given_up = || Error::Device {
            library: "NCCL",
            call: "use a communicator".into(),
            cause: "it was not made or is given up".into(),
        };
        self.handles[index].map(|Handle(comm)| comm).ok_or_else(given_up)
    }
}

/// A communicator that does not block, everything else as NCCL chooses.
fn configuration() -> ncclConfig_t {
    /// "As NCCL chooses."
    const UNDEFINED: c_int = c_int::MIN;
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: CONFIG_MAGIC,
        version: CONFIG_VERSION,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

fn sum_type(dtype: DType) -> ncclDataType_t {
    match dtype {
        DType::F32 => ncclDataType_t::ncclFloat32,
        DType::F64 => ncclDataType_t::ncclFloat64,
        DType::Bf16 => ncclDataType_t::ncclBfloat16,
        DType::I32 | DType::U16 => panic!("{dtype:?} is not a type of sums"),
    }
}
