//! Before the first step: data read and packed, a plan that fits, and both told.

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Observer, job::Data, order::Order};
use crate::{
    domain::{
        Event, Invalid, Level, ModelConfig, RunSpec,
        attention_workspace::TILE_KEYS,
        machine::DeviceKind,
        progress::{DataSummary, HeldOut, PreviewedExample},
        run::DataFile,
        training::LongDocuments,
    },
    engine::{
        Result,
        data::{Corpus, Dataset, Tokenizer, pack::Settings, preview::preview},
    },
    plan::{self, Plan, Ranks, Request},
};

/// What every document is padded to: attention kernels of GPUs want whole blocks of keys, the CPU does not care.
fn pad_to(device: DeviceKind) -> u64 {
    match device {
        DeviceKind::Cpu => 1,
        DeviceKind::Cuda => TILE_KEYS,
    }
}

/// What rank 0 has settled, and all ranks go by.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Settled {
    pub sequence_length: u64,
    pub plan: Plan,
}

/// The run's documents as tokens.
struct Corpora {
    training: Corpus,
    validation: Option<Corpus>,
    preview: Vec<PreviewedExample>,
}

/// Reads the data, settles the sequence length, and plans for it: as rank 0, or to inspect the data.
pub(super) fn settle(run: &RunSpec, config: &ModelConfig, observer: &mut dyn Observer) -> Result<(Data, Settled)> {
    let corpora = Corpora::open(run, config)?;
    let settled = corpora.settle(run, config, observer)?;
    let sequence_length = settled.sequence_length;
    if sequence_length > config.max_position_embeddings {
        observer.event(Event::message(
            Level::Warn,
            format!(
                "sequences of {} tokens are longer than the {} positions the model was made for",
                sequence_length, config.max_position_embeddings
            ),
        ));
    }
    Ok((corpora.pack(run, sequence_length)?, settled))
}

/// The data of a run, as every other rank reads it.
pub(super) fn data(run: &RunSpec, config: &ModelConfig, settled: &Settled) -> Result<Data> {
    Corpora::open(run, config)?.pack(run, settled.sequence_length)
}

impl Corpora {
    fn open(run: &RunSpec, config: &ModelConfig) -> Result<Self> {
        let tokenizer = Tokenizer::open(&run.model, config.vocab_size, run.created_at)?;
        let folder = run.work_dir.join("tokens");
        let training = Corpus::open(&run.training_files, &tokenizer, &folder)?;
        let validation = open_validation(&run.validation_files, &tokenizer, &folder)?;
        let preview = preview(&training, &tokenizer)?;
        Ok(Self { training, validation, preview })
    }

    fn settle(&self, run: &RunSpec, config: &ModelConfig, observer: &mut dyn Observer) -> Result<Settled> {
        let (spec, pad_to, multiple) = (&run.training, pad_to(run.machine.device), multiple(run));
        let longest_document = (0..self.training.n_documents()).map(|i| self.training.length(i)).max().unwrap_or(0);
        // What is packed into a sequence does not depend on the number of ranks; only the padding at its end does.
        let wanted = spec.sequence_length.or(run.sequence_length).unwrap_or(longest_document);
        let sequence_length = wanted.max(2).next_multiple_of(pad_to);
        let mut request = Request::of(config, spec, &run.machine, sequence_length.next_multiple_of(multiple));
        if !run.inspect_only {
            request.forced.ranks = Some(run.ranks);
        }
        match plan::plan(&request) {
            Ok(plan) => Ok(Settled { sequence_length, plan }),
            // Nobody asked for this length: where documents may be cut, the longest that fits will do.
            Err(refusal) if spec.sequence_length.is_none() && spec.long_documents != LongDocuments::Refuse => {
                let tokens = (refusal.longest_tokens / multiple * multiple).max(multiple);
                observer.event(Event::message(
                    Level::Warn,
                    format!(
                        "the longest document has {longest_document} tokens; sequences of {tokens} are the longest that fit"
                    ),
                ));
                let plan = plan::plan(&Request { tokens, ..request }).map_err(Invalid::from)?;
                Ok(Settled { sequence_length: tokens, plan })
            }
            Err(refusal) => Err(Invalid::from(refusal).into()),
        }
    }

