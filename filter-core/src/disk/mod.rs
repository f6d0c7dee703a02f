//! What the filter does with a disk's writes, as a state machine without I/O, clock or threads.
//!
//! Invariant: before a write is passed down, it is either published in the lane or marked in the
//! dirty map, and it stands in the in-flight table until its completion was seen. A write is deferred
//! for at most the budget; then the disk tracks instead. Replication never fails a write.
//!
//! | file | holds |
//! |---|---|
//! | this one | the modes, writes and their completion |
//! | [`sync`] | reading marked blocks and publishing them, never over newer data |
//!
//! The caller holds the disk's lock around every call, and carries out what is returned: passes or
//! defers the I/O, wakes the daemon, reads a block below the filter.

pub mod sync;

use crate::lane::dirty::DirtyMap;
use crate::lane::inflight::{InFlight, Token};
use crate::lane::layout::{DIRTY_BLOCK_BYTES, LaneMemory, LaneState};
use crate::lane::producer::{Draft, Producer, PublishError, PublishedGroup, Source, Stamps};
use crate::lane::sync::Ordering::Relaxed;
use crate::mutant::{Guard, holds};
use crate::record::RecordKind;
use sync::Sync;

/// Choices of a disk.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// How long a write may be deferred for want of room, in ns.
    pub defer_budget_ns: u64,
    /// Bytes that a sync reads at once: a multiple of the dirty block.
    pub sync_read_bytes: u64,
    /// Reads of a sync in flight at once.
    pub sync_reads: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            defer_budget_ns: 5_000_000,
            sync_read_bytes: 4 * DIRTY_BLOCK_BYTES,
            sync_reads: 2,
        }
    }
}

/// A guest's I/O that changes the disk.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// WRITE, ZERO or UNMAP.
    pub kind: RecordKind,
    /// Start, in bytes.
    pub offset_bytes: u64,
    /// Length, in bytes.
    pub len_bytes: u64,
    /// The data of a WRITE, in order.
    pub sources: &'a [Source<'a>],
}

/// What happens to a change now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Pass it down; give `token` back at its completion. `wake`: the daemon sleeps.
    Pass {
        /// To be given back to [`Disk::done`].
        token: Token,
        /// Wake the daemon.
        wake: bool,
    },
    /// Hold it and ask again, in the order of arrival, with [`Disk::retry`].
    Defer,
}

/// What a completion leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Completed {
    /// Wake the daemon.
    pub wake: bool,
    /// A sync has become necessary, or may go on: call [`Disk::sync_step`] soon.
    pub sync: bool,
}

/// How a disk starts, from the attach decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// A new stream: everything is to be synced.
    Full,
    /// Go on; what is marked, and what was in flight, is to be synced.
    Marked,
    /// Go on; nothing is to be synced.
    Clean,
}

/// Counters since the attach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Writes that were deferred.
    pub deferred: u64,
    /// The longest deferral, in ns.
    pub deferred_max_ns: u64,
    /// Times that tracking began.
    pub tracking: u64,
    /// Writes that the disk failed.
    pub failed_writes: u64,
    /// Bytes published by syncs.
    pub sync_bytes: u64,
    /// Sync reads thrown away because a write touched the block meanwhile.
    pub sync_touched: u64,
    /// Sync reads that the disk failed.
    pub sync_read_errors: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Every change is published before it is passed down.
    Publishing,
    /// Changes are marked only.
    Tracking,
}

/// One protected disk.
#[derive(Debug)]
pub struct Disk {
    producer: Producer,
    dirty: DirtyMap,
    inflight: InFlight,
    config: Config,
    mode: Mode,
    capacity_bytes: u64,
    /// Changes that the caller holds.
    deferred: usize,
    sync: Sync,
    counters: Counters,
}

impl Disk {
    /// Takes over a lane. `producer` stands where the scan at attach ended.
    pub fn new(mut producer: Producer, capacity_bytes: u64, start: Start, config: Config) -> Self {
        let memory = producer.memory();
        let dirty = DirtyMap::new(memory);
        if start == Start::Marked && holds(Guard::Leftovers) {
            InFlight::leftovers(memory, dirty);
        }
        let inflight = InFlight::new(memory);
        memory
            .producer()
            .capacity_bytes
            .store(capacity_bytes, Relaxed); // for the daemon's hello
        let mut sync = Sync::default();
        if start == Start::Full {
            dirty.clear_all();
            dirty.mark(0, capacity_bytes);
            producer.start_base(0);
        }
        if start != Start::Clean {
            sync.want();
        }
        producer.set_state(if start == Start::Clean {
            LaneState::Streaming
        } else {
            LaneState::Syncing
        });
        let counters = Counters::default();
        let mode = Mode::Publishing;
        Self {
            producer,
            dirty,
            inflight,
            config,
            mode,
            capacity_bytes,
            deferred: 0,
            sync,
            counters,
        }
    }

