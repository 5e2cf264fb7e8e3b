//! `longhaul jobs plan`: what a job would come to, without making it.

use std::{io::Write, thread, time::Duration};

use serde_json::Value;

use super::{
    Failure, Result, create,
    http::{Client, SHORT},
    say,
};
use crate::domain::{PlanId, ids::random_suffix};

/// Pause between two looks at a plan whose data is being read.
const LOOK: Duration = Duration::from_secs(1);

/// Asks for a plan, waits until its data was read, and prints it.
pub(super) fn run(args: &create::Args, client: &Client, out: &mut dyn Write) -> Result {
    let mut plan = client.post_again("/v1/fine_tuning/plans", &create::body(args)?, &random_suffix())?;
    while plan["status"] == "queued" {
        thread::sleep(LOOK);
        let id = plan["id"].as_str().and_then(|id| id.parse::<PlanId>().ok());
        let id = id.ok_or_else(|| Failure::shape(client.server(), "a plan's id", &plan))?;
        plan = client.get(&format!("/v1/fine_tuning/plans/{id}"), SHORT, |_| ())?;
    }
    if args.json { say(out, &plan) } else { show(&plan, out) }
}

fn show(plan: &Value, out: &mut dyn Write) -> Result {
    if let Some(message) = plan["error"]["message"].as_str() {
        return say(out, format_args!("the job would fail: {message}"));
    }
    for name in
        ["documents", "tokens", "valid_labels", "longest_document", "sequences", "sequence_length", "total_steps"]
    {
        say(out, format_args!("{name:<17} {}", plan["data"][name]))?;
    }
    for host in plan["hosts"].as_array().into_iter().flatten() {
        let name = |name: &str| host[name].as_str().unwrap_or_default().to_owned();
        let (hostname, device, outlook) = (name("hostname"), name("device"), &host["plan"]);
        match (outlook["predicted_seconds"].as_f64(), outlook["predicted_step_seconds"].as_f64()) {
            (Some(all), Some(step)) => {
                let peak = outlook["predicted_peak_bytes"].as_f64().unwrap_or_default() / f64::from(1 << 30);
                say(out, format_args!("{hostname}, {device}: {all:.0} s, {step:.2} s a step, {peak:.2} GiB"))?;
            }
            _ => say(out, format_args!("{hostname}, {device}: {}", name("problem")))?,
        }
    }
    Ok(())
}
