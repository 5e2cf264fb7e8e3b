//! Attention through cuDNN's backend API: graphs of operations that the library recognises and runs as one kernel.
//!
//! [`descriptor`] wraps the library's objects, [`graph`] puts operations together, [`sdpa`] writes the two graphs of
//! attention, [`plan`] compiles and runs them. Plans are kept by shape: making one takes 0.04 to 0.7 s.

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

/// Plans that are kept, at about 1 MB of host memory each: what the planner leaves free.
const MOST_PLANS: usize = 512;

/// The library and the plans made of late.
#[derive(Debug)]
pub(super) struct Attention {
    plans: HashMap<(Pass, Shape), Kept>,
    /// Asked for so far; tells which plans were used of late.
    asked: u64,
    library: Library,
}

#[derive(Debug)]
struct Kept {
    plan: Plan,
    last_asked: u64,
}

impl Attention {
    /// Opens cuDNN on the device's stream.
    pub(super) fn new(device: &Device) -> Result<Self> {
        Ok(Self { plans: HashMap::new(), asked: 0, library: Library::new(device.compute())? })
    }

    /// Version as a number: 91900 is 9.19.0.
    pub(super) fn version(&self) -> usize {
        self.library.version()
    }

    /// Plans that are kept.
    pub(super) fn n_plans(&self) -> usize {
        self.plans.len()
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
        self.plans[&(pass, shape)].plan.run(&self.library, &bindings, workspace)
    }

    fn plan(&mut self, pass: Pass, shape: Shape) -> Result<&Plan> {
        self.asked += 1;
        if !self.plans.contains_key(&(pass, shape)) {
            self.make_room()?;
            let graph = match pass {
                Pass::Forward => sdpa::forward(shape)?,
                Pass::Backward => sdpa::backward(shape)?,
            };
            let plan = Plan::new(&self.library, graph)?;
            self.plans.insert((pass, shape), Kept { plan, last_asked: self.asked });
        }
        let kept = self.plans.get_mut(&(pass, shape)).expect("made just now, if it was not there");
        kept.last_asked = self.asked;
        Ok(&kept.plan)
    }

    /// Lets the half of the plans go that was not used for longest, when there are as many as may be.
    fn make_room(&mut self) -> Result {
        if self.plans.len() < MOST_PLANS {
            return Ok(());
        }
        // A plan owns the code of its kernel.
        self.library.synchronize()?;
        let mut ages: Vec<u64> = self.plans.values().map(|kept| kept.last_asked).collect();
        let (_, middle, _) = ages.select_nth_unstable(MOST_PLANS / 2);
        let middle = *middle;
        self.plans.retain(|_, kept| kept.last_asked >= middle);
        Ok(())
    }
}
