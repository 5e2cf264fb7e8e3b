//! The first examples of a data set as the model will have them: pieces of text, trained or not, with their tokens counted.

use super::{Corpus, Token, Tokenizer};
use crate::{
    domain::progress::{PreviewedExample, PreviewedSpan},
    engine::Result,
};

/// Examples shown, spans of each, and tokens shown at the begin and at the end of a span.
const EXAMPLES: usize = 3;
const SPANS: usize = 24;
const HEAD: usize = 48;
const TAIL: usize = 16;

/// Shows the first examples.
pub fn preview(corpus: &Corpus, tokenizer: &Tokenizer) -> Result<Vec<PreviewedExample>> {
    let shown = 0..corpus.n_documents().min(EXAMPLES);
    shown.map(|i| example(corpus.name(i), corpus.document(i), tokenizer)).collect()
}

fn example(origin: String, tokens: &[Token], tokenizer: &Tokenizer) -> Result<PreviewedExample> {
    let spans: Vec<&[Token]> = tokens.chunk_by(|a, b| a.is_trained() == b.is_trained()).collect();
    let trained = |tokens: &[Token]| tokens.iter().filter(|token| token.is_trained()).count() as u64;
    Ok(PreviewedExample {
        origin,
        tokens: tokens.len() as u64,
        trained_tokens: trained(tokens),
        more_spans: spans.len().saturating_sub(SPANS) as u64,
        spans: spans.into_iter().take(SPANS).map(|tokens| span(tokens, tokenizer)).collect::<Result<_>>()?,
    })
}

fn span(tokens: &[Token], tokenizer: &Tokenizer) -> Result<PreviewedSpan> {
    let text = |tokens: &[Token]| tokenizer.text(&tokens.iter().map(|token| token.id() as u32).collect::<Vec<_>>());
    let whole = tokens.len() <= HEAD + TAIL;
    Ok(PreviewedSpan {
        trained: tokens.first().is_some_and(|token| token.is_trained()),
        tokens: tokens.len() as u64,
        text: text(if whole { tokens } else { &tokens[..HEAD] })?,
        end: if whole { None } else { Some(text(&tokens[tokens.len() - TAIL..])?) },
    })
}
