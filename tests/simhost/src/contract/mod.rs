//! The host's checks of the filter's side of the contract, at every call.
//!
//! Invariant: what a filter may not do is refused; the violation is logged with what and where, and
//! counted. A VM process that counted any ends with a failure (at once, if it is strict).
//!
//! | file | holds |
//! |---|---|
//! | this one | the count of violations, the figures |
//! | [`io`] | where an I/O stands, and which way it may go on |
//! | [`context`] | which calls of the filter this thread is in, and what they may call |
//! | [`ledger`] | what a disk of the filter has taken and must give back |

pub mod context;
pub mod io;
pub mod ledger;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A filter that holds an I/O for longer than it declared, and this beside, breaks the contract. Wide:
/// a busy machine delays timers, and the guest's own patience is a minute or so.
pub const HOLD_SLACK: Duration = Duration::from_secs(10);

/// How a strict process ends at a violation.
pub const EXIT_VIOLATION: i32 = 70;

/// Violations, and what was measured of the filter's behaviour.
#[derive(Debug, Default)]
pub struct Contract {
    violations: AtomicU64,
    strict: bool,
    /// I/Os that the filter deferred.
    pub deferred: AtomicU64,
    /// The longest deferral, in ns.
    pub deferred_max_ns: AtomicU64,
    /// Completions that the filter held.
    pub held: AtomicU64,
    /// The longest time that a completion was held, in ns.
    pub held_max_ns: AtomicU64,
    /// I/Os that passed the filter.
    pub calls: AtomicU64,
}

impl Contract {
    /// `strict`: the first violation ends the process.
    pub fn new(strict: bool) -> Self {
        Self {
            strict,
            ..Self::default()
        }
    }

    /// Notes a violation.
    pub fn violated(&self, label: &str, what: &str) {
        self.violations.fetch_add(1, Ordering::Relaxed); // a counter
        tracing::error!("contract violated by the filter, disk {label}: {what}");
        if self.strict {
            std::process::exit(EXIT_VIOLATION);
        }
    }

    /// Violations so far.
    pub fn violations(&self) -> u64 {
        self.violations.load(Ordering::Relaxed) // a counter
    }

    /// Notes how long an I/O was deferred.
    pub fn note_deferral(&self, waited: Duration) {
        let waited_ns = waited.as_nanos() as u64;
        self.deferred.fetch_add(1, Ordering::Relaxed); // a counter
        self.deferred_max_ns.fetch_max(waited_ns, Ordering::Relaxed); // a figure
    }

    /// Notes how long a completion was held.
    pub fn note_hold(&self, waited: Duration) {
        let waited_ns = waited.as_nanos() as u64;
        self.held.fetch_add(1, Ordering::Relaxed); // a counter
        self.held_max_ns.fetch_max(waited_ns, Ordering::Relaxed); // a figure
    }
}
