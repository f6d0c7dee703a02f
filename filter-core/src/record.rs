//! The record: one 64-byte header, the same bytes in the ring, on the wire and in the log.
//!
//! Invariant: a length is believed only after the header's own CRC checked, and every field of a
//! decoded header lies within its limit. Layout (little-endian, 64-byte aligned, no padding):
//!
//! | at | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `JDR1` |
//! | 4 | 1 | kind |
//! | 5 | 1 | flags; unknown bits are zero, and checked |
//! | 6 | 2 | header length, 64 |
//! | 8 | 4 | payload length in bytes, at most [`MAX_PAYLOAD_BYTES`] |
//! | 12 | 4 | CRC32C of the payload (without its zero padding) |
//! | 16 | 8 | seq: per disk, from 1, +1 a record, never reused |
//! | 24 | 8 | stamp: per VM, +1 for each record of any of its disks |
//! | 32 | 8 | offset of the range on the disk, in bytes; of a STREAM_BASE the seq that it relies on |
//! | 40 | 4 | attach epoch |
//! | 44 | 4 | cut epoch |
//! | 48 | 8 | time, ns since 1970 (host's clock; for people and lag figures, never for order) |
//! | 56 | 4 | length of the range on the disk, in bytes |
//! | 60 | 4 | CRC32C of the 60 bytes before |
//!
//! The payload follows at once, padded with zeros to a multiple of 64.

use crate::crc::crc32c;

/// `JDR1`, as the first four bytes of every record.
pub const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"JDR1");
/// Bytes of a record's header.
pub const HEADER_BYTES: usize = 64;
/// Records start at multiples of this, in ring, frame and log.
pub const RECORD_ALIGN: usize = 64;
/// The largest payload of one record; a larger write travels as several fragments.
pub const MAX_PAYLOAD_BYTES: u32 = 256 * 1024;
/// The largest range of one record without payload (ZERO, UNMAP, VOID).
pub const MAX_RANGE_BYTES: u32 = 1 << 31;
/// The end of the largest disk that can be addressed: 2^62 bytes.
pub const MAX_DISK_BYTES: u64 = 1 << 62;

/// More fragments of the same guest write follow; all were published together.
pub const FLAG_FRAGMENT_MORE: u8 = 1 << 0;
/// A SYNC record without payload: a sync of this disk begins here.
pub const FLAG_SYNC_BEGIN: u8 = 1 << 1;
/// A SYNC record without payload: the sync is complete, the replica is consistent again.
pub const FLAG_SYNC_END: u8 = 1 << 2;
/// On a SYNC_BEGIN: the first record of a fresh lane; seq may jump forward here. Its offset is the
/// seq that the stream relies on: the sync that follows makes up for everything that a receiver
/// lacks which holds all records up to there. 0: it relies on nothing, the sync covers the whole disk.
pub const FLAG_STREAM_BASE: u8 = 1 << 3;
const KNOWN_FLAGS: u8 = FLAG_FRAGMENT_MORE | FLAG_SYNC_BEGIN | FLAG_SYNC_END | FLAG_STREAM_BASE;

/// What a record says about its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RecordKind {
    /// The guest wrote the payload.
    Write = 1,
    /// The range reads as zeros from now on (guest write-zeroes, or a sync that found zeros).
    Zero = 2,
    /// The guest discarded the range; it reads as zeros in the replica.
    Unmap = 3,
    /// A block read below the filter; or, without payload, a marker (`FLAG_SYNC_*`).
    Sync = 4,
    /// The content of the range on the primary is unknown (a failed write); changes nothing.
    Void = 5,
    /// Fills the end of the ring; has no seq and never leaves the host.
    Pad = 6,
}

impl RecordKind {
    fn from_wire(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Write,
            2 => Self::Zero,
            3 => Self::Unmap,
            4 => Self::Sync,
            5 => Self::Void,
            6 => Self::Pad,
            _ => return None,
        })
    }
}

