//! One part in the making: records go in, the surviving bytes of the part come out.
//!
//! Invariant: the extents of a disk are what replaying the part's records in order gives; a byte that a
//! later record of the same part replaced is neither compressed nor stored.

use crate::encode::{encode_header, seal};
use crate::error::{FormatError, StoreError};
use crate::extents::{ExtentMap, Place};
use crate::format::{
    BlockEntry, Commit, DiskInfo, Extent, PartDisk, PartHeader, PartIndex, Sha256Hash, Source,
};
use filter_core::record::{RecordKind, RecordRef};
use std::collections::BTreeMap;
use uuid::Uuid;

/// Raw data bytes after which a part is finished, by default.
pub const DEFAULT_PART_BYTES: usize = 8 << 20;
/// Raw bytes of a data block, by default.
pub const DEFAULT_BLOCK_BYTES: usize = 128 << 10;
/// Extents after which a part is finished, however little data they hold: bounds index and memory.
const MAX_PART_EXTENTS: usize = 64 << 10;
/// Zeros are looked for in chunks of this size, aligned on the disk.
const ZERO_CHUNK_BYTES: usize = 4096;

/// What became of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fed {
    /// The container has it already; nothing changed.
    Old,
    /// It is buffered.
    Taken,
    /// It is buffered, and the part is full: call `flush_part` before feeding more.
    PartFull,
}

/// Where the bytes of an extent wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pending {
    Zero,
    /// Start in the arena.
    Data(usize),
}

impl Place for Pending {
    fn skip(self, bytes: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Data(at) => Self::Data(at + bytes as usize),
        }
    }

    fn continues(self, len_bytes: u64, next: Self) -> bool {
        match (self, next) {
            (Self::Zero, Self::Zero) => true,
            (Self::Data(a), Self::Data(b)) => a as u64 + len_bytes == b as u64,
            _ => false,
        }
    }
}

/// A disk's share of the part.
#[derive(Debug, Default)]
struct DiskShare {
    extents: ExtentMap<Pending>,
    first_seq: u64,
    stream_base: bool,
}

/// The state of a disk that the part's table needs; kept by the writer.
#[derive(Clone, Debug)]
pub(crate) struct DiskState {
    pub(crate) info: DiskInfo,
    pub(crate) seq: u64,
    pub(crate) attach_epoch: u32,
    pub(crate) sync_open: bool,
    /// The description changed since it was last written to a part.
    pub(crate) info_changed: bool,
}

/// A part in the making.
#[derive(Debug, Default)]
pub(crate) struct PartBuilder {
    arena: Vec<u8>,
    /// Bytes of the arena that some extent still refers to.
    live_bytes: u64,
    /// Extents of all disks: counted, as they are asked for at every record.
    extents: usize,
    disks: BTreeMap<Uuid, DiskShare>,
}

impl PartBuilder {
    /// Whether no record went in since the last part.
    pub(crate) fn is_empty(&self) -> bool {
        self.disks.is_empty()
    }

    /// Takes a record whose seq the writer has checked. `stream_base`: a fresh stream starts here.
    pub(crate) fn take(&mut self, disk: Uuid, record: &RecordRef<'_>, stream_base: bool) {
        let header = &record.header;
        let share = self.disks.entry(disk).or_insert_with(|| DiskShare {
            first_seq: header.seq,
            ..DiskShare::default()
        });
        share.stream_base |= stream_base;
        match header.kind {
            RecordKind::Write | RecordKind::Sync if !record.payload.is_empty() => {
                self.take_data(disk, header.offset_bytes, record.payload);
            }
            RecordKind::Zero | RecordKind::Unmap => {
                self.take_zeros(disk, header.offset_bytes, u64::from(header.range_len));
            }
            // VOID changes nothing; markers and pads carry nothing.
            _ => {}
        }
    }

    fn take_zeros(&mut self, disk: Uuid, offset_bytes: u64, len_bytes: u64) {
        self.insert(disk, offset_bytes, len_bytes, Pending::Zero);
    }

    fn insert(&mut self, disk: Uuid, offset_bytes: u64, len_bytes: u64, place: Pending) {
        if let Pending::Data(_) = place {
            self.live_bytes += len_bytes;
        }
        let live = &mut self.live_bytes;
        if let Some(share) = self.disks.get_mut(&disk) {
            let before = share.extents.len();
            share
                .extents
                .insert(offset_bytes, len_bytes, place, |gone, len| {
                    if let Pending::Data(_) = gone {
                        *live -= len;
                    }
                });
            self.extents = self.extents + share.extents.len() - before;
        }
    }

