//! Completions that are held while a cut over several hosts is taken.
//!
//! A cut on several hosts needs a moment that all of them have in common: one in which every host has
//! raised the domain's epoch, and no write that was stamped with the new one is known to be done. So
//! from a host's bump until the last host's the completions of writes are held. New writes never are.
//!
//! Invariant: a completion is held until the hold ends, at its deadline at the latest, and for no longer than
//! the budget of this side, whatever the page says. One that goes on while the hold lasts makes the cut worth
//! nothing, and the caller is told. No clock here: the caller says what time it is, and polls while
//! [`CutHold::wants_poll`].

use crate::mutant::{Guard, holds};
use alloc::collections::VecDeque;

/// How long a completion is held at most, in ns, unless told otherwise.
pub const CUT_HOLD_NS: u64 = 20_000_000;

#[derive(Clone, Copy, Debug)]
struct Held<T> {
    what: T,
    since_ns: u64,
}

/// The held completions of one disk, in the order in which they came. `T` names one.
#[derive(Debug)]
pub struct CutHold<T> {
    budget_ns: u64,
    held: VecDeque<Held<T>>,
    held_count: u64,
    held_max_ns: u64,
}

impl<T: Copy + PartialEq> CutHold<T> {
    /// Nothing is held yet.
    pub const fn new(budget_ns: u64) -> Self {
        Self {
            budget_ns,
            held: VecDeque::new(),
            held_count: 0,
            held_max_ns: 0,
        }
    }

    /// Completions held so far.
    pub const fn held_count(&self) -> u64 {
        self.held_count
    }

    /// The longest that one was held, in ns.
    pub const fn held_max_ns(&self) -> u64 {
        self.held_max_ns
    }

    /// Whether something is held: poll soon.
    pub fn wants_poll(&self) -> bool {
        !self.held.is_empty()
    }

    /// A write that the disk has completed; `until_ns`: what the domain's page says. `true`: its completion is
    /// held, until [`CutHold::poll`] hands it out.
    pub fn done(&mut self, what: T, until_ns: u64, now_ns: u64) -> bool {
        if now_ns >= until_ns || !holds(Guard::HoldCompletions) {
            return false;
        }
        self.held_count += 1;
        let since_ns = now_ns;
        self.held.push_back(Held { what, since_ns });
        true
    }

    /// Hands out the completions that go on now. `true`: some go on although the hold lasts, since they
    /// were held for as long as this side allows; the cut must not be.
    pub fn poll(&mut self, until_ns: u64, now_ns: u64, mut goes_on: impl FnMut(T)) -> bool {
        let over = now_ns >= until_ns;
        let (budget_ns, longest) = (self.budget_ns, &mut self.held_max_ns);
        let mut torn = false;
        self.held.retain(|held| {
            let waited_ns = now_ns.saturating_sub(held.since_ns);
            let stays = !over && waited_ns < budget_ns;
            if !stays {
                *longest = (*longest).max(waited_ns);
                torn |= !over;
                goes_on(held.what);
            }
            stays
        });
        torn
    }

    /// Hands out everything that is held; `true`: that was something, and the cut must not be.
    pub fn release_all(&mut self, mut goes_on: impl FnMut(T)) -> bool {
        let any = !self.held.is_empty();
        for held in self.held.drain(..) {
            goes_on(held.what);
        }
        any
    }

    /// Takes a held completion out, which goes on; `false`: it is not held.
    pub fn forget(&mut self, what: T) -> bool {
        let at = self.held.iter().position(|held| held.what == what);
        at.is_some_and(|at| self.held.remove(at).is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn polled(hold: &mut CutHold<u32>, until_ns: u64, now_ns: u64) -> (Vec<u32>, bool) {
        let mut out = Vec::new();
        let torn = hold.poll(until_ns, now_ns, |what| out.push(what));
        (out, torn)
    }

    #[test]
    fn completions_are_held_until_the_hold_ends() {
        let mut hold = CutHold::new(100);
        assert!(!hold.done(1, 0, 1000), "there is no hold");
        assert!(hold.done(2, 1050, 1000));
        assert!(hold.done(3, 1050, 1010));
        assert_eq!(polled(&mut hold, 1050, 1040), (Vec::new(), false));
        // It is ended, in order.
        assert_eq!(polled(&mut hold, 0, 1045), (Vec::from([2, 3]), false));
        assert_eq!((hold.held_count(), hold.held_max_ns()), (2, 45));
        assert!(!hold.wants_poll());
    }

    #[test]
    fn nothing_is_held_beyond_the_deadline_or_the_budget() {
        let mut hold = CutHold::new(100);
        assert!(hold.done(1, 1050, 1000));
        assert_eq!(polled(&mut hold, 1050, 1050), (Vec::from([1]), false));
        assert!(!hold.done(2, 1050, 1050));
        // A page that says for ever: by this side's own budget, and the cut is torn.
        assert!(hold.done(3, u64::MAX, 2000));
        assert_eq!(polled(&mut hold, u64::MAX, 2099), (Vec::new(), false));
        assert_eq!(polled(&mut hold, u64::MAX, 2100), (Vec::from([3]), true));
    }

    #[test]
    fn what_is_let_go_early_is_told() {
        let mut hold = CutHold::new(100);
        assert!(hold.done(1, 1050, 1000) && hold.done(2, 1050, 1000));
        assert!(hold.forget(1) && !hold.forget(1));
        let mut out = Vec::new();
        assert!(hold.release_all(|what| out.push(what)));
        assert_eq!(out, [2]);
        assert!(!hold.release_all(|_| {}));
    }
}
