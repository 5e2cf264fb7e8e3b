//! A job on several hosts, as the one that leads it sees it: calls for ranks, the claim once all are taken, and how the others do.

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;

use super::{Context, devices::Seat, prepare::retry, verdict::End, work};
use crate::{
    domain::{
        ExecutorId, JobId,
        run::{Part, Place, Token},
    },
    store::{
        Error,
        calls::{Answer, NewCall},
        queue::{Claim, Settlement},
    },
    trainer::protocol::Report,
};

/// How long a call is open: an executor looks for calls more often.
const CALL: Duration = Duration::from_secs(15);
/// Pause between two looks at what the others answer.
const LOOK: Duration = Duration::from_millis(300);
/// How long the others may take to say how their ranks ended, once those here have failed.
const HINDSIGHT: Duration = Duration::from_secs(3);

/// Calls the others of a seat, and claims the job once they have taken their ranks. `None` when somebody does not, or somebody else
/// has the job; then nothing has happened to it.
pub(super) async fn gather(
    context: &Arc<Context>,
    job: &JobId,
    seat: &mut Seat,
) -> Option<(Claim, std::time::Instant)> {
    let token = Token::random();
    let called = async {
        let part = |ranks: &std::ops::Range<u64>| Part {
            first: ranks.start,
            n: ranks.end - ranks.start,
            of: seat.ranks,
            machine: seat.machine.clone(),
            token: token.clone(),
        };
        let calls = seat.others.iter().map(|(host, ranks)| NewCall { host: host.clone(), part: part(ranks) });
        let calls: Vec<NewCall> = calls.collect();
        if !context.store.call_ranks(job, &context.id, &calls, CALL).await? {
            return Ok(None);
        }
        tracing::info!(%job, hosts = calls.len(), "other hosts are called for ranks");
        if !all(context, job, |answer| answer.taken).await? {
            return Ok(None);
        }
        let claimed = work::claim_called(context, job, seat.ranks.world()).await;
        if let Some((claim, _)) = &claimed {
            context.store.begin_calls(job, &context.id, claim.epoch).await?;
        }
        Ok::<_, Error>(claimed)
    };
    let claimed = called.await.unwrap_or_else(|error| {
        tracing::warn!(%job, %error, "other hosts could not be called");
        None
    });
    if claimed.is_none() {
        take_back(context, job).await;
    }
    seat.place = Some(Place { rank: 0, address: format!("{}:0", context.settings.address), token });
    claimed
}

/// Whether all called hosts come to this while the call is open.
async fn all(context: &Context, job: &JobId, what: impl Fn(&Answer) -> bool) -> Result<bool, Error> {
    let mut rest = CALL;
    while !context.stop.is_cancelled() && !rest.is_zero() {
        let answers = context.store.answers(job, &context.id).await?;
        if answers.iter().all(&what) {
            return Ok(true);
        }
        sleep(LOOK).await;
        rest = rest.saturating_sub(LOOK);
    }
    Ok(false)
}

/// Waits until every other host of the seat has the job's files. The settlement where one cannot have them, or is gone.
pub(super) async fn ready(context: &Context, claim: &Claim, seat: &Seat) -> Result<(), Settlement> {
    while !seat.others.is_empty() {
        let answers = answers(context, claim).await;
        if let Some(report) = answers.iter().find_map(ended) {
            return Err(match report {
                Report::Refused { error } => Settlement::Failed { error },
                Report::Broken { message, .. } => retry(message),
                _ => retry("another host ended its ranks before they began"),
            });
        }
        if let Some(gone) = gone_of(&answers, seat) {
            return Err(retry(gone));
        }
        if answers.iter().all(|answer| answer.ready) {
            return Ok(());
        }
        sleep(LOOK).await;
    }
    Ok(())
}

/// Waits until another host of the seat is gone, and says so. Never, where there is none.
pub(super) async fn gone(context: &Context, claim: &Claim, seat: &Seat) -> String {
    if seat.others.is_empty() {
        return std::future::pending().await;
    }
    loop {
        sleep(context.settings.lease / 3).await;
        if let Some(gone) = gone_of(&answers(context, claim).await, seat) {
            return gone;
        }
    }
}

/// What lies nearest to the cause: how the ranks here ended, or what another host says of its own, which comes within seconds.
pub(super) async fn nearest(context: &Context, claim: &Claim, seat: &Seat, report: Report) -> Report {
    let failed = End::of(&report).is_some_and(|end| end.is_failure());
    if seat.others.is_empty() || !failed {
        return report;
    }
    let mut rest = HINDSIGHT;
    loop {
        let answers = answers(context, claim).await;
        if rest.is_zero() || answers.iter().all(|answer| answer.ended.is_some()) {
            let distance = |report: &Report| End::of(report).map(|end| end.distance());
            let theirs = answers.iter().filter_map(ended).filter(|report| End::of(report).is_some());
            return [report].into_iter().chain(theirs).min_by_key(distance).expect("there is one");
        }
        sleep(LOOK).await;
        rest = rest.saturating_sub(LOOK);
    }
}

/// Ends what the others hold for this job.
pub(super) async fn take_back(context: &Context, job: &JobId) {
    if let Err(error) = context.store.drop_calls(job, &context.id).await {
        tracing::warn!(%job, %error, "calls were not taken back; they lapse");
    }
}

/// What the others answer. While the database is away nobody is gone; the lease bounds how long.
async fn answers(context: &Context, claim: &Claim) -> Vec<Answer> {
    loop {
        match context.store.answers(&claim.job, &context.id).await {
            Ok(answers) => return answers,
            Err(error) => tracing::warn!(job = %claim.job, %error, "other hosts cannot be heard"),
        }
        sleep(LOOK).await;
    }
}

fn ended(answer: &Answer) -> Option<Report> {
    serde_json::from_value(answer.ended.clone()?).ok()
}

fn gone_of(answers: &[Answer], seat: &Seat) -> Option<String> {
    let holds = |host: &ExecutorId| answers.iter().any(|answer| answer.host == *host && !answer.lapsed);
    let (host, ranks) = seat.others.iter().find(|(host, _)| !holds(host))?;
    let ranks = ranks.clone().map(|rank| rank.to_string()).collect::<Vec<_>>().join(", ");
    Some(format!("the host of rank {ranks} is gone: its executor {host} does not renew its hold any more"))
}