    /// Splits the payload into runs of zero and non-zero chunks and takes each.
    fn take_data(&mut self, disk: Uuid, offset_bytes: u64, payload: &[u8]) {
        let mut run: Option<(usize, usize, bool)> = None;
        let mut at = 0;
        while at < payload.len() {
            let misaligned = (offset_bytes + at as u64) as usize % ZERO_CHUNK_BYTES;
            let end = (at + ZERO_CHUNK_BYTES - misaligned).min(payload.len());
            let zero = payload.get(at..end).is_some_and(is_zero);
            run = match run {
                Some((start, _, kind)) if kind == zero => Some((start, end, kind)),
                Some(done) => {
                    self.take_run(disk, offset_bytes, payload, done);
                    Some((at, end, zero))
                }
                None => Some((at, end, zero)),
            };
            at = end;
        }
        if let Some(done) = run {
            self.take_run(disk, offset_bytes, payload, done);
        }
    }

    fn take_run(
        &mut self,
        disk: Uuid,
        offset_bytes: u64,
        payload: &[u8],
        (start, end, zero): (usize, usize, bool),
    ) {
        let offset_bytes = offset_bytes + start as u64;
        if zero {
            return self.take_zeros(disk, offset_bytes, (end - start) as u64);
        }
        let at = self.arena.len();
        let bytes = payload.get(start..end).unwrap_or_default();
        self.arena.extend_from_slice(bytes);
        self.insert(disk, offset_bytes, bytes.len() as u64, Pending::Data(at));
    }

    /// Whether the part should be finished; first drops replaced bytes if that makes much room.
    pub(crate) fn is_full(&mut self, part_bytes: usize) -> bool {
        if self.extents >= MAX_PART_EXTENTS {
            return true;
        }
        if self.arena.len() < part_bytes {
            return false;
        }
        if self.live_bytes > part_bytes as u64 / 2 {
            return true;
        }
        self.compact();
        false
    }

    /// Copies the living bytes to a new arena. At most half of it lives, so the cost is paid for by
    /// the bytes that were replaced.
    fn compact(&mut self) {
        let old = std::mem::take(&mut self.arena);
        let mut arena = Vec::with_capacity(old.capacity());
        for share in self.disks.values_mut() {
            share.extents.map_places(|place, len| match place {
                Pending::Zero => Pending::Zero,
                Pending::Data(at) => {
                    let new_at = arena.len();
                    let bytes = old.get(at..at + len as usize).unwrap_or_default();
                    arena.extend_from_slice(bytes);
                    Pending::Data(new_at)
                }
            });
        }
        self.arena = arena;
    }
}

/// Whether all bytes are zero; almost always decided by the first eight.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, tail) = bytes.as_chunks::<64>();
    let word_is_zero = |chunk: &[u8; 64]| chunk.iter().fold(0u8, |acc, byte| acc | byte) == 0;
    bytes.first() == Some(&0) && words.iter().all(word_is_zero) && tail.iter().all(|b| *b == 0)
}

/// Turns full parts into objects; keeps the compression context and its buffers.
pub(crate) struct Encoder {
    zstd: zstd::bulk::Compressor<'static>,
    raw: Vec<u8>,
    squeezed: Vec<u8>,
    block_bytes: usize,
}

/// A finished part.
pub(crate) struct EncodedPart {
    pub(crate) object: Vec<u8>,
    pub(crate) sha256: Sha256Hash,
    pub(crate) raw_bytes: u64,
    /// Spare memory of the builder, for the next part.
    pub(crate) arena: Vec<u8>,
}

impl Encoder {
    pub(crate) fn new(level: i32, block_bytes: usize) -> Result<Self, StoreError> {
        let zstd = zstd::bulk::Compressor::new(level)
            .map_err(|error| StoreError::Task(format!("cannot start zstd: {error}")))?;
        Ok(Self {
            zstd,
            raw: Vec::with_capacity(block_bytes),
            squeezed: Vec::with_capacity(block_bytes),
            block_bytes,
        })
    }

