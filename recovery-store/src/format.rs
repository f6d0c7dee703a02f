//! The bytes of a part object: header, data blocks, index, footer.
//!
//! Invariant: what a decoder returns has been checked completely: every offset lies inside the
//! object, blocks tile the data area, the extents of a disk are sorted and disjoint, and every
//! extent lies inside its block. Decoders are pure functions over byte slices and never panic.
//! `docs/store-format.md` has the byte tables.

use crate::codec::Reader;
use crate::error::FormatError;
use crc32c::crc32c;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// First eight bytes of a part.
pub(crate) const PART_MAGIC: [u8; 8] = *b"JDRPART\n";
/// First eight bytes of a part's footer.
pub(crate) const FOOTER_MAGIC: [u8; 8] = *b"JDRFOOT\n";
/// Version of the part format that is written, and the newest that is read.
pub(crate) const PART_VERSION: u32 = 1;
/// Bytes of a part's header.
pub const HEADER_BYTES: usize = 128;
/// Bytes of a part's footer.
pub const FOOTER_BYTES: usize = 96;
/// The largest raw block.
pub(crate) const MAX_BLOCK_RAW_BYTES: u32 = 256 * 1024;
/// The largest part object.
pub(crate) const MAX_PART_OBJECT_BYTES: u64 = 256 << 20;
/// The largest index.
pub(crate) const MAX_INDEX_BYTES: u64 = 64 << 20;
/// The most disks in one part.
pub(crate) const MAX_DISKS: u32 = 16 * 1024;
/// The longest name of a cut, a VM or a disk, in bytes of UTF-8.
pub(crate) const MAX_NAME_BYTES: usize = 1024;

pub(crate) const FLAG_COMMIT: u32 = 1;
pub(crate) const DISK_FLAG_SYNC_OPEN: u32 = 1;
pub(crate) const DISK_FLAG_STREAM_BASE: u32 = 2;
const BLOCK_ENTRY_BYTES: u64 = 24;
const EXTENT_BYTES: u64 = 24;
const DISK_ENTRY_BYTES: u64 = 72;
const POSITION_BYTES: u64 = 24;
pub(crate) const METHOD_STORED: u32 = 0;
pub(crate) const METHOD_ZSTD: u32 = 1;
/// The block number of an extent that reads as zeros.
pub(crate) const ZERO_BLOCK: u32 = u32::MAX;

/// A SHA-256.
pub type Sha256Hash = [u8; 32];

/// Who a disk is. The same in the API and in the disk table of a part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// The disk.
    pub uuid: Uuid,
    /// The VM that it belongs to.
    pub vm_uuid: Uuid,
    /// The VM's name.
    pub vm_name: String,
    /// The disk's name in its VM.
    pub name: String,
    /// Its capacity in bytes.
    pub capacity_bytes: u64,
}

/// The identity of a part: the first 128 bytes of the object, and of its index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartHeader {
    /// The domain.
    pub domain: Uuid,
    /// The timeline, from 1.
    pub timeline: u32,
    /// The cut that the part belongs to, from 1.
    pub cut: u64,
    /// The part of the cut, from 1.
    pub part: u32,
    /// Whether this part commits its cut.
    pub commit: bool,
    /// SHA-256 of the object before this one; of `timeline.json` for the first.
    pub previous: Sha256Hash,
    /// When the part was made, ns since 1970.
    pub time_ns: u64,
}

/// Where a data block lies and how it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockEntry {
    /// Start in the object, in bytes.
    pub offset_bytes: u64,
    /// Bytes in the object.
    pub stored_bytes: u32,
    /// Bytes after decompression.
    pub raw_bytes: u32,
    /// CRC32C of the raw bytes.
    pub crc: u32,
    /// Whether the block is compressed (zstd); else it is stored as it is.
    pub compressed: bool,
}

