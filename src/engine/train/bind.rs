//! From a plan to tensors: the one place where the planner's regions become the engine's buffers.

use std::{fs::File, path::Path};

use crate::{
    domain::ModelConfig,
    engine::{
        Error, Result,
        alst::{
            checkpoint_offload::{CheckpointOffload, Kept, Slots},
            tiled_loss::TiledLoss,
            tiled_mlp::TiledMlp,
        },
        backend::{Backend, DType, Tensor},
        layers::{
            attention::{self, KeysValues},
            loss, mlp,
        },
        model::{
            Params, Transformer, block,
            gradients::{Gradients, Sums},
        },
        optim,
    },
    plan::{Layout, Place, Plan, Slot, layout::Element},
};

/// A model and its optimizer state, laid over a backend's arena.
#[derive(Debug)]
pub struct Bound {
    pub model: Transformer,
    pub states: optim::States,
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
            Element::Index => DType::I32,
            // Scratch has no type of its own; two bytes an element, as many elements as fit.
            Element::Half | Element::Byte => DType::U16,
        };
        let rows = if region.element == Element::Byte { region.rows / 2 } else { region.rows };
        Some(Tensor::device(region.offset, dtype, rows, region.cols))
    }

    fn tensor(&self, slot: Slot) -> Tensor {
        self.find(slot).unwrap_or_else(|| Tensor::device(0, self.storage, 0, 0))
    }

    fn pair(&self, a: Slot, b: Slot) -> Option<(Tensor, Tensor)> {
        Some((self.find(a)?, self.find(b)?))
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

/// Lays a model over the arena that `plan` describes. `spill` is the folder for a spill file, if the plan has one.
pub fn bind<B: Backend>(b: &B, plan: &Plan, config: &ModelConfig, spill: &Path) -> Result<Bound> {
    let binding = Binding { layout: &plan.layout, storage: b.storage(), wide: b.wide() };
    let eps = config.rms_norm_eps;
    let weights_flat = binding.tensor(Slot::Weights);
    let grads_flat = binding.tensor(Slot::Gradients);
    let weights = Params::over(config, weights_flat);
    let slots = match plan.choice.checkpoint_place {
        Place::Device => Slots::Device(binding.tensor(Slot::Checkpoints)),
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
    };
    let states = optim::States {
        w: weights_flat,
        low: binding.find(Slot::MasterLow),
        m: binding.tensor(Slot::MomentM),
        v: binding.tensor(Slot::MomentV),
        g: grads_flat,
    };
    let scalars = optim::Scalars { sum_squares: scalars.rows(2, 3), scale: scalars.rows(3, 4) };
    Ok(Bound { model, states, groups, scalars })
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
