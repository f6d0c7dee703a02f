//! The pages of a lane, their words, and the identity that is written once.
//!
//! Invariant: every offset and length used to reach into the mapping comes from a [`Geometry`] that
//! was checked against the mapping's real length; the words themselves are atomics, so a peer can
//! make them wrong but never make reading them undefined.

use super::sync::{AtomicU32, AtomicU64};
use crate::crc::crc32c;
use crate::lineage::MAX_ANCESTORS;
use crate::record::MAX_PAYLOAD_BYTES;
use alloc::string::String;
use core::ptr::NonNull;

/// Bytes of a page of the lane (the host's page size may be a multiple or a divisor of it).
pub const PAGE_BYTES: usize = 4096;
/// Where the producer page starts.
pub const PRODUCER_AT: usize = PAGE_BYTES;
/// Where it tells of the producer's opening: two places, see [`super::opening`].
pub const OPENINGS_AT: usize = PRODUCER_AT + 1024;
/// Where the in-flight table starts.
pub const INFLIGHT_AT: usize = 2 * PAGE_BYTES;
/// Where the consumer page starts.
pub const CONSUMER_AT: usize = 3 * PAGE_BYTES;
/// Where the hashes that the consumer answers with start.
pub const HASH_AT: usize = 4 * PAGE_BYTES;
/// Bytes of one hash: the first of a SHA-256.
pub const HASH_BYTES: usize = 16;
/// Hashes of one answer, at most: what the page holds.
pub const MAX_HASHES: usize = PAGE_BYTES / HASH_BYTES;
/// Where the dirty map starts.
pub const DIRTY_AT: usize = 5 * PAGE_BYTES;
/// Bytes of disk that one bit of the dirty map stands for.
pub const DIRTY_BLOCK_BYTES: u64 = 64 * 1024;
/// The smallest ring: eight of the largest fragments.
pub const MIN_RING_BYTES: u64 = 8 * MAX_PAYLOAD_BYTES as u64;
/// The largest ring.
pub const MAX_RING_BYTES: u64 = 1 << 30;
/// The ring of a lane unless told otherwise.
pub const DEFAULT_RING_BYTES: u64 = 8 << 20;
/// Version of this layout. From 4 on the producer of a lane holds completions when a cut asks for it: a
/// daemon that meets an older one does not serve it.
pub const LANE_VERSION: u32 = 4;
/// Longest name (domain, VM, disk label) in bytes.
pub const MAX_NAME_BYTES: usize = 80;
const LANE_MAGIC: u64 = u64::from_le_bytes(*b"jdrLANE1");

/// Words of the producer page. Written by the producer only.
#[repr(C, align(64))]
pub struct ProducerWords {
    /// End of what is published, in bytes since the lane began (not wrapped).
    pub tail: AtomicU64,
    /// Last published seq, for people and for the attach scan; the truth is in the records.
    pub last_seq: AtomicU64,
    /// [`LaneState`] as a number.
    pub state: AtomicU32,
    /// Attach epoch of the producer that is (or was last) attached.
    pub attach_epoch: AtomicU32,
    /// Odd while a producer stamps records; see `ring::stamp_enter`.
    pub stamping: AtomicU32,
    /// The restart request that the producer has answered.
    pub restart_done: AtomicU32,
    /// Position from which the stream is whole again after that restart.
    pub restart_at: AtomicU64,
    /// Last seq before that position.
    pub restart_seq: AtomicU64,
    /// Last stamp used for a record of this disk.
    pub last_stamp: AtomicU64,
    /// Capacity of the disk in bytes; grows.
    pub capacity_bytes: AtomicU64,
    /// Process id of the producer, for people: liveness is a lock on the lane's file.
    pub pid: AtomicU32,
    /// Bumped whenever a write begins to pass that is marked instead of published: a cut whose
    /// taking saw it move is void.
    pub tracking_rounds: AtomicU32,
    /// Bytes that the dirty map stands for, updated at each change of state, for status pages.
    pub dirty_bytes: AtomicU64,
    /// Bumped (Release) when the producer asks what the appliance holds of a range: one hash for each
    /// dirty block of it.
    pub hash_ask: AtomicU32,
    /// Blocks of that range, at most `MAX_HASHES`.
    pub hash_blocks: AtomicU32,
    /// Start of that range, in bytes: a multiple of the dirty block.
    pub hash_offset: AtomicU64,
    /// Not zero while a change has passed whose regions' bits the sidecar does not have.
    pub intent_late: AtomicU32,
}