/// Where the bytes of an extent are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The extent reads as zeros.
    Zero,
    /// In a block of the same part.
    Block {
        /// The block's number in the part.
        block: u32,
        /// Start in the raw block, in bytes.
        offset_bytes: u32,
    },
}

/// A range of a disk that the part gives new content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Start on the disk, in bytes.
    pub offset_bytes: u64,
    /// Length, in bytes.
    pub len_bytes: u64,
    /// Where the bytes are.
    pub source: Source,
}

/// What a part says of one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartDisk {
    /// Who it is.
    pub info: DiskInfo,
    /// First record covered by the part; 0 if the part covers none of this disk.
    pub first_seq: u64,
    /// The disk's position after the part.
    pub last_seq: u64,
    /// The highest attach epoch so far.
    pub attach_epoch: u32,
    /// Whether a sync is under way after the part.
    pub sync_open: bool,
    /// Whether a fresh stream starts in this part (its seq may have jumped).
    pub stream_base: bool,
    /// Sorted, disjoint.
    pub extents: Vec<Extent>,
}

/// A disk's place in a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The disk.
    pub disk: Uuid,
    /// Its last record in the cut.
    pub seq: u64,
}

/// What the last part of a cut says of the cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The hosts' cut epoch that the cut closed.
    pub cut_epoch: u32,
    /// When the cut was closed, ns since 1970.
    pub time_ns: u64,
    /// Parts of the cut, this one included.
    pub parts: u32,
    /// Records in the cut.
    pub records: u64,
    /// Raw data bytes in all parts of the cut.
    pub raw_bytes: u64,
    /// The operator's name for it.
    pub name: Option<String>,
    /// The disks of the cut. Each is in the part's disk table too.
    pub positions: Vec<Position>,
}

/// The end of a part: how to find and check everything else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Bytes of the object.
    pub object_bytes: u64,
    /// Start of the index.
    pub index_offset_bytes: u64,
    /// Bytes of the index.
    pub index_bytes: u64,
    /// CRC32C of the index.
    pub index_crc: u32,
    /// SHA-256 of all bytes before this field: what the next object names.
    pub sha256: Sha256Hash,
}

/// Everything about a part except its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartIndex {
    /// Which part it is.
    pub header: PartHeader,
    /// The disks that it is about.
    pub disks: Vec<PartDisk>,
    /// Its data blocks, in the order of the object.
    pub blocks: Vec<BlockEntry>,
    /// Present in the last part of a cut.
    pub commit: Option<Commit>,
    /// The object's hash, as the next object names it.
    pub sha256: Sha256Hash,
}

pub(crate) fn field(what: &'static str, value: impl Into<u64>) -> FormatError {
    FormatError::Field {
        what,
        value: value.into(),
    }
}

/// The SHA-256 of `bytes`.
pub fn sha256(bytes: &[u8]) -> Sha256Hash {
    Sha256::digest(bytes).into()
}

/// Reads a part's header from the first 128 of `bytes`.
pub fn decode_header(bytes: &[u8]) -> Result<PartHeader, FormatError> {
    let what = "part header";
    let raw: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(FormatError::Truncated {
        what,
        have: bytes.len() as u64,
        need: HEADER_BYTES as u64,
    })?;
    let mut reader = Reader::new(what, raw);
    let magic: [u8; 8] = reader.array()?;
    if magic != PART_MAGIC {
        return Err(FormatError::Magic { what, found: magic });
    }
    let version = reader.u32()?;
    check_crc(what, raw)?;
    if version != PART_VERSION {
        return Err(FormatError::Version {
            found: version,
            supported: PART_VERSION,
        });
    }
    let flags = reader.u32()?;
    if flags & !FLAG_COMMIT != 0 {
        return Err(field("part flags", flags));
    }
    let header = PartHeader {
        domain: reader.uuid()?,
        timeline: reader.u32()?,
        part: reader.u32()?,
        cut: reader.u64()?,
        commit: flags & FLAG_COMMIT != 0,
        previous: reader.array()?,
        time_ns: reader.u64()?,
    };
    reader.zeros(reader.left() - 4)?;
    for (name, value) in [
        ("timeline", u64::from(header.timeline)),
        ("cut number", header.cut),
        ("part number", u64::from(header.part)),
    ] {
        if value == 0 {
            return Err(field(name, value));
        }
    }
    Ok(header)
}

