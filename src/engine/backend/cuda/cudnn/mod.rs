//! Attention through cuDNN's backend API: graphs of operations that the library recognises and runs as one kernel.
//!
//! [`descriptor`] wraps the library's objects, [`graph`] puts operations together, [`sdpa`] writes the two graphs of
//! attention, [`plan`] compiles and runs them. Plans are kept by shape: making one takes 0.1 to 0.7 s.

mod descriptor;
mod graph;
mod plan;
mod sdpa;

use std::collections::HashMap;

pub(super) use self::sdpa::{BACKWARD, FORWARD, Shape};
use self::{
    descriptor::Library,
    plan::{Binding, Plan},
};
use super::device::Device;
use crate::engine::Result;

/// Which graph of a shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Pass {
    Forward,
    Backward,
}

/// The library and the plans made so far.
#[derive(Debug)]
pub(super) struct Attention {
    plans: HashMap<(Pass, Shape), Plan>,
    library: Library,
}

impl Attention {
    /// Opens cuDNN on the device's stream.
    pub(super) fn new(device: &Device) -> Result<Self> {
        Ok(Self { plans: HashMap::new(), library: Library::new(device.compute())? })
    }

    /// Version as a number: 91900 is 9.19.0.
    pub(super) fn version(&self) -> usize {
        self.library.version()
    }

    /// Bytes of the library's own workspace for a call; makes the plan if need be.
    pub(super) fn workspace_bytes(&mut self, pass: Pass, shape: Shape) -> Result<u64> {
        Ok(self.plan(pass, shape)?.workspace_bytes)
    }

    /// Queues a call. `tensors` are addresses in the order of [`FORWARD`] or [`BACKWARD`]; `workspace` is the address of
    /// at least [`Attention::workspace_bytes`] bytes.
    pub(super) fn run(&mut self, pass: Pass, shape: Shape, tensors: &[u64], workspace: u64) -> Result {
        let names: &[i64] = match pass {
            Pass::Forward => &FORWARD,
            Pass::Backward => &BACKWARD,
        };
        assert_eq!(names.len(), tensors.len(), "tensors of an attention call");
        let bindings: Vec<Binding> =
            names.iter().zip(tensors).map(|(id, address)| Binding { id: *id, address: *address }).collect();
        self.plan(pass, shape)?;
        self.plans[&(pass, shape)].run(&self.library, &bindings, workspace)
    }

    fn plan(&mut self, pass: Pass, shape: Shape) -> Result<&Plan> {
        if !self.plans.contains_key(&(pass, shape)) {
            let graph = match pass {
                Pass::Forward => sdpa::forward(shape)?,
                Pass::Backward => sdpa::backward(shape)?,
            };
            let plan = Plan::new(&self.library, graph)?;
            self.plans.insert((pass, shape), plan);
        }
        Ok(&self.plans[&(pass, shape)])
    }
}
