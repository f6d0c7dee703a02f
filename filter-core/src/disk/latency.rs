//! How long guest I/Os took, counted in buckets that grow with the latency.
//!
//! Invariant: counting takes no lock and two relaxed additions; nobody resets a counter, who wants
//! those of a span takes the difference of two looks. Counters go round after 2^32 I/Os, differences
//! do not mind.

use crate::lane::sync::{AtomicU32, Ordering::Relaxed};
use alloc::boxed::Box;
use alloc::vec::Vec;

/// Buckets for a doubling of the latency: each is at most 1/32 (3 %) wide.
const PER_OCTAVE_BITS: u32 = 5;
/// Latencies below 2^10 ns (1 us) share a bucket.
const FIRST_BIT: u32 = 10;
/// Latencies of 2^35 ns (34 s) and more share the last.
const LAST_BIT: u32 = 35;
/// Number of buckets.
pub const BUCKETS: usize = ((LAST_BIT - FIRST_BIT) << PER_OCTAVE_BITS) as usize + 1;

/// The bucket of a latency.
pub fn bucket_of(latency_ns: u64) -> usize {
    let capped = latency_ns.clamp(1 << FIRST_BIT, (1 << LAST_BIT) - 1);
    let bit = capped.ilog2();
    let within = (capped >> (bit - PER_OCTAVE_BITS)) & ((1 << PER_OCTAVE_BITS) - 1);
    let octave = u64::from(bit - FIRST_BIT) << PER_OCTAVE_BITS;
    (octave + within) as usize + usize::from(latency_ns >= 1 << LAST_BIT)
}

/// The shortest latency of a bucket, in ns.
pub fn lowest_ns(bucket: usize) -> u64 {
    let octave = bucket as u32 >> PER_OCTAVE_BITS;
    let within = bucket as u64 & ((1 << PER_OCTAVE_BITS) - 1);
    let bit = octave + FIRST_BIT;
    (1 << bit) + (within << (bit - PER_OCTAVE_BITS))
}

/// The counters that I/O paths add to.
#[derive(Debug)]
pub struct Latencies {
    count: AtomicU32,
    buckets: Box<[AtomicU32]>,
}

impl Default for Latencies {
    fn default() -> Self {
        let buckets: Vec<_> = (0..BUCKETS).map(|_| AtomicU32::new(0)).collect();
        Self {
            count: AtomicU32::new(0),
            buckets: buckets.into_boxed_slice(),
        }
    }
}

impl Latencies {
    /// Counts an I/O. From any thread.
    pub fn add(&self, latency_ns: u64) {
        if let Some(bucket) = self.buckets.get(bucket_of(latency_ns)) {
            bucket.fetch_add(1, Relaxed); // a figure; differences of looks may be an I/O off
        }
        self.count.fetch_add(1, Relaxed); // as above
    }

    /// I/Os counted so far, modulo 2^32.
    pub fn count(&self) -> u32 {
        self.count.load(Relaxed) // a figure
    }

    /// A look at the counters.
    fn look(&self, into: &mut [u32]) {
        for (to, from) in into.iter_mut().zip(&self.buckets) {
            *to = from.load(Relaxed); // a figure
        }
    }
}

/// A distribution of latencies.
#[derive(Clone, Debug)]
pub struct Histogram {
    buckets: Vec<u32>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: alloc::vec![0; BUCKETS],
            total: 0,
        }
    }
}

impl Histogram {
    /// I/Os in it.
    pub const fn total(&self) -> u64 {
        self.total
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.buckets.fill(0);
        self.total = 0;
    }

    /// Halves every count: what is old counts for less.
    pub fn halve(&mut self) {
        self.total = 0;
        for bucket in &mut self.buckets {
            *bucket /= 2;
            self.total += u64::from(*bucket);
        }
    }

    /// Adds another one.
    pub fn merge(&mut self, other: &Self) {
        for (to, from) in self.buckets.iter_mut().zip(&other.buckets) {
            *to = to.saturating_add(*from);
        }
        self.total += other.total;
    }

    /// The bucket that holds the I/O below which `permille` of 1000 lie; `None` if it is empty.
    pub fn quantile(&self, permille: u64) -> Option<usize> {
        let above = (self.total * (1000 - permille) / 1000).min(self.total.saturating_sub(1));
        let mut passed = 0;
        self.buckets.iter().rposition(|count| {
            passed += u64::from(*count);
            passed > above
        })
    }

    /// I/Os in buckets above this one.
    pub fn above(&self, bucket: usize) -> u64 {
        self.buckets
            .iter()
            .skip(bucket + 1)
            .map(|c| u64::from(*c))
            .sum()
    }
}

/// What was counted since a moment.
#[derive(Debug)]
pub struct Span {
    from: Vec<u32>,
    now: Vec<u32>,
    since: Histogram,
}

impl Default for Span {
    fn default() -> Self {
        Self {
            from: alloc::vec![0; BUCKETS],
            now: alloc::vec![0; BUCKETS],
            since: Histogram::default(),
        }
    }
}

impl Span {
    /// Begins now.
    pub fn begin(&mut self, latencies: &Latencies) {
        latencies.look(&mut self.from);
        self.since.clear();
    }

    /// What was counted since it began.
    pub fn look(&mut self, latencies: &Latencies) -> &Histogram {
        latencies.look(&mut self.now);
        self.since.total = 0;
        for ((to, now), from) in self.since.buckets.iter_mut().zip(&self.now).zip(&self.from) {
            *to = now.wrapping_sub(*from);
            self.since.total += u64::from(*to);
        }
        &self.since
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_narrow_and_in_order() {
        let mut last = 0;
        let mut ns = 1u64 << FIRST_BIT;
        while ns < 1 << LAST_BIT {
            let bucket = bucket_of(ns);
            assert!(bucket >= last && bucket < BUCKETS, "{ns}");
            let lowest = lowest_ns(bucket);
            assert!(
                lowest <= ns && ns - lowest <= lowest / 32,
                "{ns} from {lowest}"
            );
            assert_eq!(bucket_of(lowest), bucket);
            last = bucket;
            ns += ns / 100 + 1;
        }
        assert_eq!(bucket_of(0), 0);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn a_span_sees_what_came_since_it_began() {
        let latencies = Latencies::default();
        latencies.add(5_000_000);
        let mut span = Span::default();
        span.begin(&latencies);
        for i in 1..=1000 {
            latencies.add(i * 10_000);
        }
        let seen = span.look(&latencies).clone();
        assert_eq!(seen.total(), 1000);
        assert_eq!(seen.quantile(990), Some(bucket_of(9_900_000)));
        assert_eq!(seen.quantile(0), Some(bucket_of(10_000)));
        assert!((70..=110).contains(&seen.above(bucket_of(9_000_000))));
        assert_eq!(latencies.count(), 1001);
        let mut sum = seen.clone();
        sum.merge(&seen);
        assert_eq!((sum.total(), sum.quantile(990)), (2000, seen.quantile(990)));
        sum.halve();
        assert_eq!(sum.total(), 1000);
        sum.clear();
        assert_eq!((sum.total(), sum.quantile(990)), (0, None));
    }
}
