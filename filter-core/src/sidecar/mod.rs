//! What the filter keeps beside a disk: its identity, its attach epoch, how it was left.
//!
//! Invariant: the epoch only grows, and is durable before any I/O of that attach; of the two copies
//! the newer whole one counts, and only the older is ever written, so a torn write costs nothing.
//!
//! Blocks of 4 KiB: two copies of the header, then two copies of each block of the region map
//! ([`regions`]). The header, little-endian:
//!
//! | at | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `jdrSIDE1` |
//! | 8 | 4 | version, 3 |
//! | 12 | 4 | flags: 1 = closed in order; 2 = replication was given up after a defect |
//! | 16 | 8 | generation: +1 a write; the copy is generation mod 2 |
//! | 24 | 16 | the disk's id, made at attach |
//! | 40 | 16 | boot id of the host that wrote it |
//! | 56 | 4 | attach epoch; 0: never opened |
//! | 60 | 4 | blocks of the region map |
//! | 64 | 8 | seq floor: a new lane starts above it |
//! | 72 | 8 | content id that the host gave at the last attach; 0: it could not tell |
//! | 80 | 8 | capacity whose regions' bits the map has |
//! | 88 | 8 | number of the last attach, as no other has it |
//! | 96 | 4 | attach epoch in which the stream began anew last |
//! | 100 | 4 | how many of the attaches before it are listed, at most 32 |
//! | 104 | 640 | of each, the newest first: epoch (4), number (8), generation of the region map that was found after it (8); then zeros |
//! | 744 | 4 | CRC32C of the 744 bytes before |
//!
//! What the list of attaches is for: [`crate::lineage`].

pub mod regions;

use crate::crc::crc32c;
use crate::lineage::{Attach, Lineage, MAX_ANCESTORS};
use crate::mutant::{Guard, holds};
use crate::record::{le_u32, le_u64};

/// Bytes of one copy.
pub const BLOCK_BYTES: usize = 4096;
/// Bytes of the two headers, with which every sidecar begins.
pub const HEADERS_BYTES: usize = 2 * BLOCK_BYTES;
/// Most blocks of a region map: a sidecar is at most 256 MiB long.
pub const MAX_REGION_BLOCKS: u32 = (1 << 15) - 1;
/// How far the seq floor is raised when a new lane is made: more records than a lane ever carries.
pub const SEQ_STRIDE: u64 = 1 << 40;
const MAGIC: u64 = u64::from_le_bytes(*b"jdrSIDE1");
const VERSION: u32 = 3;
/// What the CRC covered before version 3.
const COVERED_BEFORE: usize = 88;
const LINEAGE_AT: usize = 104;
const ANCESTOR_BYTES: usize = 20;
const COVERED: usize = LINEAGE_AT + MAX_ANCESTORS * ANCESTOR_BYTES;

/// Why a sidecar cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SidecarError {
    /// Neither copy is whole.
    #[error("neither copy of the sidecar is whole")]
    Damaged,
    /// Another program wrote it.
    #[error("the sidecar has version {0}, this program knows {VERSION}")]
    Version(u32),
    /// The epochs or seqs are used up.
    #[error("the sidecar's attach epochs or sequence numbers are used up: detach and attach again")]
    Exhausted,
}

impl SidecarError {
    /// Whether an older program wrote it, whose sidecars are replaced.
    pub const fn is_older(&self) -> bool {
        matches!(self, Self::Version(version) if *version < VERSION)
    }
}

/// How a disk is opened, as the sidecar is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opening {
    /// The host's boot.
    pub boot_id: [u8; 16],
    /// What the host calls the disk's content from now on; 0: it cannot tell.
    pub content_id: u64,
    /// A number that no other opening has.
    pub attach_id: u64,
    /// A lane is made.
    pub new_lane: bool,
    /// Generation of the region map as it was found. `None`: the stream begins anew, relying on nothing.
    pub found_generation: Option<u64>,
}

/// The content of a sidecar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sidecar {
    /// +1 a write.
    pub generation: u64,
    /// The disk.
    pub disk_id: [u8; 16],
    /// The boot in which it was written.
    pub boot_id: [u8; 16],
    /// Epoch of the last attach.
    pub attach_epoch: u32,
    /// A new lane starts above this seq.
    pub seq_floor: u64,
    /// Blocks of the region map.
    pub region_blocks: u32,
    /// The disk's capacity, as far as the region map knows of it, in bytes.
    pub capacity_bytes: u64,
    /// What the host called the disk's content at the last attach; 0: it could not tell.
    pub content_id: u64,
    /// Number of the last attach.
    pub attach_id: u64,
    /// The attaches before it.
    pub lineage: Lineage,
    /// The disk was closed in order.
    pub closed: bool,
    /// Replication was given up after a defect: the disk may have changed unseen.
    pub failed: bool,
}

