//! What the tests of the store share: records, and a model of disks.
#![allow(dead_code, clippy::unwrap_used)]

pub mod flaky;

use filter_core::record::{
    FLAG_STREAM_BASE, FLAG_SYNC_BEGIN, FLAG_SYNC_END, RecordHeader, RecordKind, RecordRef,
};
use recovery_store::{Container, CutMeta, CutView, CutWriter, DiskInfo, DomainInfo, PartBlocks};
use std::collections::BTreeMap;
use uuid::Uuid;

/// The domain of the tests.
pub fn domain() -> DomainInfo {
    DomainInfo::new(Uuid::from_u128(0xd0), "test domain")
}

/// A disk of the tests.
pub fn disk(number: u128, capacity_bytes: u64) -> DiskInfo {
    DiskInfo {
        uuid: Uuid::from_u128(0x100 + number),
        vm_uuid: Uuid::from_u128(0x200),
        vm_name: "vm".into(),
        name: format!("disk{number}"),
        capacity_bytes,
    }
}

/// A record with its payload.
#[derive(Clone, Debug)]
pub struct Rec {
    /// Its header.
    pub header: RecordHeader,
    /// Its payload.
    pub payload: Vec<u8>,
}

impl Rec {
    /// As the writer takes it.
    pub fn as_ref(&self) -> RecordRef<'_> {
        RecordRef {
            header: self.header,
            payload: &self.payload,
        }
    }
}

/// A record of any kind.
pub fn rec(seq: u64, kind: RecordKind, offset_bytes: u64, len: u32, payload: Vec<u8>) -> Rec {
    let header = RecordHeader {
        kind,
        flags: 0,
        payload_len: payload.len() as u32,
        payload_crc: 0,
        seq,
        stamp: seq,
        offset_bytes,
        attach_epoch: 1,
        cut_epoch: 1,
        time_ns: 0,
        range_len: len,
    };
    header.check().expect("a valid record");
    Rec { header, payload }
}

/// A write of `len` bytes of `fill`.
pub fn write(seq: u64, offset_bytes: u64, len: u32, fill: u8) -> Rec {
    rec(
        seq,
        RecordKind::Write,
        offset_bytes,
        len,
        vec![fill; len as usize],
    )
}

/// A marker.
pub fn marker(seq: u64, flags: u8) -> Rec {
    let mut marker = rec(seq, RecordKind::Zero, 0, 1, Vec::new());
    marker.header.kind = RecordKind::Sync;
    marker.header.range_len = 0;
    marker.header.flags = flags;
    marker.header.check().expect("a valid marker");
    marker
}

/// A sync begins.
pub fn sync_begin(seq: u64) -> Rec {
    marker(seq, FLAG_SYNC_BEGIN)
}

/// A fresh stream begins.
pub fn stream_base(seq: u64) -> Rec {
    marker(seq, FLAG_SYNC_BEGIN | FLAG_STREAM_BASE)
}

/// A sync ends.
pub fn sync_end(seq: u64) -> Rec {
    marker(seq, FLAG_SYNC_END)
}

/// The bytes of a disk, and what a record does to them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl Model {
    /// A disk of zeros.
    pub fn new(capacity_bytes: u64) -> Self {
        Self {
            bytes: vec![0; capacity_bytes as usize],
        }
    }

    /// What the record does.
    pub fn apply(&mut self, rec: &Rec) {
        let start = rec.header.offset_bytes as usize;
        let range = start..start + rec.header.range_len as usize;
        match rec.header.kind {
            RecordKind::Write | RecordKind::Sync => self.bytes[range].copy_from_slice(&rec.payload),
            RecordKind::Zero | RecordKind::Unmap => self.bytes[range].fill(0),
            _ => {}
        }
    }
}

/// Feeds records and waits for uploads as they become due.
pub async fn feed(writer: &mut CutWriter, disk: Uuid, records: &[Rec]) {
    for record in records {
        writer
            .apply(disk, &record.as_ref())
            .await
            .expect("is taken");
    }
}

/// Commits what was fed.
pub async fn commit(writer: &mut CutWriter, name: Option<&str>) -> u64 {
    let positions: BTreeMap<Uuid, u64> = writer
        .fed_positions()
        .into_iter()
        .map(|(disk, position)| (disk, position.seq))
        .filter(|(_, seq)| *seq > 0)
        .collect();
    let meta = CutMeta {
        cut_epoch: 1,
        time_ns: 1_700_000_000_000_000_000,
        name: name.map(Into::into),
        positions,
        ..CutMeta::default()
    };
    writer.commit(meta).await.expect("commits").cut
}

/// The bytes of a disk in a view.
pub async fn read_disk(container: &Container, view: &CutView, disk: &DiskInfo) -> Vec<u8> {
    let mut bytes = vec![0xee; disk.capacity_bytes as usize];
    let map = view.extents(disk.uuid).expect("the disk is in the view");
    let mut end = 0;
    for piece in map.iter() {
        let start = piece.offset_bytes as usize;
        // What no part mentions reads as zeros.
        bytes[end..start].fill(0);
        let range = start..start + piece.len_bytes as usize;
        end = range.end;
        match piece.place {
            PartBlocks::Zero => bytes[range].fill(0),
            PartBlocks::Block {
                part,
                block,
                offset_bytes,
            } => {
                let part = &view.parts[part as usize];
                let blocks = container.read_part(part, &[block]).await.expect("reads");
                let at = offset_bytes as usize;
                bytes[range.clone()].copy_from_slice(&blocks[0].1[at..at + range.len()]);
            }
        }
    }
    bytes[end..].fill(0);
    bytes
}

/// A small random number generator, so that a seed says everything.
pub struct Random(pub u64);

impl Random {
    /// The next number (splitmix64).
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// A random record of a disk.
pub fn random_record(random: &mut Random, seq: u64, capacity_bytes: u64) -> Rec {
    let sectors = capacity_bytes / 512;
    let offset = random.below(sectors);
    let most = (sectors - offset).min(1 + random.below(64));
    let len = (1 + random.below(most)) as u32 * 512;
    let offset = offset * 512;
    match random.below(10) {
        0 => rec(seq, RecordKind::Zero, offset, len, Vec::new()),
        1 => rec(seq, RecordKind::Unmap, offset, len, Vec::new()),
        2 => rec(seq, RecordKind::Void, offset, len, Vec::new()),
        3 => rec(seq, RecordKind::Sync, offset, len, vec![0; len as usize]),
        kind => {
            let mut payload = vec![random.next() as u8; len as usize];
            if kind > 6 {
                for byte in &mut payload {
                    *byte = random.next() as u8;
                }
            }
            rec(seq, RecordKind::Write, offset, len, payload)
        }
    }
}
