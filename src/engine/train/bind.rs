//! From a plan to tensors: the one place where the planner's regions become the engine's buffers.

use std::{fs::File, path::Path};

use crate::{
    domain::ModelConfig,
    engine::{
        Error, Result,
        alst::{
            checkpoint_offload::{CheckpointOffload, Kept, Slots},
            optimizer_offload::{OptimizerOffload, Staged},
            tiled_loss::TiledLoss,
            tiled_mlp::TiledMlp,
            zero3::Zero3,
        },
        backend::{Backend, DType, Space, Split, Tensor},
        layers::{
            attention::{self, KeysValues},
            loss, mlp,
        },
        model::{
            LayerParams, Params, Transformer, block,
            gradients::{Gradients, Sums},
        },
        optim,
    },
    plan::{
        Layout, Place, Plan, Slot,
        layout::{Arena, Element},
    },
};

/// A model and its optimizer state, laid over a backend's arena.
#[derive(Debug)]
pub struct Bound {
    pub model: Transformer,
    /// All weights, a row a parameter, and all gradients, flat.
    pub weights: Split,
    pub grads: Tensor,
    pub optimizer: OptimizerOffload,
    pub groups: Vec<optim::Group>,
    pub scalars: optim::Scalars,
}

/// Tensors of a layout under a backend's element types.
struct Binding<'a> {
    layout: &'a Layout,
    storage: DType,
    wide: DType,
}

impl Binding<'_> {
    fn find(&self, slot: Slot) -> Option<Tensor> {
        let region = self.layout.region(slot)?;
        let dtype = match region.element {
            Element::Storage => self.storage,
            Element::Wide => self.wide,
            Element::Bf16 => DType::Bf16,
            Element::Index => DType::I32,
            // Scratch has no type of its own; two bytes an element, as many elements as fit.
            Element::Half | Element::Byte => DType::U16,
        };
        let rows = if region.element == Element::Byte { region.rows / 2 } else { region.rows };
        let space = match region.arena {
            Arena::Device => Space::Device,
            Arena::Host => Space::Host,
        };
        Some(Tensor { space, offset: region.offset, dtype, rows, cols: region.cols })
    }

    fn tensor(&self, slot: Slot) -> Tensor {
        self.find(slot).unwrap_or_else(|| Tensor::device(0, self.storage, 0, 0))
    }

    fn pair(&self, a: Slot, b: Slot) -> Option<(Tensor, Tensor)> {
        Some((self.find(a)?, self.find(b)?))
    }

    /// A run of rows of `cols` elements of which the first may lie in host memory.
    fn split(&self, host: Slot, device: Slot, cols: u64) -> Option<Split> {
        let as_rows = |tensor: Tensor| tensor.shaped(tensor.elements() / cols, cols);
        let (host, device) = (self.find(host).map(as_rows), self.find(device).map(as_rows));
        let like = host.or(device)?;
        let none = |space| Tensor { space, offset: 0, rows: 0, ..like };
        let (host, device) = (host.unwrap_or(none(Space::Host)), device.unwrap_or(none(Space::Device)));
        Some(Split { host, device, host_start: 0 })
    }

    /// All weights: those of the first layers may be in host memory, behind the embedding in the flat order.
    fn weights(&self, config: &ModelConfig) -> Split {
        let flat = self.split(Slot::HostWeights, Slot::Weights, 1);
        let flat = flat.unwrap_or_else(|| Split::resident(self.tensor(Slot::Weights)));
        let embedding = config.vocab_size * config.hidden_size;
        Split { host_start: if flat.host.rows > 0 { embedding } else { 0 }, ..flat }
    }

    /// The two rows of a region.
    fn two(&self, slot: Slot) -> Option<[Tensor; 2]> {
        self.find(slot).map(|both| [both.rows(0, 1), both.rows(1, 2)])
    }

    fn moments(&self, host: Slot, device: Slot) -> Split {
        self.split(host, device, 1).unwrap_or_else(|| Split::resident(self.tensor(device)))
    }

    fn optimizer(&self) -> OptimizerOffload {
        let buffer = |slot, i: usize| self.two(slot).map(|two| two[i].shaped(two[i].cols, 1));
        let staged = |i| {
            let (m, v) = (buffer(Slot::StagedM, i)?, buffer(Slot::StagedV, i)?);
            Some(Staged { w: buffer(Slot::StagedWeights, i), m, v, low: buffer(Slot::StagedLow, i) })
        };
        OptimizerOffload {
            m: self.moments(Slot::HostMomentM, Slot::MomentM),
            v: self.moments(Slot::HostMomentV, Slot::MomentV),
            low: self.split(Slot::HostMasterLow, Slot::MasterLow, 1),
            staged: staged(0).zip(staged(1)).map(<[Staged; 2]>::from),
        }
    }

    /// Wide sums beside gradients that are kept in storage.
    fn sums(&self, config: &ModelConfig) -> Option<Sums> {
        let (layer, outside) = self.pair(Slot::LayerGradients, Slot::VocabularyGradients)?;
        let (vocab, h) = (config.vocab_size, config.hidden_size);
        let vocabulary = outside.shaped(vocab, h);
        let norm = Tensor { offset: outside.offset + vocabulary.bytes(), ..outside.shaped(1, h) };
        Some(Sums { layer, vocabulary, norm })
    }

    fn kept(&self) -> Kept {
        Kept {
            attention: self.pair(Slot::KeptO, Slot::KeptLse),
            qkv: self.pair(Slot::KeptK, Slot::KeptV).and_then(|(k, v)| Some((self.find(Slot::KeptQ)?, k, v))),
            gate_up: self.find(Slot::KeptGateUp),
        }
    }

    fn block(&self, eps: f64) -> block::Work {
        let attention = attention::Work {
            norm: self.tensor(Slot::Xn),
            qkv: self.tensor(Slot::Qkv),
            d_o: self.tensor(Slot::DO),
            dq: self.tensor(Slot::Dq),
            delta: self.tensor(Slot::Delta),
            scratch: self.tensor(Slot::AttentionWorkspace),
        };
        let tile = mlp::Work {
            norm: self.tensor(Slot::MlpNorm),
            gate_up: self.tensor(Slot::GateUp),
            act: self.tensor(Slot::Act),
            d_norm: self.tensor(Slot::DMlpNorm),
        };
        block::Work {
            attention,
            q: self.find(Slot::Q),
            attended: self.pair(Slot::O, Slot::Lse),
            h1: self.tensor(Slot::H1),
            kv: self.pair(Slot::K, Slot::V).map(|(k, v)| KeysValues { k, v }),
            dkv: KeysValues { k: self.tensor(Slot::Dk), v: self.tensor(Slot::Dv) },
            mlp: TiledMlp { work: tile, eps },
        }
    }
}

