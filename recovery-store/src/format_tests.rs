//! Parsers meet arbitrary and almost-right bytes; golden bytes fix the format.

use super::*;
use crate::block::{decode_block, decode_object};
use crate::encode::{encode_header, seal};

fn header(commit: bool) -> PartHeader {
    PartHeader {
        domain: Uuid::from_u128(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10),
        timeline: 1,
        cut: 2,
        part: 3,
        commit,
        previous: [0x5a; 32],
        time_ns: 1_700_000_000_000_000_000,
    }
}

fn disk(number: u128) -> PartDisk {
    PartDisk {
        info: DiskInfo {
            uuid: Uuid::from_u128(number),
            vm_uuid: Uuid::from_u128(9),
            vm_name: "vm".into(),
            name: "disk".into(),
            capacity_bytes: 1 << 20,
        },
        first_seq: 5,
        last_seq: 7,
        attach_epoch: 2,
        sync_open: false,
        stream_base: true,
        extents: vec![
            Extent {
                offset_bytes: 512,
                len_bytes: 16,
                source: Source::Block {
                    block: 0,
                    offset_bytes: 0,
                },
            },
            Extent {
                offset_bytes: 4096,
                len_bytes: 8192,
                source: Source::Zero,
            },
        ],
    }
}

/// A small object: one stored block, two disks, a commit.
fn sample() -> (Vec<u8>, PartIndex) {
    let header = header(true);
    let mut object = encode_header(&header);
    let raw = b"sixteen raw byte";
    object.extend_from_slice(raw);
    let mut index = PartIndex {
        header,
        disks: vec![disk(1), disk(2)],
        blocks: vec![BlockEntry {
            offset_bytes: HEADER_BYTES as u64,
            stored_bytes: 16,
            raw_bytes: 16,
            crc: crc32c(raw),
            compressed: false,
        }],
        commit: Some(Commit {
            cut_epoch: 4,
            time_ns: 6,
            parts: 3,
            records: 12,
            raw_bytes: 16,
            name: Some("a name".into()),
            positions: vec![
                Position {
                    disk: Uuid::from_u128(1),
                    seq: 7,
                },
                Position {
                    disk: Uuid::from_u128(2),
                    seq: 7,
                },
            ],
        }),
        sha256: [0; 32],
    };
    index.sha256 = seal(&mut object, &index);
    (object, index)
}

#[test]
fn what_is_written_reads_back() {
    let (object, index) = sample();
    let (read, computed) = decode_object(&object).expect("decodes");
    assert_eq!(read, index);
    assert_eq!(computed, index.sha256);
    let block = object.get(128..144).expect("the block");
    let raw = decode_block(0, &index.blocks[0], block).expect("decodes");
    assert_eq!(raw, b"sixteen raw byte");
}

/// If this fails, the format has changed: raise its version, and keep reading the old one.
#[test]
fn the_format_is_what_it_was() {
    let (object, _) = sample();
    assert_eq!(object.len(), 128 + 16 + 506 + 96);
    let hash = crate::codec::hex(&sha256(&object));
    assert_eq!(hash, GOLDEN_SHA256);
}
const GOLDEN_SHA256: &str = "6f7f6b2589f8c785248cc417fd9c1c47de2a04900fc194bef1b17e8699699260";

#[test]
fn another_version_is_named() {
    let mut raw = encode_header(&header(false));
    raw[8] = 2;
    let crc = crc32c(&raw[..124]).to_le_bytes();
    raw[124..].copy_from_slice(&crc);
    assert_eq!(
        decode_header(&raw),
        Err(FormatError::Version {
            found: 2,
            supported: 1
        })
    );
}

/// Reseals a changed index, so that the checks behind the checksums are reached.
fn reseal(change: impl FnOnce(&mut PartIndex)) -> Result<(PartIndex, Sha256Hash), FormatError> {
    let (object, mut index) = sample();
    change(&mut index);
    let mut changed = object.get(..144).expect("header and block").to_vec();
    changed.splice(..128, encode_header(&index.header));
    seal(&mut changed, &index);
    decode_object(&changed)
}

