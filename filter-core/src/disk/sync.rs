//! Sync: marked blocks are read below the filter and published, never over newer data.
//!
//! Invariant: a SYNC record is published only if no write that overlaps it was in flight when its
//! read began, and none has begun since; both are decided under the disk's lock. A block's mark is
//! cleared only after its record was published, so a kill in between costs a repeat, nothing else.
//!
//! The stream between SYNC_BEGIN and SYNC_END is not consistent; END is published only when nothing
//! is marked, no read is under way and no unpublished write is in flight.

use super::guard::Guard;
use super::hashes::Hash;
use super::{Disk, Mode};
use crate::lane::layout::{DIRTY_BLOCK_BYTES, LaneState};
use crate::lane::producer::{Draft, PublishError, Source, Stamps};
use crate::mutant::{self, holds};
use crate::record::RecordKind;
use alloc::vec::Vec;

/// Names a read of a sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

/// What to do next for the sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncStep {
    /// Nothing is to be synced.
    Idle,
    /// Nothing can be done just now: ask again after a read has come back, or in a little while.
    Wait {
        /// Wake the daemon.
        wake: bool,
        /// How long, in ns, for the guest's sake; 0: it is something else that is waited for.
        after_ns: u64,
    },
    /// Read this range below the filter, then call [`Disk::sync_read`].
    Read {
        /// To be given back.
        ticket: Ticket,
        /// Start, in bytes.
        offset_bytes: u64,
        /// Length, in bytes.
        len_bytes: u64,
        /// Wake the daemon.
        wake: bool,
    },
    /// The sync is complete: the disk streams.
    Finished {
        /// Wake the daemon.
        wake: bool,
    },
}

impl SyncStep {
    const fn waits(wake: bool) -> Self {
        Self::Wait { wake, after_ns: 0 }
    }
}

/// A read under way.
#[derive(Clone, Copy, Debug)]
struct Window {
    ticket: u64,
    offset_bytes: u64,
    len_bytes: u64,
    touched: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Off,
    /// Something is marked, SYNC_BEGIN is not yet published.
    Wanted,
    /// Between SYNC_BEGIN and SYNC_END.
    Begun,
}

/// The sync of one disk.
#[derive(Debug, Default)]
pub(super) struct Sync {
    phase: Phase,
    windows: Vec<Window>,
    next_ticket: u64,
    /// Where the search for the next marked block goes on.
    cursor: u64,
}

impl Sync {
    pub(super) fn want(&mut self) {
        if self.phase == Phase::Off {
            self.phase = Phase::Wanted;
        }
    }

    pub(super) fn active(&self) -> bool {
        self.phase != Phase::Off
    }

    /// Forgets the reads under way and the begun bracket; the marks stay.
    pub(super) fn reset(&mut self) {
        self.windows.clear();
        self.phase = Phase::Off;
    }

    /// A write overlaps these bytes: what is being read there must not be published.
    pub(super) fn touch(&mut self, offset_bytes: u64, len_bytes: u64) {
        for window in &mut self.windows {
            if overlap(window, offset_bytes, len_bytes) {
                window.touched = true;
            }
        }
    }

    fn reading(&self, offset_bytes: u64, len_bytes: u64) -> bool {
        self.windows
            .iter()
            .any(|window| overlap(window, offset_bytes, len_bytes))
    }
}

fn overlap(window: &Window, offset_bytes: u64, len_bytes: u64) -> bool {
    window.offset_bytes < offset_bytes + len_bytes
        && offset_bytes < window.offset_bytes + window.len_bytes
}

/// Marked places that are looked at in one step before giving up for now.
const PROBES: usize = 64;

impl Disk {
    /// Looks after things that no I/O brings about: a restart that the consumer asks for, the way
    /// back from tracking. Call it every now and then, and before [`Disk::sync_step`].
    pub fn tick(&mut self) {
        if self.producer.restart_requested() {
            self.producer.restart();
            self.sync.reset();
            self.hashes.forget(); // the appliance holds nothing that counts
            self.dirty.mark(0, self.capacity_bytes);
            if let Some(intent) = &mut self.intent {
                intent.begin_anew();
            }
            self.mode = Mode::Publishing;
            self.sync.want();
            self.producer.set_state(LaneState::Syncing);
        }
        if self.mode == Mode::Tracking && self.waiting_for_room == 0 && self.has_room_for_sync() {
            self.mode = Mode::Publishing;
            self.sync.want();
            self.producer.set_state(LaneState::Syncing);
        }
    }