/// Why bytes are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Fewer bytes than a header (or than header and payload) are there.
    #[error("record is cut short: {have} bytes, {need} needed")]
    Truncated {
        /// Bytes present.
        have: usize,
        /// Bytes needed.
        need: usize,
    },
    /// The first four bytes are not `JDR1`.
    #[error("no record here: magic is {0:#010x}, expected {RECORD_MAGIC:#010x}")]
    Magic(u32),
    /// The header's CRC does not match: none of its fields can be believed.
    #[error("record header is corrupt: CRC32C {stored:#010x} stored, {computed:#010x} computed")]
    HeaderCrc {
        /// The CRC in the header.
        stored: u32,
        /// The CRC of its bytes.
        computed: u32,
    },
    /// The payload's CRC does not match.
    #[error(
        "record {seq}: payload is corrupt: CRC32C {stored:#010x} stored, {computed:#010x} computed"
    )]
    PayloadCrc {
        /// The record's seq.
        seq: u64,
        /// The CRC in the header.
        stored: u32,
        /// The CRC of the payload.
        computed: u32,
    },
    /// A field is outside its limits although the CRC matches: another version, or a bug.
    #[error("record {seq}: field `{field}` has the invalid value {value}")]
    Field {
        /// The record's seq as stored.
        seq: u64,
        /// The field's name.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

/// A record's header in the machine's own form. See the module for each field's meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// What the record says about its range.
    pub kind: RecordKind,
    /// `FLAG_*` bits.
    pub flags: u8,
    /// Bytes of payload that follow.
    pub payload_len: u32,
    /// CRC32C of the payload, 0 without one.
    pub payload_crc: u32,
    /// Per-disk sequence number.
    pub seq: u64,
    /// Per-VM order over disks.
    pub stamp: u64,
    /// Start of the range on the disk, in bytes.
    pub offset_bytes: u64,
    /// The attach epoch that made the record.
    pub attach_epoch: u32,
    /// The cut epoch that was current when it was stamped.
    pub cut_epoch: u32,
    /// Host time, ns since 1970.
    pub time_ns: u64,
    /// Length of the range on the disk, in bytes.
    pub range_len: u32,
}

/// Bytes that a record with this payload takes, header and padding included.
pub const fn record_span_bytes(payload_len: u32) -> usize {
    let len = HEADER_BYTES + payload_len as usize;
    (len + RECORD_ALIGN - 1) & !(RECORD_ALIGN - 1)
}

impl RecordHeader {
    /// Bytes that the record takes, header and padding included.
    pub const fn span_bytes(&self) -> usize {
        record_span_bytes(self.payload_len)
    }

    /// First byte after the range on the disk; 0 for a marker, which has none.
    pub const fn end_bytes(&self) -> u64 {
        if self.is_marker() {
            return 0;
        }
        self.offset_bytes + self.range_len as u64
    }

    /// Of a STREAM_BASE: the seq that the stream relies on.
    pub const fn relies_on(&self) -> Option<u64> {
        if self.flags & FLAG_STREAM_BASE == 0 {
            return None;
        }
        Some(self.offset_bytes)
    }

    /// A marker carries a state change of the stream, no data.
    pub const fn is_marker(&self) -> bool {
        self.flags & (FLAG_SYNC_BEGIN | FLAG_SYNC_END) != 0
    }