#[test]
fn a_lie_behind_a_good_checksum_is_found() {
    type Change = fn(&mut PartIndex);
    let lies: &[(&str, Change)] = &[
        ("timeline", |i| i.header.timeline = 0),
        ("cut number", |i| i.header.cut = 0),
        ("part number", |i| i.header.part = 0),
        ("parts of the cut", |i| i.header.part = 4),
        ("block offset", |i| i.blocks[0].offset_bytes += 1),
        ("block raw length", |i| i.blocks[0].raw_bytes = 1 << 30),
        ("block raw length", |i| i.blocks[0].raw_bytes = 0),
        ("block stored length", |i| i.blocks[0].stored_bytes = 17),
        ("block stored length", |i| i.blocks[0].compressed = true),
        ("end of the data blocks", |i| {
            i.blocks[0].stored_bytes = 8;
            i.blocks[0].raw_bytes = 8;
            for disk in &mut i.disks {
                disk.extents.clear();
            }
        }),
        ("in it twice", |i| {
            i.disks[1].info.uuid = i.disks[0].info.uuid
        }),
        ("disk seq range", |i| i.disks[0].first_seq = 8),
        ("without records", |i| i.disks[0].first_seq = 0),
        ("disk capacity", |i| {
            i.disks[0].info.capacity_bytes = u64::MAX
        }),
        ("extent length", |i| i.disks[0].extents[1].len_bytes = 0),
        ("extent length", |i| {
            i.disks[0].extents[1].len_bytes = u64::MAX
        }),
        ("extent length", |i| i.disks[0].info.capacity_bytes = 4096),
        ("not sorted", |i| i.disks[0].extents[1].offset_bytes = 520),
        ("offset in its block", |i| {
            i.disks[0].extents[0].len_bytes = 17
        }),
        ("extent's block", |i| {
            i.disks[0].extents[0].source = Source::Block {
                block: 1,
                offset_bytes: 0,
            };
        }),
        ("position of a disk", |i| i.disks[0].sync_open = true),
        ("position of a disk", |i| {
            if let Some(commit) = &mut i.commit {
                commit.positions[0].seq = 6;
            }
        }),
        ("bytes after the index", |i| i.header.commit = false),
        ("name length", |i| i.disks[0].info.name = "x".repeat(2000)),
    ];
    for (what, change) in lies {
        let error = reseal(change).map(|_| ()).expect_err(what);
        assert!(error.to_string().contains(what), "{what}: {error}");
    }
    reseal(|_| {}).expect("nothing changed");
}

#[test]
fn arbitrary_bytes_never_make_a_parser_panic() {
    bolero::check!().for_each(|bytes: &[u8]| {
        let _ = decode_header(bytes);
        let _ = decode_footer(bytes, bytes.len() as u64);
        let _ = decode_object(bytes);
        let entry = BlockEntry {
            offset_bytes: 0,
            stored_bytes: bytes.len() as u32,
            raw_bytes: 64 << 10,
            crc: 0,
            compressed: true,
        };
        let _ = decode_block(0, &entry, bytes);
    });
}

/// The index parser behind its checksum: arbitrary bytes after a valid header, with a right CRC.
#[test]
fn arbitrary_indexes_never_make_the_parser_panic() {
    bolero::check!().for_each(|bytes: &[u8]| {
        for commit in [false, true] {
            let mut raw = encode_header(&header(commit));
            raw.extend_from_slice(bytes);
            let footer = Footer {
                object_bytes: 0,
                index_offset_bytes: HEADER_BYTES as u64,
                index_bytes: raw.len() as u64,
                index_crc: crc32c(&raw),
                sha256: [0; 32],
            };
            let _ = decode_index(&raw, &footer);
        }
    });
}

