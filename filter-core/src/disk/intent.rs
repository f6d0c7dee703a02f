//! Region intent: which regions of the disk may differ from the replica, as the sidecar has it.
//!
//! Invariant: before a change is passed down, the bit of each region that it touches is durable in the
//! sidecar; a bit is cleared only when no change of its region is in flight, nothing in it is marked,
//! all that was published of it is durable downstream, and the disk below was flushed since. So after
//! a crash of the host, when lane and dirty map are gone, the set bits name all that may differ.
//!
//! Bits are written a block of 4 KiB at a time: all that are wanted while a block is being written go
//! into the next one. Time is divided into periods; only a region that was left alone for a whole one
//! is looked at.
//!
//! The sum of the blocks' generations tells a sidecar from an earlier state of itself: see [`crate::lineage`].

mod of_disk;

use crate::mutant::{Guard, holds};
use crate::sidecar::regions::{BLOCK_REGIONS, BLOCK_WORDS, RegionBlock, map_generation};
use crate::sidecar::{BLOCK_BYTES, SidecarError};
use alloc::boxed::Box;
use alloc::vec::Vec;

/// What is to be done for the region map next.
#[derive(Debug, PartialEq, Eq)]
pub enum IntentStep {
    /// Nothing, or something is under way.
    Idle,
    /// Write these bytes to the sidecar, then call [`super::Disk::intent_written`].
    Write {
        /// Where in the sidecar, in bytes.
        offset_bytes: u64,
        /// A block.
        bytes: Box<[u8; BLOCK_BYTES]>,
    },
    /// Flush the disk below the filter, then call [`super::Disk::intent_flushed`].
    Flush,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    /// Of the last write that was begun, or a failed one's and more: the next is above.
    generation: u64,
    /// What the sidecar has.
    durable_generation: u64,
    /// By how much the next write goes beyond the next generation: a change passed before it.
    skip: u64,
    durable_seq: u64,
    /// A bit that is wanted is not in the sidecar.
    wants: bool,
    /// A bit that is not wanted any more is in the sidecar.
    clears: bool,
}

#[derive(Debug)]
struct Writing {
    index: usize,
    bits: [u64; BLOCK_WORDS],
    generation: u64,
    /// It goes beyond the next generation by so much.
    skip: u64,
    /// Some of them are not in the sidecar yet.
    sets: bool,
}

/// By how much a change that passes before the sidecar has its bits raises what is told: more than all
/// other writes of the map could meanwhile. Even, since a generation's copy is its remainder by 2.
const LATE_SKIP: u64 = 1 << 24;

/// What the map needs to know to clear bits.
pub(super) struct Progress<'a> {
    /// A monotonic clock, ns.
    pub(super) now_ns: u64,
    /// Last seq published.
    pub(super) published_seq: u64,
    /// Last seq that is durable downstream.
    pub(super) durable_seq: u64,
    /// Whether something in `[offset, offset + len)` is marked or in flight.
    pub(super) busy: &'a dyn Fn(u64, u64) -> bool,
}

/// The region map of one disk.
#[derive(Debug)]
pub struct Intent {
    disk_id: [u8; 16],
    shift: u32,
    /// The sidecar has the bit, and no write that clears it has begun.
    durable: Vec<u64>,
    /// The sidecar is to have the bit.
    wanted: Vec<u64>,
    /// Changed, or published by a sync, in this period.
    touched: Vec<u64>,
    /// The same of the period before.
    touched_before: Vec<u64>,
    blocks: Vec<Block>,
    /// Sum of the generations that the sidecar has.
    durable_generation: u64,
    /// What an appliance is to know: the sum with which the newest bit was set.
    told_generation: u64,
    writing: Option<Writing>,
    /// Regions that a flush is under way for.
    flushing: Option<Vec<u64>>,
    period_end_ns: u64,
    /// Last seq published when this period began, and when the one before did.
    period_seqs: (u64, u64),
    /// The last write of a block failed: nothing is cleared until one succeeds.
    failing: bool,
    /// A block in which something has changed since any block was written.
    changed: Option<usize>,
    /// Bits are cleared after so much quiet, in ns.
    period_ns: u64,
}

impl Intent {
    /// The map as the sidecar has it.
    pub fn load(
        disk_id: [u8; 16],
        found: &[RegionBlock],
        period_ns: u64,
    ) -> Result<Self, SidecarError> {
        let shift = found.first().ok_or(SidecarError::Damaged)?.shift;
        let wanted: Vec<u64> = found.iter().flat_map(|block| block.bits).collect();
        let blocks = found.iter().map(|block| Block {
            generation: block.generation,
            durable_generation: block.generation,
            skip: 0,
            durable_seq: block.durable_seq,
            wants: false,
            clears: false,
        });
        let generation = map_generation(found);
        Ok(Self {
            disk_id,
            shift,
            durable: wanted.clone(),
            touched: wanted.clone(),
            touched_before: wanted.clone(),
            wanted,
            blocks: blocks.collect(),
            durable_generation: generation,
            told_generation: generation,
            writing: None,
            flushing: None,
            period_end_ns: 0,
            period_seqs: (u64::MAX, u64::MAX),
            failing: false,
            changed: None,
            period_ns,
        })
    }

