//! cuDNN's handle and its descriptors: typed objects whose attributes are set, then finalized.
#![expect(unsafe_code, reason = "the library takes attributes as untyped memory")]

use std::{ffi::c_void, ptr, sync::Arc};

use cudarc::{
    cudnn::sys::{
        self, cudnnBackendAttributeName_t as Attribute, cudnnBackendAttributeType_t as Type, cudnnBackendDescriptor_t,
        cudnnBackendDescriptorType_t as Kind, cudnnHandle_t, cudnnStatus_t,
    },
    driver::CudaStream,
};

use super::super::driver;
use crate::engine::{Error, Result};

/// An open cuDNN, bound to a stream.
#[derive(Debug)]
pub(super) struct Library {
    handle: cudnnHandle_t,
    stream: Arc<CudaStream>,
}

impl Library {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: `libraries::open` found the library; the handle is written on success and destroyed in `drop`.
        check(unsafe { sys::cudnnCreate(&raw mut handle) }, || "cudnnCreate".to_owned())?;
        let library = Self { handle, stream: stream.clone() };
        // SAFETY: both are live; the stream type of the runtime is the driver's under another name.
        check(unsafe { sys::cudnnSetStream(library.handle, stream.cu_stream().cast()) }, || {
            "cudnnSetStream".to_owned()
        })?;
        Ok(library)
    }

    pub(super) fn version(&self) -> usize {
        // SAFETY: the library is open, and the call has no preconditions.
        unsafe { sys::cudnnGetVersion() }
    }

    /// Waits for everything queued on the stream.
    pub(super) fn synchronize(&self) -> Result {
        self.stream.synchronize().map_err(driver("wait for the device"))
    }

    pub(super) fn handle(&self) -> Handle {
        Handle(self.handle)
    }

    /// Queues a finalized plan on the stream.
    ///
    /// The pack must bind every tensor of the plan to memory of its size.
    pub(super) fn execute(&self, plan: &Descriptor, pack: &Descriptor) -> Result {
        // SAFETY: both descriptors are finalized; the caller bound what the plan needs.
        check(unsafe { sys::cudnnBackendExecute(self.handle, plan.raw, pack.raw) }, || "cudnnBackendExecute".to_owned())
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed only here. A failure leaves nothing to do.
        unsafe { sys::cudnnDestroy(self.handle) };
    }
}

fn check(status: cudnnStatus_t, call: impl Fn() -> String) -> Result {
    if status == cudnnStatus_t::CUDNN_STATUS_SUCCESS {
        return Ok(());
    }
    Err(Error::Device { library: "cuDNN", call: call(), cause: format!("{status:?}") })
}

/// The handle as an attribute.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(super) struct Handle(cudnnHandle_t);

/// A descriptor as an attribute of another, which refers to it: both live in the same graph or plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Reference(cudnnBackendDescriptor_t);

/// An address of device or host memory as an attribute.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(super) struct Address(pub(super) *mut c_void);

/// A Rust type with the layout of one of cuDNN's attribute types.
///
/// # Safety
/// `TYPE` must name exactly this layout.
pub(super) unsafe trait Value: Copy {
    const TYPE: Type;
}

macro_rules! values {
    ($($rust:ty => $name:ident),* $(,)?) => {
        // SAFETY: each pair is the one of cuDNN's documentation: enumerations by name, pointers, int64 and 1-byte bool.
        $(unsafe impl Value for $rust { const TYPE: Type = Type::$name; })*
    };
}

values! {
    Handle => CUDNN_TYPE_HANDLE,
    Reference => CUDNN_TYPE_BACKEND_DESCRIPTOR,
    Address => CUDNN_TYPE_VOID_PTR,
    i64 => CUDNN_TYPE_INT64,
    bool => CUDNN_TYPE_BOOLEAN,
    sys::cudnnDataType_t => CUDNN_TYPE_DATA_TYPE,
    sys::cudnnPointwiseMode_t => CUDNN_TYPE_POINTWISE_MODE,
    sys::cudnnReduceTensorOp_t => CUDNN_TYPE_REDUCTION_OPERATOR_TYPE,
    sys::cudnnBackendHeurMode_t => CUDNN_TYPE_HEUR_MODE,
}

/// One of cuDNN's objects.
#[derive(Debug)]
pub(super) struct Descriptor {
    raw: cudnnBackendDescriptor_t,
    kind: Kind,
}

impl Descriptor {
    pub(super) fn new(kind: Kind) -> Result<Self> {
        let mut raw = ptr::null_mut();
        // SAFETY: the descriptor is written on success and destroyed in `drop`.
        check(unsafe { sys::cudnnBackendCreateDescriptor(kind, &raw mut raw) }, || format!("create {kind:?}"))?;
        Ok(Self { raw, kind })
    }

    pub(super) fn set<V: Value>(self, attribute: Attribute, values: &[V]) -> Result<Self> {
        let (count, start) = (values.len() as i64, values.as_ptr().cast());
        // SAFETY: `values` holds `count` elements of the layout that `V::TYPE` names; the library copies them.
        let status = unsafe { sys::cudnnBackendSetAttribute(self.raw, attribute, V::TYPE, count, start) };
        check(status, || format!("set {attribute:?}"))?;
        Ok(self)
    }

    pub(super) fn finalize(self) -> Result<Self> {
        // SAFETY: the descriptor is live; the library checks its attributes.
        check(unsafe { sys::cudnnBackendFinalize(self.raw) }, || format!("finalize {:?}", self.kind))?;
        Ok(self)
    }

    pub(super) fn reference(&self) -> Reference {
        Reference(self.raw)
    }

    /// An attribute that is one int64.
    pub(super) fn number(&self, attribute: Attribute) -> Result<i64> {
        let (mut value, mut count) = (0i64, 0i64);
        let start = (&raw mut value).cast();
        // SAFETY: room for one int64, and one is asked for.
        let status = unsafe {
            sys::cudnnBackendGetAttribute(self.raw, attribute, Type::CUDNN_TYPE_INT64, 1, &raw mut count, start)
        };
        check(status, || format!("read {attribute:?}"))?;
        Ok(value)
    }

    /// An attribute that is a list of descriptors, filled into new ones of `kind`.
    pub(super) fn list(&self, attribute: Attribute, kind: Kind) -> Result<Vec<Self>> {
        let mut count = 0i64;
        let descriptors = Type::CUDNN_TYPE_BACKEND_DESCRIPTOR;
        // SAFETY: no elements are asked for, only how many there are.
        let status = unsafe {
            sys::cudnnBackendGetAttribute(self.raw, attribute, descriptors, 0, &raw mut count, ptr::null_mut())
        };
        check(status, || format!("count {attribute:?}"))?;
        let mut list = (0..count).map(|_| Self::new(kind)).collect::<Result<Vec<_>>>()?;
        let mut raw: Vec<cudnnBackendDescriptor_t> = list.iter().map(|descriptor| descriptor.raw).collect();
        let start = raw.as_mut_ptr().cast();
        let mut filled = 0i64;
        // SAFETY: `raw` holds `count` live descriptors of the kind that the attribute lists; the library fills them.
        let status =
            unsafe { sys::cudnnBackendGetAttribute(self.raw, attribute, descriptors, count, &raw mut filled, start) };
        check(status, || format!("read {attribute:?}"))?;
        list.truncate(filled.max(0) as usize);
        Ok(list)
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed only here. A failure leaves nothing to do.
        unsafe { sys::cudnnBackendDestroyDescriptor(self.raw) };
    }
}
