//! The lane's orderings under every interleaving that matters (loom), and the mutants that must fail.
//!
//! Run: `RUSTFLAGS="--cfg loom" cargo test --release -p filter-core --test loom_lane --target-dir target/loom`
#![cfg(loom)]
#![allow(clippy::unwrap_used)]

use filter_core::lane::model::ring::{self, Orders, Sound};
use filter_core::lane::model::sync::{AtomicU32, AtomicU64, Ordering};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use std::panic::{AssertUnwindSafe, catch_unwind};

const SLOTS: u64 = 2;

/// A ring of two records; loom's cells notice any access that is not ordered.
struct Lane {
    tail: AtomicU64,
    head: AtomicU64,
    sleeping: AtomicU32,
    data: [UnsafeCell<u64>; SLOTS as usize],
}

// SAFETY: the cells are what the model checks: loom fails the run on an unordered access.
unsafe impl Sync for Lane {}

impl Lane {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            tail: AtomicU64::new(0),
            head: AtomicU64::new(0),
            sleeping: AtomicU32::new(0),
            data: [UnsafeCell::new(0), UnsafeCell::new(0)],
        })
    }

    fn put(&self, position: u64, value: u64) {
        // SAFETY: the slot is free: the head was observed beyond its last use.
        self.data[(position % SLOTS) as usize].with_mut(|slot| unsafe { *slot = value });
    }

    fn get(&self, position: u64) -> u64 {
        // SAFETY: the slot is published: the tail was observed beyond it.
        self.data[(position % SLOTS) as usize].with(|slot| unsafe { *slot })
    }
}

fn model(body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(body);
}

/// Whether loom finds a fault in the model.
fn fails(body: impl Fn() + Sync + Send + 'static) -> bool {
    catch_unwind(AssertUnwindSafe(|| model(body))).is_err()
}

/// Three records through a ring of two: contents, order, reuse of space.
fn stream<O: Orders + 'static>(release_first: bool) -> impl Fn() + Sync + Send + 'static {
    move || {
        const RECORDS: u64 = 3;
        let lane = Lane::new();
        let theirs = lane.clone();
        let producer = loom::thread::spawn(move || {
            for position in 0..RECORDS {
                while position - ring::observe_head::<O>(&theirs.head) >= SLOTS {
                    loom::thread::yield_now();
                }
                theirs.put(position, 100 + position);
                let _ = ring::publish::<O>(&theirs.tail, &theirs.sleeping, position + 1);
            }
        });
        for position in 0..RECORDS {
            while ring::observe_tail::<O>(&lane.tail) <= position {
                loom::thread::yield_now();
            }
            if release_first {
                ring::release::<O>(&lane.head, position + 1);
                assert_eq!(lane.get(position), 100 + position);
            } else {
                assert_eq!(lane.get(position), 100 + position);
                ring::release::<O>(&lane.head, position + 1);
            }
        }
        producer.join().unwrap();
    }
}

/// One record, and a consumer that goes to sleep: either it sees the record, or it is woken.
fn wake_up<O: Orders + 'static>() -> impl Fn() + Sync + Send + 'static {
    || {
        let lane = Lane::new();
        let theirs = lane.clone();
        let producer = loom::thread::spawn(move || {
            theirs.put(0, 7);
            ring::publish::<O>(&theirs.tail, &theirs.sleeping, 1)
        });
        let slept = ring::prepare_sleep::<O>(&lane.tail, &lane.sleeping, 0);
        let woken = producer.join().unwrap();
        assert!(!slept || woken, "the consumer sleeps and nobody wakes it");
    }
}

/// A stamp and a bump: once nobody stamps, every record of the old epoch is visible.
fn cut<O: Orders + 'static>() -> impl Fn() + Sync + Send + 'static {
    || {
        let lane = Lane::new();
        let stamping = Arc::new(AtomicU32::new(0));
        let epoch = Arc::new(AtomicU32::new(1));
        let (theirs, word, page) = (lane.clone(), stamping.clone(), epoch.clone());
        let producer = loom::thread::spawn(move || {
            let stamped = ring::stamp_enter::<O>(&word, &page);
            theirs.put(0, u64::from(stamped));
            let _ = ring::publish::<O>(&theirs.tail, &theirs.sleeping, 1);
            ring::stamp_leave(&word);
        });
        ring::epoch_bump::<O>(&epoch, 2);
        let first = ring::stamping_round(&stamping);
        while first & 1 == 1 && ring::stamping_round(&stamping) == first {
            loom::thread::yield_now();
        }
        let seen = ring::observe_tail::<O>(&lane.tail);
        producer.join().unwrap();
        if seen == 0 {
            // What was not visible when the cut was taken must belong to the next one.
            assert_eq!(
                lane.get(0),
                2,
                "a record of the cut came after its position"
            );
        }
    }
}

struct TailPublishRelaxed;
impl Orders for TailPublishRelaxed {
    const TAIL_PUBLISH: Ordering = Ordering::Relaxed; // mutant of P3
    const FENCES: bool = false; // a fence before the next store would hide it
}

struct TailObserveRelaxed;
impl Orders for TailObserveRelaxed {
    const TAIL_OBSERVE: Ordering = Ordering::Relaxed; // mutant of C1
}

struct HeadReleaseRelaxed;
impl Orders for HeadReleaseRelaxed {
    const HEAD_RELEASE: Ordering = Ordering::Relaxed; // mutant of C4
}

struct HeadObserveRelaxed;
impl Orders for HeadObserveRelaxed {
    const HEAD_OBSERVE: Ordering = Ordering::Relaxed; // mutant of P1
}

struct NoFences;
impl Orders for NoFences {
    const FENCES: bool = false; // mutant of P4 and C6
}

#[test]
fn sound_stream() {
    model(stream::<Sound>(false));
}

#[test]
fn sound_wake_up() {
    model(wake_up::<Sound>());
}

#[test]
fn sound_cut() {
    model(cut::<Sound>());
}

#[test]
fn mutant_tail_publish_relaxed_fails() {
    assert!(fails(stream::<TailPublishRelaxed>(false)));
}

#[test]
fn mutant_tail_observe_relaxed_fails() {
    assert!(fails(stream::<TailObserveRelaxed>(false)));
}

#[test]
fn mutant_head_release_relaxed_fails() {
    assert!(fails(stream::<HeadReleaseRelaxed>(false)));
}

#[test]
fn mutant_head_observe_relaxed_fails() {
    assert!(fails(stream::<HeadObserveRelaxed>(false)));
}

#[test]
fn mutant_release_before_reading_fails() {
    assert!(fails(stream::<Sound>(true)));
}

#[test]
fn mutant_without_fences_loses_a_wake_up() {
    assert!(fails(wake_up::<NoFences>()));
}

#[test]
fn mutant_without_fences_loses_a_record_of_the_cut() {
    assert!(fails(cut::<NoFences>()));
}
