//! The guards that keep a write from being lost between its marks, by name.
//!
//! Invariant: in the product all of them are in place: only a build for the model checker can be told
//! to leave one out. `tests/loom_sync.rs` does, one and two at a time.

use super::Config;
#[cfg(not(loom))]
use crate::mutant::{self, holds};

/// A guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// A write that is not published is marked before it is passed down.
    FirstMark,
    /// It is marked again at its completion.
    SecondMark,
    /// A sync reads nothing that a write in flight overlaps.
    InFlight,
    /// What a write touched since the sync's read began is not published.
    Touch,
    /// What was in flight when a producer died is marked when the disk is opened again.
    Leftovers,
}

/// Which guards are in place.
#[cfg(loom)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guards(u8);

#[cfg(loom)]
impl Guards {
    /// All.
    pub const ALL: Self = Self(0);

    /// All but these.
    pub fn without(guards: &[Guard]) -> Self {
        let bit = |guard: &Guard| 1 << *guard as u8;
        Self(guards.iter().map(bit).fold(0, |all, one| all | one))
    }
}

impl Config {
    /// Whether the guard is in place.
    #[cfg(not(loom))]
    pub(super) fn keeps(&self, guard: Guard) -> bool {
        holds(match guard {
            Guard::FirstMark => mutant::Guard::FirstMark,
            Guard::SecondMark => mutant::Guard::SecondMark,
            Guard::InFlight => mutant::Guard::InFlightCheck,
            Guard::Touch => mutant::Guard::TouchCheck,
            Guard::Leftovers => mutant::Guard::Leftovers,
        })
    }

    /// Whether the guard is in place.
    #[cfg(loom)]
    pub(super) const fn keeps(&self, guard: Guard) -> bool {
        self.guards.0 & (1 << guard as u8) == 0
    }
}
