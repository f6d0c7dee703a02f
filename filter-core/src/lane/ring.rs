//! The memory orderings of the lane, in one place.
//!
//! Invariant: a consumer that sees a tail sees every byte before it; a producer that sees a head
//! knows that every byte before it has been read; and no record is published to a consumer that
//! sleeps without waking it.
//!
//! | step | does | pairs with |
//! |---|---|---|
//! | P1 | `head.load(Acquire)`: room that may be overwritten | C4 |
//! | P2 | writes payload and header (plain) | ordered by P1 and P3 |
//! | P3 | `tail.store(Release)`: publish | C1, C7 |
//! | P4 | `fence(SeqCst)`: the store of P3 before the load of P5 | C6 |
//! | P5 | `sleeping.load(Relaxed)`: wake the consumer? | C5 |
//! | C1 | `tail.load(Acquire)`: records that may be read | P3 |
//! | C2 | reads header and payload (plain) | ordered by C1 and C4 |
//! | C3 | the record is durable downstream: its space may go | |
//! | C4 | `head.store(Release)`: free the space | P1 |
//! | C5 | `sleeping.store(1, Relaxed)`: about to sleep | P5 |
//! | C6 | `fence(SeqCst)`: the store of C5 before the load of C7 | P4 |
//! | C7 | `tail.load(Acquire)`: look once more before sleeping | P3 |
//!
//! Without P4 and C6 both sides can miss each other: the producer reads "awake" before its tail is
//! visible, the consumer reads the old tail before its flag is visible. Which orderings are used is
//! a type parameter, so that `tests/loom_lane.rs` checks this very code and shows that each weaker
//! choice fails.
//!
//! The cut epoch uses the same double check: the producer says that it is stamping ([`stamp_enter`]),
//! then reads the epoch; the daemon bumps the epoch, then looks who is stamping ([`epoch_bump`]).
//!
//! A cut over several hosts also holds completions: the daemon says until when ([`hold_begin`]), *then*
//! bumps the epoch (H1, Release); a producer reads the epoch (H2, Acquire), and later, when the write comes
//! back, whether it is held ([`hold_until`]). So a write that was stamped with the new epoch is held. The hold
//! ends (H3, Release) when every host has bumped; who sees that it has ended (H4, Acquire) sees that.

use super::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// The orderings that are used. [`Sound`] is the product; the others exist in tests only.
pub trait Orders {
    /// P1.
    const HEAD_OBSERVE: Ordering = Ordering::Acquire; // P1, pairs with C4
    /// P3.
    const TAIL_PUBLISH: Ordering = Ordering::Release; // P3, pairs with C1 and C7
    /// P4 and C6.
    const FENCES: bool = true;
    /// C1 and C7.
    const TAIL_OBSERVE: Ordering = Ordering::Acquire; // C1 and C7, pair with P3
    /// C4.
    const HEAD_RELEASE: Ordering = Ordering::Release; // C4, pairs with P1
    /// H1.
    const EPOCH_PUBLISH: Ordering = Ordering::Release; // H1, pairs with H2
    /// H2.
    const EPOCH_OBSERVE: Ordering = Ordering::Acquire; // H2, pairs with H1
}

/// The orderings of the product.
#[derive(Clone, Copy, Debug)]
pub struct Sound;
impl Orders for Sound {}

/// P1: how far the consumer has freed the ring.
pub fn observe_head<O: Orders>(head: &AtomicU64) -> u64 {
    head.load(O::HEAD_OBSERVE)
}

/// P3 to P5: makes everything up to `to` visible; returns whether the consumer must be woken.
#[must_use]
pub fn publish<O: Orders>(tail: &AtomicU64, sleeping: &AtomicU32, to: u64) -> bool {
    tail.store(to, O::TAIL_PUBLISH);
    if O::FENCES {
        fence(Ordering::SeqCst); // P4, pairs with C6
    }
    sleeping.load(Ordering::Relaxed) != 0
}

/// C1: how far records may be read.
pub fn observe_tail<O: Orders>(tail: &AtomicU64) -> u64 {
    tail.load(O::TAIL_OBSERVE)
}

/// C4: frees everything before `to`. Only after C2 and C3.
pub fn release<O: Orders>(head: &AtomicU64, to: u64) {
    head.store(to, O::HEAD_RELEASE);
}

/// C5 to C7: announces sleep; returns whether nothing came after `seen`, so that sleeping is safe.
#[must_use]
pub fn prepare_sleep<O: Orders>(tail: &AtomicU64, sleeping: &AtomicU32, seen: u64) -> bool {
    sleeping.store(1, Ordering::Relaxed);
    if O::FENCES {
        fence(Ordering::SeqCst); // C6, pairs with P4
    }
    tail.load(O::TAIL_OBSERVE) == seen
}

/// The consumer is awake again.
pub fn awake(sleeping: &AtomicU32) {
    sleeping.store(0, Ordering::Relaxed);
}

/// The producer begins to stamp: `stamping` becomes odd; returns the cut epoch to stamp with.
/// Called with the disk's producer lock held, so there is one writer.
pub fn stamp_enter<O: Orders>(stamping: &AtomicU32, cut_epoch: &AtomicU32) -> u32 {
    let round = stamping.load(Ordering::Relaxed);
    stamping.store((round | 1).wrapping_add((round & 1) * 2), Ordering::Relaxed);
    if O::FENCES {
        fence(Ordering::SeqCst); // pairs with the fence of `epoch_bump`
    }
    cut_epoch.load(O::EPOCH_OBSERVE) // H2
}

/// The producer has published what it stamped: `stamping` becomes even.
pub fn stamp_leave(stamping: &AtomicU32) {
    let round = stamping.load(Ordering::Relaxed);
    // Release: who sees the even value (Acquire in `stamping_done`) sees the published tail.
    stamping.store(round.wrapping_add(1) & !1, Ordering::Release);
}

/// The daemon moves the cut epoch to `to`; from now on `stamping_done` tells, lane by lane, when
/// nobody can publish an older epoch any more.
pub fn epoch_bump<O: Orders>(cut_epoch: &AtomicU32, to: u32) {
    cut_epoch.store(to, O::EPOCH_PUBLISH); // H1
    if O::FENCES {
        fence(Ordering::SeqCst); // pairs with the fence of `stamp_enter`
    }
}

/// Reads a lane's stamping word after [`epoch_bump`]. An even value means that every record of an
/// older epoch is visible by the next read of the tail; an odd one must be waited for to change.
pub fn stamping_round(stamping: &AtomicU32) -> u32 {
    stamping.load(Ordering::Acquire) // pairs with the store of `stamp_leave`
}

/// The daemon: completions are held until this moment of the host's monotonic clock, in ns, or until
/// [`hold_end`]. Followed by [`epoch_bump`].
pub fn hold_begin(hold: &AtomicU64, until_ns: u64) {
    hold.store(until_ns, Ordering::Relaxed); // ordered by H1
}

/// The daemon: every host has bumped its epoch, or nothing comes of the cut.
pub fn hold_end(hold: &AtomicU64) {
    hold.store(0, Ordering::Release); // H3, pairs with H4
}

/// The producer, about a write that was stamped before: until when its completion is held; 0: it is not.
pub fn hold_until(hold: &AtomicU64) -> u64 {
    hold.load(Ordering::Acquire) // H4, pairs with H3
}