/// Lays a model over the arenas that `plan` describes. `spill` is the folder for a spill file, if the plan has one.
pub fn bind<B: Backend>(b: &B, plan: &Plan, config: &ModelConfig, spill: &Path) -> Result<Bound> {
    let binding = Binding { layout: &plan.layout, storage: b.storage(), wide: b.wide() };
    let eps = config.rms_norm_eps;
    let weights_flat = binding.weights(config);
    let grads_flat = binding.tensor(Slot::Gradients);
    let weights = Params::over_split(config, weights_flat);
    let slots = match plan.choice.checkpoint_place {
        Place::Memory => {
            let split = binding.split(Slot::HostCheckpoints, Slot::Checkpoints, config.hidden_size);
            Slots::Memory(split.unwrap_or_else(|| Split::resident(binding.tensor(Slot::Checkpoints))))
        }
        Place::Disk => Slots::Disk { file: spill_file(spill)?, slots: plan.choice.checkpoint_slots },
    };
    let scalars = binding.tensor(Slot::Scalars);
    let groups = optim::groups(weights.named(config).iter().map(|p| (p.tensor.elements(), p.shape.len() == 1)));
    let loss_work = loss::Work {
        norm: binding.tensor(Slot::LossNorm),
        logits: binding.tensor(Slot::Logits),
        d_norm: binding.tensor(Slot::DLossNorm),
    };
    let model = Transformer {
        config: config.clone(),
        grads: Gradients { kept: Params::over(config, grads_flat), sums: binding.sums(config) },
        layer_weights: Zero3 {
            homes: weights.layers.iter().map(LayerParams::flat).collect(),
            buffers: binding.two(Slot::LayerWeights),
        },
        weights,
        segment_starts: plan.choice.segment_starts.clone(),
        checkpoints: CheckpointOffload::new(slots, plan.tokens, binding.kept()),
        block: binding.block(eps),
        loss: TiledLoss { work: loss_work, eps },
        x: binding.tensor(Slot::X),
        dy: binding.tensor(Slot::Dy),
        sums: scalars.rows(0, 2).shaped(1, 2),
        ids: binding.tensor(Slot::Ids),
        labels: binding.tensor(Slot::Labels),
        positions: binding.tensor(Slot::Positions),
        angles: binding.tensor(Slot::Rope),
        memory_proof: None,
    };
    let scalars = optim::Scalars { sum_squares: scalars.rows(2, 3), scale: scalars.rows(3, 4) };
    let optimizer = binding.optimizer();
    Ok(Bound { model, weights: weights_flat, grads: grads_flat, optimizer, groups, scalars })
}

/// A file nobody else can reach: its name is gone before the first byte, so it vanishes with the process.
fn spill_file(folder: &Path) -> Result<File> {
    std::fs::create_dir_all(folder).map_err(Error::file(folder))?;
    let path = folder.join(format!("layer-inputs-{}", std::process::id()));
    let file =
        File::options().read(true).write(true).create(true).truncate(true).open(&path).map_err(Error::file(&path))?;
    std::fs::remove_file(&path).map_err(Error::file(&path))?;
    Ok(file)
}
