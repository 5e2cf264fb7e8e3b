//! In which order the steps of a layer's chunks are queued.
//!
//! With one rank a chunk goes through its steps before the next begins. Ranks that share a sequence exchange heads between the
//! steps (`alst/ulysses.rs`), and meanwhile work on the chunks beside it. Every exchange is sent as soon as what it moves is made, and
//! waited for where it is used, which is at least one of the large operations later:
//!
//! | exchange of chunk c, in the order of the walk | sent after | runs beside | waited for by |
//! |---|---|---|---|
//! | forward: q, k, v | project c | attend c-1, finish c-2 | attend c |
//! | forward: o | attend c | finish c-1, project c+2 | finish c |
//! | backward: q, where it is not kept | project c | feed c-1, finish c-2 | attend c |
//! | backward: o | attend c | back c-1, project c+1 | feed c |
//! | backward: gradient of o | feed c | finish c-1, attend c+1 | back c |
//! | backward: gradients of q, k, v | back c | project c+2, feed c+1 | finish c |
//!
//! At the ends of a walk there is no chunk beside: there an exchange may wait in the open. Each step takes the chunks in the same order
//! either way, so sums are made in the same order.

use crate::engine::Result;

/// A chunk's steps of a layer's forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Forward {
    /// Queries, keys and values.
    Project,
    Attend,
    /// From attention's output on.
    Finish,
}

/// Those of its backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Backward {
    /// Queries again.
    Project,
    /// Attention's output again.
    Attend,
    /// Back through the feed-forward, to the gradient of attention's output.
    Feed,
    /// Back through attention.
    Back,
    /// Back through the projection.
    Finish,
}

/// Steps in the order of a turn, each for the chunk that is so many ahead of the one that is finished.
type Order<S> = [(S, usize)];

/// Order of a forward; `apart` where ranks exchange heads.
pub(super) fn forward(apart: bool) -> &'static Order<Forward> {
    use Forward::{Attend, Finish, Project};
    if apart { &[(Project, 2), (Attend, 1), (Finish, 0)] } else { &[(Project, 0), (Attend, 0), (Finish, 0)] }
}

/// Order of a backward.
pub(super) fn backward(apart: bool) -> &'static Order<Backward> {
    use Backward::{Attend, Back, Feed, Finish, Project};
    if apart {
        &[(Attend, 1), (Back, 0), (Project, 2), (Feed, 1), (Finish, 0)]
    } else {
        &[(Project, 0), (Attend, 0), (Feed, 0), (Back, 0), (Finish, 0)]
    }
}

/// Takes every chunk through every step.
pub(super) fn walk<S: Copy, T>(chunks: &[T], order: &Order<S>, mut step: impl FnMut(S, &T) -> Result) -> Result {
    let furthest = order.iter().map(|(_, ahead)| *ahead).max().unwrap_or(0);
    for turn in 0..chunks.len() + furthest {
        for (what, ahead) in order {
            if let Some(chunk) = (turn + ahead).checked_sub(furthest).and_then(|i| chunks.get(i)) {
                step(*what, chunk)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walked<S: Copy>(chunks: usize, order: &Order<S>) -> Vec<(S, usize)> {
        let chunks: Vec<usize> = (0..chunks).collect();
        let mut taken = Vec::new();
        walk(&chunks, order, |step, chunk| {
            taken.push((step, *chunk));
            Ok(())
        })
        .expect("nothing fails");
        taken
    }

    #[test]
    fn one_rank_takes_chunk_after_chunk() {
        use Forward::{Attend, Finish, Project};
        let expected = [(Project, 0), (Attend, 0), (Finish, 0), (Project, 1), (Attend, 1), (Finish, 1)];
        assert_eq!(walked(2, forward(false)), expected);
    }

    #[test]
    fn every_step_takes_every_chunk_in_order_and_after_the_step_before() {
        use Backward::{Attend, Back, Feed, Finish, Project};
        for n in 0..6 {
            for apart in [false, true] {
                let taken = walked(n, backward(apart));
                assert_eq!(taken.len(), 5 * n);
                let place = |step, chunk| taken.iter().position(|t| *t == (step, chunk)).expect("it is taken");
                for chunk in 0..n {
                    for (before, after) in [(Project, Attend), (Attend, Feed), (Feed, Back), (Back, Finish)] {
                        assert!(place(before, chunk) < place(after, chunk));
                    }
                    for step in [Project, Attend, Feed, Back, Finish] {
                        assert!(chunk == 0 || place(step, chunk - 1) < place(step, chunk));
                    }
                    // Two chunks have queries and attention's outputs at once, in two buffers of each.
                    assert!(chunk < 2 || place(Back, chunk - 2) < place(Project, chunk));
                }
            }
        }
    }
}