/// One changed place in a valid index, with a right CRC.
#[test]
fn a_changed_index_never_makes_the_parser_panic() {
    let (object, _) = sample();
    let good = object
        .get(144..object.len() - FOOTER_BYTES)
        .expect("the index");
    bolero::check!()
        .with_type::<(u16, u32, bool)>()
        .for_each(|(at, value, short)| {
            let mut raw = good.to_vec();
            let at = usize::from(*at) % (raw.len() - 4);
            raw[at..at + 4].copy_from_slice(&value.to_le_bytes());
            if *short {
                raw.truncate(at);
            } else if at < HEADER_BYTES {
                return;
            }
            let footer = Footer {
                object_bytes: 0,
                index_offset_bytes: 144,
                index_bytes: raw.len() as u64,
                index_crc: crc32c(&raw),
                sha256: [0; 32],
            };
            if let Ok(index) = decode_index(&raw, &footer) {
                for disk in &index.disks {
                    for pair in disk.extents.windows(2) {
                        let end = pair[0].offset_bytes + pair[0].len_bytes;
                        assert!(end <= pair[1].offset_bytes);
                    }
                }
            }
        });
}

/// The example of `docs/store-format.md`, made by the writer's own code.
fn documented_example() -> Vec<u8> {
    use crate::builder::{DiskState, Encoder, PartBuilder};
    use filter_core::record::{RecordHeader, RecordKind, RecordRef};
    let disk = Uuid::from_u128(0xd15c);
    let mut part = PartBuilder::default();
    let payload: Vec<u8> = b"jetdr\n".iter().copied().cycle().take(512).collect();
    for (seq, kind, offset_bytes, range_len, payload) in [
        (1, RecordKind::Write, 4096, 512, payload.as_slice()),
        (2, RecordKind::Unmap, 8192, 4096, &[]),
    ] {
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
            range_len,
        };
        part.take(disk, &RecordRef { header, payload }, false);
    }
    let state = DiskState {
        info: DiskInfo {
            uuid: disk,
            vm_uuid: Uuid::from_u128(7),
            vm_name: "vm".into(),
            name: "disk0".into(),
            capacity_bytes: 1 << 20,
        },
        seq: 2,
        attach_epoch: 1,
        sync_open: false,
        info_changed: false,
    };
    let header = PartHeader {
        domain: Uuid::from_u128(0xd0),
        timeline: 1,
        cut: 1,
        part: 1,
        commit: true,
        previous: [0xaa; 32],
        time_ns: 1_700_000_000_000_000_000,
    };
    let commit = Commit {
        cut_epoch: 1,
        time_ns: 1_700_000_000_000_000_000,
        parts: 1,
        records: 2,
        raw_bytes: 0,
        name: Some("first".into()),
        positions: vec![Position { disk, seq: 2 }],
    };
    let mut encoder = Encoder::new(1, 128 << 10).expect("starts");
    encoder
        .encode(header, part, &[(disk, state)].into(), Some(commit))
        .expect("encodes")
        .object
}

/// The hexdump in the document is an object that this code reads, and (but for what zstd makes of the
/// block) the one that it writes.
#[test]
fn the_documented_example_is_true() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/store-format.md");
    let text = std::fs::read_to_string(path).expect("docs/store-format.md");
    let (_, text) = text
        .split_once("<!-- example -->")
        .expect("the example begins");
    let (text, _) = text
        .split_once("<!-- end of example -->")
        .expect("and ends");
    let mut documented = Vec::new();
    for line in text.lines().filter(|line| line.starts_with("0000")) {
        let bytes = line.get(10..58).unwrap_or_default().split_whitespace();
        documented.extend(bytes.map(|byte| u8::from_str_radix(byte, 16).expect("is hex")));
    }
    let (index, computed) = decode_object(&documented).expect("decodes");
    assert_eq!(computed, index.sha256);
    let written = documented_example();
    let (ours, _) = decode_object(&written).expect("decodes");
    assert_eq!(ours.header, index.header);
    assert_eq!(ours.disks, index.disks);
    assert_eq!(ours.commit, index.commit);
    let block = index.blocks[0];
    let stored = documented.get(128..128 + block.stored_bytes as usize);
    let raw = decode_block(0, &block, stored.expect("the block")).expect("decodes");
    assert_eq!(raw.get(..6), Some(&b"jetdr\n"[..]));
    assert_eq!(raw.len(), 512);
}
