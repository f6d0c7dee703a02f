//! Write-through (`ack = log`): a completion is held until the appliance's log has the write.
//!
//! Invariant: a completion is held for at most the budget; when one was held that long, all that are
//! held go on at once, nothing more is held, and that is an alarm, until acknowledgements have been
//! quick for a while. While nothing is held a guest's completion says what it says without this:
//! the disk below has the write.
//!
//! A write that is only marked (the disk tracks), or that comes between others that are still to be
//! synced, could not be recovered from the appliance's log, so nothing is held for it either: a disk
//! that tracks or syncs has fallen back, with the same alarm. No clock here: the caller says what time
//! it is, and polls while [`Ack::wants_poll`].

use crate::mutant::{Guard, holds};
use alloc::collections::VecDeque;

/// Calm that is needed after the first fall-back.
const CALM_NS: u64 = 1_000_000_000;
/// The most that is ever needed: it doubles while fall-backs follow each other.
const CALM_MOST_NS: u64 = 64 * CALM_NS;
/// Held without a fall-back for this long, a disk needs little calm again.
const TRUSTED_NS: u64 = 60 * CALM_NS;

/// Choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AckConfig {
    /// Whether completions wait for the appliance's log.
    pub log: bool,
    /// The longest that one is held, in ns.
    pub budget_ns: u64,
}

impl Default for AckConfig {
    fn default() -> Self {
        Self {
            log: false,
            budget_ns: 50_000_000,
        }
    }
}

/// How the stream stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Every write is published and nothing is to be synced.
    pub streaming: bool,
    /// How often the stream has begun anew: [`super::Disk::beginnings`].
    pub beginnings: u32,
    /// Last seq that the appliance's log has. A stream that begins anew gives up what was not durable, and
    /// counts from above it: then this says nothing of what was published before.
    pub durable_seq: u64,
    /// Monotonic time, in ns.
    pub now_ns: u64,
}

/// Something that an operator is to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AckEvent {
    /// Fell back: an acknowledgement took longer than the budget.
    TooSlow,
    /// Fell back: the disk tracks or syncs.
    NotStreaming,
    /// Completions are held again.
    Back,
}

#[derive(Clone, Copy, Debug)]
struct Held<T> {
    what: T,
    seq: u64,
    since_ns: u64,
}

/// A write whose acknowledgement is timed without holding it.
#[derive(Clone, Copy, Debug)]
struct Probe {
    seq: u64,
    since_ns: u64,
    /// It took too long already.
    late: bool,
}

#[derive(Clone, Copy, Debug)]
enum Mode {
    /// Held until durable; since when.
    Through { since_ns: u64 },
    /// Not held. `calm_since_ns`: since when nothing was slow; `quick`: a probe has come back in time
    /// since then.
    Fallen {
        calm_since_ns: u64,
        quick: bool,
        probe: Option<Probe>,
    },
}

/// The held completions of one disk. `T` names one.
#[derive(Debug)]
pub struct Ack<T> {
    config: AckConfig,
    mode: Mode,
    held: VecDeque<Held<T>>,
    /// The stream that they were published in.
    beginnings: u32,
    calm_needed_ns: u64,
    event: Option<AckEvent>,
    held_count: u64,
    held_max_ns: u64,
}