    /// Tells the figures that cost a walk over the map to whoever looks at the lane.
    pub fn publish_figures(&self) {
        let memory = self.memory();
        memory
            .producer()
            .dirty_bytes
            .store(self.dirty_bytes(), super::Relaxed); // for status pages
    }

    /// A sync leaves half of the lane to the guest.
    fn has_room_for_sync(&mut self) -> bool {
        self.producer.free_bytes() >= self.memory().geometry().ring_bytes / 2
    }

    /// The next step of the sync.
    pub fn sync_step(&mut self, stamps: &Stamps<'_>) -> SyncStep {
        if self.mode == Mode::Tracking {
            return SyncStep::waits(false);
        }
        if self.changing && holds(mutant::Guard::ChangePausesSync) {
            // What is read now is gone soon: its marks, and so its regions' bits, would be gone too.
            return SyncStep::waits(false);
        }
        let mut wake = false;
        match self.sync.phase {
            Phase::Off => return SyncStep::Idle,
            Phase::Wanted => match self.producer.publish_marker(true, stamps) {
                Ok(group) => {
                    wake = group.wake;
                    self.sync.phase = Phase::Begun;
                    self.producer.set_state(LaneState::Syncing);
                }
                Err(_) => return SyncStep::waits(wake),
            },
            Phase::Begun => {}
        }
        if self.sync.windows.len() >= self.config.sync_reads || !self.has_room_for_sync() {
            return SyncStep::waits(wake);
        }
        let before = self.sync.cursor;
        match self.next_range() {
            Some((offset_bytes, _)) if !self.hashes_ready(offset_bytes) => {
                self.sync.cursor = before;
                let wake = self.question_wakes() || wake;
                SyncStep::waits(wake)
            }
            Some((offset_bytes, len_bytes)) => {
                if let Err(after_ns) = self.pace.take(len_bytes) {
                    self.sync.cursor = before;
                    return SyncStep::Wait { wake, after_ns };
                }
                let ticket = self.sync.next_ticket;
                self.sync.next_ticket += 1;
                let window = Window {
                    ticket,
                    offset_bytes,
                    len_bytes,
                    touched: false,
                };
                self.sync.windows.push(window);
                if !holds(mutant::Guard::ClearAfterPublish) {
                    self.clear(offset_bytes, len_bytes);
                }
                SyncStep::Read {
                    ticket: Ticket(ticket),
                    offset_bytes,
                    len_bytes,
                    wake,
                }
            }
            None if self.dirty.next_set(0).is_none() => self.finish(stamps, wake),
            None => SyncStep::waits(wake),
        }
    }

    /// If the stream starts anew, publishes its beginning; returns whether to wake the daemon.
    pub fn begin_base(&mut self, stamps: &Stamps<'_>) -> Result<bool, PublishError> {
        if !self.producer.base_pending() || !holds(mutant::Guard::BaseFirst) {
            return Ok(false);
        }
        let group = self.producer.publish_marker(true, stamps)?;
        self.sync.phase = Phase::Begun;
        self.producer.set_state(LaneState::Syncing);
        Ok(group.wake)
    }

    fn finish(&mut self, stamps: &Stamps<'_>, wake: bool) -> SyncStep {
        let unpublished = self.inflight.tracked() > 0 && holds(mutant::Guard::SyncEndWaits);
        if !self.sync.windows.is_empty() || unpublished {
            return SyncStep::waits(wake);
        }
        match self.producer.publish_marker(false, stamps) {
            Ok(group) => {
                self.sync.reset();
                self.hashes.forget();
                self.pace.stop();
                self.producer.set_state(LaneState::Streaming);
                SyncStep::Finished {
                    wake: wake || group.wake,
                }
            }
            Err(_) => SyncStep::waits(wake),
        }
    }

    /// The next marked range that nobody writes or reads just now.
    fn next_range(&mut self) -> Option<(u64, u64)> {
        let blocks = self.capacity_bytes.div_ceil(DIRTY_BLOCK_BYTES);
        let mut wrapped = false;
        for _ in 0..PROBES {
            let Some(block) = self
                .dirty
                .next_set(self.sync.cursor)
                .filter(|b| *b < blocks)
            else {
                if wrapped {
                    return None;
                }
                // Marks beyond the end of the disk mean nothing.
                if let Some(beyond) = self.dirty.next_set(blocks) {
                    self.dirty.clear_block(beyond);
                }
                wrapped = true;
                self.sync.cursor = 0;
                continue;
            };
            let most = self.config.sync_read_bytes / DIRTY_BLOCK_BYTES;
            let mut count = 1;
            while count < most && self.dirty.is_set(block + count) && block + count < blocks {
                count += 1;
            }
            self.sync.cursor = block + count;
            let offset = block * DIRTY_BLOCK_BYTES;
            let len = (count * DIRTY_BLOCK_BYTES).min(self.capacity_bytes - offset);
            if !self.is_busy(offset, len) {
                return Some((offset, len));
            }
            // A busy neighbour must not keep a quiet block waiting: try the first block alone.
            let first = DIRTY_BLOCK_BYTES.min(self.capacity_bytes - offset);
            if !self.is_busy(offset, first) {
                self.sync.cursor = block + 1;
                return Some((offset, first));
            }
        }
        None
    }

