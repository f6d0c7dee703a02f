//! What the filter does with a disk's writes, as a state machine without I/O, clock or threads.
//!
//! Invariant: before a write is passed down, it is either published in the lane or marked in the
//! dirty map, its regions' bits are durable in the sidecar, and it stands in the in-flight table until
//! its completion was seen. Two changes that overlap are never in flight together: which of them the
//! disk does last nobody could tell. A write is deferred for at most the budget; then the disk tracks
//! instead. Replication never fails a write.
//!
//! | file | holds |
//! |---|---|
//! | this one | the modes, writes and their completion |
//! | [`ack`] | write-through: completions that wait for the appliance's log |
//! | [`cut_hold`] | completions that wait for a cut over several hosts |
//! | [`guard`] | the guards against a lost write, by name |
//! | [`handoff`] | what goes along to another host |
//! | [`hashes`] | what the replica holds already |
//! | [`intent`] | which regions the sidecar says may differ |
//! | [`latency`] | how long the guest's I/Os take |
//! | [`pace`] | how fast a sync may be, for the guest's sake |
//! | [`sync`] | reading marked blocks and publishing them, never over newer data |
//! | `values` | what a disk is asked, and what it answers |
//!
//! The caller holds the disk's lock around every call, and carries out what is returned: passes or
//! defers the I/O, wakes the daemon, reads a block below the filter.

pub mod ack;
pub mod cut_hold;
pub mod guard;
pub mod handoff;
pub mod hashes;
pub mod intent;
pub mod latency;
pub mod pace;
pub mod sync;
mod values;

use crate::lane::dirty::DirtyMap;
use crate::lane::inflight::{InFlight, Token};
use crate::lane::layout::{DIRTY_BLOCK_BYTES, LaneMemory, LaneState};
use crate::lane::opening;
use crate::lane::producer::{Draft, Producer, PublishError, PublishedGroup, Stamps};
use crate::lane::sync::Ordering::Relaxed;
use crate::lineage::{Attach, Lineage};
use crate::mutant::{self, holds};
use crate::record::RecordKind;
use guard::Guard;
use hashes::Hashes;
use intent::Intent;
use pace::{Met, Pace};
use sync::Sync;
pub use values::{Change, Completed, Config, Counters, Decision, Start, Why};

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
    /// Changes that the caller holds, and those of them that wait for room.
    deferred: usize,
    waiting_for_room: usize,
    sync: Sync,
    /// The content is about to change behind the filter.
    changing: bool,
    pace: Pace,
    hashes: Hashes,
    intent: Option<Intent>,
    counters: Counters,
}