/// Checks the CRC32C in the last four bytes over all before.
fn check_crc(what: &'static str, bytes: &[u8]) -> Result<(), FormatError> {
    let (body, crc) = bytes
        .split_last_chunk::<4>()
        .ok_or(FormatError::Truncated {
            what,
            have: bytes.len() as u64,
            need: 4,
        })?;
    let stored = u32::from_le_bytes(*crc);
    let computed = crc32c(body);
    if stored != computed {
        return Err(FormatError::Crc {
            what,
            stored,
            computed,
        });
    }
    Ok(())
}

/// Reads the footer from the last 96 bytes of `tail`; `object_bytes` is the object's length as the
/// store gives it.
pub fn decode_footer(tail: &[u8], object_bytes: u64) -> Result<Footer, FormatError> {
    let what = "part footer";
    let raw: &[u8; FOOTER_BYTES] = tail.last_chunk().ok_or(FormatError::Truncated {
        what,
        have: tail.len() as u64,
        need: FOOTER_BYTES as u64,
    })?;
    let mut reader = Reader::new(what, raw);
    let magic: [u8; 8] = reader.array()?;
    if magic != FOOTER_MAGIC {
        return Err(FormatError::Magic { what, found: magic });
    }
    check_crc(what, raw)?;
    let stored_len = reader.u64()?;
    let footer = Footer {
        object_bytes: stored_len,
        index_offset_bytes: reader.u64()?,
        index_bytes: reader.u64()?,
        index_crc: reader.u32()?,
        sha256: {
            reader.zeros(24)?;
            reader.array()?
        },
    };
    if stored_len != object_bytes {
        return Err(FormatError::Truncated {
            what: "part object",
            have: object_bytes,
            need: stored_len,
        });
    }
    if object_bytes > MAX_PART_OBJECT_BYTES {
        return Err(field("object length", object_bytes));
    }
    if footer.index_bytes > MAX_INDEX_BYTES || footer.index_bytes < HEADER_BYTES as u64 {
        return Err(field("index length", footer.index_bytes));
    }
    let index_end = footer.index_offset_bytes.checked_add(footer.index_bytes);
    if index_end != Some(object_bytes - FOOTER_BYTES as u64)
        || footer.index_offset_bytes < HEADER_BYTES as u64
    {
        return Err(field("index offset", footer.index_offset_bytes));
    }
    Ok(footer)
}

/// A count from outside, only if that many entries of at least `each` bytes can still follow.
fn count(
    reader: &mut Reader<'_>,
    what: &'static str,
    each: u64,
    limit: u32,
) -> Result<u32, FormatError> {
    let n = reader.u32()?;
    if n > limit || u64::from(n) * each > reader.left() as u64 {
        return Err(field(what, n));
    }
    Ok(n)
}