/// One place of the producer page that tells of an opening. Written by the producer only.
#[repr(C, align(64))]
pub struct OpeningWords {
    /// Its attach epoch; 0 while it is being written.
    pub epoch: AtomicU32,
    /// Epoch of the opening in which the stream began anew last, relying on nothing.
    pub root_epoch: AtomicU32,
    /// A number that no other opening of the disk has.
    pub id: AtomicU64,
    /// Generation of the region map that the appliance is to be told.
    pub told_generation: AtomicU64,
    /// Generation of the region map in the sidecar.
    pub durable_generation: AtomicU64,
    /// Openings that it goes back to.
    pub count: AtomicU32,
    /// Of each, the newest first: epoch, number, generation.
    pub ancestors: [[AtomicU64; 3]; MAX_ANCESTORS],
}

/// Words of the consumer page. Written by the consumer only.
#[repr(C, align(64))]
pub struct ConsumerWords {
    /// Start of what is still needed, in bytes since the lane began.
    pub head: AtomicU64,
    /// Last seq that the appliance holds durably. Stored before `head`.
    pub durable_seq: AtomicU64,
    /// Not zero while the consumer sleeps and wants to be woken.
    pub sleeping: AtomicU32,
    /// Bumped when the consumer cannot go on from `head`: the producer restarts the stream.
    pub restart_request: AtomicU32,
    /// The restarted stream must begin above this seq.
    pub restart_above_seq: AtomicU64,
    /// Which of the daemon's wake-up pipes (`wake-<n>` in the run folder) to write to.
    pub wake_slot: AtomicU32,
    /// 1 while the daemon has a session for this lane.
    pub linked: AtomicU32,
    /// Last seq that the object store holds.
    pub uploaded_seq: AtomicU64,
    /// The newest attach epoch that the appliance has seen, if it refused this lane for it; else 0.
    pub fenced_epoch: AtomicU32,
    /// The `hash_ask` that the hash page answers (Release).
    pub hash_answer: AtomicU32,
    /// Hashes in the page; 0: there are none to be had.
    pub hash_count: AtomicU32,
}

const _: () = {
    assert!(core::mem::size_of::<ProducerWords>() == 128);
    assert!(core::mem::size_of::<ConsumerWords>() == 64);
    assert!(core::mem::size_of::<OpeningWords>() == 832);
    assert!(OPENINGS_AT + 2 * core::mem::size_of::<OpeningWords>() <= INFLIGHT_AT);
};

/// What the producer side of a lane was last doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum LaneState {
    /// Made, never attached.
    Fresh = 0,
    /// Every write is published.
    Streaming = 1,
    /// Every write is published, and marked blocks are being read and published too.
    Syncing = 2,
    /// Writes are marked in the dirty map only.
    Tracking = 3,
    /// The producer closed the disk in order; nothing was in flight.
    Closed = 4,
}

impl LaneState {
    /// The state for a word, or `None` for a number that no producer writes.
    pub const fn from_word(word: u32) -> Option<Self> {
        Some(match word {
            0 => Self::Fresh,
            1 => Self::Streaming,
            2 => Self::Syncing,
            3 => Self::Tracking,
            4 => Self::Closed,
            _ => return None,
        })
    }
}

