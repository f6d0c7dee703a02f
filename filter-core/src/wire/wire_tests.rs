#![allow(clippy::unwrap_used)]
use super::body::Body;
use super::*;
use proptest::prelude::*;

fn parse(frame: &[u8]) -> Result<Message, WireError> {
    let (head, body) = frame.split_first_chunk::<FRAME_HEADER_BYTES>().unwrap();
    let header = FrameHeader::decode(head)?;
    assert_eq!(header.body_len as usize, body.len());
    Message::decode(&header, body)
}

fn hello() -> Hello {
    Hello {
        oldest: 1,
        newest: 3,
        role: PeerRole::Daemon,
        port_offset: 2,
        peer_id: *b"0123456789abcdef",
        incarnation: 0x0807_0605_0403_0201,
        name: "esx-1".into(),
    }
}

/// Frozen for ever: an old appliance must be able to read the hello of a daemon of any age.
#[test]
fn golden_hello() {
    let mut golden = Vec::new();
    golden.extend_from_slice(b"JDF1");
    golden.extend_from_slice(&[1, 0, 0, 0, 29, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
    let mut body = vec![1, 0, 3, 0, 1, 2];
    body.extend_from_slice(b"0123456789abcdef");
    body.extend_from_slice(&[5, 0]);
    body.extend_from_slice(b"esx-1");
    golden.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
    golden.extend_from_slice(&crc32c::crc32c(&golden).to_le_bytes());
    golden.extend_from_slice(&body);
    assert_eq!(Message::Hello(hello()).encode(0), golden);
    // Fields that a newer peer appends are ignored.
    golden.extend_from_slice(b"later");
    let mut longer = golden[FRAME_HEADER_BYTES..].to_vec();
    let header = FrameHeader {
        kind: FrameKind::Hello,
        body_len: longer.len() as u32,
        channel: 0,
        word: hello().incarnation,
        body_crc: crc32c(0, &longer),
    };
    assert_eq!(
        Message::decode(&header, &longer),
        Ok(Message::Hello(hello()))
    );
    longer[0] ^= 1;
    assert!(matches!(
        Message::decode(&header, &longer),
        Err(WireError::BodyCrc { .. })
    ));
}

#[test]
fn versions_are_agreed_or_refused() {
    assert_eq!(hello().agree(), Ok(PROTOCOL_NEWEST));
    let older = Hello {
        newest: 1,
        ..hello()
    };
    assert_eq!(older.agree(), Ok(1));
    let future = Hello {
        oldest: 7,
        newest: 9,
        ..hello()
    };
    assert_eq!(
        future.agree(),
        Err(WireError::Version {
            oldest: 7,
            newest: 9
        })
    );
    let ancient = Hello {
        oldest: 0,
        newest: 0,
        ..hello()
    };
    assert!(ancient.agree().is_err());
    let upside_down = Hello {
        oldest: 2,
        newest: 1,
        ..hello()
    };
    assert!(upside_down.agree().is_err());
}

const fn before(epoch: u32) -> Attach {
    Attach {
        epoch,
        id: 7,
        generation: 8,
    }
}

fn messages() -> Vec<Message> {
    vec![
        Message::Hello(hello()),
        Message::OpenLane(OpenLane {
            disk_id: [1; 16],
            vm_id: [2; 16],
            again: true,
            attach_epoch: 3,
            attach_id: 11,
            map_generation: 12,
            lineage: Box::new(Lineage::anew(1).child(before(1)).child(before(2))),
            durable_seq: 4,
            capacity_bytes: 5 << 30,
            base: Some(6),
            domain: "d".into(),
            vm_name: "v".into(),
            disk_label: "l".into(),
        }),
        Message::LaneOpened {
            durable_seq: 9,
            attach_epoch: 2,
            full_base_seq: 8,
        },
        Message::Ack {
            durable_seq: 10,
            uploaded_seq: 3,
        },
        Message::Error {
            code: ErrorCode::Gap,
            seq: 77,
            text: "a gap".into(),
        },
        Message::CutRequest {
            epoch: 8,
            domain: "d".into(),
        },
        Message::CutPositions {
            epoch: 8,
            domain: "d".into(),
            positions: vec![([7; 16], 99)],
        },
        Message::Heartbeat {
            clock_ns: 12,
            answer: true,
        },
        Message::CloseLane { in_order: false },
        Message::CloseLane { in_order: true },
        Message::CutHold {
            epoch: 8,
            domain: "d".into(),
        },
        Message::CutHeld {
            epoch: 8,
            domain: "d".into(),
        },
        Message::CutRelease {
            epoch: 8,
            domain: "d".into(),
        },
        Message::CutReport {
            epoch: 8,
            domain: "d".into(),
            disks: vec![
                DiskReport {
                    disk_id: [7; 16],
                    seq: 99,
                    open: true,
                    complete: false,
                },
                DiskReport {
                    disk_id: [8; 16],
                    seq: 0,
                    open: false,
                    complete: true,
                },
            ],
        },
        Message::HashRequest {
            offset_bytes: 3 << 16,
            blocks: 256,
        },
        Message::Hashes {
            offset_bytes: 3 << 16,
            hashes: vec![[9; 16], [0; 16]],
        },
    ]
}

#[test]
fn every_message_survives_and_every_flipped_bit_is_noticed() {
    for message in messages() {
        let frame = message.encode(5);
        assert_eq!(parse(&frame).as_ref(), Ok(&message));
        for bit in 0..frame.len() * 8 {
            let mut bad = frame.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let (head, body) = bad.split_first_chunk::<FRAME_HEADER_BYTES>().unwrap();
            let noticed = FrameHeader::decode(head).and_then(|h| Message::decode(&h, body));
            assert!(noticed.is_err(), "{message:?}, bit {bit}");
        }
    }
}

#[test]
fn truncated_bodies_are_errors() {
    for message in messages() {
        let frame = message.encode(1);
        let body = &frame[FRAME_HEADER_BYTES..];
        for len in 0..body.len() {
            let short = &body[..len];
            let header = FrameHeader {
                body_len: len as u32,
                body_crc: crc32c(0, short),
                ..FrameHeader::decode(frame.first_chunk().unwrap()).unwrap()
            };
            let result = Message::decode(&header, short);
            assert!(
                matches!(result, Err(WireError::Field { .. })),
                "{message:?} cut to {len}"
            );
        }
    }
}

#[test]
fn lengths_are_limited_by_kind() {
    for (kind, limit) in [
        (FrameKind::Data, MAX_DATA_BYTES),
        (FrameKind::Ack, MAX_BODY_BYTES),
    ] {
        for body_len in [limit + 1, u32::MAX] {
            let header = FrameHeader {
                kind,
                body_len,
                channel: 0,
                word: 0,
                body_crc: 0,
            };
            let result = FrameHeader::decode(&header.encode());
            assert!(matches!(result, Err(WireError::TooLong { .. })));
        }
        let fits = FrameHeader {
            kind,
            body_len: limit,
            channel: 0,
            word: 0,
            body_crc: 0,
        };
        assert_eq!(FrameHeader::decode(&fits.encode()), Ok(fits));
    }
}

#[test]
fn questions_about_blocks_are_within_their_limits() {
    let whole = |offset_bytes, blocks| {
        let message = Message::HashRequest {
            offset_bytes,
            blocks,
        };
        parse(&message.encode(1)).is_ok()
    };
    assert!(whole(1 << 16, 1) && whole(0, 256));
    assert!(!whole(1 << 15, 1) && !whole(0, 0) && !whole(0, 257));
    assert!(!whole(1 << 63, 1));
    let hashes = vec![[1; 16]; 257];
    let offset_bytes = 0;
    let too_many = Message::Hashes {
        offset_bytes,
        hashes,
    };
    assert!(parse(&too_many.encode(1)).is_err());
}

#[test]
fn a_count_is_checked_against_what_is_left() {
    let mut body = Body::default();
    body.text("d");
    body.u32(u32::MAX);
    let header = FrameHeader {
        kind: FrameKind::CutPositions,
        body_len: body.0.len() as u32,
        channel: 0,
        word: 1,
        body_crc: crc32c(0, &body.0),
    };
    let field = WireError::Field {
        kind: 8,
        field: "count",
    };
    assert_eq!(Message::decode(&header, &body.0), Err(field));
    let header = FrameHeader {
        kind: FrameKind::CutReport,
        ..header
    };
    let field = WireError::Field {
        kind: 13,
        field: "count",
    };
    assert_eq!(Message::decode(&header, &body.0), Err(field));
}

#[test]
fn reserved_bits_are_checked() {
    let mut raw = FrameHeader::data(1, 2, 64).encode();
    raw[5] = 1;
    let crc = crc32c(0, &raw[..28]);
    raw[28..].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(FrameHeader::decode(&raw), Err(WireError::Reserved(1)));
}

#[test]
fn ports_have_their_jobs() {
    for (offset, role) in PortRole::ALL.into_iter().enumerate() {
        assert_eq!(usize::from(role.offset()), offset);
        assert_eq!(PortRole::from_offset(offset as u16), Some(role));
    }
    assert_eq!(PortRole::from_offset(6), None);
    assert!((1..=4).contains(&PortRole::of_disk(&[9; 16]).offset()));
}

proptest! {
    #[test]
    fn long_texts_are_cut_at_a_character(text in "\\PC{0,900}") {
        let message = Message::Error { code: ErrorCode::Other, seq: 0, text: text.clone() };
        match parse(&message.encode(0)) {
            Ok(Message::Error { text: back, .. }) => prop_assert!(text.starts_with(&back)),
            other => prop_assert!(false, "{other:?}"),
        }
    }
}

#[test]
fn fuzz_frames() {
    bolero::check!().for_each(|input: &[u8]| {
        let Some((head, body)) = input.split_first_chunk::<FRAME_HEADER_BYTES>() else {
            return;
        };
        let _ = FrameHeader::decode(head);
        // With the CRCs made right the input reaches the parsers of the bodies.
        if let Some(kind) = FrameKind::from_wire(head[4]) {
            let header = FrameHeader {
                kind,
                body_len: body.len() as u32,
                channel: 1,
                word: le_u64(head, 16),
                body_crc: crc32c(0, body),
            };
            if let Ok(message) = Message::decode(&header, body) {
                assert_eq!(parse(&message.encode(1)), Ok(message));
            }
        }
    });
}
