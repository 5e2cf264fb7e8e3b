//! How often a key may ask: a bucket for each key that fills steadily and from which every request takes one.
//!
//! Held in this process: two servers over one database each let as many through. Every answer to such a key says what is left.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::http::{HeaderMap, HeaderName, HeaderValue};

use crate::domain::KeyId;

const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit-requests");
const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining-requests");
const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset-requests");
/// Time in which a bucket fills.
const PERIOD: Duration = Duration::from_mins(1);

/// The buckets of all keys that have a limit.
#[derive(Debug, Clone, Default)]
pub struct Pace(Arc<Mutex<HashMap<KeyId, Bucket>>>);

/// What is left of a key's requests, and since when.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    left: f64,
    at: Instant,
}

/// Where a key stands after a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Standing {
    limit: u32,
    left: f64,
    /// False when the request came too early.
    pub allowed: bool,
}

impl Pace {
    /// Takes one request of a key that may make so many a minute.
    pub fn take(&self, key: &KeyId, limit: u32, now: Instant) -> Standing {
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bucket = buckets.entry(key.clone()).or_insert(Bucket { left: f64::from(limit), at: now });
        let filled = f64::from(limit) * now.saturating_duration_since(bucket.at).as_secs_f64() / PERIOD.as_secs_f64();
        let left = (bucket.left + filled).min(f64::from(limit));
        let allowed = left >= 1.0;
        *bucket = Bucket { left: if allowed { left - 1.0 } else { left }, at: now.max(bucket.at) };
        Standing { limit, left: bucket.left, allowed }
    }
}

impl Standing {
    /// Until there is room for so many requests.
    fn until(&self, room: f64) -> Duration {
        PERIOD.mul_f64((room - self.left).max(0.0) / f64::from(self.limit))
    }

    /// Until the next request is let through.
    pub fn wait(&self) -> Duration {
        self.until(1.0)
    }

    /// Tells it in an answer.
    pub fn tell(&self, headers: &mut HeaderMap) {
        headers.insert(LIMIT, self.limit.into());
        headers.insert(REMAINING, (self.left as u32).into());
        let reset = format!("{}s", self.until(f64::from(self.limit)).as_secs_f64().ceil());
        headers.extend(HeaderValue::from_str(&reset).ok().map(|reset| (RESET, reset)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_fills_steadily_and_no_further_than_its_rim() {
        let (pace, key, begin) = (Pace::default(), KeyId::random(), Instant::now());
        let after = |seconds: u64| pace.take(&key, 6, begin + Duration::from_secs(seconds));
        assert!((0..6).all(|_| after(0).allowed), "a full minute's worth at once");
        let early = after(0);
        assert_eq!((early.allowed, early.wait()), (false, Duration::from_secs(10)));
        assert_eq!((after(9).allowed, after(10).allowed, after(10).allowed), (false, true, false));
        let mut headers = HeaderMap::new();
        after(15).tell(&mut headers);
        let told = [LIMIT, REMAINING, RESET].map(|name| headers[name].to_str().expect("ASCII").to_owned());
        assert_eq!(told, ["6", "0", "55s"]);
        assert!((0..6).all(|_| after(10_000).allowed) && !after(10_000).allowed);
        // Another key has a bucket of its own; a clock that seems to go back fills nothing.
        assert!(pace.take(&KeyId::random(), 1, begin).allowed);
        assert!(!after(0).allowed);
    }
}
