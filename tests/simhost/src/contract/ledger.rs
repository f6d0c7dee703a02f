//! What the filter has taken for one disk: memory, timers, work, requests.
//!
//! Invariant: each thing is counted from when the filter asked for it until it was given back or has
//! begun to run; what runs is counted apart. At close nothing may wait, and what runs is waited for.

use super::context::{self, Context};
use parking_lot::{Condvar, Mutex};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// What can be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A timer.
    Timer,
    /// An item of work.
    Work,
    /// An I/O of the filter's own.
    Request,
}

impl Kind {
    /// The context in which its function runs.
    const fn context(self) -> Context {
        match self {
            Self::Work => Context::Work,
            Self::Timer | Self::Request => Context::Callback,
        }
    }
}

/// How long a function of the filter that has begun may take to end, at close.
const END_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct Counts {
    heap: HashMap<usize, u64>,
    waiting: HashMap<Kind, u64>,
    running: u64,
}

/// The account of one disk.
#[derive(Debug, Default)]
pub struct Ledger {
    counts: Mutex<Counts>,
    ended: Condvar,
}

impl Ledger {
    /// Memory was taken.
    pub fn allocated(&self, address: usize, len_bytes: u64) {
        self.counts.lock().heap.insert(address, len_bytes);
    }

    /// Memory is given back; `false`: it was not taken here.
    pub fn freed(&self, address: usize) -> bool {
        self.counts.lock().heap.remove(&address).is_some()
    }

    /// Something was asked for.
    pub fn taken(&self, kind: Kind) {
        *self.counts.lock().waiting.entry(kind).or_default() += 1;
    }

    /// It will not run: it was cancelled, or could not be had after all.
    pub fn given_back(&self, kind: Kind) {
        if let Some(waiting) = self.counts.lock().waiting.get_mut(&kind) {
            *waiting -= 1;
        }
    }

    /// Runs the filter's function for it.
    pub fn run(&self, kind: Kind, function: impl FnOnce()) {
        {
            let mut counts = self.counts.lock();
            counts.running += 1;
            if let Some(waiting) = counts.waiting.get_mut(&kind) {
                *waiting -= 1;
            }
        }
        let entered = context::enter(kind.context());
        function();
        drop(entered);
        self.counts.lock().running -= 1;
        self.ended.notify_all();
    }

    /// What is left after close, each in words for the log. Waits for what has begun to run: it may be
    /// in its last lines, after it told the filter that it is over.
    pub fn left_behind(&self) -> Vec<String> {
        let deadline = Instant::now() + END_LIMIT;
        let mut counts = self.counts.lock();
        while counts.running > 0 {
            if self.ended.wait_until(&mut counts, deadline).timed_out() {
                break;
            }
        }
        let mut left = Vec::new();
        if counts.running > 0 {
            left.push(format!(
                "{} functions still run after close",
                counts.running
            ));
        }
        let heap_bytes: u64 = counts.heap.values().sum();
        if heap_bytes > 0 {
            let blocks = counts.heap.len();
            left.push(format!(
                "{blocks} blocks of memory ({heap_bytes} bytes) are left after close"
            ));
        }
        for (kind, what) in [
            (Kind::Timer, "timers run"),
            (Kind::Work, "items of work wait"),
            (Kind::Request, "requests are in flight"),
        ] {
            let waiting = counts.waiting.get(&kind).copied().unwrap_or_default();
            if waiting > 0 {
                left.push(format!("{waiting} {what} after close"));
            }
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_named() {
        let ledger = Ledger::default();
        assert!(ledger.left_behind().is_empty());
        ledger.allocated(16, 100);
        ledger.taken(Kind::Timer);
        ledger.taken(Kind::Work);
        ledger.taken(Kind::Request);
        assert_eq!(ledger.left_behind().len(), 4);
        assert!(ledger.freed(16));
        assert!(!ledger.freed(16), "freed twice");
        ledger.given_back(Kind::Timer);
        ledger.run(Kind::Work, || assert_eq!(context::current(), Context::Work));
        ledger.run(Kind::Request, || assert!(!context::may_block()));
        assert!(ledger.left_behind().is_empty());
    }
}