    /// A map with every bit wanted and none in the sidecar, whatever the sidecar holds: `found` has the
    /// blocks of it that are whole. Write all of it before anything is passed.
    pub fn full(
        disk_id: [u8; 16],
        shift: u32,
        count: u32,
        found: &[RegionBlock],
        period_ns: u64,
    ) -> Self {
        let words = count as usize * BLOCK_WORDS;
        let newest = found
            .iter()
            .map(|block| block.generation)
            .max()
            .unwrap_or(0);
        let block = Block {
            generation: newest,
            durable_generation: 0,
            skip: 0,
            durable_seq: 0,
            wants: true,
            clears: false,
        };
        Self {
            disk_id,
            shift,
            durable: alloc::vec![0; words],
            wanted: alloc::vec![u64::MAX; words],
            touched: alloc::vec![u64::MAX; words],
            touched_before: alloc::vec![u64::MAX; words],
            blocks: alloc::vec![block; count as usize],
            durable_generation: 0,
            told_generation: 0,
            writing: None,
            flushing: None,
            period_end_ns: 0,
            period_seqs: (u64::MAX, u64::MAX),
            failing: false,
            changed: None,
            period_ns,
        }
    }

    /// The largest disk that the map has bits for, in bytes.
    pub fn max_capacity_bytes(&self) -> u64 {
        (self.blocks.len() as u64 * BLOCK_REGIONS) << self.shift
    }

    /// The seq up to which a receiver must hold everything for the clear bits to mean anything; 0:
    /// none is clear.
    pub fn relies_on_seq(&self) -> u64 {
        self.blocks
            .iter()
            .map(|block| block.durable_seq)
            .max()
            .unwrap_or(0)
    }

    /// Bytes of the regions whose bit is wanted.
    pub fn wanted_bytes(&self) -> u64 {
        let bits: u64 = self
            .wanted
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum();
        bits << self.shift
    }

