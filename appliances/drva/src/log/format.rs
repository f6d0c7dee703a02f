//! Bytes of the replication log.
//!
//! Invariant: a batch is believed only if its header's CRC, its domain, its number, the chain to the
//! batch before it and its body's CRC all match; parsers never panic.
//!
//! A segment is a preallocated file of batches, each starting at a multiple of 4096. A batch is a
//! header of 64 bytes and a body, padded with zeros. Header, little-endian:
//!
//! | at | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `JDL1` |
//! | 4 | 4 | version, 1 |
//! | 8 | 16 | the domain's id |
//! | 24 | 8 | number: from 1, +1 a batch |
//! | 32 | 4 | body length in bytes |
//! | 36 | 4 | CRC32C of the body |
//! | 40 | 4 | CRC32C in the header of the batch before (0 for the first) |
//! | 44 | 16 | reserved, zero |
//! | 60 | 4 | CRC32C of the 60 bytes before |
//!
//! The body is entries, each a header of 48 bytes and its content: kind (1), 3 zero bytes, content
//! length (4), disk id (16), first seq (8), last seq (8), epoch (4), 4 zero bytes. Kinds: RUN holds
//! whole records as they came; DISK and CUT hold JSON documents; STATE tells where a disk stands, its
//! content is the seq (8) of the disk's last base that relied on nothing.

use crc32c::crc32c;

/// Bytes of a batch's header.
pub const BATCH_HEADER_BYTES: usize = 64;
/// Batches start at multiples of this.
pub const BATCH_ALIGN: usize = 4096;
/// Largest body.
pub const MAX_BODY_BYTES: usize = 4 << 20;
/// Bytes of an entry's header.
pub const ENTRY_HEADER_BYTES: usize = 48;
const MAGIC: u32 = u32::from_le_bytes(*b"JDL1");
const VERSION: u32 = 1;

/// Why bytes are not a batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// No batch starts here.
    #[error("no batch starts here")]
    None,
    /// A newer program wrote it.
    #[error("log version {0}; this program knows {VERSION}")]
    Version(u32),
    /// It is of another domain.
    #[error("the batch belongs to another domain")]
    Domain,
    /// It is not the batch that follows.
    #[error("batch {found} where {expected} was expected")]
    Number {
        /// Expected.
        expected: u64,
        /// Found.
        found: u64,
    },
    /// Its chain value is not that of the batch before.
    #[error("batch {0} does not follow the batch before it")]
    Chain(u64),
    /// Its body is cut short or damaged.
    #[error("batch {0}: its body is damaged")]
    Body(u64),
    /// Bytes that a newer program may have given a meaning.
    #[error("batch {0}: reserved bytes are not zero")]
    Reserved(u64),
    /// An entry cannot be read.
    #[error("batch {0}: an entry is malformed")]
    Entry(u64),
}

/// A batch's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// The domain.
    pub domain_id: [u8; 16],
    /// Number.
    pub number: u64,
    /// Body length.
    pub body_len: u32,
    /// CRC32C of the body.
    pub body_crc: u32,
    /// Chain value of the batch before.
    pub before: u32,
}

fn u32_at(raw: &[u8; BATCH_HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]])
}

impl BatchHeader {
    /// Its bytes, and its chain value for the next.
    pub fn encode(&self) -> ([u8; BATCH_HEADER_BYTES], u32) {
        let mut out = [0u8; BATCH_HEADER_BYTES];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4..8].copy_from_slice(&VERSION.to_le_bytes());
        out[8..24].copy_from_slice(&self.domain_id);
        out[24..32].copy_from_slice(&self.number.to_le_bytes());
        out[32..36].copy_from_slice(&self.body_len.to_le_bytes());
        out[36..40].copy_from_slice(&self.body_crc.to_le_bytes());
        out[40..44].copy_from_slice(&self.before.to_le_bytes());
        let crc = crc32c(&out[..60]);
        out[60..64].copy_from_slice(&crc.to_le_bytes());
        (out, crc)
    }

    /// Reads a header; also gives its chain value.
    pub fn decode(bytes: &[u8]) -> Result<(Self, u32), BatchError> {
        let raw = bytes
            .first_chunk::<BATCH_HEADER_BYTES>()
            .ok_or(BatchError::None)?;
        let crc = u32_at(raw, 60);
        if u32_at(raw, 0) != MAGIC || crc != crc32c(&raw[..60]) {
            return Err(BatchError::None);
        }
        if u32_at(raw, 4) != VERSION {
            return Err(BatchError::Version(u32_at(raw, 4)));
        }
        let mut domain_id = [0u8; 16];
        domain_id.copy_from_slice(&raw[8..24]);
        let number = u64::from(u32_at(raw, 24)) | u64::from(u32_at(raw, 28)) << 32;
        if raw[44..60].iter().any(|byte| *byte != 0) {
            return Err(BatchError::Reserved(number));
        }
        let body_len = u32_at(raw, 32);
        if body_len as usize > MAX_BODY_BYTES {
            return Err(BatchError::Body(number));
        }
        let (body_crc, before) = (u32_at(raw, 36), u32_at(raw, 40));
        Ok((
            Self {
                domain_id,
                number,
                body_len,
                body_crc,
                before,
            },
            crc,
        ))
    }

    /// Bytes that the batch takes in its segment.
    pub const fn span_bytes(&self) -> u64 {
        (BATCH_HEADER_BYTES + self.body_len as usize).next_multiple_of(BATCH_ALIGN) as u64
    }
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EntryKind {
    /// Whole records of one disk.
    Run = 1,
    /// A disk's description.
    Disk = 2,
    /// A closed cut.
    Cut = 3,
    /// Where a disk stands; written at the start of each segment, so that older ones may go.
    State = 4,
}

