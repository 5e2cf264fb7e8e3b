//! One job's steps on one backend: weights in, steps, evaluations, checkpoints out.

use std::{collections::BTreeMap, path::Path, time::Instant};

use super::{
    Observer, Outcome, Stop,
    order::Order,
    prepare, saved,
    session::{Session, Totals},
};
use crate::{
    domain::{
        ModelConfig, RunSpec, TrainingSpec,
        progress::{Evaluation, PreviewedExample, StepMetrics, WrittenCheckpoint},
        run::Ranks,
        training,
    },
    engine::{
        Error, Result,
        backend::{AdamW, Backend},
        comm::{Comm, Groups},
        data::{Dataset, Sequence},
        model::Batch,
        optim::schedule::{Schedule, Shape},
    },
    plan::Plan,
};

/// Data of a run, read and counted.
pub(super) struct Data {
    pub training: Dataset,
    pub validation: Option<Dataset>,
    pub order: Order,
    /// Sequences are padded at their end to a multiple of so many tokens.
    pub multiple: u64,
    /// The first examples, to be shown.
    pub preview: Vec<PreviewedExample>,
}

impl Data {
    /// A sequence as every rank takes it.
    fn sequence(&self, of: &Dataset, epoch: u64, index: u64) -> Sequence {
        let mut sequence = of.sequence(epoch, index);
        sequence.pad(self.multiple);
        sequence
    }

    /// What a replica takes where the others have a sequence and it has none: the shortest that there is, without a label. All
    /// ranks of a world gather the same weights at the same time, so none may sit a sequence out.
    fn nothing(&self) -> Sequence {
        let mut sequence = Sequence::default();
        sequence.append_padding(self.multiple);
        sequence
    }
}

/// What a run has come to; written with every checkpoint, read back on resume.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    /// Tokens trained on, without padding.
    pub tokens_seen: u64,
    /// Last measured losses, for the checkpoint's metrics.
    pub train_loss: Option<f64>,
    pub valid_loss: Option<f64>,
}

struct Job<'a, B, C> {
    run: &'a RunSpec,
    session: Session<B, C>,
    data: &'a Data,
    schedule: Schedule,
    progress: Progress,
    seconds: f64,
    steps_timed: u64,
}

/// Trains the run to its end as one of its ranks, or until the observer of rank 0 wants it to stop. Every rank has the same
/// outcome; one that fails tells the others why, and they fail in the call they are in.
pub(super) fn train<B: Backend, C: Comm<B>>(
    backend: B,
    groups: Groups<C>,
    run: &RunSpec,
    config: &ModelConfig,
    plan: &Plan,
    data: &Data,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    // Told only once the device is open: one that is not there trains nothing as planned.
    prepare::announce(plan, config, run, observer);
    let session = Session::among(backend, groups, plan, config, &run.work_dir.join("spill"))?;
    let schedule = schedule(&run.training, data.order.total_steps);
    let progress = Progress::default();
    let mut job = Job { run, session, data, schedule, progress, seconds: 0.0, steps_timed: 0 };
    job.train(observer).inspect_err(|error| job.session.groups.give_up(error))
}

fn schedule(spec: &TrainingSpec, total_steps: u64) -> Schedule {
    let shape = match spec.schedule {
        training::Schedule::Constant => Shape::Constant,
        training::Schedule::Linear => Shape::Linear,
        training::Schedule::Cosine => Shape::Cosine,
    };
    Schedule {
        shape,
        peak: spec.learning_rate,
        warmup_steps: spec.warmup_steps,
        total_steps,
        min_ratio: spec.min_lr_ratio,
    }
}