/// Reads the index; `bytes` is exactly what the footer names.
pub fn decode_index(bytes: &[u8], footer: &Footer) -> Result<PartIndex, FormatError> {
    let what = "part index";
    if bytes.len() as u64 != footer.index_bytes {
        return Err(FormatError::Truncated {
            what,
            have: bytes.len() as u64,
            need: footer.index_bytes,
        });
    }
    let computed = crc32c(bytes);
    if computed != footer.index_crc {
        return Err(FormatError::Crc {
            what,
            stored: footer.index_crc,
            computed,
        });
    }
    let header = decode_header(bytes)?;
    let mut reader = Reader::new(what, bytes);
    reader.bytes(HEADER_BYTES)?;
    let block_count = count(
        &mut reader,
        "block count",
        BLOCK_ENTRY_BYTES,
        ZERO_BLOCK - 1,
    )?;
    let disk_count = count(&mut reader, "disk count", DISK_ENTRY_BYTES, MAX_DISKS)?;
    let mut blocks = Vec::with_capacity(block_count as usize);
    let mut at = HEADER_BYTES as u64;
    for _ in 0..block_count {
        let block = decode_block_entry(&mut reader, at)?;
        at = at.saturating_add(u64::from(block.stored_bytes));
        blocks.push(block);
    }
    if at != footer.index_offset_bytes {
        return Err(field("end of the data blocks", at));
    }
    let mut disks: Vec<PartDisk> = Vec::with_capacity(disk_count as usize);
    let mut seen = std::collections::HashSet::new();
    for _ in 0..disk_count {
        let disk = decode_disk(&mut reader, &blocks)?;
        if !seen.insert(disk.info.uuid) {
            return Err(field(
                "disk table: a disk is in it twice",
                disks.len() as u64,
            ));
        }
        disks.push(disk);
    }
    let commit = if header.commit {
        Some(decode_commit(&mut reader, &header, &disks)?)
    } else {
        None
    };
    if reader.left() != 0 {
        return Err(field("bytes after the index", reader.left() as u64));
    }
    Ok(PartIndex {
        header,
        disks,
        blocks,
        commit,
        sha256: footer.sha256,
    })
}

fn decode_block_entry(reader: &mut Reader<'_>, at: u64) -> Result<BlockEntry, FormatError> {
    let offset_bytes = reader.u64()?;
    let stored_bytes = reader.u32()?;
    let raw_bytes = reader.u32()?;
    let crc = reader.u32()?;
    let method = reader.u32()?;
    if offset_bytes != at {
        return Err(field("block offset", offset_bytes));
    }
    if raw_bytes == 0 || raw_bytes > MAX_BLOCK_RAW_BYTES {
        return Err(field("block raw length", raw_bytes));
    }
    let fits = match method {
        METHOD_STORED => stored_bytes == raw_bytes,
        METHOD_ZSTD => stored_bytes > 0 && stored_bytes < raw_bytes,
        _ => return Err(field("block method", method)),
    };
    if !fits {
        return Err(field("block stored length", stored_bytes));
    }
    Ok(BlockEntry {
        offset_bytes,
        stored_bytes,
        raw_bytes,
        crc,
        compressed: method == METHOD_ZSTD,
    })
}

fn decode_disk(reader: &mut Reader<'_>, blocks: &[BlockEntry]) -> Result<PartDisk, FormatError> {
    let uuid = reader.uuid()?;
    let vm_uuid = reader.uuid()?;
    let capacity_bytes = reader.u64()?;
    let first_seq = reader.u64()?;
    let last_seq = reader.u64()?;
    let attach_epoch = reader.u32()?;
    let flags = reader.u32()?;
    let extent_count = count(reader, "extent count", EXTENT_BYTES, u32::MAX)?;
    let vm_name_len = usize::from(reader.u16()?);
    let name_len = usize::from(reader.u16()?);
    for len in [vm_name_len, name_len] {
        if len > MAX_NAME_BYTES {
            return Err(field("name length", len as u64));
        }
    }
    let vm_name = reader.text(vm_name_len)?;
    let name = reader.text(name_len)?;
    if flags & !(DISK_FLAG_SYNC_OPEN | DISK_FLAG_STREAM_BASE) != 0 {
        return Err(field("disk flags", flags));
    }
    if capacity_bytes > filter_core::record::MAX_DISK_BYTES {
        return Err(field("disk capacity", capacity_bytes));
    }
    if first_seq > last_seq || last_seq > filter_core::position::MAX_SEQ {
        return Err(field("disk seq range", first_seq));
    }
    if first_seq == 0 && extent_count != 0 {
        return Err(field("extents of a disk without records", extent_count));
    }
    // The count was checked against what was left before the names were read: check it again.
    if u64::from(extent_count) * EXTENT_BYTES > reader.left() as u64 {
        return Err(field("extent count", extent_count));
    }
    let mut extents = Vec::with_capacity(extent_count as usize);
    let mut end = 0u64;
    for _ in 0..extent_count {
        let extent = decode_extent(reader, blocks, end, capacity_bytes)?;
        end = extent.offset_bytes + extent.len_bytes;
        extents.push(extent);
    }
    Ok(PartDisk {
        info: DiskInfo {
            uuid,
            vm_uuid,
            vm_name,
            name,
            capacity_bytes,
        },
        first_seq,
        last_seq,
        attach_epoch,
        sync_open: flags & DISK_FLAG_SYNC_OPEN != 0,
        stream_base: flags & DISK_FLAG_STREAM_BASE != 0,
        extents,
    })
}

