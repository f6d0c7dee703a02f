//! The in-flight table: writes that were passed down and have not completed.
//!
//! Invariant: a slot is filled before its write is published or passed down, and emptied after its
//! completion was seen. So after the VM's process was killed, the occupied slots (and the blocks
//! marked because the table was full) are all of the disk that may differ from what was published.

use super::dirty::DirtyMap;
use super::layout::{LaneMemory, PAGE_BYTES};
use super::sync::Ordering::Relaxed;
use alloc::vec::Vec;

/// Slots of the table.
pub const SLOTS: usize = PAGE_BYTES / 16;

/// What the producer remembers of a write in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token(u32);

impl Token {
    /// The token as a number that a shell can keep with the I/O.
    pub const fn to_word(self) -> u64 {
        self.0 as u64 + 1
    }

    /// The token for such a number; `None` for 0 (no token) and for what cannot be one.
    pub fn from_word(word: u64) -> Option<Self> {
        let index = u32::try_from(word.checked_sub(1)?).ok()?;
        Some(Self(index))
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    offset_bytes: u64,
    len_bytes: u64,
    /// Not published: must be marked again at completion.
    tracked: bool,
    used: bool,
    /// The last record that it was published in; 0: none.
    seq: u64,
    /// Where it stands in the list of used entries.
    place: u32,
}

/// The private list of writes in flight, its first [`SLOTS`] entries mirrored into the lane.
#[derive(Debug)]
pub struct InFlight {
    memory: LaneMemory,
    entries: Vec<Entry>,
    /// Unused entries that are mirrored: they go first, since any other costs a mark and a sync.
    free: Vec<u32>,
    /// Unused entries beyond the table.
    spare: Vec<u32>,
    /// Used entries, in no order: few of many, and looked through for every change.
    used: Vec<u32>,
    tracked: usize,
}

impl InFlight {
    /// An empty list; the lane's table is emptied too, so take [`InFlight::leftovers`] first.
    pub fn new(memory: LaneMemory) -> Self {
        for word in memory.inflight_words() {
            word.store(0, Relaxed); // Relaxed: one process writes, ordered by its disk lock
        }
        let entries = alloc::vec![Entry::default(); SLOTS];
        let free = (0..SLOTS as u32).rev().collect();
        Self {
            memory,
            entries,
            free,
            spare: Vec::new(),
            used: Vec::new(),
            tracked: 0,
        }
    }

    /// Ranges that a killed producer left in flight, marked into `dirty`. Returns how many.
    pub fn leftovers(memory: LaneMemory, dirty: DirtyMap) -> usize {
        let mut count = 0;
        for pair in memory.inflight_words().chunks_exact(2) {
            let [offset, len] = pair else { continue };
            let (offset, len) = (offset.load(Relaxed), len.load(Relaxed)); // Relaxed: writer is dead
            if len != 0 {
                dirty.mark(offset, len);
                count += 1;
            }
        }
        count
    }

    /// Adds a write. `false`: the table's slots are used up, so the caller must mark the range, else
    /// a kill would lose sight of it.
    pub fn add(&mut self, offset_bytes: u64, len_bytes: u64, tracked: bool) -> (Token, bool) {
        let unused = self.free.pop().or_else(|| self.spare.pop());
        let index = unused.unwrap_or_else(|| {
            self.entries.push(Entry::default());
            self.entries.len() as u32 - 1
        });
        if let Some(entry) = self.entries.get_mut(index as usize) {
            *entry = Entry {
                offset_bytes,
                len_bytes,
                tracked,
                used: true,
                seq: 0,
                place: self.used.len() as u32,
            };
        }
        self.used.push(index);
        self.tracked += usize::from(tracked);
        let mirrored = (index as usize) < SLOTS;
        if mirrored {
            self.mirror(index as usize, offset_bytes, len_bytes);
        }
        (Token(index), mirrored)
    }

    /// Takes a write out; returns its (offset, length, tracked), or `None` for an unknown token.
    pub fn remove(&mut self, token: Token) -> Option<(u64, u64, bool)> {
        let entry = self.entries.get_mut(token.0 as usize)?;
        if !entry.used {
            return None;
        }
        let gone = *entry;
        *entry = Entry::default();
        self.used.swap_remove(gone.place as usize);
        let moved = self.used.get(gone.place as usize);
        if let Some(entry) = moved.and_then(|index| self.entries.get_mut(*index as usize)) {
            entry.place = gone.place;
        }
        self.tracked -= usize::from(gone.tracked);
        if (token.0 as usize) < SLOTS {
            self.free.push(token.0);
            self.mirror(token.0 as usize, 0, 0);
        } else {
            self.spare.push(token.0);
        }
        Some((gone.offset_bytes, gone.len_bytes, gone.tracked))
    }

    /// The write was published, up to this record.
    pub fn published(&mut self, token: Token, seq: u64) {
        if let Some(entry) = self.entries.get_mut(token.0 as usize) {
            entry.seq = seq;
        }
    }

    /// The last record that a write in flight was published in, if it was.
    pub fn seq(&self, token: Token) -> Option<u64> {
        let entry = self.entries.get(token.0 as usize)?;
        (entry.used && entry.seq != 0).then_some(entry.seq)
    }

    /// Whether any write in flight touches the range.
    pub fn overlaps(&self, offset_bytes: u64, len_bytes: u64) -> bool {
        let end = offset_bytes + len_bytes;
        let mut used = self
            .used
            .iter()
            .filter_map(|index| self.entries.get(*index as usize));
        used.any(|e| e.offset_bytes < end && offset_bytes < e.offset_bytes + e.len_bytes)
    }

    /// Writes in flight that were not published.
    pub const fn tracked(&self) -> usize {
        self.tracked
    }

    /// Writes in flight.
    pub fn len(&self) -> usize {
        self.used.len()
    }

    /// Whether nothing is in flight.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn mirror(&self, slot: usize, offset_bytes: u64, len_bytes: u64) {
        let words = self.memory.inflight_words();
        if let (Some(offset), Some(len)) = (words.get(slot * 2), words.get(slot * 2 + 1)) {
            // The length says whether the slot counts: it goes first when emptied, last when filled,
            // so a kill between the two stores leaves an empty slot, whose write was not yet passed.
            if len_bytes == 0 {
                len.store(0, Relaxed); // Relaxed: read only after this process died
                offset.store(0, Relaxed); // Relaxed: as above
            } else {
                offset.store(offset_bytes, Relaxed); // Relaxed: as above
                len.store(len_bytes, Relaxed); // Relaxed: as above
            }
        }
    }
}

#[cfg(test)]
#[path = "inflight_tests.rs"]
mod tests;
