//! The sequence of a step: random tokens, as one document or packed of many.

use std::ops::Range;

use super::random::Random;
use crate::{domain::attention_workspace::TILE_KEYS, engine::model::Batch};

/// Tokens of one sequence, and which of them belong together.
#[derive(Debug)]
pub(super) struct Sequence {
    ids: Vec<i32>,
    labels: Vec<i32>,
    positions: Vec<i32>,
    pub(super) documents: Vec<Range<u64>>,
}

impl Sequence {
    /// `tokens` of a vocabulary of `vocab`, as documents of `mean` tokens on average, or as one.
    pub(super) fn draw(random: &mut Random, tokens: u64, vocab: u64, mean: Option<u64>) -> Self {
        let documents = documents(random, tokens, mean);
        let ids: Vec<i32> = (0..tokens).map(|_| (random.next() % vocab) as i32).collect();
        let mut labels = [&ids[1..], &[-100]].concat();
        for document in &documents {
            labels[document.end as usize - 1] = -100;
        }
        let positions = documents.iter().flat_map(|document| 0..(document.end - document.start) as i32).collect();
        Self { ids, labels, positions, documents }
    }

    pub(super) fn batch(&self) -> Batch<'_> {
        Batch { ids: &self.ids, labels: &self.labels, positions: &self.positions, documents: &self.documents }
    }

    /// Tokens of each document.
    pub(super) fn lengths(&self) -> Vec<u64> {
        self.documents.iter().map(|document| document.end - document.start).collect()
    }
}

/// Documents of 1 to 2 `mean` tokens, every length as likely, rounded up to tiles as those of a job on a GPU; or one.
fn documents(random: &mut Random, tokens: u64, mean: Option<u64>) -> Vec<Range<u64>> {
    let (mut documents, mut start) = (Vec::new(), 0);
    while start < tokens {
        let length = mean.map_or(tokens, |mean| (1 + random.next() % (2 * mean)).next_multiple_of(TILE_KEYS));
        let end = tokens.min(start + length);
        documents.push(start..end);
        start = end;
    }
    documents
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_cover_the_sequence_and_none_learns_the_next_ones_first_token() {
        for mean in [None, Some(1), Some(100), Some(700), Some(100_000)] {
            let sequence = Sequence::draw(&mut Random(5), 5000, 97, mean);
            let documents = &sequence.documents;
            assert_eq!((documents[0].start, documents[documents.len() - 1].end), (0, 5000));
            assert!(documents.windows(2).all(|pair| pair[0].end == pair[1].start && pair[0].end % TILE_KEYS == 0));
            let unlearned = sequence.labels.iter().filter(|label| **label == -100).count();
            assert_eq!(unlearned, documents.len());
            for document in documents {
                let (start, end) = (document.start as usize, document.end as usize);
                assert_eq!(sequence.labels[end - 1], -100);
                assert!(sequence.positions[start..end].iter().copied().eq(0..(end - start) as i32));
            }
        }
    }

    #[test]
    fn documents_are_as_long_as_said_on_average() {
        let lengths = Sequence::draw(&mut Random(9), 1 << 20, 97, Some(2048)).lengths();
        let mean = lengths.iter().sum::<u64>() as f64 / lengths.len() as f64;
        assert!((1900.0..2300.0).contains(&mean), "{mean}");
    }
}