/// Reads an extent that must start at or after `min_offset` and end within the disk.
fn decode_extent(
    reader: &mut Reader<'_>,
    blocks: &[BlockEntry],
    min_offset: u64,
    capacity_bytes: u64,
) -> Result<Extent, FormatError> {
    let offset_bytes = reader.u64()?;
    let len_bytes = reader.u64()?;
    let block = reader.u32()?;
    let at = reader.u32()?;
    if offset_bytes < min_offset {
        return Err(field("extent offset (not sorted)", offset_bytes));
    }
    let in_disk = offset_bytes
        .checked_add(len_bytes)
        .is_some_and(|end| end <= capacity_bytes);
    if len_bytes == 0 || !in_disk {
        return Err(field("extent length", len_bytes));
    }
    let source = if block == ZERO_BLOCK {
        if at != 0 {
            return Err(field("offset in a zero extent", at));
        }
        Source::Zero
    } else {
        let entry = blocks
            .get(block as usize)
            .ok_or(field("extent's block", block))?;
        let in_block = u64::from(at)
            .checked_add(len_bytes)
            .is_some_and(|end| end <= u64::from(entry.raw_bytes));
        if !in_block {
            return Err(field("extent's offset in its block", at));
        }
        Source::Block {
            block,
            offset_bytes: at,
        }
    };
    Ok(Extent {
        offset_bytes,
        len_bytes,
        source,
    })
}

fn decode_commit(
    reader: &mut Reader<'_>,
    header: &PartHeader,
    disks: &[PartDisk],
) -> Result<Commit, FormatError> {
    let time_ns = reader.u64()?;
    let cut_epoch = reader.u32()?;
    let parts = reader.u32()?;
    let records = reader.u64()?;
    let raw_bytes = reader.u64()?;
    let position_count = count(reader, "position count", POSITION_BYTES, MAX_DISKS)?;
    let named = reader.u16()?;
    let name_len = usize::from(reader.u16()?);
    if named > 1 || name_len > MAX_NAME_BYTES || (named == 0 && name_len != 0) {
        return Err(field("cut name length", name_len as u64));
    }
    let name = reader.text(name_len)?;
    if parts != header.part {
        return Err(field("parts of the cut", parts));
    }
    let mut positions = Vec::new();
    let by_uuid: std::collections::HashMap<Uuid, &PartDisk> =
        disks.iter().map(|disk| (disk.info.uuid, disk)).collect();
    for _ in 0..position_count {
        let position = Position {
            disk: reader.uuid()?,
            seq: reader.u64()?,
        };
        let agrees = by_uuid
            .get(&position.disk)
            .is_some_and(|disk| disk.last_seq == position.seq && !disk.sync_open);
        if !agrees {
            return Err(field("position of a disk in the cut", position.seq));
        }
        positions.push(position);
    }
    Ok(Commit {
        cut_epoch,
        time_ns,
        parts,
        records,
        raw_bytes,
        name: (named == 1).then_some(name),
        positions,
    })
}

#[cfg(test)]
#[path = "format_tests.rs"]
mod tests;
