//! A job on several ranks is the job on one: what it reports, what it writes, how it stops and how it fails. The ranks are threads
//! here, which meet as processes do.

use std::{
    io::{BufRead, BufReader, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    process::{Command, Stdio},
    sync::mpsc::{Sender, channel},
    thread,
};

use longhaul::{
    domain::{
        Event, RunSpec, TrainingSpec,
        progress::{DataSummary, Evaluation, StepMetrics, WrittenCheckpoint},
        run::Place,
        training::LongDocuments,
    },
    engine::{
        Result,
        train::{Observer, Outcome, Stop, train as train_rank},
    },
};
use serde_json::Value;

use super::{Recorder, Studio, finish, folder, interrupt, names, refusal, spec, steps::weights, story};
use crate::{
    comm::{NO_HANG, within},
    support::model::relative_error,
};

/// f32, and sums in another order.
const TOLERANCE: f64 = 1e-6;
/// Where the process that is to be killed finds its run.
const RUN: &str = "LONGHAUL_TEST_RUN_OF_RANKS";

fn on(ranks: u32, training: TrainingSpec) -> TrainingSpec {
    TrainingSpec { sequence_parallel_size: Some(ranks), ..training }
}

fn replicas(data: u32, sequence: u32, training: TrainingSpec) -> TrainingSpec {
    TrainingSpec { data_parallel_size: Some(data), ..on(sequence, training) }
}

/// Trains on every rank of the run: rank 0 here, with the observer, and each of the others on a thread. The outcome is rank 0's.
pub fn train(run: &RunSpec, observer: &mut dyn Observer) -> Result<Outcome> {
    let n_ranks = if run.inspect_only { 1 } else { run.ranks.world() };
    thread::scope(|scope| {
        let (tell, told) = channel::<String>();
        scope.spawn(move || {
            // Nobody comes where rank 0 never listened.
            let Ok(address) = told.recv() else { return };
            thread::scope(|scope| {
                for rank in 1..n_ranks {
                    let place = Place { rank, address: address.clone(), ..run.place.clone() };
                    let run = RunSpec { place, ..run.clone() };
                    scope.spawn(move || train_rank(&run, &mut Unheard));
                }
            });
        });
        train_rank(run, &mut First { observer, tell })
    })
}

/// Rank 0, whose address starts the others.
struct First<'a> {
    observer: &'a mut dyn Observer,
    tell: Sender<String>,
}

impl Observer for First<'_> {
    fn meeting(&mut self, address: &str) {
        self.tell.send(address.to_owned()).unwrap();
    }

    fn event(&mut self, event: Event) {
        self.observer.event(event);
    }

    fn data(&mut self, summary: &DataSummary) {
        self.observer.data(summary);
    }

    fn step(&mut self, metrics: &StepMetrics) {
        self.observer.step(metrics);
    }

    fn evaluation(&mut self, evaluation: &Evaluation) {
        self.observer.evaluation(evaluation);
    }

    fn checkpoint(&mut self, checkpoint: &WrittenCheckpoint) {
        self.observer.checkpoint(checkpoint);
    }

    fn stop_wanted(&self) -> Option<Stop> {
        self.observer.stop_wanted()
    }
}

/// Every other rank.
struct Unheard;

impl Observer for Unheard {
    fn event(&mut self, _: Event) {}

    fn data(&mut self, _: &DataSummary) {}

    fn step(&mut self, _: &StepMetrics) {}

    fn evaluation(&mut self, _: &Evaluation) {}

    fn checkpoint(&mut self, _: &WrittenCheckpoint) {}

    fn stop_wanted(&self) -> Option<Stop> {
        None
    }
}

fn assert_close(a: f64, b: f64, what: &str) {
    assert!((a - b).abs() <= TOLERANCE * b.abs(), "{what}: {a} and {b}");
}

/// The same steps on the same tokens, with the same losses.
fn assert_same_steps<'a>(
    ours: impl IntoIterator<Item = &'a StepMetrics>,
    theirs: impl IntoIterator<Item = &'a StepMetrics>,
    what: &str,
) {
    let (ours, theirs): (Vec<_>, Vec<_>) = (ours.into_iter().collect(), theirs.into_iter().collect());
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (a, b) in ours.into_iter().zip(theirs) {
        let what = format!("{what}, step {}", b.step);
        assert_eq!((a.step, a.valid_labels, a.tokens_seen), (b.step, b.valid_labels, b.tokens_seen), "{what}");
        assert_close(a.train_loss, b.train_loss, &what);
        assert!((a.grad_norm - b.grad_norm).abs() <= 1e-5 * b.grad_norm, "{what}: {} and {}", a.grad_norm, b.grad_norm);
    }
}

