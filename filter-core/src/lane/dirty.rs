//! The dirty map: which blocks of the disk the replica may not have.
//!
//! Invariant: a set bit is cleared only after the block's content was published, under the disk's
//! lock. The map lies in the lane's mapping: it outlives the VM's process.

use super::layout::{DIRTY_BLOCK_BYTES, LaneMemory};
use super::sync::Ordering::Relaxed;

/// A view of a lane's dirty map. One process writes it (the producer's).
#[derive(Clone, Copy, Debug)]
pub struct DirtyMap {
    memory: LaneMemory,
}

impl DirtyMap {
    /// The map of a lane.
    pub const fn new(memory: LaneMemory) -> Self {
        Self { memory }
    }

    /// Sets the bit of every block that `[offset_bytes, offset_bytes + len_bytes)` touches. Blocks
    /// beyond the map's end are ignored: capacity is checked against the map at attach and grow.
    pub fn mark(&self, offset_bytes: u64, len_bytes: u64) {
        if len_bytes == 0 {
            return;
        }
        let words = self.memory.dirty_words();
        let first = offset_bytes / DIRTY_BLOCK_BYTES;
        let last = offset_bytes.saturating_add(len_bytes - 1) / DIRTY_BLOCK_BYTES;
        let (first_word, last_word) = ((first / 64) as usize, (last / 64) as usize);
        for (at, word) in words
            .iter()
            .enumerate()
            .take(last_word + 1)
            .skip(first_word)
        {
            let mut mask = u64::MAX;
            if at == first_word {
                mask &= u64::MAX << (first % 64);
            }
            if at == last_word {
                mask &= u64::MAX >> (63 - last % 64);
            }
            // Relaxed: one process, ordered by its disk lock; after a kill memory is coherent.
            word.fetch_or(mask, Relaxed);
        }
    }

    /// Whether a block that the range touches is marked.
    pub fn any(&self, offset_bytes: u64, len_bytes: u64) -> bool {
        let end = offset_bytes
            .saturating_add(len_bytes)
            .div_ceil(DIRTY_BLOCK_BYTES);
        let words = self.memory.dirty_words();
        let mut block = offset_bytes / DIRTY_BLOCK_BYTES;
        while block < end {
            let Some(word) = words.get((block / 64) as usize) else {
                return false;
            };
            let mut mask = u64::MAX << (block % 64);
            let next = (block / 64 + 1) * 64;
            if next > end {
                mask &= u64::MAX >> (next - end);
            }
            // Relaxed: see `mark`
            if word.load(Relaxed) & mask != 0 {
                return true;
            }
            block = next;
        }
        false
    }

    /// Whether the bit of a block is set.
    pub fn is_set(&self, block: u64) -> bool {
        let word = self.memory.dirty_words().get((block / 64) as usize);
        word.is_some_and(|word| word.load(Relaxed) & (1 << (block % 64)) != 0) // Relaxed: see `mark`
    }

    /// Clears the bit of one block.
    pub fn clear_block(&self, block: u64) {
        if let Some(word) = self.memory.dirty_words().get((block / 64) as usize) {
            word.fetch_and(!(1 << (block % 64)), Relaxed); // Relaxed: see `mark`
        }
    }

    /// Clears everything.
    pub fn clear_all(&self) {
        for word in self.memory.dirty_words() {
            word.store(0, Relaxed); // Relaxed: see `mark`
        }
    }

    /// The first set block at or after `from`, or `None`.
    pub fn next_set(&self, from: u64) -> Option<u64> {
        let words = self.memory.dirty_words();
        let mut at = (from / 64) as usize;
        let mut mask = u64::MAX << (from % 64);
        while let Some(word) = words.get(at) {
            let bits = word.load(Relaxed) & mask; // Relaxed: see `mark`
            if bits != 0 {
                return Some(at as u64 * 64 + u64::from(bits.trailing_zeros()));
            }
            mask = u64::MAX;
            at += 1;
        }
        None
    }

    /// Number of set bits.
    pub fn count(&self) -> u64 {
        // Relaxed: a figure for status pages.
        self.memory
            .dirty_words()
            .iter()
            .map(|w| u64::from(w.load(Relaxed).count_ones()))
            .sum()
    }
}

#[cfg(test)]
#[path = "dirty_tests.rs"]
mod tests;