    /// The header's 64 bytes, its CRC included.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0u8; HEADER_BYTES];
        out[0..4].copy_from_slice(&RECORD_MAGIC.to_le_bytes());
        out[4] = self.kind as u8;
        out[5] = self.flags;
        out[6..8].copy_from_slice(&(HEADER_BYTES as u16).to_le_bytes());
        out[8..12].copy_from_slice(&self.payload_len.to_le_bytes());
        out[12..16].copy_from_slice(&self.payload_crc.to_le_bytes());
        out[16..24].copy_from_slice(&self.seq.to_le_bytes());
        out[24..32].copy_from_slice(&self.stamp.to_le_bytes());
        out[32..40].copy_from_slice(&self.offset_bytes.to_le_bytes());
        out[40..44].copy_from_slice(&self.attach_epoch.to_le_bytes());
        out[44..48].copy_from_slice(&self.cut_epoch.to_le_bytes());
        out[48..56].copy_from_slice(&self.time_ns.to_le_bytes());
        out[56..60].copy_from_slice(&self.range_len.to_le_bytes());
        let crc = crc32c(0, &out[..60]);
        out[60..64].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads a header from the first 64 of `bytes` and checks each field; the payload is not looked at.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let Some(raw) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(RecordError::Truncated {
                have: bytes.len(),
                need: HEADER_BYTES,
            });
        };
        let magic = le_u32(raw, 0);
        if magic != RECORD_MAGIC {
            return Err(RecordError::Magic(magic));
        }
        let stored = le_u32(raw, 60);
        let computed = crc32c(0, &raw[..60]);
        if stored != computed {
            return Err(RecordError::HeaderCrc { stored, computed });
        }
        let seq = le_u64(raw, 16);
        let bad = |field, value| RecordError::Field { seq, field, value };
        let kind = RecordKind::from_wire(raw[4]).ok_or(bad("kind", raw[4].into()))?;
        let header_len = u16::from_le_bytes([raw[6], raw[7]]);
        if usize::from(header_len) != HEADER_BYTES {
            return Err(bad("header length", header_len.into()));
        }
        let header = Self {
            kind,
            flags: raw[5],
            payload_len: le_u32(raw, 8),
            payload_crc: le_u32(raw, 12),
            seq,
            stamp: le_u64(raw, 24),
            offset_bytes: le_u64(raw, 32),
            attach_epoch: le_u32(raw, 40),
            cut_epoch: le_u32(raw, 44),
            time_ns: le_u64(raw, 48),
            range_len: le_u32(raw, 56),
        };
        header.check()?;
        Ok(header)
    }

    /// Checks that the fields fit together; what `decode` applies to every header.
    pub fn check(&self) -> Result<(), RecordError> {
        let bad = |field, value| {
            Err(RecordError::Field {
                seq: self.seq,
                field,
                value,
            })
        };
        if self.flags & !KNOWN_FLAGS != 0 {
            return bad("flags", self.flags.into());
        }
        if self.kind == RecordKind::Pad {
            // A pad's payload length is what it skips; it has no range, no seq, no CRC.
            let plain = self.flags == 0 && self.seq == 0 && self.range_len == 0;
            return if plain {
                Ok(())
            } else {
                bad("pad", self.flags.into())
            };
        }
        if self.seq == 0 || self.seq > crate::position::MAX_SEQ {
            return bad("seq", self.seq);
        }
        if self.payload_len > MAX_PAYLOAD_BYTES {
            return bad("payload length", self.payload_len.into());
        }
        if self.range_len > MAX_RANGE_BYTES {
            return bad("range length", self.range_len.into());
        }
        if self.offset_bytes > MAX_DISK_BYTES - u64::from(MAX_RANGE_BYTES) {
            return bad("offset", self.offset_bytes);
        }
        let marker = self.is_marker();
        if marker {
            let both = self.flags & FLAG_SYNC_BEGIN != 0 && self.flags & FLAG_SYNC_END != 0;
            let plain = self.payload_len == 0 && self.range_len == 0;
            if self.kind != RecordKind::Sync || both || !plain {
                return bad("flags", self.flags.into());
            }
            let base = self.flags & FLAG_STREAM_BASE != 0;
            if self.offset_bytes != 0 && !(base && self.offset_bytes < self.seq) {
                return bad("offset", self.offset_bytes);
            }
        }
        if self.flags & FLAG_STREAM_BASE != 0 && self.flags & FLAG_SYNC_BEGIN == 0 {
            return bad("flags", self.flags.into());
        }
        let carries_data = match self.kind {
            RecordKind::Write => true,
            RecordKind::Sync => !marker,
            _ => false,
        };
        if carries_data && (self.payload_len == 0 || self.payload_len != self.range_len) {
            return bad("payload length", self.payload_len.into());
        }
        if !carries_data && self.payload_len != 0 {
            return bad("payload length", self.payload_len.into());
        }
        if !carries_data && !marker && self.range_len == 0 {
            return bad("range length", 0);
        }
        if self.flags & FLAG_FRAGMENT_MORE != 0 && marker {
            return bad("flags", self.flags.into());
        }
        Ok(())
    }
}

