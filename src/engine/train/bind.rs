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
            ulysses::{Exchange, Ulysses},
            zero3::{Gathered, Outside, Zero3},
        },
        backend::{Backend, DType, Space, Split, Tensor},
        layers::{
            attention::{self, KeysValues},
            loss, mlp,
        },
        model::{
            Params, Transformer, block,
            gradients::{Gradients, Sums, Units},
            params::Named,
            share::{Part, Share},
        },
        optim,
    },
    plan::{
        Layout, Place, Plan, Ranks, Slot,
        layout::{Arena, Element},
        segments, shards,
    },
};

/// A model and its optimizer state, laid over a backend's arena.
#[derive(Debug)]
pub struct Bound {
    pub model: Transformer,
    /// All weights, a row a parameter, and all gradients, flat.
    pub weights: Split,
    pub grads: Tensor,
    /// Which parameters each rank's are.
    pub shares: Vec<Share>,
    /// Every parameter of the model, its tensor a place where all could lie.
    pub named: Vec<Named>,
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

    /// The rank's weights: those of the first layers may be in host memory, behind the embedding in the flat order.
    fn weights(&self, parts: &[u64]) -> Split {
        let flat = self.split(Slot::HostWeights, Slot::Weights, 1);
        let flat = flat.unwrap_or_else(|| Split::resident(self.tensor(Slot::Weights)));
        Split { host_start: if flat.host.rows > 0 { parts[0] } else { 0 }, ..flat }
    }