impl<B: Backend, C: Comm<B>> Job<'_, B, C> {
    fn train(&mut self, observer: &mut dyn Observer) -> Result<Outcome> {
        match &self.run.resume_from {
            Some(folder) => self.progress = saved::resume(&mut self.session, folder)?,
            None => saved::load_base(&mut self.session, &self.run.model)?,
        }
        self.steps(observer)
    }

    fn steps(&mut self, observer: &mut dyn Observer) -> Result<Outcome> {
        let total = self.data.order.total_steps;
        if self.progress.step == 0 {
            self.evaluate(observer)?;
        }
        for sequence in self.sequences(self.progress.step + 1) {
            self.session.prepare(&sequence.documents)?;
        }
        // Whether the state in memory is already in a checkpoint folder.
        let mut written = self.run.resume_from.is_some();
        while self.progress.step < total {
            if let Some(stop) = self.stop_wanted(observer)? {
                if stop.checkpoint && !written && self.progress.step > 0 {
                    self.checkpoint(observer, false)?;
                }
                return Ok(Outcome::Stopped { step: self.progress.step });
            }
            self.step(observer)?;
            written = false;
            let step = self.progress.step;
            let due = |interval: Option<u64>| interval.is_some_and(|n| step.is_multiple_of(n));
            if due(self.run.training.evaluation_interval) || step == total {
                self.evaluate(observer)?;
            }
            if due(self.run.training.checkpoint_interval) && step < total {
                self.checkpoint(observer, false)?;
                written = true;
            }
        }
        self.checkpoint(observer, true)?;
        Ok(Outcome::Finished { trained_tokens: self.progress.tokens_seen })
    }

    /// The wish of rank 0's observer, the same on every rank.
    fn stop_wanted(&mut self, observer: &dyn Observer) -> Result<Option<Stop>> {
        let world = &mut self.session.groups.world;
        let wish = observer.stop_wanted().filter(|_| world.rank() == 0);
        let mut counts = [wish.is_some(), wish.is_some_and(|stop| stop.checkpoint)].map(u64::from);
        world.all_reduce_counts(&mut counts)?;
        Ok((counts[0] > 0).then_some(Stop { checkpoint: counts[1] > 0 }))
    }

    /// Of so many sequences, which this replica takes in every round: one after another go to one replica after another, and in
    /// the last round some may have none.
    fn own(&self, n: u64) -> impl Iterator<Item = Option<u64>> + use<B, C> {
        let Ranks { sequence, data } = self.run.ranks;
        let replica = self.session.groups.world.rank() as u64 / sequence;
        (0..n.div_ceil(data)).map(move |round| Some(round * data + replica).filter(|i| *i < n))
    }

    /// This replica's sequences of a step, as many as those of the others.
    fn sequences(&self, step: u64) -> Vec<Sequence> {
        let (data, places) = (self.data, self.data.order.of_step(step).collect::<Vec<_>>());
        let place = |i: u64| places[i as usize];
        let sequence = |(epoch, i)| data.sequence(&data.training, epoch, i);
        self.own(places.len() as u64).map(|own| own.map_or_else(|| data.nothing(), |i| sequence(place(i)))).collect()
    }

    fn step(&mut self, observer: &mut dyn Observer) -> Result {
        let start = Instant::now();
        let step = self.progress.step + 1;
        let sequences = self.sequences(step);
        let batches: Vec<Batch> = sequences.iter().map(batch).collect();
        let spec = &self.run.training;
        let hyper = AdamW {
            learning_rate: self.schedule.rate(step),
            beta1: spec.beta1,
            beta2: spec.beta2,
            epsilon: spec.epsilon,
            weight_decay: spec.weight_decay,
            step,
            seed: spec.seed,
            first_index: 0,
        };
        let totals = self.session.step(&batches, &hyper, spec.max_grad_norm)?;
        for (what, value) in [("loss", totals.mean_loss()), ("gradient norm", totals.grad_norm)] {
            if !value.is_finite() {
                return Err(Error::NotFinite { what, value, step });
            }
        }
        let mut tokens = [sequences.iter().map(|s| s.n_tokens).sum()];
        self.session.groups.world.all_reduce_counts(&mut tokens)?;
        // All ranks of a sequence counted the same tokens.
        let tokens = tokens[0] / self.run.ranks.sequence;
        self.progress.step = step;
        self.progress.tokens_seen += tokens;
        self.progress.train_loss = Some(totals.mean_loss());
        let seconds = start.elapsed().as_secs_f64();
        self.seconds += seconds;
        self.steps_timed += 1;
        observer.step(&self.metrics(&totals, tokens, seconds));
        Ok(())
    }

    fn metrics(&self, totals: &Totals, tokens: u64, seconds: f64) -> StepMetrics {
        let (step, total_steps) = (self.progress.step, self.data.order.total_steps);
        StepMetrics {
            step,
            total_steps,
            train_loss: totals.mean_loss(),
            train_mean_token_accuracy: totals.accuracy(),
            learning_rate: self.schedule.rate(step),
            grad_norm: totals.grad_norm,
            seconds,
            tokens_per_second: tokens as f64 / seconds,
            valid_labels: totals.valid_labels,
            tokens_seen: self.progress.tokens_seen,
            device_peak_bytes: self.session.backend.peak_bytes(),
            estimated_seconds_left: self.seconds / self.steps_timed as f64 * (total_steps - step) as f64,
        }
    }

    /// Loss over every validation sequence, one at a time.
    fn evaluate(&mut self, observer: &mut dyn Observer) -> Result {
        let Some(validation) = &self.data.validation else { return Ok(()) };
        let mut totals = Totals::default();
        for own in self.own(validation.sequences_per_epoch()) {
            let sequence = own.map_or_else(|| self.data.nothing(), |i| self.data.sequence(validation, 0, i));
            let one = self.session.evaluate([batch(&sequence)])?;
            totals.loss += one.loss;
            totals.correct += one.correct;
            totals.valid_labels += one.valid_labels;
        }
        self.progress.valid_loss = Some(totals.mean_loss());
        observer.evaluation(&Evaluation {
            step: self.progress.step,
            valid_loss: totals.mean_loss(),
            valid_mean_token_accuracy: totals.accuracy(),
            valid_labels: totals.valid_labels,
        });
        Ok(())
    }

    fn checkpoint(&mut self, observer: &mut dyn Observer, last: bool) -> Result {
        let folder = self.run.work_dir.join("checkpoints");
        let mut metrics = BTreeMap::from([("step".to_owned(), self.progress.step as f64)]);
        metrics.extend(self.progress.train_loss.map(|loss| ("train_loss".to_owned(), loss)));
        metrics.extend(self.progress.valid_loss.map(|loss| ("valid_loss".to_owned(), loss)));
        let written = saved::write(&mut self.session, self.progress, &self.run.model, &folder)?;
        // Rank 0 wrote for all.
        if let Some(checkpoint) = written {
            let trained_tokens = self.progress.tokens_seen;
            observer.checkpoint(&WrittenCheckpoint { metrics, last, trained_tokens, ..checkpoint });
        }
        Ok(())
    }
}

fn batch(sequence: &Sequence) -> Batch<'_> {
    Batch {
        ids: &sequence.ids,
        labels: &sequence.labels,
        positions: &sequence.positions,
        documents: &sequence.documents,
    }
}

/// Folder of a run's spill file and checkpoints must be there before the first step, or the run fails hours in.
pub(super) fn prepare(work_dir: &Path) -> Result {
    for folder in ["checkpoints", "spill", "tokens"] {
        let path = work_dir.join(folder);
        std::fs::create_dir_all(&path).map_err(Error::file(&path))?;
    }
    Ok(())
}
