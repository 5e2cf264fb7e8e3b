//! What ran beside what in a profiled step of several ranks: collectives under the work of the compute stream.
//!
//! The layer in the middle is shown, forward and backward. Where it begins and ends is read off the attention calls, of which every
//! layer has equally many.

use serde_json::{Value, json};

use crate::engine::backend::{
    Stream,
    cuda::{Part, Span},
};

/// Lines of the table: for the shown stretches a line for every interval, and how much of all collectives was hidden. `calls` are
/// attention's of a layer's forward; empty without collectives.
pub(super) fn table(spans: &[Span], layers: u64, calls: u64) -> Vec<Value> {
    if spans.iter().all(|span| span.part.is_some()) {
        return Vec::new();
    }
    let busy = busy(spans);
    let mut lines = Vec::new();
    let middle = layers / 2;
    for (what, part, nth) in [
        ("forward", Part::AttentionForward, middle),
        // Backward comes to the last layer first.
        ("backward", Part::AttentionBackward, layers - 1 - middle),
    ] {
        let starts: Vec<f64> = spans.iter().filter(|span| span.part == Some(part)).map(|span| span.start).collect();
        let start_of = |layer: u64| starts.get((layer * calls) as usize).copied();
        if let (Some(start), Some(end)) = (start_of(nth), start_of(nth + 1)) {
            lines.extend(stretch(what, middle, (start, end), spans, &busy));
        }
    }
    for stream in [Stream::Exchange, Stream::Gather] {
        let (all, hidden) =
            spans.iter().filter(|span| span.stream == stream).fold((0.0, 0.0), |(all, hidden), span| {
                (all + span.end - span.start, hidden + covered(&busy, span.start, span.end))
            });
        lines.push(json!({ "collectives": name(stream), "seconds": all, "hidden_seconds": hidden }));
    }
    lines
}

/// A line for each interval of a stretch, in order of their starts.
fn stretch(what: &str, layer: u64, (start, end): (f64, f64), spans: &[Span], busy: &[(f64, f64)]) -> Vec<Value> {
    let mut rows: Vec<(f64, f64, Stream, &str)> = Vec::new();
    for span in spans.iter().filter(|span| span.start >= start && span.start < end) {
        let label = span.part.map_or("", label);
        // Neighbours of a kind are one interval.
        match rows.iter_mut().rev().find(|(_, _, stream, _)| *stream == span.stream) {
            Some((_, to, _, last)) if *last == label && span.part.is_some() => *to = span.end,
            _ => rows.push((span.start, span.end, span.stream, label)),
        }
    }
    rows.sort_by(|a, b| a.0.total_cmp(&b.0));
    let milliseconds = |seconds: f64| ((seconds - start) * 1e5).round() / 1e2;
    let line = |(from, to, stream, label): (f64, f64, Stream, &str)| {
        let hidden = (stream != Stream::Compute).then(|| (covered(busy, from, to) / (to - from) * 1e2).round() / 1e2);
        json!({
            "timeline": what, "layer": layer, "ms": [milliseconds(from), milliseconds(to)], "stream": name(stream),
            "what": label, "hidden": hidden,
        })
    };
    rows.into_iter().map(line).collect()
}

fn name(stream: Stream) -> &'static str {
    match stream {
        Stream::Compute => "compute",
        Stream::Exchange => "exchange",
        Stream::Gather => "gather",
        Stream::Down | Stream::Up => "link",
    }
}

fn label(part: Part) -> &'static str {
    match part {
        Part::AttentionForward => "attention",
        Part::AttentionBackward => "attention backward",
        Part::MatmulForward | Part::MatmulDx | Part::MatmulDw => "products",
        Part::Wait => "wait",
        _ => "other",
    }
}

/// Intervals in which the compute stream works, in order.
fn busy(spans: &[Span]) -> Vec<(f64, f64)> {
    let works = |span: &&Span| span.part.is_some_and(|part| part != Part::Wait);
    spans.iter().filter(works).map(|span| (span.start, span.end)).collect()
}

/// Seconds of `from..to` in which it works.
fn covered(busy: &[(f64, f64)], from: f64, to: f64) -> f64 {
    let first = busy.partition_point(|(_, end)| *end <= from);
    let within = busy[first..].iter().take_while(|(start, _)| *start < to);
    within.map(|(start, end)| end.min(to) - start.max(from)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(part: Option<Part>, stream: Stream, start: f64, end: f64) -> Span {
        Span { stream, part, start, end }
    }

    #[test]
    fn a_layer_is_cut_out_and_what_is_hidden_is_counted() {
        let compute = |part, start, end| span(Some(part), Stream::Compute, start, end);
        let exchange = |start, end| span(None, Stream::Exchange, start, end);
        // Two layers of two calls each, a second a call; the second layer is shown, its exchange half hidden.
        let mut spans = Vec::new();
        for part in [Part::AttentionForward, Part::AttentionBackward] {
            let at = if part == Part::AttentionForward { 0.0 } else { 10.0 };
            spans.extend((0..5).map(|i| compute(part, at + f64::from(i), at + f64::from(i) + 0.5)));
            spans.push(compute(Part::Wait, at + 2.5, at + 3.0));
            spans.push(exchange(at + 2.25, at + 2.75));
        }
        let lines = table(&spans, 2, 2);
        let shown = |what: &str| lines.iter().filter(|line| line["timeline"] == what).cloned().collect::<Vec<_>>();
        let forward = shown("forward");
        assert_eq!(forward[0]["ms"], json!([0.0, 1500.0]), "two calls of attention, neighbours");
        assert_eq!(forward[1]["stream"], "exchange");
        assert_eq!((&forward[1]["ms"], &forward[1]["hidden"]), (&json!([250.0, 750.0]), &json!(0.5)));
        assert!(!shown("backward").is_empty());
        let sums = lines.iter().find(|line| line["collectives"] == "exchange").expect("a line for exchanges");
        assert_eq!((sums["seconds"].as_f64(), sums["hidden_seconds"].as_f64()), (Some(1.0), Some(0.5)));
        assert!(table(&spans[..3], 2, 2).is_empty(), "one rank has no table");
    }
}