impl Sidecar {
    /// Of a disk that comes under protection.
    pub const fn new(disk_id: [u8; 16], region_blocks: u32) -> Self {
        Self {
            generation: 0,
            disk_id,
            boot_id: [0; 16],
            attach_epoch: 0,
            seq_floor: 0,
            region_blocks,
            capacity_bytes: 0,
            content_id: 0,
            attach_id: 0,
            lineage: Lineage::anew(0),
            closed: false,
            failed: false,
        }
    }

    /// What to write for an attach; it must be durable before the first I/O. With a new lane its first
    /// seq is `seq_floor + 1` of the *old* value, and the floor is raised past it.
    pub fn attached(&self, opening: &Opening) -> Result<Self, SidecarError> {
        let Opening {
            boot_id,
            content_id,
            attach_id,
            new_lane,
            found_generation,
        } = *opening;
        let attach_epoch = self
            .attach_epoch
            .checked_add(1)
            .ok_or(SidecarError::Exhausted)?;
        let seq_floor = if new_lane && holds(Guard::FloorRaised) {
            self.seq_floor + SEQ_STRIDE
        } else {
            self.seq_floor
        };
        if seq_floor > crate::position::MAX_SEQ / 4 {
            return Err(SidecarError::Exhausted);
        }
        let (closed, failed, generation) = (false, false, self.generation + 1);
        let lineage = match found_generation {
            Some(generation) if self.attach_epoch > 0 => self.lineage.child(Attach {
                epoch: self.attach_epoch,
                id: self.attach_id,
                generation,
            }),
            _ => Lineage::anew(attach_epoch),
        };
        Ok(Self {
            boot_id,
            content_id,
            attach_id,
            lineage,
            attach_epoch,
            seq_floor,
            closed,
            failed,
            generation,
            ..*self
        })
    }

    /// What to write once the region map has the bits of everything up to this capacity.
    pub const fn grown(&self, capacity_bytes: u64) -> Self {
        Self {
            capacity_bytes,
            generation: self.generation + 1,
            ..*self
        }
    }

    /// What to write when the appliance has seen a newer epoch than this one although nobody attached
    /// since: disk and sidecar were rolled back.
    pub fn risen(&self, above_epoch: u32) -> Result<Self, SidecarError> {
        let attach_epoch = above_epoch
            .max(self.attach_epoch)
            .checked_add(1)
            .ok_or(SidecarError::Exhausted)?;
        // Each opening that was forgotten may have had a lane of its own, and this one is above them all.
        let openings = match holds(Guard::FloorRisen) {
            true => u64::from(attach_epoch - self.attach_epoch),
            false => 0,
        };
        let seq_floor = openings
            .checked_mul(SEQ_STRIDE)
            .and_then(|seqs| self.seq_floor.checked_add(seqs))
            .filter(|floor| *floor <= crate::position::MAX_SEQ / 4)
            .ok_or(SidecarError::Exhausted)?;
        Ok(Self {
            attach_epoch,
            seq_floor,
            lineage: Lineage::anew(attach_epoch),
            generation: self.generation + 1,
            ..*self
        })
    }

    /// After [`Sidecar::risen`]: no stream of an opening that was forgotten has come to this seq.
    pub const fn above_forgotten(&self) -> u64 {
        self.seq_floor.saturating_sub(SEQ_STRIDE)
    }

    /// What to write when the sidecar may hold an older state.
    pub const fn again(&self) -> Self {
        Self {
            generation: self.generation + 1,
            ..*self
        }
    }

    /// What to write at a close.
    pub const fn closed(&self, in_order: bool) -> Self {
        Self {
            closed: in_order,
            generation: self.generation + 1,
            ..*self
        }
    }

    /// What to write after a defect.
    pub const fn failed(&self) -> Self {
        Self {
            failed: true,
            closed: false,
            generation: self.generation + 1,
            ..*self
        }
    }