/// One whole record inside a byte slice: the header, and where its payload lies.
#[derive(Clone, Copy, Debug)]
pub struct RecordRef<'a> {
    /// The checked header.
    pub header: RecordHeader,
    /// The payload, without padding, its CRC checked.
    pub payload: &'a [u8],
}

/// Walks whole records that lie back to back in `bytes`, checking header and payload of each.
///
/// Ends at the first error, which it yields once. PAD is an error here: pads never leave the ring.
pub struct RecordIter<'a> {
    rest: &'a [u8],
    /// `None`: payloads are believed.
    crc: Option<fn(u32, &[u8]) -> u32>,
}

impl<'a> RecordIter<'a> {
    /// Walks `bytes` with the crate's own CRC32C.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self {
            rest: bytes,
            crc: Some(crc32c),
        }
    }

    /// Walks `bytes` with the given CRC32C (seed 0 starts), for shells that link a faster one.
    pub fn with_crc(bytes: &'a [u8], crc: fn(u32, &[u8]) -> u32) -> Self {
        let crc = Some(crc);
        Self { rest: bytes, crc }
    }

    /// Walks `bytes` whose payloads were just checked by something that covers all of them (a batch's
    /// CRC): headers are checked, payloads are believed.
    pub const fn trusting(bytes: &'a [u8]) -> Self {
        Self {
            rest: bytes,
            crc: None,
        }
    }

    fn step(&mut self) -> Result<RecordRef<'a>, RecordError> {
        let header = RecordHeader::decode(self.rest)?;
        if header.kind == RecordKind::Pad {
            return Err(RecordError::Field {
                seq: 0,
                field: "kind",
                value: 6,
            });
        }
        let span = header.span_bytes();
        let truncated = RecordError::Truncated {
            have: self.rest.len(),
            need: span,
        };
        let (record, rest) = self.rest.split_at_checked(span).ok_or(truncated)?;
        let end = HEADER_BYTES + header.payload_len as usize;
        let payload = record.get(HEADER_BYTES..end).ok_or(truncated)?;
        let computed = match self.crc {
            None => header.payload_crc,
            Some(_) if payload.is_empty() => 0,
            Some(crc) => crc(0, payload),
        };
        if computed != header.payload_crc {
            let stored = header.payload_crc;
            return Err(RecordError::PayloadCrc {
                seq: header.seq,
                stored,
                computed,
            });
        }
        self.rest = rest;
        Ok(RecordRef { header, payload })
    }
}

impl<'a> Iterator for RecordIter<'a> {
    type Item = Result<RecordRef<'a>, RecordError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let step = self.step();
        if step.is_err() {
            self.rest = &[];
        }
        Some(step)
    }
}

/// A little-endian u32 at `at`; callers pass constant positions inside a fixed array.
pub(crate) fn le_u32<const N: usize>(raw: &[u8; N], at: usize) -> u32 {
    u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]])
}

/// A little-endian u64 at `at`; callers pass constant positions inside a fixed array.
pub(crate) fn le_u64<const N: usize>(raw: &[u8; N], at: usize) -> u64 {
    u64::from(le_u32(raw, at)) | (u64::from(le_u32(raw, at + 4)) << 32)
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
