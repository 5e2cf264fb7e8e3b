//! Attention heads, and which of them each rank of a sequence-parallel group computes.

use std::ops::Range;

/// Shape of one attention call: `n_heads` query heads share `n_kv_heads` key-value heads of `head_dim`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    pub n_heads: u64,
    pub n_kv_heads: u64,
    pub head_dim: u64,
}

/// Query heads of one rank that share key-value heads evenly, as attention wants them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadRun {
    pub heads: Range<u64>,
    pub kv_heads: Range<u64>,
}

impl HeadRun {
    pub fn n_heads(&self) -> u64 {
        self.heads.end - self.heads.start
    }

    pub fn n_kv_heads(&self) -> u64 {
        self.kv_heads.end - self.kv_heads.start
    }
}

/// Heads of rank `rank` when `n_heads` query heads, which share `n_kv_heads` key-value heads, are dealt to `n_ranks` ranks in
/// equal runs. Mostly one run; more where the ranks' cuts lie unevenly in the groups that share a key-value head.
///
/// # Panics
/// When the ranks do not divide the query heads: the planner refuses such a group.
pub fn of_rank(n_heads: u64, n_kv_heads: u64, n_ranks: u64, rank: u64) -> Vec<HeadRun> {
    assert!(n_heads.is_multiple_of(n_ranks), "{n_ranks} ranks for {n_heads} heads");
    let (mine, group) = (n_heads / n_ranks, n_heads / n_kv_heads);
    let (first, end) = (rank * mine, (rank + 1) * mine);
    let mut runs: Vec<HeadRun> = Vec::new();
    for kv_head in first / group..end.div_ceil(group) {
        let heads = first.max(kv_head * group)..end.min((kv_head + 1) * group);
        match runs.last_mut() {
            Some(run)
                if run.n_heads() / run.n_kv_heads() == heads.end - heads.start
                    && run.n_heads() % run.n_kv_heads() == 0 =>
            {
                run.heads.end = heads.end;
                run.kv_heads.end = kv_head + 1;
            }
            _ => runs.push(HeadRun { heads, kv_heads: kv_head..kv_head + 1 }),
        }
    }
    runs
}

/// Group sizes that deal `n_heads` query heads evenly, ascending.
pub fn group_sizes(n_heads: u64) -> Vec<u64> {
    (1..=n_heads).filter(|n| n_heads.is_multiple_of(*n)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_head_is_dealt_once_with_its_own_keys() {
        for (n_heads, n_kv_heads) in [(32, 8), (6, 2), (12, 4), (28, 4), (40, 8), (9, 3), (8, 8), (8, 1)] {
            let group = n_heads / n_kv_heads;
            for n_ranks in group_sizes(n_heads) {
                let mut next = 0;
                for run in (0..n_ranks).flat_map(|rank| of_rank(n_heads, n_kv_heads, n_ranks, rank)) {
                    assert_eq!(run.heads.start, next);
                    next = run.heads.end;
                    let shared = run.n_heads() / run.n_kv_heads();
                    for (i, head) in run.heads.clone().enumerate() {
                        assert_eq!(
                            run.kv_heads.start + i as u64 / shared,
                            head / group,
                            "{n_heads} {n_kv_heads} {n_ranks}"
                        );
                    }
                }
                assert_eq!(next, n_heads);
            }
        }
        assert_eq!(of_rank(32, 8, 2, 1), [HeadRun { heads: 16..32, kv_heads: 4..8 }]);
        assert_eq!(of_rank(28, 4, 7, 1).len(), 2);
    }
}
