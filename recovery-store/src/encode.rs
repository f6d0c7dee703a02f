//! Writing of a part object: header, index and footer around data blocks that are there already.
//!
//! Invariant: what is written here, `format` reads back as the same `PartIndex`.

use crate::codec::Put;
use crate::format::{
    DISK_FLAG_STREAM_BASE, DISK_FLAG_SYNC_OPEN, FLAG_COMMIT, FOOTER_BYTES, FOOTER_MAGIC,
    HEADER_BYTES, METHOD_STORED, METHOD_ZSTD, PART_MAGIC, PART_VERSION, PartDisk, PartHeader,
    PartIndex, Sha256Hash, Source, ZERO_BLOCK, sha256,
};
use crc32c::crc32c;

/// The header's 128 bytes.
pub(crate) fn encode_header(header: &PartHeader) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES);
    out.extend_from_slice(&PART_MAGIC);
    out.put_u32(PART_VERSION);
    out.put_u32(if header.commit { FLAG_COMMIT } else { 0 });
    out.extend_from_slice(header.domain.as_bytes());
    out.put_u32(header.timeline);
    out.put_u32(header.part);
    out.put_u64(header.cut);
    out.extend_from_slice(&header.previous);
    out.put_u64(header.time_ns);
    out.put_zeros(HEADER_BYTES - 4 - out.len());
    let crc = crc32c(&out);
    out.put_u32(crc);
    out
}

/// Appends index and footer to an object whose header and blocks are in `object` already.
/// Returns the object's hash.
pub(crate) fn seal(object: &mut Vec<u8>, index: &PartIndex) -> Sha256Hash {
    let index_offset = object.len() as u64;
    encode_index(object, index);
    let index_bytes = object.len() as u64 - index_offset;
    let index_crc = crc32c(object.get(index_offset as usize..).unwrap_or_default());
    let footer_start = object.len();
    object.extend_from_slice(&FOOTER_MAGIC);
    object.put_u64(footer_start as u64 + FOOTER_BYTES as u64);
    object.put_u64(index_offset);
    object.put_u64(index_bytes);
    object.put_u32(index_crc);
    object.put_zeros(24);
    let sha = sha256(object);
    object.extend_from_slice(&sha);
    let crc = crc32c(object.get(footer_start..).unwrap_or_default());
    object.put_u32(crc);
    sha
}

fn encode_index(out: &mut Vec<u8>, index: &PartIndex) {
    out.extend_from_slice(&encode_header(&index.header));
    out.put_u32(index.blocks.len() as u32);
    out.put_u32(index.disks.len() as u32);
    for block in &index.blocks {
        out.put_u64(block.offset_bytes);
        out.put_u32(block.stored_bytes);
        out.put_u32(block.raw_bytes);
        out.put_u32(block.crc);
        out.put_u32(if block.compressed {
            METHOD_ZSTD
        } else {
            METHOD_STORED
        });
    }
    for disk in &index.disks {
        encode_disk(out, disk);
    }
    if let Some(commit) = &index.commit {
        let name = commit.name.as_deref().unwrap_or_default();
        out.put_u64(commit.time_ns);
        out.put_u32(commit.cut_epoch);
        out.put_u32(commit.parts);
        out.put_u64(commit.records);
        out.put_u64(commit.raw_bytes);
        out.put_u32(commit.positions.len() as u32);
        out.put_u16(u16::from(commit.name.is_some()));
        out.put_u16(name.len() as u16);
        out.extend_from_slice(name.as_bytes());
        for position in &commit.positions {
            out.extend_from_slice(position.disk.as_bytes());
            out.put_u64(position.seq);
        }
    }
}

fn encode_disk(out: &mut Vec<u8>, disk: &PartDisk) {
    let mut flags = 0;
    if disk.sync_open {
        flags |= DISK_FLAG_SYNC_OPEN;
    }
    if disk.stream_base {
        flags |= DISK_FLAG_STREAM_BASE;
    }
    out.extend_from_slice(disk.info.uuid.as_bytes());
    out.extend_from_slice(disk.info.vm_uuid.as_bytes());
    out.put_u64(disk.info.capacity_bytes);
    out.put_u64(disk.first_seq);
    out.put_u64(disk.last_seq);
    out.put_u32(disk.attach_epoch);
    out.put_u32(flags);
    out.put_u32(disk.extents.len() as u32);
    out.put_u16(disk.info.vm_name.len() as u16);
    out.put_u16(disk.info.name.len() as u16);
    out.extend_from_slice(disk.info.vm_name.as_bytes());
    out.extend_from_slice(disk.info.name.as_bytes());
    for extent in &disk.extents {
        let (block, at) = match extent.source {
            Source::Zero => (ZERO_BLOCK, 0),
            Source::Block {
                block,
                offset_bytes,
            } => (block, offset_bytes),
        };
        out.put_u64(extent.offset_bytes);
        out.put_u64(extent.len_bytes);
        out.put_u32(block);
        out.put_u32(at);
    }
}