    /// Makes the object of a part. `disks` are the states after the part; those without records in it
    /// go into its table too if `header.commit` is set or their description has changed.
    pub(crate) fn encode(
        &mut self,
        header: PartHeader,
        mut part: PartBuilder,
        disks: &BTreeMap<Uuid, DiskState>,
        commit: Option<Commit>,
    ) -> Result<EncodedPart, FormatError> {
        let mut object = encode_header(&header);
        object.reserve(part.live_bytes as usize / 2);
        let mut index = PartIndex {
            header,
            disks: Vec::new(),
            blocks: Vec::new(),
            commit,
            sha256: [0; 32],
        };
        for (uuid, state) in disks {
            let share = part.disks.remove(uuid);
            if share.is_none() && !index.header.commit && !state.info_changed {
                continue;
            }
            let share = share.unwrap_or_default();
            let mut extents = Vec::with_capacity(share.extents.len());
            for piece in share.extents.iter() {
                match piece.place {
                    Pending::Zero => extents.push(Extent {
                        offset_bytes: piece.offset_bytes,
                        len_bytes: piece.len_bytes,
                        source: Source::Zero,
                    }),
                    Pending::Data(at) => {
                        let bytes = part
                            .arena
                            .get(at..at + piece.len_bytes as usize)
                            .unwrap_or_default();
                        self.pack(
                            &mut object,
                            &mut index.blocks,
                            &mut extents,
                            piece.offset_bytes,
                            bytes,
                        )?;
                    }
                }
            }
            index.disks.push(PartDisk {
                info: state.info.clone(),
                first_seq: share.first_seq,
                last_seq: state.seq,
                attach_epoch: state.attach_epoch,
                sync_open: state.sync_open,
                stream_base: share.stream_base,
                extents,
            });
        }
        self.close_block(&mut object, &mut index.blocks)?;
        if let Some(commit) = &mut index.commit {
            commit.raw_bytes += part.live_bytes;
        }
        let sha256 = seal(&mut object, &index);
        part.arena.clear();
        Ok(EncodedPart {
            object,
            sha256,
            raw_bytes: part.live_bytes,
            arena: part.arena,
        })
    }

    /// Adds bytes of a disk to the current block, and further ones as it fills.
    fn pack(
        &mut self,
        object: &mut Vec<u8>,
        blocks: &mut Vec<BlockEntry>,
        extents: &mut Vec<Extent>,
        mut offset_bytes: u64,
        mut bytes: &[u8],
    ) -> Result<(), FormatError> {
        while !bytes.is_empty() {
            if self.raw.len() >= self.block_bytes {
                self.close_block(object, blocks)?;
            }
            let room = (self.block_bytes - self.raw.len()).min(bytes.len());
            let (now, later) = bytes.split_at_checked(room).unwrap_or((bytes, &[]));
            extents.push(Extent {
                offset_bytes,
                len_bytes: now.len() as u64,
                source: Source::Block {
                    block: blocks.len() as u32,
                    offset_bytes: self.raw.len() as u32,
                },
            });
            self.raw.extend_from_slice(now);
            offset_bytes += now.len() as u64;
            bytes = later;
        }
        Ok(())
    }

    /// Compresses the current block into the object, or stores it when that gains nothing.
    fn close_block(
        &mut self,
        object: &mut Vec<u8>,
        blocks: &mut Vec<BlockEntry>,
    ) -> Result<(), FormatError> {
        if self.raw.is_empty() {
            return Ok(());
        }
        let number = blocks.len() as u32;
        self.squeezed.clear();
        self.squeezed
            .reserve(zstd::zstd_safe::compress_bound(self.raw.len()));
        let squeezed = self
            .zstd
            .compress_to_buffer(&self.raw, &mut self.squeezed)
            .map_err(|error| FormatError::Decompress {
                block: number,
                reason: format!("cannot compress: {error}"),
            })?;
        // A gain below 1/16 is not worth the decompression.
        let compressed = squeezed < self.raw.len() - self.raw.len() / 16;
        let stored = if compressed {
            &self.squeezed
        } else {
            &self.raw
        };
        blocks.push(BlockEntry {
            offset_bytes: object.len() as u64,
            stored_bytes: stored.len() as u32,
            raw_bytes: self.raw.len() as u32,
            crc: crc32c::crc32c(&self.raw),
            compressed,
        });
        object.extend_from_slice(stored);
        self.raw.clear();
        Ok(())
    }
}

impl PartBuilder {
    /// An empty builder that reuses the memory of a finished part.
    pub(crate) fn with_arena(arena: Vec<u8>) -> Self {
        Self {
            arena,
            ..Self::default()
        }
    }

    /// Drops what a disk has in the part: it left the domain, and no cut will have it.
    pub(crate) fn forget(&mut self, disk: Uuid) {
        if let Some(share) = self.disks.remove(&disk) {
            self.extents -= share.extents.len();
            for piece in share.extents.iter() {
                if let Pending::Data(_) = piece.place {
                    self.live_bytes -= piece.len_bytes;
                }
            }
        }
    }
}
