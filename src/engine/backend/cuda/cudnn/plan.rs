//! A compiled graph: the library's first choice of engine, its workspace, and calls with tensors bound by id.

use std::ptr;

use cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Attribute, cudnnBackendDescriptorType_t as Kind, cudnnBackendHeurMode_t as Heuristic,
};

use super::{
    descriptor::{Address, Descriptor, Library},
    graph::Graph,
};
use crate::engine::{Error, Result};

/// A tensor of the graph and the device address it has in this call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Binding {
    pub(super) id: i64,
    pub(super) address: u64,
}

/// What can be run again and again.
#[derive(Debug)]
pub(super) struct Plan {
    plan: Descriptor,
    pub(super) workspace_bytes: u64,
    /// Owns what `plan` refers to, in the order of making.
    _parts: (Vec<Descriptor>, Graph),
    scalars: Vec<(i64, u32)>,
}

impl Plan {
    /// The first engine of the library's heuristic that takes the graph.
    pub(super) fn new(library: &Library, graph: Graph) -> Result<Self> {
        let operations = Descriptor::new(Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?
            .set(Attribute::CUDNN_ATTR_OPERATIONGRAPH_HANDLE, &[library.handle()])?
            .set(Attribute::CUDNN_ATTR_OPERATIONGRAPH_OPS, graph.operations())?
            .finalize()?;
        let heuristic = Descriptor::new(Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?
            .set(Attribute::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, &[operations.reference()])?
            .set(Attribute::CUDNN_ATTR_ENGINEHEUR_MODE, &[Heuristic::CUDNN_HEUR_MODE_A])?
            .finalize()?;
        let engines =
            heuristic.list(Attribute::CUDNN_ATTR_ENGINEHEUR_RESULTS, Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR)?;
        let mut refused = Error::Device {
            library: "cuDNN",
            call: "choose an engine".to_owned(),
            cause: "none takes this attention shape".to_owned(),
        };
        for engine in engines {
            let plan = Descriptor::new(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?
                .set(Attribute::CUDNN_ATTR_EXECUTION_PLAN_HANDLE, &[library.handle()])?
                .set(Attribute::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, &[engine.reference()])?
                .finalize();
            match plan {
                Ok(plan) => {
                    let bytes = plan.number(Attribute::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE)?;
                    let scalars = graph.scalars().to_vec();
                    let parts = vec![engine, heuristic, operations];
                    return Ok(Self { plan, workspace_bytes: bytes.max(0) as u64, _parts: (parts, graph), scalars });
                }
                Err(error) => refused = error,
            }
        }
        Err(refused)
    }

    /// Queues a call on the library's stream.
    pub(super) fn run(&self, library: &Library, bindings: &[Binding], workspace: u64) -> Result {
        let device = |address: u64| Address(ptr::without_provenance_mut(address as usize));
        // Scalars are read from host memory while the call is queued.
        let values: Vec<u32> = self.scalars.iter().map(|(_, bits)| *bits).collect();
        let (mut ids, mut addresses): (Vec<i64>, Vec<Address>) =
            bindings.iter().map(|binding| (binding.id, device(binding.address))).unzip();
        for ((id, _), value) in self.scalars.iter().zip(&values) {
            ids.push(*id);
            addresses.push(Address(ptr::from_ref(value).cast_mut().cast()));
        }
        let pack = Descriptor::new(Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?
            .set(Attribute::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, &ids)?
            .set(Attribute::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, &addresses)?
            .set(Attribute::CUDNN_ATTR_VARIANT_PACK_WORKSPACE, &[device(workspace)])?
            .finalize()?;
        library.execute(&self.plan, &pack)
    }
}