/// Why a mapping is not a lane that can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaneError {
    /// The file is shorter than its own geometry says, or shorter than the fixed pages.
    #[error("lane is {have} bytes long, {need} needed")]
    TooShort {
        /// Bytes mapped.
        have: u64,
        /// Bytes needed.
        need: u64,
    },
    /// The first bytes are not a lane's.
    #[error("not a lane: magic {0:#018x}")]
    Magic(u64),
    /// Another layout.
    #[error("lane has layout version {0}, this program knows {LANE_VERSION}")]
    Version(u32),
    /// The identity page does not match its CRC.
    #[error("lane identity is corrupt: CRC32C {stored:#010x} stored, {computed:#010x} computed")]
    IdentityCrc {
        /// The CRC in the page.
        stored: u32,
        /// The CRC of the bytes.
        computed: u32,
    },
    /// A field of the identity is outside its limits.
    #[error("lane identity: field `{field}` has the invalid value {value}")]
    Field {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The memory does not start at a multiple of 64.
    #[error("lane mapping is not aligned to 64 bytes")]
    Alignment,
}

/// Sizes of a lane's variable parts, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Length of the ring: a power of two.
    pub ring_bytes: u64,
    /// Length of the dirty map: a multiple of the page.
    pub dirty_bytes: u64,
}

impl Geometry {
    /// The geometry for a disk of `capacity_bytes`, its map with room to grow to twice that.
    pub fn for_disk(capacity_bytes: u64, ring_bytes: u64) -> Result<Self, LaneError> {
        let blocks = capacity_bytes.saturating_mul(2).div_ceil(DIRTY_BLOCK_BYTES);
        let dirty_bytes = blocks
            .div_ceil(8)
            .next_multiple_of(PAGE_BYTES as u64)
            .max(4096);
        let geometry = Self {
            ring_bytes,
            dirty_bytes,
        };
        geometry.check()?;
        Ok(geometry)
    }

    /// Where the ring starts.
    pub const fn data_at(&self) -> u64 {
        DIRTY_AT as u64 + self.dirty_bytes
    }

    /// Length of the whole mapping.
    pub const fn total_bytes(&self) -> u64 {
        self.data_at() + self.ring_bytes
    }

    /// The largest disk that the map has bits for.
    pub const fn max_capacity_bytes(&self) -> u64 {
        self.dirty_bytes * 8 * DIRTY_BLOCK_BYTES
    }

    fn check(&self) -> Result<(), LaneError> {
        let ring = self.ring_bytes;
        if !ring.is_power_of_two() || !(MIN_RING_BYTES..=MAX_RING_BYTES).contains(&ring) {
            return Err(LaneError::Field {
                field: "ring bytes",
                value: ring,
            });
        }
        let dirty = self.dirty_bytes;
        if dirty == 0 || !dirty.is_multiple_of(PAGE_BYTES as u64) || dirty > 1 << 36 {
            return Err(LaneError::Field {
                field: "dirty map bytes",
                value: dirty,
            });
        }
        Ok(())
    }
}

/// The identity page: what a lane belongs to. Written once, before the lane gets its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Sizes.
    pub geometry: Geometry,
    /// The disk, as its sidecar names it.
    pub disk_id: [u8; 16],
    /// The VM.
    pub vm_id: [u8; 16],
    /// The boot of the host in which the lane was made.
    pub boot_id: [u8; 16],
    /// The first seq of the lane.
    pub base_seq: u64,
    /// The protected domain.
    pub domain: String,
    /// The VM's name, for people.
    pub vm_name: String,
    /// The disk's label, unique within its VM.
    pub disk_label: String,
}

/// Bytes of the identity that are stored and covered by its CRC.
const IDENTITY_BYTES: usize = 512;
const NAMES_AT: usize = 96;

impl Identity {
    /// The page's first `IDENTITY_BYTES` bytes.
    pub fn encode(&self) -> Result<[u8; IDENTITY_BYTES], LaneError> {
        self.geometry.check()?;
        let mut out = [0u8; IDENTITY_BYTES];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &LANE_MAGIC.to_le_bytes());
        put(8, &LANE_VERSION.to_le_bytes());
        put(16, &self.geometry.ring_bytes.to_le_bytes());
        put(24, &self.geometry.dirty_bytes.to_le_bytes());
        put(32, &self.disk_id);
        put(48, &self.vm_id);
        put(64, &self.boot_id);
        put(80, &self.base_seq.to_le_bytes());
        for (i, name) in [&self.domain, &self.vm_name, &self.disk_label]
            .iter()
            .enumerate()
        {
            if name.len() > MAX_NAME_BYTES {
                return Err(LaneError::Field {
                    field: "name length",
                    value: name.len() as u64,
                });
            }
            put(
                NAMES_AT + i * (MAX_NAME_BYTES + 4),
                &(name.len() as u32).to_le_bytes(),
            );
            put(NAMES_AT + i * (MAX_NAME_BYTES + 4) + 4, name.as_bytes());
        }
        let crc = crc32c(0, &out[..IDENTITY_BYTES - 4]);
        out[IDENTITY_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
        Ok(out)
    }

