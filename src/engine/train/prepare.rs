//! Before the first step: data read and packed, a plan that fits, and both told.

use serde_json::json;

use super::{Observer, job::Data, order::Order};
use crate::{
    domain::{
        Event, Invalid, Level, ModelConfig, RunSpec, machine::DeviceKind, progress::DataSummary, run::DataFile,
        training::LongDocuments,
    },
    engine::{
        Result,
        data::{Corpus, Dataset, Tokenizer, pack::Settings},
    },
    plan::{self, Forced, Plan, Ranks, Request},
};

/// What every document is padded to: attention kernels of GPUs want whole blocks of keys, the CPU does not care.
fn pad_to(device: DeviceKind) -> u64 {
    match device {
        DeviceKind::Cpu => 1,
        DeviceKind::Cuda => 128,
    }
}

/// Reads the data, settles the sequence length, and plans for it.
pub(super) fn data_and_plan(run: &RunSpec, config: &ModelConfig, observer: &mut dyn Observer) -> Result<(Data, Plan)> {
    let spec = &run.training;
    let tokenizer = Tokenizer::open(&run.model, config.vocab_size)?;
    let folder = run.work_dir.join("tokens");
    let training = Corpus::open(&run.training_files, &tokenizer, &folder)?;
    let validation = open_validation(&run.validation_files, &tokenizer, &folder)?;

    let pad_to = pad_to(run.machine.device);
    let ranks = Ranks { sequence: u64::from(spec.sequence_parallel_size), data: 1 };
    // A rank's part of a sequence is padded as a document is.
    let multiple = pad_to * ranks.sequence;
    let longest_document = (0..training.n_documents()).map(|i| training.length(i)).max().unwrap_or(0);
    // What is packed into a sequence does not depend on the number of ranks; only the padding at its end does.
    let mut sequence_length = spec.sequence_length.unwrap_or(longest_document).max(2).next_multiple_of(pad_to);
    let request = Request {
        model: config,
        precision: spec.precision_on(run.machine.device),
        moments: spec.moments,
        tokens: sequence_length.next_multiple_of(multiple),
        micro_batches: u64::from(spec.gradient_accumulation_steps),
        machine: &run.machine,
        forced: Forced { ranks: Some(ranks), ..Forced::default() },
    };
    let plan = match plan::plan(&request) {
        Ok(plan) => plan,
        // Nobody asked for this length: where documents may be cut, the longest that fits will do.
        Err(refusal) if spec.sequence_length.is_none() && spec.long_documents != LongDocuments::Refuse => {
            let tokens = (refusal.longest_tokens / multiple * multiple).max(multiple);
            sequence_length = tokens;
            observer.event(Event::message(
                Level::Warn,
                format!(
                    "the longest document has {longest_document} tokens; sequences of {tokens} are the longest that fit"
                ),
            ));
            plan::plan(&Request { tokens, ..request }).map_err(Invalid::from)?
        }
        Err(refusal) => return Err(Invalid::from(refusal).into()),
    };
    if sequence_length > config.max_position_embeddings {
        observer.event(Event::message(
            Level::Warn,
            format!(
                "sequences of {} tokens are longer than the {} positions the model was made for",
                sequence_length, config.max_position_embeddings
            ),
        ));
    }
    let settings = Settings {
        sequence_length,
        pad_to,
        packing: spec.packing,
        long_documents: spec.long_documents,
        seed: spec.seed,
    };
    let training = Dataset::new(training, settings, true)?;
    // Held-out documents are measured whole where they fit and in pieces where not: nothing is refused for them.
    let validation_settings = Settings { long_documents: LongDocuments::Split, ..settings };
    let validation = validation.map(|corpus| Dataset::new(corpus, validation_settings, false)).transpose()?;
    let (n, per_step) = (training.sequences_per_epoch(), u64::from(spec.gradient_accumulation_steps));
    let order = match (spec.max_steps, spec.n_epochs) {
        (Some(steps), _) => Order::steps(n, per_step, steps),
        (None, epochs) => Order::epochs(n, per_step, u64::from(epochs.unwrap_or(1))),
    };
    Ok((Data { training, validation, order, multiple }, plan))
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
    DataSummary { total_steps: data.order.total_steps, ..data.training.summary().clone() }
}

/// Tells what the machine will do.
pub(super) fn announce(plan: &Plan, config: &ModelConfig, run: &RunSpec, observer: &mut dyn Observer) {
    let choice = &plan.choice;
    let ranks = match choice.ranks.sequence {
        1 => String::new(),
        n => format!(", {n} ranks to a sequence"),
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
