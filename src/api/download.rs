//! Answers that are bytes: whole, a range of them, or the word that the client has them already.
//!
//! HTTP semantics of RFC 9110: strong ETags (13.1.1 to 13.1.5), one range (14.2); several ranges at once and ranges in
//! other units are ignored, as the RFC allows, and the whole is sent.

use std::ops::Range;

use axum::{
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};

use super::ApiError;
use crate::store::weights::ByteStream;

/// Something to download.
#[derive(Debug, Clone)]
pub struct Download {
    pub bytes: u64,
    /// Digest of the content; two contents never share it.
    pub tag: String,
    pub content_type: &'static str,
    /// Name to save it under.
    pub filename: String,
}

/// What the headers of a request ask for.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Whole,
    Part(Range<u64>),
    /// The client's copy is current.
    NotModified,
    /// The client insists on another version.
    Changed,
    /// No byte of the range exists.
    Outside,
}

impl Download {
    /// Answers a GET or HEAD. `open` makes the stream of a range; it is not called where no byte is wanted, and a stream
    /// is only read as fast as the client takes it.
    pub async fn answer<F, S>(&self, headers: &HeaderMap, open: F) -> Result<Response, ApiError>
    where
        F: FnOnce(Range<u64>) -> S,
        S: Future<Output = Result<ByteStream, ApiError>>,
    {
        let mut response = match self.wanted(headers) {
            Wanted::Changed => return Err(ApiError::precondition()),
            Wanted::NotModified => StatusCode::NOT_MODIFIED.into_response(),
            Wanted::Outside => {
                let mut response = ApiError::range(self.bytes).into_response();
                set(response.headers_mut(), header::CONTENT_RANGE, &format!("bytes */{}", self.bytes));
                return Ok(response);
            }
            Wanted::Whole => self.body(StatusCode::OK, 0..self.bytes, open).await?,
            Wanted::Part(range) => {
                let shown = format!("bytes {}-{}/{}", range.start, range.end - 1, self.bytes);
                let mut response = self.body(StatusCode::PARTIAL_CONTENT, range, open).await?;
                set(response.headers_mut(), header::CONTENT_RANGE, &shown);
                response
            }
        };
        let headers = response.headers_mut();
        set(headers, header::ETAG, &self.etag());
        set(headers, header::ACCEPT_RANGES, "bytes");
        Ok(response)
    }

    async fn body<F, S>(&self, status: StatusCode, range: Range<u64>, open: F) -> Result<Response, ApiError>
    where
        F: FnOnce(Range<u64>) -> S,
        S: Future<Output = Result<ByteStream, ApiError>>,
    {
        let length = range.end - range.start;
        let mut response = (status, Body::from_stream(open(range).await?)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_LENGTH, length.into());
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        set(headers, header::CONTENT_DISPOSITION, &format!("attachment; filename=\"{}\"", plain(&self.filename)));
        Ok(response)
    }

    fn etag(&self) -> String {
        format!("\"{}\"", self.tag)
    }

    fn wanted(&self, headers: &HeaderMap) -> Wanted {
        let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        let etag = self.etag();
        let lists = |value: &str| value.split(',').map(str::trim).any(|tag| tag == "*" || tag == etag);
        if text(header::IF_MATCH).is_some_and(|tags| !lists(tags)) {
            return Wanted::Changed;
        }
        // Comparison for If-None-Match is weak: a proxy may have marked our tag so.
        let weak = |value: &str| value.split(',').any(|tag| tag.trim().strip_prefix("W/") == Some(&etag));
        if text(header::IF_NONE_MATCH).is_some_and(|tags| lists(tags) || weak(tags)) {
            return Wanted::NotModified;
        }
        let Some(range) = text(header::RANGE) else { return Wanted::Whole };
        if text(header::IF_RANGE).is_some_and(|tag| tag.trim() != etag) {
            return Wanted::Whole;
        }
        parse_range(range, self.bytes)
    }
}

/// Reads `bytes=first-last`, `bytes=first-` and `bytes=-length` against content of `bytes` bytes.
fn parse_range(value: &str, bytes: u64) -> Wanted {
    let Some((unit, spec)) = value.split_once('=') else { return Wanted::Whole };
    let Some((first, last)) = spec.trim().split_once('-') else { return Wanted::Whole };
    if !unit.trim().eq_ignore_ascii_case("bytes") || spec.contains(',') {
        return Wanted::Whole;
    }
    let (first, last) = (number(first.trim()), number(last.trim()));
    match (first, last) {
        (Number::None, Number::Of(length)) => match length.min(bytes) {
            0 => Wanted::Outside,
            length => Wanted::Part(bytes - length..bytes),
        },
        (Number::Of(first), _) if first >= bytes && last != Number::Bad => Wanted::Outside,
        (Number::Of(first), Number::None) => Wanted::Part(first..bytes),
        (Number::Of(first), Number::Of(last)) if last >= first => {
            Wanted::Part(first..last.saturating_add(1).min(bytes))
        }
        _ => Wanted::Whole,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Number {
    None,
    Of(u64),
    Bad,
}

fn number(text: &str) -> Number {
    match text {
        "" => Number::None,
        // More digits than 64 bits hold is beyond any content; saturating says so.
        text if text.bytes().all(|b| b.is_ascii_digit()) => Number::Of(text.parse().unwrap_or(u64::MAX)),
        _ => Number::Bad,
    }
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// A file name fit for a quoted header value.
fn plain(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_graphic() && !"\"\\".contains(c) || c == ' ' { c } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_as_the_rfc_writes_them() {
        let part = |a, b| Wanted::Part(a..b);
        for (header, bytes, expected) in [
            ("bytes=0-499", 10_000, part(0, 500)),
            ("bytes=9500-", 10_000, part(9500, 10_000)),
            ("bytes=-500", 10_000, part(9500, 10_000)),
            ("bytes=-20000", 10_000, part(0, 10_000)),
            ("bytes=0-99999", 10_000, part(0, 10_000)),
            ("bytes=0-0", 1, part(0, 1)),
            ("bytes=10000-", 10_000, Wanted::Outside),
            ("bytes=0-", 0, Wanted::Outside),
            ("bytes=-0", 10_000, Wanted::Outside),
            ("bytes=-1", 0, Wanted::Outside),
            ("bytes=99999999999999999999-", 10, Wanted::Outside),
            ("bytes=0-99999999999999999999", 10, part(0, 10)),
            ("bytes=5-4", 10, Wanted::Whole),
            ("bytes=0-1,3-4", 10, Wanted::Whole),
            ("lines=0-1", 10, Wanted::Whole),
            ("bytes=a-b", 10, Wanted::Whole),
            ("bytes=-", 10, Wanted::Whole),
            ("bytes=20-x", 10, Wanted::Whole),
            ("bytes", 10, Wanted::Whole),
            ("bytes=+1-2", 10, Wanted::Whole),
        ] {
            assert_eq!(parse_range(header, bytes), expected, "{header} of {bytes}");
        }
    }

    proptest! {
        #[test]
        fn a_part_is_never_empty_and_never_outside(value in "(bytes=)?[0-9]{0,22}-?[0-9]{0,22}", bytes in 0u64..1000) {
            if let Wanted::Part(range) = parse_range(&value, bytes) {
                prop_assert!(range.start < range.end && range.end <= bytes, "{value} of {bytes} gave {range:?}");
            }
        }
    }
}