    /// Reads and checks an identity page.
    pub fn decode(raw: &[u8; IDENTITY_BYTES]) -> Result<Self, LaneError> {
        use crate::record::{le_u32, le_u64};
        if le_u64(raw, 0) != LANE_MAGIC {
            return Err(LaneError::Magic(le_u64(raw, 0)));
        }
        if le_u32(raw, 8) != LANE_VERSION {
            return Err(LaneError::Version(le_u32(raw, 8)));
        }
        let stored = le_u32(raw, IDENTITY_BYTES - 4);
        let computed = crc32c(0, &raw[..IDENTITY_BYTES - 4]);
        if stored != computed {
            return Err(LaneError::IdentityCrc { stored, computed });
        }
        let geometry = Geometry {
            ring_bytes: le_u64(raw, 16),
            dirty_bytes: le_u64(raw, 24),
        };
        geometry.check()?;
        let id = |at: usize| {
            let mut id = [0u8; 16];
            id.copy_from_slice(&raw[at..at + 16]);
            id
        };
        let name = |i: usize| {
            let at = NAMES_AT + i * (MAX_NAME_BYTES + 4);
            let len = le_u32(raw, at) as usize;
            let bad = LaneError::Field {
                field: "name",
                value: len as u64,
            };
            if len > MAX_NAME_BYTES {
                return Err(bad);
            }
            core::str::from_utf8(&raw[at + 4..at + 4 + len])
                .map(String::from)
                .map_err(|_| bad)
        };
        let base_seq = le_u64(raw, 80);
        if base_seq == 0 || base_seq > crate::position::MAX_SEQ {
            return Err(LaneError::Field {
                field: "base seq",
                value: base_seq,
            });
        }
        Ok(Self {
            geometry,
            disk_id: id(32),
            vm_id: id(48),
            boot_id: id(64),
            base_seq,
            domain: name(0)?,
            vm_name: name(1)?,
            disk_label: name(2)?,
        })
    }
}

/// Where a lane lies: in a mapped file, or (in the simulator) in ordinary memory.
pub trait LaneHome {
    /// Its memory, valid for as long as this lives.
    fn memory(&self) -> LaneMemory;
    /// What it belongs to.
    fn identity(&self) -> &Identity;
}

/// A lane's memory, shared with another process.
///
/// Copies of this handle reach the same memory; whoever maps it must keep it mapped for as long as
/// any copy lives.
#[derive(Clone, Copy, Debug)]
pub struct LaneMemory {
    base: NonNull<u8>,
    geometry: Geometry,
}

// SAFETY: the handle only gives out atomics and raw copies; who may write which words is the
// protocol's matter, and a broken protocol gives wrong values, not undefined behaviour.
unsafe impl Send for LaneMemory {}
// SAFETY: as above.
unsafe impl Sync for LaneMemory {}

impl LaneMemory {
    /// Writes a new lane into zeroed memory.
    ///
    /// # Safety
    /// `base` must be valid for reads and writes of `len` bytes for as long as any copy of the
    /// result is used, zeroed, and not yet visible to another process.
    pub unsafe fn create(
        base: NonNull<u8>,
        len: usize,
        identity: &Identity,
        capacity_bytes: u64,
    ) -> Result<Self, LaneError> {
        let page = identity.encode()?;
        let memory = Self::checked(base, len, identity.geometry)?;
        // SAFETY: the first page lies inside the mapping (checked), nobody else sees it yet.
        unsafe {
            base.as_ptr()
                .copy_from_nonoverlapping(page.as_ptr(), page.len())
        };
        use super::sync::Ordering::Relaxed; // not visible yet: any ordering does
        let before = identity.base_seq - 1;
        memory.producer().last_seq.store(before, Relaxed);
        memory.producer().restart_seq.store(before, Relaxed);
        memory
            .producer()
            .capacity_bytes
            .store(capacity_bytes, Relaxed);
        memory.consumer().durable_seq.store(before, Relaxed);
        memory.consumer().uploaded_seq.store(before, Relaxed);
        Ok(memory)
    }