    /// The rank's weights where operations find them: its own memory with one rank, else where units are gathered.
    fn outside(&self, units: &Units) -> Option<Outside> {
        let (vocabulary, norm) = self.pair(Slot::VocabularyWeights, Slot::NormWeights)?;
        let gathered = |part, whole| Gathered { part, whole };
        Some(Outside {
            embedding: gathered(units.embedding, vocabulary),
            norm: gathered(units.norm, norm),
            head: units.head.map(|head| gathered(head, vocabulary)),
        })
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

    /// Wide sums of the unit whose backward runs, where gradients are not kept wide and whole.
    fn sums(&self, config: &ModelConfig, world: u64) -> Option<Sums> {
        let (layer, outside) = self.pair(Slot::LayerGradients, Slot::VocabularyGradients)?;
        let vocabulary = world * shards::part(config.vocab_size * config.hidden_size, world);
        let norm = outside.part(vocabulary, outside.elements() - vocabulary);
        Some(Sums { layer, vocabulary: outside.part(0, vocabulary), norm })
    }

    fn kept(&self) -> Kept {
        Kept {
            attention: self.pair(Slot::KeptO, Slot::KeptLse),
            qkv: self.pair(Slot::KeptK, Slot::KeptV).and_then(|(k, v)| Some((self.find(Slot::KeptQ)?, k, v))),
            gate_up: self.find(Slot::KeptGateUp),
        }
    }

    fn block(&self, config: &ModelConfig, ranks: Ranks, rank: usize) -> block::Work {
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
        let heads = shards::heads(config, ranks);
        let eps = config.rms_norm_eps;
        block::Work {
            ulysses: Ulysses { head_dim: config.head_dim, heads, rank, exchange: self.exchange() },
            attention,
            q: self.find(Slot::Q),
            attended: self.pair(Slot::O, Slot::Lse),
            h1: self.tensor(Slot::H1),
            kv: self.pair(Slot::K, Slot::V).map(|(k, v)| KeysValues { k, v }),
            dkv: KeysValues { k: self.tensor(Slot::Dk), v: self.tensor(Slot::Dv) },
            mlp: TiledMlp { work: tile, eps },
        }
    }

    /// Buffers for ranks that share a sequence.
    fn exchange(&self) -> Option<Exchange> {
        let (q, o) = self.pair(Slot::LocalQ, Slot::LocalO)?;
        let kv = self.pair(Slot::LocalK, Slot::LocalV).map(|(k, v)| KeysValues { k, v })?;
        let dkv = self.pair(Slot::LocalDk, Slot::LocalDv).map(|(k, v)| KeysValues { k, v })?;
        Some(Exchange { q, o, kv, dkv, packed: self.tensor(Slot::Packed) })
    }
}

/// The parts of a flat run of rows of single parameters that belong to each unit.
fn units(flat: Split, parts: &[u64], tied: bool) -> Units {
    let mut end = 0;
    let mut take = |n: &u64| {
        end += n;
        let place = flat.rows(end - n, end).next().expect("no unit is empty");
        assert_eq!(place.rows, *n, "a unit's part lies in one place");
        place.shaped(1, *n)
    };
    let after_layers = parts.len() - if tied { 1 } else { 2 };
    let embedding = take(&parts[0]);
    let layers = parts[1..after_layers].iter().map(&mut take).collect();
    let norm = take(&parts[after_layers]);
    let head = parts.get(after_layers + 1).map(take);
    Units { embedding, layers, norm, head }
}

/// Shapes of all parameters where operations find them.
fn places(config: &ModelConfig, own: &Units, binding: &Binding) -> Params {
    let outside = binding.outside(own);
    let layer = |own: Tensor| binding.two(Slot::LayerWeights).map_or(own, |buffers| buffers[0]);
    let whole = |own: Tensor, gathered: Option<Gathered>| gathered.map_or(own, |gathered| gathered.whole);
    Params::of_units(
        config,
        whole(own.embedding, outside.map(|o| o.embedding)),
        own.layers.iter().map(|own| layer(*own)),
        whole(own.norm, outside.map(|o| o.norm)),
        own.head.map(|own| whole(own, outside.and_then(|o| o.head))),
    )
}

/// Lays a rank's part of a model over the arenas that `plan` describes. `rank` is its place in the world; `spill` is the folder
/// for a spill file, if the plan has one.
pub fn bind<B: Backend>(b: &B, plan: &Plan, rank: u64, config: &ModelConfig, spill: &Path) -> Result<Bound> {
    let binding = Binding { layout: &plan.layout, storage: b.storage(), wide: b.wide() };
    let (ranks, world) = (plan.choice.ranks, plan.choice.ranks.world());
    let eps = config.rms_norm_eps;
    let part = |n| shards::part(n, world);
    let sizes = shards::units(config);
    let parts: Vec<u64> = sizes.iter().copied().map(part).collect();
    let shares: Vec<Share> = (0..world).map(|rank| Share::new(&sizes, rank, part)).collect();
    let (weights, grads) = (binding.weights(&parts), binding.tensor(Slot::Gradients));
    let own = units(weights, &parts, config.tie_word_embeddings);
    let flat_grads = Split::resident(grads.shaped(grads.elements(), 1));
    let shapes = places(config, &own, &binding);
    let slots = match plan.choice.checkpoint_place {
        Place::Memory => {
            let split = binding.split(Slot::HostCheckpoints, Slot::Checkpoints, config.hidden_size);
            Slots::Memory(split.unwrap_or_else(|| Split::resident(binding.tensor(Slot::Checkpoints))))
        }
        Place::Disk => Slots::Disk { file: spill_file(spill, rank)?, slots: plan.choice.checkpoint_slots },
    };
    let scalars = binding.tensor(Slot::Scalars);
    let named = shapes.named(config);
    let groups = groups(&named, &shares[rank as usize]);
    let loss_work = loss::Work {
        norm: binding.tensor(Slot::LossNorm),
        logits: binding.tensor(Slot::Logits),
        d_norm: binding.tensor(Slot::DLossNorm),
    };
    let model = Transformer {
        config: config.clone(),
        grads: Gradients {
            kept: units(flat_grads, &parts, config.tie_word_embeddings),
            sums: binding.sums(config, world),
            shapes: shapes.clone(),
        },
        zero3: Zero3 { outside: binding.outside(&own), layers: own.layers, buffers: binding.two(Slot::LayerWeights) },
        weights: shapes,
        segment_starts: plan.choice.segment_starts.clone(),
        order: segments::walk(&plan.choice.segment_starts, config.n_layers),
        checkpoints: CheckpointOffload::new(slots, (plan.choice.local(plan.tokens), plan.tokens), binding.kept()),
        block: binding.block(config, ranks, (rank % ranks.sequence) as usize),
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
    Ok(Bound { model, weights, grads, shares, named, optimizer, groups, scalars })
}

/// What the rank owns, in runs that are updated alike.
fn groups(named: &[Named], share: &Share) -> Vec<optim::Group> {
    let of = |parameter: &Named| {
        let decayed = parameter.shape.len() > 1;
        let range = parameter.first..parameter.first + parameter.elements();
        let group =
            move |part: Part| optim::Group { start: part.at, elements: part.n, first_index: part.first, decayed };
        share.of(range).map(group).collect::<Vec<_>>()
    };
    optim::joined(named.iter().flat_map(of))
}

/// A file nobody else can reach: its name is gone before the first byte, so it vanishes with the process.
fn spill_file(folder: &Path, rank: u64) -> Result<File> {
    std::fs::create_dir_all(folder).map_err(Error::file(folder))?;
    let path = folder.join(format!("layer-inputs-{}-{rank}", std::process::id()));
    let file =
        File::options().read(true).write(true).create(true).truncate(true).open(&path).map_err(Error::file(&path))?;
    std::fs::remove_file(&path).map_err(Error::file(&path))?;
    Ok(file)
}
