//! What goes along when a disk moves to another host while the appliance does not hold all of it: the
//! dirty map, and the places of what was published but is not durable.
//!
//! Invariant: whatever the replica may lack when the disk is closed lies in a block of the map; so the
//! next host, which finds nobody in between, need not copy whole regions.

use super::Disk;
use crate::lane::layout::DIRTY_BLOCK_BYTES;
use crate::lane::walk;
use crate::sidecar::BLOCK_BYTES;
use crate::sidecar::regions::{BLOCK_REGIONS, BLOCK_WORDS, RegionBlock, blocks_for};
use alloc::vec::Vec;

/// The map's blocks stand for as much as those of the dirty map.
const SHIFT: u32 = DIRTY_BLOCK_BYTES.trailing_zeros();

/// A dirty map that goes along.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handoff {
    bits: Vec<u64>,
}

impl Handoff {
    fn new(capacity_bytes: u64) -> Self {
        let blocks = blocks_for(capacity_bytes, SHIFT) as usize;
        Self {
            bits: alloc::vec![0; blocks * BLOCK_WORDS],
        }
    }

    fn mark(&mut self, offset_bytes: u64, len_bytes: u64) {
        let last = offset_bytes.saturating_add(len_bytes.max(1) - 1) >> SHIFT;
        for block in offset_bytes >> SHIFT..=last {
            match self.bits.get_mut((block / 64) as usize) {
                Some(word) => *word |= 1 << (block % 64),
                None => return, // beyond the disk
            }
        }
    }

    /// Bytes that are marked.
    pub fn marked_bytes(&self) -> u64 {
        let bits: u64 = self
            .bits
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum();
        bits * DIRTY_BLOCK_BYTES
    }

    /// The content of a sidecar that holds it, closed by the attach of this epoch.
    pub fn encode(&self, disk_id: &[u8; 16], attach_epoch: u32) -> Vec<u8> {
        let (words, _) = self.bits.as_chunks::<BLOCK_WORDS>();
        let mut out = Vec::with_capacity(words.len() * BLOCK_BYTES);
        for (index, bits) in words.iter().enumerate() {
            let block = RegionBlock {
                index: index as u32,
                shift: SHIFT,
                generation: attach_epoch.into(),
                durable_seq: 0,
                bits: *bits,
            };
            out.extend_from_slice(&block.encode(disk_id));
        }
        out
    }

    /// And back. `None`: it is not whole, or of another disk or attach.
    pub fn decode(
        raw: &[u8],
        disk_id: &[u8; 16],
        attach_epoch: u32,
        capacity_bytes: u64,
    ) -> Option<Self> {
        let (blocks, rest) = raw.as_chunks::<BLOCK_BYTES>();
        if !rest.is_empty() || blocks.len() as u64 != blocks_for(capacity_bytes, SHIFT) {
            return None;
        }
        let mut bits = Vec::with_capacity(blocks.len() * BLOCK_WORDS);
        for (index, raw) in blocks.iter().enumerate() {
            let block =
                RegionBlock::decode(raw, disk_id, index as u32, u64::from(attach_epoch) % 2)?;
            if block.generation != u64::from(attach_epoch) || block.shift != SHIFT {
                return None;
            }
            bits.extend_from_slice(&block.bits);
        }
        Some(Self { bits })
    }
}

impl Disk {
    /// What the next host must copy, when the disk is closed with nothing in flight. `None`: nothing,
    /// the appliance holds all of it. `Some(None)`: that cannot be told any closer than by regions.
    pub fn handoff(&mut self) -> Option<Option<Handoff>> {
        let delivered = self.durable_seq() == self.producer.published().seq();
        if delivered && self.is_settled() {
            return None;
        }
        if !self.inflight.is_empty() || self.producer.base_pending() {
            return Some(None);
        }
        let mut map = Handoff::new(self.capacity_bytes);
        let mut from = 0;
        while let Some(block) = self.dirty.next_set(from) {
            map.mark(block * DIRTY_BLOCK_BYTES, 1);
            from = block + 1;
        }
        let tail = self.producer.tail();
        let walked = walk::undelivered(self.memory(), tail, |offset, len| map.mark(offset, len));
        Some(walked.ok().map(|()| map))
    }

    /// Of a disk that starts with its regions: only these blocks of them are to be copied.
    pub fn only_handed_over(&mut self, map: &Handoff) {
        self.dirty.clear_all();
        for (at, word) in map.bits.iter().enumerate() {
            for bit in (0..64).filter(|bit| word & (1 << bit) != 0) {
                let offset_bytes = (at as u64 * 64 + bit) * DIRTY_BLOCK_BYTES;
                if offset_bytes < self.capacity_bytes {
                    self.dirty.mark(offset_bytes, 1);
                }
            }
        }
    }
}

const _: () = assert!(BLOCK_REGIONS == 64 * BLOCK_WORDS as u64);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_map_comes_back_for_the_same_disk_and_attach_only() {
        let capacity = 3 * (BLOCK_REGIONS << SHIFT);
        let mut map = Handoff::new(capacity);
        map.mark(0, 1);
        map.mark(65_535, 2);
        map.mark(capacity - 1, 1);
        map.mark(capacity, 1);
        assert_eq!(map.marked_bytes(), 3 * DIRTY_BLOCK_BYTES);
        let raw = map.encode(&[4; 16], 7);
        assert_eq!(Handoff::decode(&raw, &[4; 16], 7, capacity), Some(map));
        assert_eq!(Handoff::decode(&raw, &[4; 16], 9, capacity), None);
        assert_eq!(Handoff::decode(&raw, &[5; 16], 7, capacity), None);
        assert_eq!(Handoff::decode(&raw, &[4; 16], 7, capacity * 2), None);
        assert_eq!(Handoff::decode(&raw[4096..], &[4; 16], 7, capacity), None);
        let mut torn = raw.clone();
        torn[5000] ^= 1;
        assert_eq!(Handoff::decode(&torn, &[4; 16], 7, capacity), None);
    }
}