    /// The wanted regions, as ranges of the disk in bytes.
    pub fn wanted_ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        ranges(&self.wanted, self.shift)
    }

    /// The map's generation: what the appliance is to be told, what the sidecar has.
    pub const fn generations(&self) -> (u64, u64) {
        (self.told_generation, self.durable_generation)
    }

    /// A change of this range passes before the sidecar has its bits: until it has them, it is to count
    /// as one from before.
    pub(super) fn pass_late(&mut self, offset_bytes: u64, len_bytes: u64) {
        for (at, mask) in masks(offset_bytes, len_bytes, self.shift) {
            let missing = self.durable.get(at).is_some_and(|has| has & mask != mask);
            if let Some(block) = self.blocks.get_mut(at / BLOCK_WORDS)
                && missing
            {
                block.skip = LATE_SKIP;
            }
        }
        self.tell_late();
    }

    /// Changes may have passed, nobody knows where, before the sidecar had their bits.
    pub(super) fn all_late(&mut self) {
        self.want_all();
        for block in &mut self.blocks {
            block.skip = LATE_SKIP;
        }
        self.tell_late();
    }

    fn tell_late(&mut self) {
        let waiting: u64 = self.blocks.iter().map(|block| block.skip).sum();
        let under_way = self.writing.as_ref().map_or(0, |writing| writing.skip);
        let once_there = self.durable_generation + waiting + under_way;
        self.told_generation = self.told_generation.max(once_there);
    }

    /// Whether a wanted bit is not in the sidecar yet.
    pub fn is_pending(&self) -> bool {
        let under_way = self.writing.as_ref().is_some_and(|writing| writing.sets);
        under_way || self.blocks.iter().any(|block| block.wants)
    }

    fn is_due(&self, now_ns: u64) -> bool {
        let waits = self.blocks.iter().any(|block| block.wants || block.clears);
        let period = self.flushing.is_none() && now_ns >= self.period_end_ns;
        self.writing.is_none() && (waits || period)
    }

    /// Whether the last write of a block failed.
    pub const fn is_failing(&self) -> bool {
        self.failing
    }

    /// Before the disk is opened: writes every block that waits. Ends at the first error.
    pub fn write_all<E>(
        &mut self,
        mut write: impl FnMut(u64, &[u8; BLOCK_BYTES]) -> Result<(), E>,
    ) -> Result<(), E> {
        while let Some(IntentStep::Write {
            offset_bytes,
            bytes,
        }) = self.next_write()
        {
            let result = write(offset_bytes, &bytes);
            self.written(result.is_ok());
            result?;
        }
        Ok(())
    }

    /// Before the disk is opened: the part from `old_capacity_bytes` on was never seen.
    pub fn want_beyond(&mut self, old_capacity_bytes: u64, capacity_bytes: u64) {
        if capacity_bytes > old_capacity_bytes {
            self.want(old_capacity_bytes, capacity_bytes - old_capacity_bytes);
        }
    }

    /// Wants the bits of a range. Whether the sidecar has them all: then the change may pass.
    pub(super) fn want(&mut self, offset_bytes: u64, len_bytes: u64) -> bool {
        let mut all = true;
        for (at, mask) in masks(offset_bytes, len_bytes, self.shift) {
            let (Some(wanted), Some(durable)) = (self.wanted.get_mut(at), self.durable.get(at))
            else {
                break; // beyond the map: capacity is checked at open and grow
            };
            *wanted |= mask;
            if durable & mask != mask {
                all = false;
                if let Some(block) = self.blocks.get_mut(at / BLOCK_WORDS) {
                    block.wants = true;
                }
            }
        }
        all
    }

    /// Something in the range has changed, or was published: it is not quiet.
    pub(super) fn touch(&mut self, offset_bytes: u64, len_bytes: u64) {
        for (at, mask) in masks(offset_bytes, len_bytes, self.shift) {
            match self.touched.get_mut(at) {
                Some(word) => *word |= mask,
                None => break,
            }
            self.changed = Some(at / BLOCK_WORDS);
        }
    }

    /// Some bit may be missing, nobody knows which: every one is wanted.
    pub(super) fn want_all(&mut self) {
        self.wanted.fill(u64::MAX);
        self.touched.fill(u64::MAX);
        for block in &mut self.blocks {
            block.wants = true;
        }
    }

    /// A new stream begins, of which nothing is durable: every bit is wanted.
    pub(super) fn begin_anew(&mut self) {
        self.want_all();
        for block in &mut self.blocks {
            block.durable_seq = 0;
        }
    }

    /// The disk is closed, and all of it is durable downstream and below: no bit is needed.
    pub(super) fn want_none(&mut self, durable_seq: u64) {
        self.wanted.fill(0);
        for block in &mut self.blocks {
            block.clears = true;
            block.wants = false;
            block.durable_seq = block.durable_seq.max(durable_seq);
        }
    }

    /// The next step.
    pub(super) fn step(&mut self, progress: &Progress<'_>) -> IntentStep {
        if self.writing.is_some() {
            return IntentStep::Idle;
        }
        if let Some(write) = self.next_write() {
            return write;
        }
        if self.flushing.is_none() && progress.now_ns >= self.period_end_ns {
            return self.end_period(progress);
        }
        IntentStep::Idle
    }

    fn next_write(&mut self) -> Option<IntentStep> {
        let wants = self.blocks.iter().position(|block| block.wants);
        let index = wants.or_else(|| self.blocks.iter().position(|block| block.clears))?;
        let block = self.blocks.get_mut(index)?;
        (block.wants, block.clears) = (false, false);
        let words = index * BLOCK_WORDS..(index + 1) * BLOCK_WORDS;
        let mut bits = [0; BLOCK_WORDS];
        bits.copy_from_slice(self.wanted.get(words.clone())?);
        let mut sets = false;
        // From now on what this write clears may be gone.
        for (durable, bit) in self.durable.get_mut(words)?.iter_mut().zip(bits) {
            sets |= bit & !*durable != 0;
            *durable &= bit;
        }
        self.changed = None;
        let skip = core::mem::take(&mut block.skip);
        let generation = block.generation + skip + 1;
        let encoded = RegionBlock {
            index: index as u32,
            shift: self.shift,
            generation,
            durable_seq: block.durable_seq,
            bits,
        };
        self.writing = Some(Writing {
            index,
            bits,
            generation,
            skip,
            sets,
        });
        Some(IntentStep::Write {
            offset_bytes: encoded.offset_bytes(),
            bytes: Box::new(encoded.encode(&self.disk_id)),
        })
    }

    /// The write that was asked for has ended.
    pub(super) fn written(&mut self, ok: bool) {
        let Some(Writing {
            index,
            bits,
            generation,
            skip,
            sets,
        }) = self.writing.take()
        else {
            return;
        };
        let Some(block) = self.blocks.get_mut(index) else {
            return;
        };
        self.failing = !ok;
        if !ok {
            // The copy may be torn: the next write goes there again, and leaves the whole one alone.
            block.generation = generation + 1;
            block.skip = block.skip.max(skip);
            block.wants = true;
            return;
        }
        self.durable_generation += generation - block.durable_generation;
        (block.generation, block.durable_generation) = (generation, generation);
        if sets {
            self.told_generation = self.told_generation.max(self.durable_generation);
        }
        let words = index * BLOCK_WORDS..(index + 1) * BLOCK_WORDS;
        if let Some(durable) = self.durable.get_mut(words) {
            durable.copy_from_slice(&bits);
        }
    }

    /// Looks for regions that were left alone for a whole period.
    fn end_period(&mut self, progress: &Progress<'_>) -> IntentStep {
        let (this, before) = self.period_seqs;
        let mut quiet = alloc::vec![0u64; self.wanted.len()];
        let mut any = false;
        // While a bit waits to be set (or the sidecar fails) none is cleared: a stream that has begun
        // anew must not be said to be relied on before the map is the one of that stream.
        let durable = before <= progress.durable_seq || !holds(Guard::IntentClearDurable);
        if durable && !self.failing && !self.is_pending() {
            for (at, word) in quiet.iter_mut().enumerate() {
                let of = |map: &[u64]| map.get(at).copied().unwrap_or(0);
                let left_alone = of(&self.wanted)
                    & of(&self.durable)
                    & !of(&self.touched)
                    & !of(&self.touched_before);
                *word = self.not_busy(at, left_alone, progress);
                any |= *word != 0;
            }
        }
        self.mark_period();
        core::mem::swap(&mut self.touched, &mut self.touched_before);
        self.touched.fill(0);
        self.period_seqs = (progress.published_seq, this);
        self.period_end_ns = progress.now_ns.saturating_add(self.period_ns);
        if !any {
            return IntentStep::Idle;
        }
        self.flushing = Some(quiet);
        IntentStep::Flush
    }

    /// Sees to it that the sidecar is written after each period in which something changed: a copy that was
    /// made before is told from the disk by that, as long as the lane is there.
    fn mark_period(&mut self) {
        if let Some(at) = self.changed.take()
            && let Some(block) = self.blocks.get_mut(at)
        {
            block.clears = true;
        }
    }

    /// The bits of a word whose regions hold nothing that is marked or in flight.
    fn not_busy(&self, at: usize, mut bits: u64, progress: &Progress<'_>) -> u64 {
        let mut left = bits;
        while left != 0 {
            let bit = left.trailing_zeros();
            left &= left - 1;
            let region = at as u64 * 64 + u64::from(bit);
            let busy = (progress.busy)(region << self.shift, 1 << self.shift);
            if busy && holds(Guard::IntentClearBusy) {
                bits &= !(1 << bit);
            }
        }
        bits
    }

    /// The flush that was asked for has ended: what is still quiet is cleared.
    pub(super) fn flushed(&mut self, ok: bool, progress: &Progress<'_>) {
        let Some(quiet) = self.flushing.take() else {
            return;
        };
        if !ok || self.failing || self.is_pending() {
            return;
        }
        for (at, candidates) in quiet.into_iter().enumerate() {
            let touched = self.touched.get(at).copied().unwrap_or(u64::MAX);
            let cleared = self.not_busy(at, candidates & !touched, progress);
            if cleared == 0 {
                continue;
            }
            if let Some(wanted) = self.wanted.get_mut(at) {
                *wanted &= !cleared;
            }
            if let Some(block) = self.blocks.get_mut(at / BLOCK_WORDS) {
                block.clears = true;
                block.durable_seq = block.durable_seq.max(progress.durable_seq);
            }
        }
    }
}

/// The words and bits of a range.
fn masks(offset_bytes: u64, len_bytes: u64, shift: u32) -> impl Iterator<Item = (usize, u64)> {
    let first = offset_bytes >> shift;
    let last = offset_bytes.saturating_add(len_bytes.max(1) - 1) >> shift;
    (first / 64..=last / 64).map(move |word| {
        let mut mask = u64::MAX;
        if word == first / 64 {
            mask &= u64::MAX << (first % 64);
        }
        if word == last / 64 {
            mask &= u64::MAX >> (63 - last % 64);
        }
        (word as usize, mask)
    })
}

fn ranges(map: &[u64], shift: u32) -> impl Iterator<Item = (u64, u64)> + '_ {
    map.iter().enumerate().flat_map(move |(at, word)| {
        (0..64)
            .filter(move |bit| word & (1 << bit) != 0)
            .map(move |bit| ((at as u64 * 64 + bit) << shift, 1 << shift))
    })
}

#[cfg(test)]
#[path = "intent_tests.rs"]
mod tests;
