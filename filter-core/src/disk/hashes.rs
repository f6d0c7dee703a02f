//! Blocks that the replica holds already: a sync after a crash asks for their hashes, and sends only
//! what differs.
//!
//! Invariant: a block's mark is cleared unsent only if its content, read with no write of it in flight
//! and none begun since, has the hash that the replica's block had at some moment after the sync began.
//! That is sound whatever was published meanwhile: replica and disk get the same writes from here on,
//! and a write that both have already changes neither. It is not once the disk has got a change that was
//! not published (tracked, failed, a revert): that may have brought a block back to what the replica
//! held before a record that is still on its way. Then no hash counts any more.
//!
//! Without answers (no daemon, an appliance that does not know) everything is sent.

use super::{Disk, Relaxed};
use crate::lane::layout::{DIRTY_BLOCK_BYTES, HASH_BYTES, LaneMemory};
use crate::lane::sync::Ordering::{Acquire, Release};
use crate::mutant::{Guard, holds};
use alloc::vec::Vec;

/// The first bytes of a block's SHA-256; zeros: not known.
pub type Hash = [u8; HASH_BYTES];

/// Blocks that are asked for at once: those of a region of the usual length.
const WINDOW_BLOCKS: u64 = 64;
/// Looks for an answer, about a millisecond apart, before the sync goes on without.
const PATIENCE: u32 = 30_000;

#[derive(Debug)]
struct Known {
    first_block: u64,
    hashes: Vec<Hash>,
}

/// What one disk's sync knows of the replica.
#[derive(Debug, Default)]
pub(super) struct Hashes {
    wanted: bool,
    /// The question that is under way: its number, its first block.
    asked: Option<(u32, u64)>,
    known: Option<Known>,
    /// The daemon, if it sleeps, is still to be woken for the question.
    unheard: bool,
    looks: u32,
}

impl Hashes {
    /// A sync that may find much of what it reads in the replica.
    pub(super) fn want(&mut self) {
        self.wanted = true;
    }

    /// The sync has ended, or the replica is known to hold nothing.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// The disk has got a change that the replica does not get.
    pub(super) fn unpublished_change(&mut self) {
        if holds(Guard::HashesForgotten) {
            self.forget();
        }
    }

    /// Whether the sync may go on to a block: its hash is known, or will not be. A question that is asked
    /// because of it is noted.
    fn ready(&mut self, memory: LaneMemory, block: u64, end_block: u64) -> bool {
        if !self.wanted {
            return true;
        }
        let covers =
            |known: &Known| (known.first_block..known.first_block + WINDOW_BLOCKS).contains(&block);
        if self.known.as_ref().is_some_and(covers) {
            return true;
        }
        if let Some((ask, first_block)) = self.asked {
            let consumer = memory.consumer();
            if consumer.hash_answer.load(Acquire) == ask {
                // pairs with the consumer's Release
                let count = consumer.hash_count.load(Relaxed); // ordered by the Acquire just before
                self.known = Some(Known {
                    first_block,
                    hashes: read_page(memory, count),
                });
                (self.asked, self.looks) = (None, 0);
                return self.ready(memory, block, end_block);
            }
            self.looks += 1;
            if self.looks > PATIENCE {
                self.forget();
                return true;
            }
            return false;
        }
        // Nobody would answer; and what was published could not leave the lane either.
        if memory.consumer().linked.load(Relaxed) == 0 {
            return false;
        }
        self.ask(memory, block - block % WINDOW_BLOCKS, end_block);
        false
    }

    fn ask(&mut self, memory: LaneMemory, first_block: u64, end_block: u64) {
        let words = memory.producer();
        let blocks = WINDOW_BLOCKS.min(end_block.saturating_sub(first_block));
        words
            .hash_offset
            .store(first_block * DIRTY_BLOCK_BYTES, Relaxed); // published by the Release below
        words.hash_blocks.store(blocks as u32, Relaxed); // published by the Release below
        let ask = words.hash_ask.load(Relaxed).wrapping_add(1); // our own word
        words.hash_ask.store(ask, Release); // pairs with the consumer's Acquire
        (self.asked, self.known, self.unheard) = (Some((ask, first_block)), None, true);
    }

    /// Whether the replica holds a block with this content.
    pub(super) fn holds(&self, block: u64, found: Option<&Hash>) -> bool {
        let Some(known) = self.known.as_ref().filter(|_| self.wanted) else {
            return false;
        };
        let at = block.checked_sub(known.first_block);
        let theirs = at.and_then(|at| known.hashes.get(usize::try_from(at).ok()?));
        found.is_some_and(|ours| *ours != [0; HASH_BYTES] && theirs == Some(ours))
    }
}

fn read_page(memory: LaneMemory, count: u32) -> Vec<Hash> {
    let (pairs, _) = memory.hash_words().as_chunks::<2>();
    let hash = |[low, high]: &[_; 2]| {
        let word = |word: &crate::lane::sync::AtomicU64| word.load(Relaxed).to_le_bytes(); // ordered by the answer's Acquire
        let mut hash = [0; HASH_BYTES];
        hash[..8].copy_from_slice(&word(low));
        hash[8..].copy_from_slice(&word(high));
        hash
    };
    pairs.iter().take(count as usize).map(hash).collect()
}

impl Disk {
    /// Whether [`Disk::sync_read_hashed`] can make use of hashes: one for each whole block.
    pub const fn wants_hashes(&self) -> bool {
        self.hashes.wanted && self.hashes.known.is_some()
    }

    /// Whether the sync may read this range now: what the replica holds of it is known, or nobody can
    /// tell.
    pub(super) fn hashes_ready(&mut self, offset_bytes: u64) -> bool {
        let memory = self.memory();
        // A block that the disk's end cuts short is always sent.
        let end_block = self.capacity_bytes / DIRTY_BLOCK_BYTES;
        let block = offset_bytes / DIRTY_BLOCK_BYTES;
        block >= end_block || self.hashes.ready(memory, block, end_block)
    }

    /// Whether the daemon is to be woken for a question that was just asked. It looks for one after it has
    /// said that it sleeps, and this looks for that after it has asked: one of them sees the other.
    pub(super) fn question_wakes(&mut self) -> bool {
        core::mem::take(&mut self.hashes.unheard) && self.producer.consumer_sleeps()
    }
}