#[test]
fn ranks_train_as_one() {
    let studio = Studio::new("ranks");
    let held_out = studio.documents("held.jsonl", &[story(500, 83), story(501, 30)]);
    // 61 tokens divide by no number of ranks, and packing must not come to depend on it.
    let packed = TrainingSpec {
        packing: true,
        sequence_length: Some(61),
        long_documents: LongDocuments::Split,
        gradient_accumulation_steps: 2,
        evaluation_interval: Some(3),
        checkpoint_interval: Some(4),
        ..spec(6)
    };
    // Five sequences by fours, twice: of the last step two replicas have nothing; and of three held-out sequences the last round.
    let epochs = TrainingSpec { n_epochs: Some(2), max_steps: None, gradient_accumulation_steps: 4, ..spec(1) };
    for (name, training, arrangements) in [
        ("packed", packed, vec![(1, 2), (1, 4), (2, 1), (2, 2)]),
        ("apart", spec(5), vec![(1, 2), (1, 4)]),
        ("epochs", epochs, vec![(4, 1), (2, 2), (4, 2), (2, 4)]),
    ] {
        let run = |data: u32, sequence: u32| {
            let name = format!("{name}-{data}x{sequence}");
            let run = studio.run(&name, &[studio.five()], replicas(data, sequence, training.clone()));
            RunSpec { validation_files: vec![held_out.clone()], ..run }
        };
        let alone = run(1, 1);
        let one = finish(&alone);
        for (data, sequence) in arrangements {
            let (shared, what) = (run(data, sequence), format!("{name}, {data} x {sequence} ranks"));
            let several = finish(&shared);
            assert_eq!(several.summary, one.summary, "{what}");
            assert_same_steps(&several.steps, &one.steps, &what);
            assert_eq!(several.evaluations.len(), one.evaluations.len(), "{what}");
            for (a, b) in several.evaluations.iter().zip(&one.evaluations) {
                assert_eq!((a.step, a.valid_labels), (b.step, b.valid_labels), "{what}");
                assert_close(a.valid_loss, b.valid_loss, &what);
            }
            let told = several.events.iter().filter(|e| e.message.starts_with("planned on")).collect::<Vec<_>>();
            assert_eq!(told.len(), 1, "rank 0 tells for all");
            let says = |n: u32, what: &str| n == 1 || told[0].message.contains(&format!("{n} {what}"));
            assert!(says(sequence, "ranks") && says(data, "sequences at a time"), "{}", told[0].message);
            let kinds = |recorder: &Recorder| -> Vec<_> {
                let of = |c: &WrittenCheckpoint| (c.step, c.last, c.files.iter().map(|f| f.path.clone()).collect());
                recorder.checkpoints.iter().map(of).collect::<Vec<(u64, bool, Vec<String>)>>()
            };
            assert_eq!(kinds(&several), kinds(&one), "{what}");
            let error = relative_error(&weights(&shared, &several), &weights(&alone, &one));
            assert!(error <= 1e-5, "{what}: weights differ by {error}");
        }
    }
}

#[test]
fn stopped_on_four_ranks_and_resumed_on_any_number() {
    let studio = Studio::new("re-ranked");
    let files = [studio.five()];
    let whole = finish(&studio.run("whole", &files, spec(5)));
    let first = studio.run("first", &files, on(4, spec(5)));
    let stopped = interrupt(&first, 2);
    let from = folder(&first, &stopped.checkpoints[0]);
    for ranks in [1, 2, 4] {
        let second = studio.run(&format!("second-{ranks}"), &files, on(ranks, spec(5)));
        let continued = finish(&RunSpec { resume_from: Some(from.clone()), ..second });
        assert_same_steps(stopped.steps.iter().chain(&continued.steps), &whole.steps, &format!("4, then {ranks}"));
    }
}

#[test]
fn a_wish_to_stop_before_the_first_step_reaches_every_rank() {
    let studio = Studio::new("early-ranks");
    let run = studio.run("run", &[studio.five()], on(4, spec(2)));
    assert!(interrupt(&run, 0).checkpoints.is_empty());
    assert!(names(&run.work_dir.join("checkpoints")).is_empty());
}