impl Disk {
    /// Takes over a lane. `producer` stands where the scan at attach ended. `intent`: the region map,
    /// durable in the sidecar as it is; without one (a host without sidecars) every crash of the host
    /// must be followed by a full sync.
    pub fn new(
        mut producer: Producer,
        capacity_bytes: u64,
        start: Start,
        mut intent: Option<Intent>,
        config: Config,
    ) -> Self {
        let memory = producer.memory();
        let dirty = DirtyMap::new(memory);
        // Relaxed: whoever wrote it is gone
        if memory.producer().intent_late.load(Relaxed) != 0
            && let Some(intent) = &mut intent
        {
            intent.all_late();
        }
        if start == Start::Marked && config.keeps(Guard::Leftovers) {
            InFlight::leftovers(memory, dirty);
        }
        let inflight = InFlight::new(memory);
        memory
            .producer()
            .capacity_bytes
            .store(capacity_bytes, Relaxed); // for the daemon's hello
        let (mut sync, mut hashes) = (Sync::default(), Hashes::default());
        match (start, &intent) {
            (Start::Regions, Some(intent)) if intent.relies_on_seq() > 0 => {
                dirty.clear_all();
                for (offset_bytes, len_bytes) in intent.wanted_ranges() {
                    let len_bytes = len_bytes.min(capacity_bytes.saturating_sub(offset_bytes));
                    dirty.mark(offset_bytes, len_bytes);
                }
                producer.start_base(intent.relies_on_seq());
                if config.sync_hashes {
                    hashes.want();
                }
            }
            (Start::Full | Start::Regions, _) => {
                dirty.clear_all();
                dirty.mark(0, capacity_bytes);
                producer.start_base(0);
            }
            (Start::Marked | Start::Clean, _) => {}
        }
        if start != Start::Clean {
            sync.want();
        }
        // A fresh lane stays so until its beginning is published: nobody is to look at it before.
        let word = memory.producer().state.load(Relaxed); // our own word
        if !(producer.base_pending() && word == LaneState::Fresh as u32) {
            producer.set_state(if start == Start::Clean {
                LaneState::Streaming
            } else {
                LaneState::Syncing
            });
        }
        let counters = Counters::default();
        let mode = Mode::Publishing;
        let disk = Self {
            producer,
            dirty,
            inflight,
            config,
            mode,
            changing: false,
            capacity_bytes,
            deferred: 0,
            waiting_for_room: 0,
            sync,
            pace: Pace::new(config.pace),
            hashes,
            intent,
            counters,
        };
        disk.tell_generation();
        disk
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

    /// How the sync goes, for figures.
    pub const fn pace(&self) -> &Pace {
        &self.pace
    }

    /// Tells the sync what the guest's I/Os met, so that it yields; without this it goes as fast as
    /// it can. Call it before [`Disk::sync_step`], with monotonic time.
    pub fn observe(&mut self, now_ns: u64, met: &Met) {
        if self.sync.active() {
            self.pace.observe(now_ns, met);
        }
    }

    /// Whether a sync wants to know how late timers are: see [`pace::PROBE_NS`].
    pub fn watches_timers(&self) -> bool {
        self.sync.active() && self.mode != Mode::Tracking && self.pace.watches()
    }

    /// Whether changes are held by the caller.
    pub const fn has_deferred(&self) -> bool {
        self.deferred > 0
    }

    /// A change on its way down.
    pub fn start(&mut self, change: &Change<'_>, stamps: &Stamps<'_>) -> Decision {
        // Whoever came first goes first: else a steady stream of small writes could keep a large
        // one out until its budget ends.
        let decided = if self.mode == Mode::Publishing && self.waiting_for_room > 0 {
            Err(Why::Room)
        } else {
            self.try_pass(change, stamps, false)
        };
        decided.unwrap_or_else(|why| {
            self.deferred += 1;
            self.waiting_for_room += usize::from(why == Why::Room);
            self.counters.deferred += 1;
            Decision::Defer(why)
        })
    }

    /// A change that was deferred `waited_ns` ago, for the reason given last.
    pub fn retry(
        &mut self,
        change: &Change<'_>,
        stamps: &Stamps<'_>,
        waited_ns: u64,
        why: Why,
    ) -> Decision {
        let late = waited_ns >= self.config.defer_budget_ns;
        let decided = match self.try_pass(change, stamps, late) {
            Err(Why::Room) if late && holds(mutant::Guard::DeferBudget) => {
                self.enter_tracking();
                Ok(self.track(change))
            }
            decided => decided,
        };
        self.waiting_for_room -= usize::from(why == Why::Room && self.waiting_for_room > 0);
        match decided {
            Ok(pass) => {
                self.deferred = self.deferred.saturating_sub(1);
                self.counters.deferred_max_ns = self.counters.deferred_max_ns.max(waited_ns);
                pass
            }
            Err(why) => {
                self.waiting_for_room += usize::from(why == Why::Room);
                Decision::Defer(why)
            }
        }
    }

    /// The caller gave up a change that it held for this reason.
    pub fn forget_deferred(&mut self, why: Why) {
        self.deferred = self.deferred.saturating_sub(1);
        self.waiting_for_room -= usize::from(why == Why::Room && self.waiting_for_room > 0);
    }

    /// Passes the change if nothing stands against it. `late`: its budget is used up.
    fn try_pass(
        &mut self,
        change: &Change<'_>,
        stamps: &Stamps<'_>,
        late: bool,
    ) -> Result<Decision, Why> {
        if !self.has_intent(change, late) {
            return Err(Why::Intent);
        }
        if self
            .inflight
            .overlaps(change.offset_bytes, change.len_bytes)
        {
            if !late {
                return Err(Why::Overlap);
            }
            // The disk is slow. The place is read again when both are done.
            self.note_tracking_round();
            self.want_sync();
            return Ok(self.track(change));
        }
        self.try_publish(change, stamps)
    }

    /// Whether the sidecar has the bits of the regions that the change touches.
    fn has_intent(&mut self, change: &Change<'_>, late: bool) -> bool {
        let Some(intent) = &mut self.intent else {
            return true;
        };
        let there = intent.want(change.offset_bytes, change.len_bytes);
        if there || !holds(mutant::Guard::IntentFirst) {
            return true;
        }
        if !late || self.config.intent_strict {
            return false;
        }
        intent.pass_late(change.offset_bytes, change.len_bytes);
        self.counters.intent_late += 1;
        self.tell_generation();
        // If this process dies before the sidecar has the bits, the next one must know.
        self.memory().producer().intent_late.store(1, Relaxed); // read after this process died
        true
    }

    /// Publishes the change, or marks it where that is what must happen.
    fn try_publish(&mut self, change: &Change<'_>, stamps: &Stamps<'_>) -> Result<Decision, Why> {
        if self.mode == Mode::Tracking {
            return Ok(self.track(change));
        }
        // After a restart the appliance takes nothing that comes before the stream's new beginning.
        // (A wake-up is not lost with a deferral: the consumer of a full lane waits for the appliance.)
        let begun = self.begin_base(stamps).map_err(|_| Why::Room)?;
        // The slot before the tail: a kill between the two leaves a slot too many, never one too few.
        let token = self.enter(change, false);
        let draft = Draft {
            kind: change.kind,
            offset_bytes: change.offset_bytes,
            len_bytes: change.len_bytes,
            sources: change.sources,
        };
        match self.producer.publish(&draft, stamps) {
            Ok(PublishedGroup { wake, last }) => {
                self.inflight.published(token, last.seq());
                self.touch(change.offset_bytes, change.len_bytes);
                let wake = wake || begun;
                Ok(Decision::Pass { token, wake })
            }
            Err(PublishError::Full { .. }) => {
                self.inflight.remove(token);
                Err(Why::Room)
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

    /// A change touches this range: what is being read of it is stale, its regions are not quiet.
    fn touch(&mut self, offset_bytes: u64, len_bytes: u64) {
        if self.config.keeps(Guard::Touch) {
            self.sync.touch(offset_bytes, len_bytes);
        }
        if let Some(intent) = &mut self.intent {
            intent.touch(offset_bytes, len_bytes);
        }
    }

    /// Marks a change instead of publishing it: the first of two marks.
    fn track(&mut self, change: &Change<'_>) -> Decision {
        self.hashes.unpublished_change();
        if self.config.keeps(Guard::FirstMark) {
            self.dirty.mark(change.offset_bytes, change.len_bytes);
        }
        self.touch(change.offset_bytes, change.len_bytes);
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
        let seq = self.inflight.seq(token);
        let Some((offset_bytes, len_bytes, tracked)) = self.inflight.remove(token) else {
            return Completed::default();
        };
        let mut completed = Completed {
            seq,
            ..Completed::default()
        };
        if tracked || !ok {
            self.hashes.unpublished_change();
            // The second mark: a sync may have cleared the first and read the block before the
            // write landed.
            let keeps = if ok {
                self.config.keeps(Guard::SecondMark)
            } else {
                holds(mutant::Guard::FailedWriteMark)
            };
            if keeps {
                self.dirty.mark(offset_bytes, len_bytes);
            }
            self.touch(offset_bytes, len_bytes);
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

    /// A completion went on that a cut over several hosts relies on to be held: a cut that is being taken
    /// must not be.
    pub fn tear_cut(&self) {
        self.note_tracking_round();
    }

    /// The disk has been enlarged: the new part is synced. The sidecar must have its regions' bits
    /// before it is told of the new capacity. `false`: the lane's map is too small, a
    /// new lane is needed; or the disk would shrink, which nothing downstream could follow.
    pub fn grow(&mut self, capacity_bytes: u64) -> bool {
        let mapped = self
            .intent
            .as_ref()
            .map_or(u64::MAX, Intent::max_capacity_bytes);
        let most = self.memory().geometry().max_capacity_bytes().min(mapped);
        if !(self.capacity_bytes..=most).contains(&capacity_bytes) {
            return false;
        }
        if capacity_bytes > self.capacity_bytes {
            self.dirty
                .mark(self.capacity_bytes, capacity_bytes - self.capacity_bytes);
            // A read of the last block under way ends at the old end: publishing it would clear the
            // mark of a block that has become longer.
            let last_block = self.capacity_bytes - self.capacity_bytes % DIRTY_BLOCK_BYTES;
            if holds(mutant::Guard::GrowTouches) {
                self.sync.touch(last_block, DIRTY_BLOCK_BYTES);
            }
            self.intend(self.capacity_bytes, capacity_bytes - self.capacity_bytes);
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
        if new > 0 {
            self.dirty.mark(old_capacity_bytes, new);
            self.intend(old_capacity_bytes, new);
            self.want_sync();
        }
    }

    /// What is marked in this range without a change of the guest's needs its regions' bits too.
    fn intend(&mut self, offset_bytes: u64, len_bytes: u64) {
        if let Some(intent) = &mut self.intent
            && len_bytes > 0
        {
            intent.want(offset_bytes, len_bytes);
            intent.touch(offset_bytes, len_bytes);
        }
    }

    /// Whether the appliance knows of another opening with this lane's epoch or a newer one: another
    /// host has attached, or disk and sidecar were rolled back.
    pub fn is_fenced(&self) -> bool {
        let fenced = self.memory().consumer().fenced_epoch.load(Relaxed); // looked at again and again
        fenced != 0 && fenced >= self.producer.attach_epoch()
    }

    /// The epoch was raised in the sidecar, since disk and sidecar had been rolled back: everything is
    /// synced, once the consumer has asked for the restart that the new epoch makes it ask for. The stream
    /// then begins above `above_seq`, so that no number stands for two records: what was published by an
    /// opening that is forgotten may still be under way, acknowledged, or awaited by a cut.
    pub fn rise(&mut self, attach_epoch: u32, above_seq: u64) {
        self.mark_all();
        let memory = self.memory();
        let (before, _) = opening::told(memory);
        let attach = Attach {
            epoch: attach_epoch,
            ..before
        };
        opening::tell(memory, &attach, &Lineage::anew(attach_epoch));
        self.producer.rise(attach_epoch, above_seq);
        self.tell_generation();
    }

    /// A sync is needed; whoever looks at the lane sees it from now on.
    fn want_sync(&mut self) {
        self.sync.want();
        if self.mode == Mode::Publishing {
            self.producer.set_state(LaneState::Syncing);
        }
    }

    /// The content is about to change in a way that no write tells (a revert): everything is marked, and
    /// stays so until [`Disk::change_ends`]. Take the steps of [`Disk::intent_step`] until nothing is
    /// pending, then let it change.
    pub fn change_begins(&mut self) {
        self.mark_all();
        self.changing = true;
    }

    /// The content has changed, or will not: what is marked is synced from now on.
    pub fn change_ends(&mut self, has_changed: bool) {
        self.changing = false;
        if has_changed {
            self.mark_all();
        }
    }

    /// The content has changed, nobody knows where: everything is synced.
    fn mark_all(&mut self) {
        self.hashes.unpublished_change();
        self.dirty.mark(0, self.capacity_bytes);
        self.intend(0, self.capacity_bytes);
        // What is being read may be the content of before.
        if holds(mutant::Guard::RevertTouches) {
            self.sync.touch(0, self.capacity_bytes);
        }
        self.want_sync();
    }

    /// How often the lane's stream has begun anew on the daemon's request.
    pub fn beginnings(&self) -> u32 {
        self.memory().producer().restart_done.load(Relaxed) // our own word
    }

    /// Everything is published, nothing is marked, nothing is in flight.
    pub fn is_settled(&self) -> bool {
        self.mode == Mode::Publishing
            && !self.sync.active()
            && !self.producer.base_pending()
            && self.inflight.is_empty()
            && self.dirty.next_set(0).is_none()
    }

    /// The last call: the disk is closed and nothing is in flight. Returns whether it ended in order.
    pub fn close(&mut self) -> bool {
        let clean = self.is_settled();
        if clean {
            self.producer.set_state(LaneState::Closed);
        }
        clean
    }
}

#[cfg(test)]
#[path = "driver_tests.rs"]
mod driver_tests;
