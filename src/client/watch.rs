//! `longhaul watch`: a job from where it is to its end, by polling.
//!
//! In: a job's id. Out: its messages as lines, its steps as a progress bar (or as lines where there is no terminal), and
//! the job's end as the exit status. A server that restarts is waited for; nothing that happened meanwhile is missed.

use std::{
    io::{self, Write},
    thread,
    time::Duration,
};

use indicatif::ProgressBar;
use serde_json::Value;

use super::{
    Failure, Result,
    bar::{self, grouped, human_bytes, human_seconds},
    http::{self, Client},
    jobs::{self, text},
    say,
};

/// Pause between two looks at a job.
const POLL: Duration = Duration::from_secs(1);
/// Events asked for at once.
const PAGE: usize = 100;
/// Most pages read to catch up; a job older than that is joined in the middle.
const MAX_PAGES: usize = 50;

/// Flags of `longhaul watch`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The job's id
    pub job: String,
    /// Print every event as a line of JSON
    #[arg(long)]
    pub json: bool,
}

/// Follows the job until it ends. Fails when the job does.
pub fn run(args: &Args, client: &Client, out: &mut dyn Write) -> Result {
    let path = jobs::path(&args.job)?;
    let mut screen = Screen { bar: bar::job(), json: args.json, counting: false, out };
    let mut seen = None;
    let mut patience = http::SHORT;
    loop {
        let mut away = false;
        let mut waiting = |failure: &Failure| {
            if !std::mem::replace(&mut away, true) {
                screen.bar.suspend(|| drop(writeln!(io::stderr(), "{failure}; trying again")));
            }
        };
        // The job before its events: when it has ended, the events that follow are all there is.
        let job = client.get(&path, patience, &mut waiting)?;
        let events = news(client, &path, &mut seen, &mut waiting)?;
        patience = http::LONG;
        screen.show(&job, &events)?;
        if let Some(end) = ending(&job) {
            screen.bar.finish_and_clear();
            return end.and_then(|line| if args.json { Ok(()) } else { say(screen.out, line) });
        }
        thread::sleep(POLL);
    }
}

/// Events after `seen`, oldest first, and moves `seen` on.
fn news(
    client: &Client,
    job: &str,
    seen: &mut Option<String>,
    waiting: &mut dyn FnMut(&Failure),
) -> Result<Vec<Value>> {
    let mut found: Vec<Value> = Vec::new();
    let mut after = String::new();
    for _ in 0..MAX_PAGES {
        let page = client.get(&format!("{job}/events?limit={PAGE}{after}"), http::LONG, &mut *waiting)?;
        let events = page["data"].as_array().ok_or_else(|| Failure::shape(client.server(), "a list", &page))?;
        // Newest first, as everywhere in the API.
        let fresh = events.iter().take_while(|event| seen.is_none() || event["id"].as_str() != seen.as_deref());
        let before = found.len();
        found.extend(fresh.cloned());
        let met = found.len() - before < events.len();
        match events.last().map(|event| text(event, "id")) {
            Some(id) if !met && page["has_more"] == true => after = format!("&after={id}"),
            _ => break,
        }
    }
    if let Some(newest) = found.first() {
        *seen = Some(text(newest, "id"));
    }
    found.reverse();
    Ok(found)
}

/// The end of a job that has ended.
fn ending(job: &Value) -> Option<Result<String>> {
    let id = text(job, "id");
    match job["status"].as_str()? {
        "succeeded" => Some(Ok(format!("succeeded: {}", text(job, "fine_tuned_model")))),
        "failed" => {
            let message = job["error"]["message"].as_str().unwrap_or("the server gave no reason").to_owned();
            Some(Err(Failure::JobFailed { job: id, message }))
        }
        "cancelled" => Some(Err(Failure::JobCancelled(id))),
        _ => None,
    }
}

/// Where a job is shown.
struct Screen<'a> {
    bar: ProgressBar,
    json: bool,
    /// The bar has its total.
    counting: bool,
    out: &'a mut dyn Write,
}

impl Screen<'_> {
    fn show(&mut self, job: &Value, events: &[Value]) -> Result {
        if self.json {
            return events.iter().try_for_each(|event| say(self.out, event));
        }
        let last_step = events.iter().rposition(|event| event["data"]["train_loss"].is_number());
        for (i, event) in events.iter().enumerate() {
            let data = &event["data"];
            if data["train_loss"].is_number() {
                self.step(data, Some(i) == last_step)?;
            } else if let (Some(loss), Some(step)) = (data["full_valid_loss"].as_f64(), data["step"].as_u64()) {
                self.line(format!("validation loss {loss:.4} after {step} steps"))?;
            } else {
                let loud = match event["level"].as_str() {
                    Some("warn") => "warning: ",
                    Some("error") => "error: ",
                    _ => "",
                };
                self.line(format!("{loud}{}", text(event, "message")))?;
            }
        }
        if !self.counting {
            self.bar.set_message(text(job, "status"));
        }
        Ok(())
    }

    /// A step moves the bar. Where none is drawn the newest of a look becomes a line.
    fn step(&mut self, data: &Value, newest: bool) -> Result {
        let (Some(step), Some(total)) = (data["step"].as_u64(), data["total_steps"].as_u64()) else { return Ok(()) };
        let numbers = numbers(data);
        if self.bar.is_hidden() {
            return if newest { say(self.out, format_args!("step {step}/{total}  {numbers}")) } else { Ok(()) };
        }
        if !std::mem::replace(&mut self.counting, true) {
            bar::steps(&self.bar, total);
        }
        self.bar.set_position(step);
        self.bar.set_message(numbers);
        Ok(())
    }

    fn line(&mut self, line: String) -> Result {
        let out = &mut *self.out;
        self.bar.suspend(|| say(out, line))
    }
}

/// What a step's numbers say, in one line; those that are missing are left out.
fn numbers(data: &Value) -> String {
    let number = |name: &str| data[name].as_f64();
    let parts = [
        number("train_loss").map(|loss| format!("loss {loss:.4}")),
        number("tokens_per_second").map(|rate| format!("{} tok/s", grouped(rate.max(0.0).round() as u64))),
        number("grad_norm").map(|norm| format!("grad {norm:.3}")),
        number("learning_rate").map(|rate| format!("lr {rate:.2e}")),
        data["device_peak_bytes"].as_u64().map(|bytes| format!("mem {}", human_bytes(bytes))),
        number("estimated_seconds_left").map(|left| format!("{} left", human_seconds(left))),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join("  ")
}
