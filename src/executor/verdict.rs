//! What the ends of an attempt's trainers come down to: one report, of the rank and the cause that ended the others.

use std::time::Duration;

use crate::{domain::Invalid, trainer::protocol::Report};

/// How a trainer came to its end.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum End {
    /// It did what it should.
    Well,
    /// The input is at fault.
    Refused(Invalid),
    /// It could not go on: by itself, or only because this rank was lost.
    Broken {
        message: String,
        lost: Option<u64>,
    },
    /// It ended without a word: exit status and last lines of its log.
    Died(String),
    /// What it wrote is no report.
    Garbage(String),
    /// It said nothing for so long.
    Silent(Duration),
    NotStarted(String),
}

impl End {
    /// The end that a report tells of, if it is a last word.
    pub(super) fn of(report: &Report) -> Option<Self> {
        match report {
            Report::Finished { .. } | Report::Stopped { .. } => Some(Self::Well),
            Report::Refused { error } => Some(Self::Refused(error.clone())),
            Report::Broken { message, lost } => Some(Self::Broken { message: message.clone(), lost: *lost }),
            _ => None,
        }
    }

    pub(super) fn is_failure(&self) -> bool {
        *self != Self::Well
    }

    /// The nearest to the cause first. What is wrong with the input is told as such, whichever rank noticed; a process that ends
    /// without a word was ended by something else, and whoever follows another's end says so.
    pub(super) fn distance(&self) -> u32 {
        match self {
            Self::Refused(_) => 0,
            Self::NotStarted(_) => 1,
            Self::Died(_) | Self::Garbage(_) => 2,
            Self::Broken { lost: None, .. } => 3,
            Self::Silent(_) => 4,
            Self::Broken { lost: Some(_), .. } => 5,
            Self::Well => 6,
        }
    }

    fn told(self, who: &str) -> Report {
        let broken = |message: String| Report::Broken { message, lost: None };
        match self {
            Self::Refused(error) => Report::Refused { error },
            Self::NotStarted(error) => broken(format!("{who} could not be started: {error}")),
            Self::Died(how) => broken(format!("{who} died: {how}")),
            Self::Garbage(line) => broken(format!("{who} did not keep to the protocol: {line}")),
            // The message names the rank that was lost.
            Self::Broken { message, lost: lost @ Some(_) } => Report::Broken { message, lost },
            Self::Broken { message, lost: None } => broken(format!("{who}: {message}")),
            Self::Silent(patience) => broken(format!("{who} said nothing for {} s and was ended", patience.as_secs())),
            Self::Well => broken(format!("{who} ended before the others")),
        }
    }
}

/// What these ends come down to, each with its rank of so many: a refusal, or what broke.
pub(super) fn verdict(n_ranks: u64, ends: impl Iterator<Item = (u64, End)>) -> Report {
    let Some((rank, end)) = ends.min_by_key(|(rank, end)| (end.distance(), *rank)) else {
        return Report::Broken { message: "no trainer was started".into(), lost: None };
    };
    match (n_ranks, end) {
        (1, End::Broken { message, .. }) => Report::Broken { message, lost: None },
        (1, end) => end.told("the trainer"),
        (n, end) => end.told(&format!("rank {rank} of {n}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(message: &str, lost: Option<u64>) -> End {
        End::Broken { message: message.into(), lost }
    }

    fn message(n_ranks: u64, ends: Vec<(u64, End)>) -> String {
        match verdict(n_ranks, ends.into_iter()) {
            Report::Broken { message, .. } => message,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_rank_that_ended_the_others_is_told_with_its_cause() {
        let follows = |rank| broken("rank 2 at 10.0.0.5:4242 closed its connection", Some(rank));
        let others = [(0, follows(2)), (1, follows(2)), (3, follows(2))];
        let and = |end| others.iter().cloned().chain([(2, end)]).collect();
        assert_eq!(message(4, and(End::Died("signal: 9 (SIGKILL)".into()))), "rank 2 of 4 died: signal: 9 (SIGKILL)");
        assert_eq!(message(4, and(broken("the disk is full", None))), "rank 2 of 4: the disk is full");
        // One that is stopped has no end; the others know.
        assert_eq!(message(4, others.to_vec()), "rank 2 at 10.0.0.5:4242 closed its connection");
        let silent = vec![(0, End::Silent(Duration::from_secs(30)))];
        assert_eq!(message(2, silent), "rank 0 of 2 said nothing for 30 s and was ended");
    }

    #[test]
    fn what_is_wrong_with_the_input_is_told_as_such_whoever_noticed() {
        let refused = Invalid::new("training_file", "it is empty");
        let ends =
            [(0, broken("rank 1 failed", Some(1))), (1, End::Refused(refused.clone())), (2, End::Died("9".into()))];
        assert_eq!(verdict(3, ends.into_iter()), Report::Refused { error: refused });
    }

    #[test]
    fn one_trainer_is_no_rank() {
        assert_eq!(message(1, vec![(0, End::Died("signal: 9".into()))]), "the trainer died: signal: 9");
        assert_eq!(message(1, vec![(0, broken("the disk is full", None))]), "the disk is full");
    }
}