/// One entry of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// What it is.
    pub kind: EntryKind,
    /// The disk; zeros for a cut.
    pub disk_id: [u8; 16],
    /// First seq of a run; begin of the open sync (or 0) of a state.
    pub first_seq: u64,
    /// Last seq of a run or state.
    pub last_seq: u64,
    /// Attach epoch of a state; cut epoch of a cut.
    pub epoch: u32,
    /// The content.
    pub content: &'a [u8],
}

impl Entry<'_> {
    /// Bytes that it takes.
    pub const fn span_bytes(&self) -> usize {
        ENTRY_HEADER_BYTES + self.content.len()
    }

    /// Its header; the content follows it.
    pub fn header(&self) -> [u8; ENTRY_HEADER_BYTES] {
        let mut out = [0u8; ENTRY_HEADER_BYTES];
        out[0] = self.kind as u8;
        out[4..8].copy_from_slice(&(self.content.len() as u32).to_le_bytes());
        out[8..24].copy_from_slice(&self.disk_id);
        out[24..32].copy_from_slice(&self.first_seq.to_le_bytes());
        out[32..40].copy_from_slice(&self.last_seq.to_le_bytes());
        out[40..44].copy_from_slice(&self.epoch.to_le_bytes());
        out
    }
}

/// Walks the entries of a body; ends at the first that is malformed, with an error.
pub struct Entries<'a> {
    rest: &'a [u8],
    number: u64,
}

impl<'a> Entries<'a> {
    /// Of the batch with this number.
    pub const fn new(body: &'a [u8], number: u64) -> Self {
        Self { rest: body, number }
    }

    fn step(&mut self) -> Option<Entry<'a>> {
        let (head, rest) = self.rest.split_first_chunk::<ENTRY_HEADER_BYTES>()?;
        let kind = match head[0] {
            1 => EntryKind::Run,
            2 => EntryKind::Disk,
            3 => EntryKind::Cut,
            4 => EntryKind::State,
            _ => return None,
        };
        if head[1..4] != [0; 3] || head[44..48] != [0; 4] {
            return None; // reserved
        }
        let number = |at: usize| {
            let mut raw = [0u8; 8];
            raw.copy_from_slice(&head[at..at + 8]);
            u64::from_le_bytes(raw)
        };
        let len = number(4) as u32 as usize;
        let (content, rest) = rest.split_at_checked(len)?;
        let mut disk_id = [0u8; 16];
        disk_id.copy_from_slice(&head[8..24]);
        self.rest = rest;
        Some(Entry {
            kind,
            disk_id,
            first_seq: number(24),
            last_seq: number(32),
            epoch: number(40) as u32,
            content,
        })
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<Entry<'a>, BatchError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let step = self.step().ok_or(BatchError::Entry(self.number));
        if step.is_err() {
            self.rest = &[];
        }
        Some(step)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn fuzz_batches() {
        bolero::check!().for_each(|input: &[u8]| {
            let _ = BatchHeader::decode(input);
            let _ = Entries::new(input, 1).count();
        });
    }

    #[test]
    fn entries_survive_and_flips_of_the_header_are_noticed() {
        let entry = Entry {
            kind: EntryKind::Run,
            disk_id: [7; 16],
            first_seq: 5,
            last_seq: 9,
            epoch: 3,
            content: b"records",
        };
        let mut body = Vec::new();
        for _ in 0..2 {
            body.extend_from_slice(&entry.header());
            body.extend_from_slice(entry.content);
        }
        assert_eq!(body.len(), 2 * entry.span_bytes());
        let back: Vec<_> = Entries::new(&body, 1).map(Result::unwrap).collect();
        assert_eq!(back, [entry, entry]);
        let last = body.len() - 1;
        assert!(Entries::new(&body[..last], 1).last().unwrap().is_err());
        let header = BatchHeader {
            domain_id: [1; 16],
            number: 3,
            body_len: 9,
            body_crc: 4,
            before: 5,
        };
        let (raw, chain) = header.encode();
        assert_eq!(BatchHeader::decode(&raw), Ok((header, chain)));
        for bit in 0..raw.len() * 8 {
            let mut bad = raw;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(BatchHeader::decode(&bad).is_err(), "bit {bit}");
        }
    }
}