/// Tells every step on standard output, for whoever waits to kill it.
struct Aloud;

impl Observer for Aloud {
    fn event(&mut self, _: Event) {}

    fn data(&mut self, _: &DataSummary) {}

    fn step(&mut self, metrics: &StepMetrics) {
        let mut out = std::io::stdout().lock();
        writeln!(out, "\n{}", serde_json::to_string(metrics).unwrap()).and_then(|()| out.flush()).unwrap();
    }

    fn evaluation(&mut self, _: &Evaluation) {}

    fn checkpoint(&mut self, _: &WrittenCheckpoint) {}

    fn stop_wanted(&self) -> Option<Stop> {
        None
    }
}

#[test]
#[ignore = "runs in a process of its own, until it is killed"]
fn doomed() {
    let Some(path) = std::env::var_os(RUN) else { return };
    let run: RunSpec = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    train(&run, &mut Aloud).unwrap();
}

/// Trains the run in a process of its own and kills it after so many steps, which are the answer.
fn killed_after(run: &RunSpec, steps: usize) -> Vec<StepMetrics> {
    std::fs::create_dir_all(&run.work_dir).unwrap();
    let path = run.work_dir.join("run.json");
    std::fs::write(&path, serde_json::to_vec(run).unwrap()).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["training::ranks::doomed", "--exact", "--ignored", "--nocapture"])
        .env(RUN, &path)
        .current_dir(&run.work_dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let told = lines.filter_map(|line| serde_json::from_str::<Value>(&line.unwrap()).ok());
    let told: Vec<StepMetrics> = told.filter_map(|v| serde_json::from_value(v).ok()).take(steps).collect();
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert!(told.len() == steps && status.code().is_none(), "it trained until it was killed: {status}");
    told
}

#[test]
fn killed_on_four_ranks_and_resumed_on_two() {
    let studio = Studio::new("killed-ranks");
    let files = [studio.five()];
    // More steps than anybody waits for: the end is the kill's.
    let training = TrainingSpec { checkpoint_interval: Some(2), ..spec(100_000) };
    let whole = interrupt(&studio.run("whole", &files, training.clone()), 8);
    let first = studio.run("first", &files, on(4, training.clone()));
    let before = killed_after(&first, 6);
    assert_same_steps(&before, &whole.steps[..6], "before the kill");
    // Step 6 may be in a checkpoint or not; step 4 is.
    let from = Some(first.work_dir.join("checkpoints/step-4"));
    let second = RunSpec { resume_from: from, ..studio.run("second", &files, on(2, training)) };
    let mut continued = Recorder { stop_after: Some(4), ..Recorder::default() };
    assert_eq!(train(&second, &mut continued).unwrap(), Outcome::Stopped { step: 8 });
    assert_same_steps(&continued.steps, &whole.steps[4..], "after the kill");
}

/// Panics at its second step.
struct Clumsy(Recorder);

impl Observer for Clumsy {
    fn event(&mut self, event: Event) {
        self.0.event(event);
    }

    fn data(&mut self, summary: &DataSummary) {
        self.0.data(summary);
    }

    fn step(&mut self, metrics: &StepMetrics) {
        self.0.step(metrics);
        assert!(self.0.steps.len() < 2, "as planned");
    }

    fn evaluation(&mut self, evaluation: &Evaluation) {
        self.0.evaluation(evaluation);
    }

    fn checkpoint(&mut self, checkpoint: &WrittenCheckpoint) {
        self.0.checkpoint(checkpoint);
    }

    fn stop_wanted(&self) -> Option<Stop> {
        None
    }
}

#[test]
fn a_panic_at_rank_0_ends_every_rank() {
    let studio = Studio::new("clumsy");
    let run = studio.run("run", &[studio.five()], on(4, spec(5)));
    let panicked = within(NO_HANG, move || {
        catch_unwind(AssertUnwindSafe(|| train(&run, &mut Clumsy(Recorder::default())))).expect_err("a panic goes on")
    });
    assert_eq!(panicked.downcast_ref::<&str>(), Some(&"as planned"));
}

#[test]
fn ranks_that_cannot_be_are_refused() {
    let studio = Studio::new("refused-ranks");
    let files = [studio.five()];
    let three = refusal(&studio.run("three", &files, on(3, spec(2))));
    assert_eq!(three.param, "training.sequence_parallel_size");
    assert!(three.message.contains("one of 1, 2, 4, not 3"), "{three}");
}
