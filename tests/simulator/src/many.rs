//! Many seeds, on several threads.
//!
//! Invariant: the first seed that fails is the same however many threads there are: a seed below it is
//! always run to its end.

use crate::kinds::KINDS;
use crate::run::{Outcome, hours, seed};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// What many seeds came to.
#[derive(Clone, Debug, Default)]
pub struct Total {
    /// How many were run.
    pub seeds: u64,
    /// Simulated time, in ns.
    pub simulated_ns: u64,
    /// Events that happened.
    pub events: u64,
    /// The longest time that a guest's write was held, in ns.
    pub longest_held_ns: u64,
    /// Counts of what happened.
    pub counts: BTreeMap<&'static str, u64>,
    /// The first seed that failed.
    pub failed: Option<Outcome>,
    /// How long it took.
    pub took: Duration,
}

impl Total {
    fn add(&mut self, outcome: Outcome) {
        self.seeds += 1;
        self.simulated_ns += outcome.simulated_ns;
        self.events += outcome.events;
        self.longest_held_ns = self.longest_held_ns.max(outcome.longest_held_ns);
        for (what, count) in &outcome.counts {
            *self.counts.entry(what).or_default() += count;
        }
        let first = self.failed.as_ref().is_none_or(|f| outcome.seed < f.seed);
        if outcome.violation.is_some() && first {
            self.failed = Some(outcome);
        }
    }

    /// Kinds that never happened.
    pub fn never(&self) -> Vec<&'static str> {
        let never = |kind: &&&str| self.counts.get(**kind).copied().unwrap_or(0) == 0;
        KINDS.iter().filter(never).copied().collect()
    }

    fn sum(&self, prefixes: &[&str]) -> u64 {
        let any = |what: &str| prefixes.iter().any(|prefix| what.starts_with(prefix));
        let mine = self.counts.iter().filter(|(what, _)| any(what));
        mine.map(|(_, count)| count).sum()
    }
}

impl fmt::Display for Total {
    /// One line: how much was simulated, how much happened in it, how long it took.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.took.as_secs_f64();
        write!(
            f,
            "{} seeds, {:.0} simulated hours, {} events, {} guest writes, {} strikes, {} single faults, {} cuts checked \
             in {seconds:.1} s ({:.1} seeds/s); longest hold {:.2} ms",
            self.seeds,
            hours(self.simulated_ns),
            self.events,
            self.sum(&["guest: write"]) - self.sum(&["guest: write held"]),
            self.sum(&["strike: "]),
            self.sum(&["fault: ", "store: "]),
            self.sum(&["cut: in the store"]),
            self.seeds as f64 / seconds,
            self.longest_held_ns as f64 / 1e6,
        )
    }
}

/// Runs these seeds until one fails, on so many threads (0: one a core). `told` hears of each one's end, and
/// the total so far.
pub fn run(seeds: Range<u64>, jobs: usize, trace: bool, told: impl Fn(&Total) + Sync) -> Total {
    let jobs = match jobs {
        _ if trace => 1,
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        jobs => jobs,
    };
    let began = Instant::now();
    let next = AtomicU64::new(seeds.start);
    let end = AtomicU64::new(seeds.end);
    let total = Mutex::new(Total::default());
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Relaxed); // only a number
                    if number >= end.load(Relaxed) {
                        return; // only a number, too
                    }
                    let outcome = seed(number, trace);
                    if outcome.violation.is_some() {
                        end.fetch_min(number, Relaxed); // as above
                    }
                    if let Ok(mut total) = total.lock() {
                        total.add(outcome);
                        total.took = began.elapsed();
                        told(&total);
                    }
                }
            });
        }
    });
    total.into_inner().unwrap_or_default()
}
