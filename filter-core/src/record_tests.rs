#![allow(clippy::unwrap_used)]
use super::*;
use alloc::vec::Vec;
use proptest::prelude::*;

fn write_header() -> RecordHeader {
    RecordHeader {
        kind: RecordKind::Write,
        flags: 0,
        payload_len: 4096,
        payload_crc: 0x1122_3344,
        seq: 0x0102_0304_0506_0708,
        stamp: 0x1112_1314_1516_1718,
        offset_bytes: 0x0021_2223_2425_2600,
        attach_epoch: 0x3132_3334,
        cut_epoch: 0x4142_4344,
        time_ns: 0x5152_5354_5556_5758,
        range_len: 4096,
    }
}

/// The layout is frozen: these bytes are what stored logs and containers hold.
#[test]
fn golden_bytes() {
    let golden: [u8; 60] = [
        b'J', b'D', b'R', b'1', 1, 0, 64, 0, 0, 0x10, 0, 0, 0x44, 0x33, 0x22, 0x11, 8, 7, 6, 5, 4,
        3, 2, 1, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11, 0x00, 0x26, 0x25, 0x24, 0x23,
        0x22, 0x21, 0x00, 0x34, 0x33, 0x32, 0x31, 0x44, 0x43, 0x42, 0x41, 0x58, 0x57, 0x56, 0x55,
        0x54, 0x53, 0x52, 0x51, 0, 0x10, 0, 0,
    ];
    let bytes = write_header().encode();
    assert_eq!(bytes[..60], golden);
    // An independent implementation of CRC32C agrees on the last four.
    assert_eq!(bytes[60..], crc32c::crc32c(&golden).to_le_bytes());
    assert_eq!(RecordHeader::decode(&bytes), Ok(write_header()));
}

#[test]
fn span_is_padded_to_64() {
    assert_eq!(record_span_bytes(0), 64);
    assert_eq!(record_span_bytes(1), 128);
    assert_eq!(record_span_bytes(4096), 4160);
    assert_eq!(record_span_bytes(MAX_PAYLOAD_BYTES), 64 + 256 * 1024);
}

/// Breaks one field, keeps the CRC right: only the field's own check can refuse it.
#[track_caller]
fn refused(change: impl Fn(&mut RecordHeader), field: &str) {
    let mut header = write_header();
    change(&mut header);
    match RecordHeader::decode(&header.encode()) {
        Err(RecordError::Field { field: got, .. }) => assert_eq!(got, field),
        other => panic!("expected `{field}` to be refused, got {other:?}"),
    }
}

#[test]
fn each_field_has_its_limit() {
    refused(|h| h.flags = 0x80, "flags");
    refused(|h| h.seq = 0, "seq");
    refused(|h| h.seq = u64::MAX, "seq");
    refused(|h| h.payload_len = 0, "payload length");
    refused(|h| h.payload_len = u32::MAX, "payload length");
    refused(|h| h.payload_len = MAX_PAYLOAD_BYTES + 1, "payload length");
    refused(|h| h.range_len = 512, "payload length");
    refused(|h| h.range_len = u32::MAX, "range length");
    refused(|h| h.offset_bytes = u64::MAX, "offset");
    refused(|h| h.flags = FLAG_SYNC_BEGIN, "flags");
    refused(|h| h.flags = FLAG_STREAM_BASE, "flags");
    refused(
        |h| (h.kind, h.payload_len) = (RecordKind::Zero, 4096),
        "payload length",
    );
    refused(
        |h| (h.kind, h.payload_len, h.range_len) = (RecordKind::Unmap, 0, 0),
        "range length",
    );
    refused(|h| h.kind = RecordKind::Pad, "pad");
}