    /// Whether a lane of `lane_epoch` found in boot `boot_id` belongs to this sidecar: its epoch is
    /// the last attach's; or the one before, if that attach died (in this very boot) between
    /// writing the sidecar and the lane, before it passed any I/O. A lane from before the stream was
    /// to begin anew does not belong to it.
    pub fn matches_lane(&self, lane_epoch: u32, boot_id: &[u8; 16]) -> bool {
        let same = lane_epoch == self.attach_epoch;
        let died_between = lane_epoch.checked_add(1) == Some(self.attach_epoch);
        let since_root = lane_epoch >= self.lineage.root_epoch();
        let ours = ((same || died_between) && since_root) || !holds(Guard::LaneOfThisAttach);
        !self.failed && self.boot_id == *boot_id && ours
    }

    /// Whether nobody can have changed the disk without its filter's noticing, as far as the sidecar
    /// and the host know: it was opened before, no defect stopped replication, and the content is
    /// still what the last attach opened. `content_before`: what it was called before this opening.
    pub fn is_trusted(&self, content_before: u64) -> bool {
        let same = self.content_id == 0
            || content_before == 0
            || self.content_id == content_before
            || !holds(Guard::FullWhenChanged);
        self.attach_epoch > 0 && !self.failed && same
    }

    /// Bytes of the whole sidecar.
    pub const fn total_bytes(&self) -> u64 {
        total_bytes(self.region_blocks)
    }

    /// Where in the sidecar this generation is written, in bytes.
    pub const fn offset_bytes(&self) -> u64 {
        (self.generation % 2) * BLOCK_BYTES as u64
    }

    /// The block to write there.
    pub fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut out = [0u8; BLOCK_BYTES];
        out[0..8].copy_from_slice(&MAGIC.to_le_bytes());
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        let flags = u32::from(self.closed) | u32::from(self.failed) << 1;
        out[12..16].copy_from_slice(&flags.to_le_bytes());
        out[16..24].copy_from_slice(&self.generation.to_le_bytes());
        out[24..40].copy_from_slice(&self.disk_id);
        out[40..56].copy_from_slice(&self.boot_id);
        out[56..60].copy_from_slice(&self.attach_epoch.to_le_bytes());
        out[60..64].copy_from_slice(&self.region_blocks.to_le_bytes());
        out[64..72].copy_from_slice(&self.seq_floor.to_le_bytes());
        out[72..80].copy_from_slice(&self.content_id.to_le_bytes());
        out[80..88].copy_from_slice(&self.capacity_bytes.to_le_bytes());
        out[88..96].copy_from_slice(&self.attach_id.to_le_bytes());
        out[96..100].copy_from_slice(&self.lineage.root_epoch().to_le_bytes());
        let ancestors = self.lineage.ancestors();
        out[100..104].copy_from_slice(&(ancestors.len() as u32).to_le_bytes());
        let (places, _) = out[LINEAGE_AT..COVERED].as_chunks_mut::<ANCESTOR_BYTES>();
        for (place, ancestor) in places.iter_mut().zip(ancestors) {
            place[0..4].copy_from_slice(&ancestor.epoch.to_le_bytes());
            place[4..12].copy_from_slice(&ancestor.id.to_le_bytes());
            place[12..20].copy_from_slice(&ancestor.generation.to_le_bytes());
        }
        let crc = crc32c(0, &out[..COVERED]);
        out[COVERED..COVERED + 4].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads both copies; the newer whole one counts.
    pub fn decode(raw: &[u8; HEADERS_BYTES]) -> Result<Self, SidecarError> {
        let (blocks, _) = raw.as_chunks::<BLOCK_BYTES>();
        let mut newest = Err(SidecarError::Damaged);
        for (copy, block) in blocks.iter().enumerate() {
            match decode_block(block) {
                Ok(found) if found.generation % 2 != copy as u64 => {}
                Ok(found) => match newest {
                    Ok(Self { generation, .. }) if generation > found.generation => {}
                    _ => newest = Ok(found),
                },
                Err(SidecarError::Version(version)) => return Err(SidecarError::Version(version)),
                Err(_) => {}
            }
        }
        newest
    }
}

/// Bytes of a sidecar whose region map has so many blocks.
pub const fn total_bytes(region_blocks: u32) -> u64 {
    (2 + 2 * region_blocks as u64) * BLOCK_BYTES as u64
}

