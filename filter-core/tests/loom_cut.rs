//! A cut over two hosts under every interleaving that matters (loom): a write of one guest, and after its
//! completion one of another host's, never end up with the second in the cut and the first not.
//!
//! The stamping, the bump and the hold are the product's own; the appliance is a counter of the hosts that
//! have bumped. What a hold that ends at its deadline leads to is the simulator's matter.
//!
//! Run: `RUSTFLAGS="--cfg loom" cargo test --release -p filter-core --test loom_cut --target-dir target/loom`
#![cfg(loom)]

use filter_core::lane::model::ring::{self, Orders, Sound};
use filter_core::lane::model::sync::{AtomicU32, AtomicU64, Ordering};
use loom::sync::Arc;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The cut's epoch: what is stamped below it is in the cut.
const CUT: u32 = 2;

/// What a daemon does wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// It holds nothing.
    NoHold,
    /// It bumps the epoch first.
    HoldAfterBump,
    /// It lets go when its own host has bumped.
    EarlyRelease,
}

#[derive(Default)]
struct Host {
    epoch: AtomicU32,
    hold: AtomicU64,
    stamping: AtomicU32,
}

#[derive(Default)]
struct Site {
    hosts: [Host; 2],
    bumped: AtomicU32,
}

impl Site {
    fn new() -> Arc<Self> {
        let site = Self::default();
        for host in &site.hosts {
            host.epoch.store(CUT - 1, Ordering::Relaxed); // before any thread runs
        }
        Arc::new(site)
    }

    /// A host's daemon; the last one to bump lets the appliance release all.
    fn daemon<O: Orders>(&self, number: usize, fault: Fault) {
        let host = &self.hosts[number];
        let hold = || {
            if fault != Fault::NoHold {
                ring::hold_begin(&host.hold, 1);
            }
        };
        if fault == Fault::HoldAfterBump {
            ring::epoch_bump::<O>(&host.epoch, CUT);
            hold();
        } else {
            hold();
            ring::epoch_bump::<O>(&host.epoch, CUT);
        }
        if fault == Fault::EarlyRelease {
            ring::hold_end(&host.hold);
        }
        // The network orders what hosts tell the appliance, and what it tells them.
        if self.bumped.fetch_add(1, Ordering::AcqRel) == 1 {
            self.hosts
                .iter()
                .for_each(|host| ring::hold_end(&host.hold));
        }
    }

    /// A guest's write: whether it is in the cut.
    fn write<O: Orders>(&self, number: usize) -> bool {
        let host = &self.hosts[number];
        let epoch = ring::stamp_enter::<O>(&host.stamping, &host.epoch);
        ring::stamp_leave(&host.stamping);
        epoch < CUT
    }

    /// Whether its completion goes up.
    fn completes(&self, number: usize) -> bool {
        ring::hold_until(&self.hosts[number].hold) == 0
    }
}

/// One write on the first host, and once it is done one on the second.
fn dependent_writes<O: Orders + 'static>(fault: Fault) -> impl Fn() + Sync + Send + 'static {
    move || {
        let site = Site::new();
        let daemons: Vec<_> = (0..2)
            .map(|number| {
                let site = site.clone();
                loom::thread::spawn(move || site.daemon::<O>(number, fault))
            })
            .collect();
        let first = site.write::<O>(0);
        if site.completes(0) || site.completes(0) {
            let second = site.write::<O>(1);
            assert!(first || !second, "the cut lacks what it relies on");
        }
        for daemon in daemons {
            daemon.join().expect("a daemon does not panic");
        }
    }
}

fn model(body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(body);
}

fn fails(body: impl Fn() + Sync + Send + 'static) -> bool {
    catch_unwind(AssertUnwindSafe(|| model(body))).is_err()
}

/// The epoch may be seen before the hold.
struct EpochRelaxed;
impl Orders for EpochRelaxed {
    const EPOCH_PUBLISH: Ordering = Ordering::Relaxed; // the mutant
}

/// The hold may be read before the epoch.
struct EpochObservedRelaxed;
impl Orders for EpochObservedRelaxed {
    const EPOCH_OBSERVE: Ordering = Ordering::Relaxed; // the mutant
}

#[test]
fn a_cut_of_two_hosts_holds_what_its_writes_rely_on() {
    model(dependent_writes::<Sound>(Fault::None));
}

#[test]
fn without_the_hold_it_is_torn() {
    assert!(fails(dependent_writes::<Sound>(Fault::NoHold)));
    assert!(fails(dependent_writes::<Sound>(Fault::HoldAfterBump)));
    assert!(fails(dependent_writes::<Sound>(Fault::EarlyRelease)));
}

#[test]
fn weaker_orderings_tear_it() {
    assert!(fails(dependent_writes::<EpochRelaxed>(Fault::None)));
    assert!(fails(dependent_writes::<EpochObservedRelaxed>(Fault::None)));
}