impl<T: Copy + PartialEq> Ack<T> {
    /// Nothing is held yet.
    pub const fn new(config: AckConfig) -> Self {
        Self {
            config,
            mode: Mode::Through { since_ns: 0 },
            held: VecDeque::new(),
            beginnings: 0,
            calm_needed_ns: CALM_NS,
            event: None,
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

    /// Whether write-through is asked for.
    pub const fn is_on(&self) -> bool {
        self.config.log
    }

    /// Whether write-through is asked for and not given.
    pub const fn has_fallen_back(&self) -> bool {
        self.config.log && matches!(self.mode, Mode::Fallen { .. })
    }

    /// Whether something waits for time to pass: poll soon.
    pub fn wants_poll(&self) -> bool {
        let probing = |mode: &Mode| match mode {
            Mode::Fallen { probe, .. } => probe.is_some_and(|probe| !probe.late),
            Mode::Through { .. } => false,
        };
        !self.held.is_empty() || probing(&self.mode)
    }

    /// What has happened since the last call, for the operator.
    pub const fn take_event(&mut self) -> Option<AckEvent> {
        self.event.take()
    }

    /// A write that the disk has completed. `seq` is its last record's; `None`: it was not published.
    /// `true`: its completion is held, until [`Ack::poll`] hands it out.
    pub fn done(&mut self, what: T, seq: Option<u64>, standing: Standing) -> bool {
        if !self.config.log {
            return false;
        }
        self.look_at_stream(standing);
        let seq = seq.filter(|_| standing.streaming);
        let Some(seq) = seq else {
            self.fall(AckEvent::NotStreaming, standing.now_ns);
            return false;
        };
        match &mut self.mode {
            Mode::Through { .. } if seq <= standing.durable_seq || !holds(Guard::AckHeld) => false,
            Mode::Through { .. } => {
                self.held_count += 1;
                self.held.push_back(Held {
                    what,
                    seq,
                    since_ns: standing.now_ns,
                });
                true
            }
            Mode::Fallen { probe, .. } => {
                probe.get_or_insert(Probe {
                    seq,
                    since_ns: standing.now_ns,
                    late: false,
                });
                false
            }
        }
    }

    /// Looks at what has become durable and how long it took; hands out completions that go on.
    pub fn poll(&mut self, standing: Standing, mut goes_on: impl FnMut(T)) {
        if !self.config.log {
            return;
        }
        self.look_at_stream(standing);
        let Standing {
            streaming,
            durable_seq,
            now_ns,
            ..
        } = standing;
        // The records are kept in arrival order: the first has waited longest.
        let waited = |held: &Held<T>| now_ns.saturating_sub(held.since_ns);
        let too_long = self
            .held
            .iter()
            .any(|held| held.seq > durable_seq && waited(held) >= self.config.budget_ns);
        if too_long && holds(Guard::AckBudget) {
            self.fall(AckEvent::TooSlow, now_ns);
        } else if !streaming {
            self.fall(AckEvent::NotStreaming, now_ns);
        }
        let all = matches!(self.mode, Mode::Fallen { .. });
        let longest = &mut self.held_max_ns;
        self.held.retain(|held| {
            let stays = !all && held.seq > durable_seq;
            if !stays {
                *longest = (*longest).max(waited(held));
                goes_on(held.what);
            }
            stays
        });
        self.look_at_probe(streaming, durable_seq, now_ns);
    }

    /// What is held since before the stream began anew was given up with the rest of its stream, and is synced:
    /// no seq says when the log has it.
    fn look_at_stream(&mut self, standing: Standing) {
        let before = core::mem::replace(&mut self.beginnings, standing.beginnings);
        if before != standing.beginnings && !self.held.is_empty() && holds(Guard::AckOfOneStream) {
            self.fall(AckEvent::NotStreaming, standing.now_ns);
        }
    }

    /// Hands out everything that is held, whatever is durable.
    pub fn release_all(&mut self, mut goes_on: impl FnMut(T)) {
        for held in self.held.drain(..) {
            goes_on(held.what);
        }
    }

    /// Falls back: the caller cannot poll.
    pub fn give_up(&mut self, now_ns: u64, goes_on: impl FnMut(T)) {
        self.fall(AckEvent::TooSlow, now_ns);
        self.release_all(goes_on);
    }

    /// Takes a held completion out; `false`: it is not held.
    pub fn forget(&mut self, what: T) -> bool {
        let at = self.held.iter().position(|held| held.what == what);
        at.is_some_and(|at| self.held.remove(at).is_some())
    }

    fn fall(&mut self, why: AckEvent, now_ns: u64) {
        match &mut self.mode {
            Mode::Through { since_ns } => {
                let trusted = now_ns.saturating_sub(*since_ns) >= TRUSTED_NS;
                self.calm_needed_ns = if trusted || *since_ns == 0 {
                    CALM_NS
                } else {
                    (self.calm_needed_ns * 2).min(CALM_MOST_NS)
                };
                self.event = Some(why);
                self.mode = Mode::Fallen {
                    calm_since_ns: now_ns,
                    quick: false,
                    probe: None,
                };
            }
            Mode::Fallen {
                calm_since_ns,
                quick,
                ..
            } => {
                *calm_since_ns = now_ns;
                *quick = false;
            }
        }
    }

    fn look_at_probe(&mut self, streaming: bool, durable_seq: u64, now_ns: u64) {
        // Half of the budget: what just fits today would not tomorrow.
        let quick_ns = self.config.budget_ns / 2;
        let calm_needed_ns = self.calm_needed_ns;
        let Mode::Fallen {
            calm_since_ns,
            quick,
            probe,
        } = &mut self.mode
        else {
            return;
        };
        if let Some(timed) = probe {
            let took_ns = now_ns.saturating_sub(timed.since_ns);
            timed.late |= took_ns > quick_ns;
            if timed.late {
                *calm_since_ns = now_ns;
                *quick = false;
            }
            if timed.seq <= durable_seq {
                *quick = !timed.late;
                *probe = None;
            }
        }
        let calm = now_ns.saturating_sub(*calm_since_ns) >= calm_needed_ns;
        if streaming && *quick && probe.is_none() && calm {
            self.mode = Mode::Through { since_ns: now_ns };
            self.event = Some(AckEvent::Back);
        }
    }
}

#[cfg(test)]
#[path = "ack_tests.rs"]
mod tests;