fn decode_block(raw: &[u8; BLOCK_BYTES]) -> Result<Sidecar, SidecarError> {
    let version = le_u32(raw, 8);
    let covered = match version {
        1 | 2 => COVERED_BEFORE,
        _ => COVERED,
    };
    if le_u64(raw, 0) != MAGIC || le_u32(raw, covered) != crc32c(0, &raw[..covered]) {
        return Err(SidecarError::Damaged);
    }
    if version != VERSION {
        return Err(SidecarError::Version(version));
    }
    let id = |at: usize| {
        let mut id = [0u8; 16];
        id.copy_from_slice(&raw[at..at + 16]);
        id
    };
    let flags = le_u32(raw, 12);
    let region_blocks = le_u32(raw, 60);
    let (ancestors, _) = raw[LINEAGE_AT..COVERED].as_chunks::<ANCESTOR_BYTES>();
    let ancestors = ancestors.iter().map(|place| Attach {
        epoch: le_u32(place, 0),
        id: le_u64(place, 4),
        generation: le_u64(place, 12),
    });
    let count = le_u32(raw, 100) as usize;
    if region_blocks > MAX_REGION_BLOCKS || count > MAX_ANCESTORS {
        return Err(SidecarError::Damaged);
    }
    let lineage = Lineage::from_parts(le_u32(raw, 96), ancestors.take(count));
    let lineage = lineage.ok_or(SidecarError::Damaged)?;
    Ok(Sidecar {
        generation: le_u64(raw, 16),
        disk_id: id(24),
        boot_id: id(40),
        attach_epoch: le_u32(raw, 56),
        seq_floor: le_u64(raw, 64),
        region_blocks,
        content_id: le_u64(raw, 72),
        capacity_bytes: le_u64(raw, 80),
        attach_id: le_u64(raw, 88),
        lineage,
        closed: flags & 1 != 0,
        failed: flags & 2 != 0,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn opened(before: &Sidecar, boot: u8, new_lane: bool) -> Sidecar {
        let opening = Opening {
            boot_id: [boot; 16],
            content_id: 9,
            attach_id: 0x77 + u64::from(before.attach_epoch),
            new_lane,
            found_generation: Some(10 * u64::from(before.attach_epoch)),
        };
        before.attached(&opening).unwrap()
    }

    fn write(raw: &mut [u8; HEADERS_BYTES], sidecar: &Sidecar) {
        let at = sidecar.offset_bytes() as usize;
        raw[at..at + BLOCK_BYTES].copy_from_slice(&sidecar.encode());
    }

    #[test]
    fn a_torn_write_leaves_the_copy_before() {
        let mut raw = [0u8; HEADERS_BYTES];
        assert_eq!(Sidecar::decode(&raw), Err(SidecarError::Damaged));
        let mut sidecar = Sidecar::new([1; 16], 3);
        write(&mut raw, &sidecar);
        for _ in 0..5 {
            let next = opened(&sidecar, 2, true);
            for cut in [0, 1, 16, 20, 57, 70, 74, 90, 104, 125, COVERED + 4] {
                let mut torn = raw;
                let at = next.offset_bytes() as usize;
                torn[at..at + cut].copy_from_slice(&next.encode()[..cut]);
                let found = Sidecar::decode(&torn).unwrap();
                assert!(
                    found == sidecar || (cut == COVERED + 4 && found == next),
                    "cut at {cut}: {found:?}"
                );
            }
            write(&mut raw, &next);
            assert_eq!(Sidecar::decode(&raw), Ok(next));
            sidecar = next;
        }
        assert_eq!(sidecar.attach_epoch, 5);
        assert_eq!(sidecar.seq_floor, 5 * SEQ_STRIDE);
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let mut good = Sidecar::new([1; 16], 3);
        for _ in 0..3 {
            good = opened(&good, 2, true);
        }
        assert_eq!(decode_block(&good.encode()), Ok(good));
        let block = good.encode();
        for bit in 0..(COVERED + 4) * 8 {
            let mut bad = block;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_block(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_lane_belongs_only_to_the_last_attach_of_this_boot() {
        let boot = [2; 16];
        let one = opened(&Sidecar::new([1; 16], 3), 2, true);
        assert!(one.matches_lane(1, &boot));
        assert!(!one.matches_lane(2, &boot));
        assert!(!one.matches_lane(1, &[3; 16]));
        let two = opened(&one, 2, false);
        assert!(two.matches_lane(1, &boot), "died between sidecar and lane");
        assert!(two.matches_lane(2, &boot));
        // Opened on another host in between: the old lane is stale.
        let elsewhere = opened(&one, 3, true);
        assert!(!elsewhere.matches_lane(1, &boot));
        assert!(!two.failed().matches_lane(2, &boot));
        // The stream was to begin anew, in a new lane, and who opened it died before it was made.
        let risen = one.risen(1).unwrap();
        assert_eq!(risen.attach_epoch, 2);
        assert!(!risen.matches_lane(1, &boot) && risen.matches_lane(2, &boot));
    }

    /// The list of openings: each with the generation that the next one found; cut where the stream
    /// begins anew.
    #[test]
    fn a_sidecar_remembers_the_openings_before() {
        let mut sidecar = Sidecar::new([1; 16], 3);
        for _ in 0..3 {
            sidecar = opened(&sidecar, 2, false);
        }
        let attach = |epoch, id, generation| Attach {
            epoch,
            id,
            generation,
        };
        assert_eq!((sidecar.attach_epoch, sidecar.attach_id), (3, 0x79));
        assert_eq!(sidecar.lineage.root_epoch(), 1);
        let before = [attach(2, 0x78, 20), attach(1, 0x77, 10)];
        assert_eq!(sidecar.lineage.ancestors(), before);
        let anew = Opening {
            boot_id: [2; 16],
            content_id: 9,
            attach_id: 5,
            new_lane: true,
            found_generation: None,
        };
        let anew = sidecar.attached(&anew).unwrap();
        assert_eq!(anew.lineage, Lineage::anew(4));
        assert_eq!(sidecar.risen(7).unwrap().lineage, Lineage::anew(8));
        // Openings that were forgotten had lanes of their own: no number of theirs comes again.
        let forgotten = (0..3).fold(sidecar, |sidecar, _| opened(&sidecar, 2, true));
        let risen = sidecar.risen(forgotten.attach_epoch).unwrap();
        assert_eq!(risen.above_forgotten(), forgotten.seq_floor);
        assert_eq!(risen.seq_floor, opened(&forgotten, 2, true).seq_floor);
        assert_eq!(sidecar.risen(u32::MAX - 1), Err(SidecarError::Exhausted));
    }

    #[test]
    fn an_older_programs_sidecar_is_told_from_a_damaged_one() {
        let mut raw = [0u8; HEADERS_BYTES];
        let mut block = Sidecar::new([1; 16], 3).encode();
        block[8] = 2;
        block[COVERED_BEFORE..].fill(0);
        let crc = crc32c(0, &block[..COVERED_BEFORE]);
        block[COVERED_BEFORE..COVERED_BEFORE + 4].copy_from_slice(&crc.to_le_bytes());
        raw[..BLOCK_BYTES].copy_from_slice(&block);
        let found = Sidecar::decode(&raw);
        assert_eq!(found, Err(SidecarError::Version(2)));
        assert!(found.unwrap_err().is_older());
    }

    #[test]
    fn a_newer_version_is_refused() {
        let mut raw = [0u8; HEADERS_BYTES];
        let mut block = Sidecar::new([1; 16], 3).encode();
        block[8] = 9;
        let crc = crc32c(0, &block[..COVERED]);
        block[COVERED..COVERED + 4].copy_from_slice(&crc.to_le_bytes());
        raw[..BLOCK_BYTES].copy_from_slice(&block);
        assert_eq!(Sidecar::decode(&raw), Err(SidecarError::Version(9)));
    }

    #[test]
    fn a_disk_that_was_changed_behind_the_filter_is_not_trusted() {
        let new = Sidecar::new([1; 16], 1);
        assert!(!new.is_trusted(0), "never opened");
        let opening = Opening {
            boot_id: [2; 16],
            content_id: 77,
            attach_id: 5,
            new_lane: true,
            found_generation: None,
        };
        let opened = new.attached(&opening).unwrap();
        assert!(opened.is_trusted(77) && opened.is_trusted(0));
        assert!(!opened.is_trusted(78), "opened by another");
        assert!(!opened.failed().is_trusted(77));
        let content_id = 0;
        let blind = new
            .attached(&Opening {
                content_id,
                ..opening
            })
            .unwrap();
        assert!(blind.is_trusted(78), "the host could not tell before");
        assert_eq!(total_bytes(1), 4 * 4096);
    }
}
