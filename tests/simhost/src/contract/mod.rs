//! The host's checks of the filter's side of the contract, at every call.
//!
//! Invariant: an I/O's state moves only along the arrows below; a filter that asks for any other
//! move is refused, the violation is logged with what and where, and counted. A VM process that
//! counted any ends with a failure.
//!
//! ```text
//! Starting --PASS--> Down --io_done PASS--> Ended
//!    |                 \---io_done DEFER--> Held --io_release--> Ended
//!    |--DEFER--> Deferred --io_continue--> Down     (or io_complete, io_abort --> Ended)
//!    |--(io_continue before DEFER was returned)--> Continued --> Down
//!    \--COMPLETE, FAIL--> Ended
//! ```

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Where an I/O stands between host and filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum IoState {
    /// `io_start` is running.
    Starting = 0,
    /// The filter continued it before its `io_start` returned.
    Continued = 1,
    /// The filter holds it.
    Deferred = 2,
    /// It is with the layers below, or its `io_done` is running.
    Down = 3,
    /// The filter holds its completion.
    Held = 4,
    /// The filter released the completion before its `io_done` returned.
    Released = 5,
    /// The filter has nothing to do with it any more.
    Ended = 6,
}

impl IoState {
    fn of(raw: u8) -> Self {
        match raw {
            0 => Self::Starting,
            1 => Self::Continued,
            2 => Self::Deferred,
            3 => Self::Down,
            4 => Self::Held,
            5 => Self::Released,
            _ => Self::Ended,
        }
    }
}

/// The state of one I/O, moved by compare-and-swap since several threads may try.
#[derive(Debug)]
pub struct IoCell(AtomicU8);

impl Default for IoCell {
    fn default() -> Self {
        Self(AtomicU8::new(IoState::Ended as u8))
    }
}

impl IoCell {
    /// The state now.
    pub fn get(&self) -> IoState {
        IoState::of(self.0.load(Ordering::Acquire))
    }

    /// Begins a new I/O.
    pub fn set(&self, to: IoState) {
        self.0.store(to as u8, Ordering::Release);
    }

    /// Moves from `from` to `to`; `Err` is the state found instead.
    pub fn step(&self, from: IoState, to: IoState) -> Result<(), IoState> {
        let (from, to) = (from as u8, to as u8);
        let swapped = self
            .0
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
        swapped.map(|_| ()).map_err(IoState::of)
    }
}

/// Violations, and what was measured of the filter's behaviour.
#[derive(Debug, Default)]
pub struct Contract {
    violations: AtomicU64,
    /// I/Os that the filter deferred.
    pub deferred: AtomicU64,
    /// The longest deferral, in ns.
    pub deferred_max_ns: AtomicU64,
    /// I/Os that passed the filter.
    pub calls: AtomicU64,
}

impl Contract {
    /// Notes a violation.
    pub fn violated(&self, label: &str, what: &str) {
        self.violations.fetch_add(1, Ordering::Relaxed); // a counter
        tracing::error!("contract violated by the filter, disk {label}: {what}");
    }

    /// Violations so far.
    pub fn violations(&self) -> u64 {
        self.violations.load(Ordering::Relaxed) // a counter
    }

    /// Notes how long an I/O was deferred.
    pub fn note_deferral(&self, waited_ns: u64) {
        self.deferred.fetch_add(1, Ordering::Relaxed); // a counter
        self.deferred_max_ns.fetch_max(waited_ns, Ordering::Relaxed); // a figure
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_arrows_can_be_walked() {
        let cell = IoCell::default();
        cell.set(IoState::Starting);
        assert_eq!(
            cell.step(IoState::Deferred, IoState::Down),
            Err(IoState::Starting)
        );
        assert_eq!(cell.step(IoState::Starting, IoState::Deferred), Ok(()));
        assert_eq!(cell.step(IoState::Deferred, IoState::Down), Ok(()));
        // A second continue of the same I/O finds it gone.
        assert_eq!(
            cell.step(IoState::Deferred, IoState::Down),
            Err(IoState::Down)
        );
    }
}