    fn pack(self, run: &RunSpec, sequence_length: u64) -> Result<Data> {
        let spec = &run.training;
        let settings = Settings {
            sequence_length,
            pad_to: pad_to(run.machine.device),
            packing: spec.packing,
            long_documents: spec.long_documents,
            seed: spec.seed,
        };
        let training = Dataset::new(self.training, settings, true)?;
        // Held-out documents are measured whole where they fit and in pieces where not: nothing is refused for them.
        let validation_settings = Settings { long_documents: LongDocuments::Split, ..settings };
        let validation = self.validation.map(|corpus| Dataset::new(corpus, validation_settings, false)).transpose()?;
        let (n, per_step) = (training.sequences_per_epoch(), u64::from(spec.gradient_accumulation_steps));
        let order = match (spec.max_steps, spec.n_epochs) {
            (Some(steps), _) => Order::steps(n, per_step, steps),
            (None, epochs) => Order::epochs(n, per_step, u64::from(epochs.unwrap_or(1))),
        };
        Ok(Data { training, validation, order, multiple: multiple(run), preview: self.preview })
    }
}

/// What sequences are padded to: a rank's part of one is padded as a document is.
fn multiple(run: &RunSpec) -> u64 {
    pad_to(run.machine.device) * run.ranks.sequence
}

fn open_validation(files: &[DataFile], tokenizer: &Tokenizer, folder: &std::path::Path) -> Result<Option<Corpus>> {
    if files.is_empty() {
        return Ok(None);
    }
    Corpus::open(files, tokenizer, folder).map(Some).map_err(|error| match error {
        crate::engine::Error::Input(invalid) if invalid.param == "training_file" => {
            Invalid { param: "validation_file".into(), code: "invalid_validation_file".into(), ..invalid }.into()
        }
        other => other,
    })
}

/// Counts of the data set, with the steps it will take.
pub(super) fn summary(data: &Data) -> DataSummary {
    let held_out = |dataset: &Dataset| {
        let DataSummary { documents, tokens, valid_labels, sequences, .. } = *dataset.summary();
        HeldOut { documents, tokens, valid_labels, sequences }
    };
    DataSummary {
        total_steps: data.order.total_steps,
        validation: data.validation.as_ref().map(held_out),
        preview: data.preview.clone(),
        ..data.training.summary().clone()
    }
}

/// Tells what the machine will do.
pub(super) fn announce(plan: &Plan, config: &ModelConfig, run: &RunSpec, observer: &mut dyn Observer) {
    let choice = &plan.choice;
    let ranks = match choice.ranks {
        Ranks::ONE => String::new(),
        Ranks { sequence, data: 1 } => format!(", {sequence} ranks to a sequence"),
        Ranks { sequence: 1, data } => format!(", {data} sequences at a time"),
        Ranks { sequence, data } => format!(", {sequence} ranks to a sequence, {data} sequences at a time"),
    };
    let message = format!(
        "planned on {} in {}{ranks}: sequences of up to {} tokens in chunks of {}, {} of {} layer inputs kept, {:.2} GiB at the \
         peak, about {:.1} s a full sequence",
        run.machine.device_name,
        plan.precision.as_str(),
        plan.tokens,
        choice.chunk_tokens,
        choice.checkpoint_slots,
        config.n_layers,
        plan.predicted_peak_bytes as f64 / f64::from(1 << 30),
        plan.step_seconds,
    );
    let ledger: serde_json::Map<String, serde_json::Value> =
        plan.ledger.iter().map(|(category, bytes)| (format!("{category:?}").to_lowercase(), json!(bytes))).collect();
    let data = json!({
        "predicted_peak_bytes": plan.predicted_peak_bytes, "disk_bytes": plan.disk_bytes,
        "predicted_seconds_per_sequence": plan.step_seconds, "choice": choice, "ledger": ledger,
    });
    observer.event(Event::info(message, data));
}
