//! The trainers of one attempt, a process for each rank: started, heard and ended together.
//!
//! Rank 0 comes first, and the others once it listens for them, on this host or, with ranks on several, elsewhere. It tells the run's story; of the others only how they end counts.
//! Whichever ends before its time, hangs or fails ends all of them: those that know it say so first, since the ranks notice among
//! themselves which of them is lost, and what is left is killed.

use std::{io, ops::Range, path::PathBuf, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout_at},
};

use super::{
    launcher::{self, READ_AHEAD, Said, Trainer},
    verdict::{End, verdict},
};
use crate::{
    domain::{RunSpec, run::Place},
    trainer::protocol::{ALIVE_INTERVAL, Report},
};

/// A trainer that says nothing for so long is stuck. Ranks that have met notice each other's silence sooner.
const SILENCE: Duration = ALIVE_INTERVAL.saturating_mul(15);
/// How long the others' words are waited for once one has failed: what they know of it comes at once.
const HINDSIGHT: Duration = Duration::from_secs(3);

/// The trainers of a run.
#[derive(Debug)]
pub(super) struct Group {
    program: PathBuf,
    /// As the first of them has it.
    run: RunSpec,
    /// Ranks on this host.
    here: Range<u64>,
    /// GPUs of these; none on the CPU.
    gpus: Vec<usize>,
    deadline: watch::Receiver<Instant>,
    /// In the order of ranks.
    members: Vec<Member>,
    tell: mpsc::Sender<(u64, Said)>,
    told: mpsc::Receiver<(u64, Said)>,
    /// When somebody was last heard, or listened to.
    left: Instant,
    /// Set once one of them has failed: how long the others may still say something.
    until: Option<Instant>,
    not_started: Option<(u64, End)>,
}

#[derive(Debug)]
struct Member {
    trainer: Trainer,
    heard: Instant,
    end: Option<End>,
}

impl Group {
    /// Starts rank 0 of the run, or where that is on another host, which has told its address, all ranks of this one. `gpus` are
    /// those of the ranks `here`; new deadlines of the lease are passed on to all.
    pub(super) fn start(
        program: PathBuf,
        run: RunSpec,
        (here, gpus): (Range<u64>, Vec<usize>),
        deadline: watch::Receiver<Instant>,
    ) -> io::Result<Self> {
        let (tell, told) = mpsc::channel(READ_AHEAD);
        let (members, left) = (Vec::new(), Instant::now());
        let mut group =
            Self { program, run, here, gpus, deadline, members, tell, told, left, until: None, not_started: None };
        let first = group.here.start;
        for rank in if first == 0 { 0..1 } else { group.here.clone() } {
            group.add(Place { rank, ..group.run.place.clone() })?;
        }
        Ok(group)
    }

    fn add(&mut self, place: Place) -> io::Result<()> {
        let gpu = self.gpus.get(self.index(place.rank)).copied().unwrap_or_default();
        let run = RunSpec { place, gpu, ..self.run.clone() };
        let trainer = launcher::start(&self.program, run, self.deadline.clone(), self.tell.clone())?;
        self.members.push(Member { trainer, heard: Instant::now(), end: None });
        Ok(())
    }

    fn index(&self, rank: u64) -> usize {
        (rank - self.here.start) as usize
    }

    /// The next report of rank 0; or what the failure of any rank comes down to, when all are ended. Nothing is lost where this is
    /// dropped before it answers.
    pub(super) async fn report(&mut self) -> Report {
        // Nobody was listened to in the meantime, so nobody was silent.
        let away = self.left.elapsed();
        self.members.iter_mut().for_each(|member| member.heard += away);
        self.left = Instant::now();
        loop {
            let all_ended = self.members.iter().all(|member| member.end.is_some());
            if self.until.is_some_and(|until| all_ended || Instant::now() >= until) {
                return self.conclude().await;
            }
            if all_ended {
                // Only without rank 0, whose own last word was told before.
                return Report::Finished { trained_tokens: 0 };
            }
            if let Some(report) = self.next().await {
                return report;
            }
        }
    }

    /// Takes in what is said next; answers what rank 0 reports.
    async fn next(&mut self) -> Option<Report> {
        let (quietest, silent_at) = self.quietest();
        let Ok(told) = timeout_at(self.until.unwrap_or(silent_at), self.told.recv()).await else {
            if self.until.is_none() {
                self.note(quietest, End::Silent(SILENCE));
            }
            return None;
        };
        let (rank, said) = told.expect("the group holds a sender of its own");
        self.left = Instant::now();
        let index = self.index(rank);
        self.members[index].heard = self.left;
        match said {
            Said::Report(Report::Meeting { address }) if rank == 0 => {
                self.gather(&address);
                return Some(Report::Meeting { address });
            }
            Said::Report(report) => match End::of(&report) {
                Some(end) if end.is_failure() || rank > 0 => self.note(rank, end),
                _ if rank == 0 => return Some(report),
                _ => {}
            },
            Said::Garbage(line) => self.note(rank, End::Garbage(line)),
            Said::End => self.note(rank, End::Died(String::new())),
        }
        None
    }

    /// Who was not heard for longest, and when that is too long.
    fn quietest(&self) -> (u64, Instant) {
        let here = self.members.iter().enumerate().filter(|(_, member)| member.end.is_none());
        let quietest = here.min_by_key(|(_, member)| member.heard);
        let (index, heard) = quietest.map_or((0, self.left), |(index, member)| (index as u64, member.heard));
        (self.here.start + index, heard + SILENCE)
    }

    /// Keeps how a rank ended. Its first word about it counts: whoever has said the last one may go.
    fn note(&mut self, rank: u64, end: End) {
        let index = self.index(rank);
        let member = &mut self.members[index];
        if member.end.is_some() {
            return;
        }
        if end.is_failure() {
            self.until = self.until.or(Some(Instant::now() + HINDSIGHT));
        }
        member.end = Some(end);
    }

    /// Starts the ranks after the first, which listens for them.
    fn gather(&mut self, address: &str) {
        for rank in self.members.len() as u64..self.here.end {
            let token = self.run.place.token.clone();
            if let Err(error) = self.add(Place { rank, address: address.to_owned(), token }) {
                self.not_started = Some((rank, End::NotStarted(error.to_string())));
                self.until = Some(Instant::now());
                return;
            }
        }
    }

    /// Ends all of them after one has failed, and says what it comes down to.
    async fn conclude(&mut self) -> Report {
        for member in &mut self.members {
            if let Some(End::Died(how)) = &mut member.end {
                *how = member.trainer.end().await;
            }
        }
        self.kill().await;
        let ranked = self.members.iter().zip(self.here.start..);
        let ends = ranked.filter_map(|(member, rank)| Some((rank, member.end.clone()?)));
        verdict(self.run.ranks.world(), ends.chain(self.not_started.clone()))
    }

    /// Asks all of them to stop at the next step boundary.
    pub(super) async fn stop(&self, checkpoint: bool) {
        // The wish of rank 0 is everybody's.
        if let Some(first) = self.members.first() {
            first.trainer.stop(checkpoint).await;
        }
    }

    /// Ends all of them now, and waits until they are gone.
    pub(super) async fn kill(&mut self) {
        self.members.iter_mut().for_each(|member| member.trainer.kill());
        self.end().await;
    }

    /// Waits until all are gone, after the last word of rank 0; who stays is killed.
    pub(super) async fn end(&mut self) {
        for member in &mut self.members {
            member.trainer.end().await;
        }
    }
}