    /// Looks at a mapping that claims to be a lane.
    ///
    /// # Safety
    /// `base` must be valid for reads and writes of `len` bytes for as long as any copy of the
    /// result is used.
    pub unsafe fn open(base: NonNull<u8>, len: usize) -> Result<(Self, Identity), LaneError> {
        if len < DIRTY_AT {
            return Err(LaneError::TooShort {
                have: len as u64,
                need: DIRTY_AT as u64,
            });
        }
        let mut page = [0u8; IDENTITY_BYTES];
        // SAFETY: at least DIRTY_AT bytes are mapped; a raw copy, since another process may write.
        unsafe {
            page.as_mut_ptr()
                .copy_from_nonoverlapping(base.as_ptr(), IDENTITY_BYTES)
        };
        let identity = Identity::decode(&page)?;
        let memory = Self::checked(base, len, identity.geometry)?;
        Ok((memory, identity))
    }

    fn checked(base: NonNull<u8>, len: usize, geometry: Geometry) -> Result<Self, LaneError> {
        if !(base.as_ptr() as usize).is_multiple_of(64) {
            return Err(LaneError::Alignment);
        }
        let need = geometry.total_bytes();
        if (len as u64) < need {
            return Err(LaneError::TooShort {
                have: len as u64,
                need,
            });
        }
        Ok(Self { base, geometry })
    }

    /// The sizes of this lane.
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The producer's words.
    pub fn producer(&self) -> &ProducerWords {
        // SAFETY: inside the mapping (checked at creation), aligned to a page of it, atomics only.
        unsafe { self.base.add(PRODUCER_AT).cast().as_ref() }
    }

    /// What the producer tells of its opening.
    pub fn openings(&self) -> &[OpeningWords; 2] {
        // SAFETY: inside the producer page (asserted above), aligned to 64 within it, atomics only.
        unsafe { self.base.add(OPENINGS_AT).cast().as_ref() }
    }

    /// The consumer's words.
    pub fn consumer(&self) -> &ConsumerWords {
        // SAFETY: as for the producer's words.
        unsafe { self.base.add(CONSUMER_AT).cast().as_ref() }
    }

    /// The in-flight table: pairs of (offset, length and flags).
    pub fn inflight_words(&self) -> &[AtomicU64] {
        // SAFETY: one page inside the mapping, aligned, atomics only.
        unsafe {
            core::slice::from_raw_parts(self.base.add(INFLIGHT_AT).cast().as_ptr(), PAGE_BYTES / 8)
        }
    }

    /// The hash page: pairs of words, a pair of zeros where the appliance does not know.
    pub fn hash_words(&self) -> &[AtomicU64] {
        // SAFETY: as for the in-flight table.
        unsafe {
            core::slice::from_raw_parts(self.base.add(HASH_AT).cast().as_ptr(), PAGE_BYTES / 8)
        }
    }

    /// The dirty map's words.
    pub fn dirty_words(&self) -> &[AtomicU64] {
        let len = (self.geometry.dirty_bytes / 8) as usize;
        // SAFETY: `dirty_bytes` bytes inside the mapping (checked), aligned, atomics only.
        unsafe { core::slice::from_raw_parts(self.base.add(DIRTY_AT).cast().as_ptr(), len) }
    }

    /// Address of the ring's byte for a position, and the bytes from there to the ring's end.
    pub(super) fn data(&self, position: u64) -> (*mut u8, u64) {
        let at = position & (self.geometry.ring_bytes - 1);
        let offset = (self.geometry.data_at() + at) as usize;
        // SAFETY: at < ring_bytes, so the address lies inside the mapping.
        (
            unsafe { self.base.add(offset).as_ptr() },
            self.geometry.ring_bytes - at,
        )
    }
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