    /// Whether the range is being read, or written.
    fn is_busy(&self, offset_bytes: u64, len_bytes: u64) -> bool {
        self.sync.reading(offset_bytes, len_bytes)
            || self.config.keeps(Guard::InFlight) && self.inflight.overlaps(offset_bytes, len_bytes)
    }

    /// A read has come back: `data` is the range's content, or `None` if the disk failed it. Returns
    /// whether to wake the daemon.
    pub fn sync_read(&mut self, ticket: Ticket, data: Option<&[u8]>, stamps: &Stamps<'_>) -> bool {
        self.sync_read_hashed(ticket, data, &[], stamps)
    }

    /// The same; `hashes` are those of the range's blocks, in order, as far as they are whole. What the
    /// replica holds already is not published.
    pub fn sync_read_hashed(
        &mut self,
        ticket: Ticket,
        data: Option<&[u8]>,
        hashes: &[Hash],
        stamps: &Stamps<'_>,
    ) -> bool {
        let found = self
            .sync
            .windows
            .iter()
            .position(|window| window.ticket == ticket.0);
        let Some(at) = found else { return false };
        let window = self.sync.windows.swap_remove(at);
        let Some(data) = data.filter(|data| data.len() as u64 == window.len_bytes) else {
            self.counters.sync_read_errors += 1;
            return false;
        };
        if window.touched || self.mode == Mode::Tracking || self.sync.phase != Phase::Begun {
            self.counters.sync_touched += 1;
            return false;
        }
        // Blocks that are to be sent go together, as far as they lie together.
        let mut wake = false;
        let (mut from, mut at) = (0, 0);
        let block_bytes = DIRTY_BLOCK_BYTES as usize;
        while at < data.len() {
            let end = (at + block_bytes).min(data.len());
            let block = (window.offset_bytes + at as u64) / DIRTY_BLOCK_BYTES;
            if self.hashes.holds(block, hashes.get(at / block_bytes)) {
                match self.publish_read(&window, data, from..at, stamps) {
                    Some(group) => wake |= group,
                    None => return wake,
                }
                self.counters.sync_held_bytes += (end - at) as u64;
                self.dirty.clear_block(block);
                from = end;
            }
            at = end;
        }
        wake | self
            .publish_read(&window, data, from..at, stamps)
            .unwrap_or(false)
    }

    /// Publishes a part of what was read, whole blocks, and takes their marks. `None`: no room.
    fn publish_read(
        &mut self,
        window: &Window,
        data: &[u8],
        part: core::ops::Range<usize>,
        stamps: &Stamps<'_>,
    ) -> Option<bool> {
        let offset_bytes = window.offset_bytes + part.start as u64;
        let data = data.get(part).filter(|data| !data.is_empty());
        let Some(data) = data else {
            return Some(false);
        };
        let zeros = data.iter().all(|byte| *byte == 0);
        let source = [Source::from_slice(data)];
        let len_bytes = data.len() as u64;
        let draft = Draft {
            kind: if zeros {
                RecordKind::Zero
            } else {
                RecordKind::Sync
            },
            offset_bytes,
            len_bytes,
            sources: if zeros { &[] } else { &source },
        };
        let group = self.producer.publish(&draft, stamps).ok()?;
        self.counters.sync_bytes += len_bytes;
        if let Some(intent) = &mut self.intent {
            // What was published just now is not durable: its regions are not quiet.
            intent.touch(offset_bytes, len_bytes);
        }
        self.clear(offset_bytes, len_bytes);
        Some(group.wake)
    }

    /// Takes the marks of a range.
    fn clear(&self, offset_bytes: u64, len_bytes: u64) {
        let end = (offset_bytes + len_bytes).div_ceil(DIRTY_BLOCK_BYTES);
        for block in offset_bytes / DIRTY_BLOCK_BYTES..end {
            self.dirty.clear_block(block);
        }
    }
}
