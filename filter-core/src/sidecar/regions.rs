//! The region map of a sidecar: which regions of the disk may differ from the replica.
//!
//! Invariant: a block is believed only if its CRC matches, it is of this disk and it lies where its
//! index and generation say. Of its two copies only the older is ever written. If both are whole the
//! newer counts. If one is not, nobody can tell a write that was cut off (the other copy is right) from
//! a whole one that was damaged later (the other copy lacks bits that were relied on): then every bit of
//! the block counts as set.
//!
//! A block of 4 KiB, little-endian:
//!
//! | at | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `jdrREGN1` |
//! | 8 | 16 | the disk's id |
//! | 24 | 4 | index of the block |
//! | 28 | 4 | a region's length is 2 to the power of this, in bytes |
//! | 32 | 8 | generation: +1 a write; the copy is generation mod 2 |
//! | 40 | 8 | seq up to which all that its clear bits stand for is durable downstream |
//! | 48 | 12 | reserved, zero |
//! | 60 | 4 | CRC32C of all other bytes |
//! | 64 | 4032 | a bit for each region, the first of a byte its lowest |

use super::{BLOCK_BYTES, SidecarError};
use crate::crc::crc32c;
use crate::mutant::{Guard, holds};
use crate::record::{le_u32, le_u64};
use alloc::vec::Vec;

/// Regions of one block.
pub const BLOCK_REGIONS: u64 = 8 * (BLOCK_BYTES - HEADER_BYTES) as u64;
/// Words of one block's bits.
pub const BLOCK_WORDS: usize = (BLOCK_BYTES - HEADER_BYTES) / 8;
/// The default region: 4 MiB.
pub const DEFAULT_REGION_SHIFT: u32 = 22;
/// The smallest region, which is one block of the dirty map, and the largest.
pub const REGION_SHIFTS: core::ops::RangeInclusive<u32> = 16..=36;
/// Largest generation of a block: the sum over all blocks of a map fits in 64 bits.
const MAX_GENERATION: u64 = 1 << 48;
const HEADER_BYTES: usize = 64;
const CRC_AT: usize = 60;
const MAGIC: u64 = u64::from_le_bytes(*b"jdrREGN1");

/// One block of the map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionBlock {
    /// Which one.
    pub index: u32,
    /// A region's length, as a power of two.
    pub shift: u32,
    /// +1 a write.
    pub generation: u64,
    /// Everything that the clear bits stand for is durable downstream up to this seq.
    pub durable_seq: u64,
    /// A bit for each region.
    pub bits: [u64; BLOCK_WORDS],
}

impl RegionBlock {
    /// Where in the sidecar this generation is written, in bytes.
    pub const fn offset_bytes(&self) -> u64 {
        offset_of(self.index, self.generation)
    }

    /// The bytes to write there.
    pub fn encode(&self, disk_id: &[u8; 16]) -> [u8; BLOCK_BYTES] {
        let mut out = [0u8; BLOCK_BYTES];
        out[0..8].copy_from_slice(&MAGIC.to_le_bytes());
        out[8..24].copy_from_slice(disk_id);
        out[24..28].copy_from_slice(&self.index.to_le_bytes());
        out[28..32].copy_from_slice(&self.shift.to_le_bytes());
        out[32..40].copy_from_slice(&self.generation.to_le_bytes());
        out[40..48].copy_from_slice(&self.durable_seq.to_le_bytes());
        let (targets, _) = out[HEADER_BYTES..].as_chunks_mut::<8>();
        for (target, word) in targets.iter_mut().zip(self.bits) {
            *target = word.to_le_bytes();
        }
        let crc = crc_of(&out);
        out[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads one copy. `None`: it is not whole, or not this disk's, or lies elsewhere.
    pub fn decode(
        raw: &[u8; BLOCK_BYTES],
        disk_id: &[u8; 16],
        index: u32,
        copy: u64,
    ) -> Option<Self> {
        let mut bits = [0; BLOCK_WORDS];
        let (sources, _) = raw[HEADER_BYTES..].as_chunks::<8>();
        for (word, source) in bits.iter_mut().zip(sources) {
            *word = u64::from_le_bytes(*source);
        }
        let block = Self {
            index: le_u32(raw, 24),
            shift: le_u32(raw, 28),
            generation: le_u64(raw, 32),
            durable_seq: le_u64(raw, 40),
            bits,
        };
        let whole = le_u64(raw, 0) == MAGIC && le_u32(raw, CRC_AT) == crc_of(raw);
        let placed = raw[8..24] == *disk_id && block.index == index && block.generation % 2 == copy;
        let sane = REGION_SHIFTS.contains(&block.shift)
            && block.durable_seq <= crate::position::MAX_SEQ
            && block.generation <= MAX_GENERATION;
        (whole && placed && sane).then_some(block)
    }
}

fn crc_of(raw: &[u8; BLOCK_BYTES]) -> u32 {
    crc32c(crc32c(0, &raw[..CRC_AT]), &raw[CRC_AT + 4..])
}

/// Where a block's copy of this generation lies: the two copies of a block are neighbours.
const fn offset_of(index: u32, generation: u64) -> u64 {
    (2 + 2 * index as u64 + generation % 2) * BLOCK_BYTES as u64
}

/// Blocks that a disk of this capacity needs.
pub const fn blocks_for(capacity_bytes: u64, shift: u32) -> u64 {
    capacity_bytes.div_ceil(1 << shift).div_ceil(BLOCK_REGIONS)
}

/// Generation of a whole map: any write of any block raises it.
pub fn map_generation(blocks: &[RegionBlock]) -> u64 {
    blocks.iter().map(|block| block.generation).sum()
}

/// Reads the map out of a whole sidecar of `raw` bytes: `count` blocks.
///
/// A block of which only one copy is whole has all its bits. `Damaged`: a block has no whole copy. Blocks of different region lengths do not fit together.
pub fn decode(
    raw: &[u8],
    disk_id: &[u8; 16],
    count: u32,
) -> Result<Vec<RegionBlock>, SidecarError> {
    let (all, _) = raw.as_chunks::<BLOCK_BYTES>();
    let mut blocks: Vec<RegionBlock> = Vec::new();
    for index in 0..count {
        let at = 2 + 2 * index as usize;
        let copies = (0..2).filter_map(|copy| {
            let block = all.get(at + copy)?;
            RegionBlock::decode(block, disk_id, index, copy as u64)
        });
        let whole: Vec<RegionBlock> = copies.collect();
        let doubted = whole.len() < 2 && holds(Guard::MapCopyDoubted);
        let newest = whole.into_iter().max_by_key(|block| block.generation);
        let mut block = newest.ok_or(SidecarError::Damaged)?;
        if doubted {
            block.bits = [u64::MAX; BLOCK_WORDS];
        }
        if blocks
            .first()
            .is_some_and(|first| first.shift != block.shift)
        {
            return Err(SidecarError::Damaged);
        }
        blocks.push(block);
    }
    Ok(blocks)
}

#[cfg(test)]
#[path = "regions_tests.rs"]
mod tests;