#[test]
fn kind_and_header_length_are_checked() {
    for (at, value, field) in [(4, 0u8, "kind"), (4, 77, "kind"), (6, 65, "header length")] {
        let mut bytes = write_header().encode();
        bytes[at] = value;
        let crc = crc32c(0, &bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        match RecordHeader::decode(&bytes) {
            Err(RecordError::Field { field: got, .. }) => assert_eq!(got, field),
            other => panic!("{field}: {other:?}"),
        }
    }
}

#[test]
fn every_flipped_bit_of_a_header_is_noticed() {
    let good = write_header().encode();
    for bit in 0..HEADER_BYTES * 8 {
        let mut bad = good;
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(RecordHeader::decode(&bad).is_err(), "bit {bit}");
    }
}

fn record(seq: u64, payload: &[u8]) -> Vec<u8> {
    let len = payload.len() as u32;
    let header = RecordHeader {
        seq,
        payload_len: len,
        range_len: len,
        payload_crc: crc32c(0, payload),
        ..write_header()
    };
    let mut out = header.encode().to_vec();
    out.extend_from_slice(payload);
    out.resize(header.span_bytes(), 0);
    out
}

#[test]
fn walks_records_and_stops_at_the_first_error() {
    let mut bytes = record(1, b"abc");
    bytes.extend(record(2, &[7; 100]));
    let seen: Vec<_> = RecordIter::new(&bytes)
        .map(|r| r.unwrap().payload.to_vec())
        .collect();
    assert_eq!(seen, [b"abc".to_vec(), [7; 100].to_vec()]);

    bytes[64 + 1] ^= 1; // first payload
    let seen: Vec<_> = RecordIter::new(&bytes).collect();
    assert_eq!(seen.len(), 1);
    assert!(matches!(
        seen[0],
        Err(RecordError::PayloadCrc { seq: 1, .. })
    ));
}

#[test]
fn a_truncated_record_is_an_error() {
    let bytes = record(1, &[9; 300]);
    for cut in 1..bytes.len() {
        let last = RecordIter::new(&bytes[..cut]).last().unwrap();
        assert!(
            matches!(last, Err(RecordError::Truncated { .. })),
            "cut at {cut}: {last:?}"
        );
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        let _ = RecordIter::new(&bytes).count();
    }
}

/// Coverage-guided when run under `cargo bolero`, a short random run otherwise.
#[test]
fn fuzz_records() {
    bolero::check!().for_each(|input: &[u8]| {
        let _ = RecordIter::new(input).count();
        // The same bytes with the CRC made right reach the field checks.
        if let Some(first) = input.first_chunk::<60>() {
            let mut header = [0u8; 64];
            header[..60].copy_from_slice(first);
            header[..4].copy_from_slice(&RECORD_MAGIC.to_le_bytes());
            let crc = crc32c(0, &header[..60]);
            header[60..].copy_from_slice(&crc.to_le_bytes());
            if let Ok(decoded) = RecordHeader::decode(&header) {
                assert_eq!(decoded.encode(), header);
            }
        }
    });
}

/// What a stream relies on is no place on the disk.
#[test]
fn a_marker_has_no_range() {
    let base = RecordHeader {
        kind: RecordKind::Sync,
        flags: FLAG_SYNC_BEGIN | FLAG_STREAM_BASE,
        payload_len: 0,
        payload_crc: 0,
        seq: 1 << 41,
        stamp: 1,
        offset_bytes: 1 << 40,
        attach_epoch: 1,
        cut_epoch: 1,
        time_ns: 0,
        range_len: 0,
    };
    assert_eq!(base.check(), Ok(()));
    assert_eq!((base.end_bytes(), base.relies_on()), (0, Some(1 << 40)));
    let begin = RecordHeader {
        flags: FLAG_SYNC_BEGIN,
        ..base
    };
    assert!(
        begin.check().is_err(),
        "relies on nothing, and has no range"
    );
    let later = RecordHeader {
        offset_bytes: base.seq,
        ..base
    };
    assert!(later.check().is_err(), "relies on itself");
    let end = RecordHeader {
        offset_bytes: 0,
        ..begin
    };
    assert_eq!((end.check(), end.relies_on()), (Ok(()), None));
}