    /// The lane's memory.
    pub const fn memory(&self) -> LaneMemory {
        self.producer.memory()
    }

    /// The producer, for figures.
    pub fn producer(&mut self) -> &mut Producer {
        &mut self.producer
    }

    /// Counters since the attach.
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// Capacity in bytes.
    pub const fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// What it is doing.
    pub fn state(&self) -> LaneState {
        match self.mode {
            Mode::Tracking => LaneState::Tracking,
            Mode::Publishing if self.sync.active() => LaneState::Syncing,
            Mode::Publishing => LaneState::Streaming,
        }
    }

    /// Bytes that are marked.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty.count() * DIRTY_BLOCK_BYTES
    }

    /// Whether changes are held by the caller.
    pub const fn has_deferred(&self) -> bool {
        self.deferred > 0
    }

    /// A change on its way down.
    pub fn start(&mut self, change: &Change<'_>, stamps: &Stamps<'_>) -> Decision {
        // Whoever came first goes first: else a steady stream of small writes could keep a large
        // one out until its budget ends.
        if self.mode == Mode::Publishing && self.deferred > 0 {
            return self.defer();
        }
        match self.try_publish(change, stamps) {
            Ok(decision) => decision,
            Err(()) => self.defer(),
        }
    }

    /// A change that was deferred `waited_ns` ago.
    pub fn retry(&mut self, change: &Change<'_>, stamps: &Stamps<'_>, waited_ns: u64) -> Decision {
        let decision = match self.try_publish(change, stamps) {
            Ok(decision) => decision,
            Err(()) if waited_ns < self.config.defer_budget_ns || !holds(Guard::DeferBudget) => {
                return Decision::Defer;
            }
            Err(()) => {
                self.enter_tracking();
                self.track(change)
            }
        };
        self.deferred = self.deferred.saturating_sub(1);
        self.counters.deferred_max_ns = self.counters.deferred_max_ns.max(waited_ns);
        decision
    }

    /// The caller gave up a change that it held.
    pub fn forget_deferred(&mut self) {
        self.deferred = self.deferred.saturating_sub(1);
    }

    fn defer(&mut self) -> Decision {
        self.deferred += 1;
        self.counters.deferred += 1;
        Decision::Defer
    }

    /// Publishes the change, or marks it where that is what must happen. `Err`: no room now.
    fn try_publish(&mut self, change: &Change<'_>, stamps: &Stamps<'_>) -> Result<Decision, ()> {
        if self.mode == Mode::Tracking {
            return Ok(self.track(change));
        }
        // After a restart the appliance takes nothing that comes before the stream's new beginning.
        // (A wake-up is not lost with a deferral: the consumer of a full lane waits for the appliance.)
        let begun = self.begin_base(stamps).map_err(|_| ())?;
        // The slot before the tail: a kill between the two leaves a slot too many, never one too few.
        let token = self.enter(change, false);
        let draft = Draft {
            kind: change.kind,
            offset_bytes: change.offset_bytes,
            len_bytes: change.len_bytes,
            sources: change.sources,
        };
        match self.producer.publish(&draft, stamps) {
            Ok(PublishedGroup { wake, .. }) => {
                self.sync.touch(change.offset_bytes, change.len_bytes);
                let wake = wake || begun;
                Ok(Decision::Pass { token, wake })
            }
            Err(PublishError::Full { .. }) => {
                self.inflight.remove(token);
                Err(())
            }
            Err(PublishError::TooLarge { .. } | PublishError::Range) => {
                // It can never travel as a record: mark it, let a sync carry it.
                self.inflight.remove(token);
                self.note_tracking_round();
                self.want_sync();
                Ok(self.track(change))
            }
        }
    }

    /// Marks a change instead of publishing it: the first of two marks.
    fn track(&mut self, change: &Change<'_>) -> Decision {
        if holds(Guard::FirstMark) {
            self.dirty.mark(change.offset_bytes, change.len_bytes);
        }
        self.sync.touch(change.offset_bytes, change.len_bytes);
        let token = self.enter(change, true);
        Decision::Pass { token, wake: false }
    }

    fn enter(&mut self, change: &Change<'_>, tracked: bool) -> Token {
        let (offset, len) = (change.offset_bytes, change.len_bytes);
        let (token, mirrored) = self.inflight.add(offset, len, tracked);
        if !mirrored {
            // The shared table is full: a mark keeps the range from being lost by a kill.
            self.dirty.mark(offset, len);
            self.want_sync();
        }
        token
    }

    /// A change was completed by the layers below. Unknown tokens are ignored.
    pub fn done(&mut self, token: Token, ok: bool, stamps: &Stamps<'_>) -> Completed {
        let Some((offset_bytes, len_bytes, tracked)) = self.inflight.remove(token) else {
            return Completed::default();
        };
        let mut completed = Completed::default();
        if tracked || !ok {
            // The second mark: a sync may have cleared the first and read the block before the
            // write landed.
            let guard = if ok {
                Guard::SecondMark
            } else {
                Guard::FailedWriteMark
            };
            if holds(guard) {
                self.dirty.mark(offset_bytes, len_bytes);
                self.sync.touch(offset_bytes, len_bytes);
            }
            completed.sync = true;
        }
        if !ok {
            self.counters.failed_writes += 1;
            self.want_sync();
            let (kind, sources) = (RecordKind::Void, [].as_slice());
            let draft = Draft {
                kind,
                offset_bytes,
                len_bytes,
                sources,
            };
            if self.mode == Mode::Publishing
                && !tracked
                && !self.producer.base_pending()
                && let Ok(group) = self.producer.publish(&draft, stamps)
            {
                completed.wake = group.wake;
            }
        }
        completed
    }

    /// From now on changes are marked only: no room came within the budget, or the caller found
    /// that replication cannot go on.
    pub fn enter_tracking(&mut self) {
        if self.mode == Mode::Tracking {
            return;
        }
        self.mode = Mode::Tracking;
        self.counters.tracking += 1;
        self.sync.reset();
        self.producer.set_state(LaneState::Tracking);
        self.note_tracking_round();
    }

    /// From here on a write may pass that the stream does not hold: a cut that is being taken must
    /// see it, even if a sync makes up for it before the daemon looks.
    fn note_tracking_round(&self) {
        let memory = self.memory();
        // Relaxed: the write that this is about is issued, and later ones stamped, after this; the
        // daemon's look is ordered by the stamping word and the fences around it.
        memory.producer().tracking_rounds.fetch_add(1, Relaxed);
    }

    /// The disk has been enlarged: the new part is synced. `false`: the lane's map is too small, a
    /// new lane is needed; or the disk would shrink, which nothing downstream could follow.
    pub fn grow(&mut self, capacity_bytes: u64) -> bool {
        let most = self.memory().geometry().max_capacity_bytes();
        if !(self.capacity_bytes..=most).contains(&capacity_bytes) {
            return false;
        }
        if capacity_bytes > self.capacity_bytes {
            self.dirty
                .mark(self.capacity_bytes, capacity_bytes - self.capacity_bytes);
            // A read of the last block under way ends at the old end: publishing it would clear the
            // mark of a block that has become longer.
            let last_block = self.capacity_bytes - self.capacity_bytes % DIRTY_BLOCK_BYTES;
            if holds(Guard::GrowTouches) {
                self.sync.touch(last_block, DIRTY_BLOCK_BYTES);
            }
            self.capacity_bytes = capacity_bytes;
            self.memory()
                .producer()
                .capacity_bytes
                .store(capacity_bytes, Relaxed); // as in `new`
            self.want_sync();
        }
        true
    }

    /// The disk was enlarged while it was closed: the part beyond `old_capacity_bytes` is synced.
    pub fn grown_since(&mut self, old_capacity_bytes: u64) {
        let new = self.capacity_bytes.saturating_sub(old_capacity_bytes);
        self.dirty.mark(old_capacity_bytes, new);
        self.want_sync();
    }

    /// A sync is needed; whoever looks at the lane sees it from now on.
    fn want_sync(&mut self) {
        self.sync.want();
        if self.mode == Mode::Publishing {
            self.producer.set_state(LaneState::Syncing);
        }
    }

    /// The content has changed in a way that no write told (a revert): everything is synced.
    pub fn mark_all(&mut self) {
        self.dirty.mark(0, self.capacity_bytes);
        // What is being read may be the content of before.
        if holds(Guard::RevertTouches) {
            self.sync.touch(0, self.capacity_bytes);
        }
        self.want_sync();
    }

    /// The last call: the disk is closed and nothing is in flight. Returns whether it ended in
    /// order: everything published, nothing marked.
    pub fn close(&mut self) -> bool {
        let clean = self.mode == Mode::Publishing
            && !self.sync.active()
            && self.inflight.is_empty()
            && self.dirty.next_set(0).is_none();
        if clean {
            self.producer.set_state(LaneState::Closed);
        }
        clean
    }
}

#[cfg(test)]
#[path = "driver_tests.rs"]
mod driver_tests;
