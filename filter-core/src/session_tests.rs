#![allow(clippy::unwrap_used)]
use super::*;
use crate::record::RecordKind;
use proptest::prelude::*;

fn record(seq: u64, attach_epoch: u32, flags: u8) -> RecordHeader {
    let marker = flags != 0;
    RecordHeader {
        kind: if marker {
            RecordKind::Sync
        } else {
            RecordKind::Zero
        },
        flags,
        payload_len: 0,
        payload_crc: 0,
        seq,
        stamp: seq,
        offset_bytes: 0,
        attach_epoch,
        cut_epoch: 1,
        time_ns: 0,
        range_len: if marker { 0 } else { 512 },
    }
}

const BASE: u8 = FLAG_SYNC_BEGIN | FLAG_STREAM_BASE;

#[test]
fn a_stream_begins_at_a_base_only() {
    let mut receiver = Receiver::new();
    assert!(matches!(
        receiver.admit(&record(1, 1, 0)),
        Err(Refusal::Gap { .. })
    ));
    assert!(matches!(
        receiver.admit(&record(1, 1, FLAG_SYNC_BEGIN)),
        Err(Refusal::Gap { .. })
    ));
    assert_eq!(receiver.admit(&record(100, 1, BASE)), Ok(Admit::Append));
    assert!(receiver.syncing());
    assert_eq!(receiver.admit(&record(101, 1, 0)), Ok(Admit::Append));
    assert_eq!(receiver.admit(&record(101, 1, 0)), Ok(Admit::Duplicate));
    assert_eq!(
        receiver.admit(&record(103, 1, 0)),
        Err(Refusal::Gap {
            last: 101,
            found: 103
        })
    );
    assert_eq!(
        receiver.admit(&record(102, 1, FLAG_SYNC_END)),
        Ok(Admit::Append)
    );
    assert!(!receiver.syncing());
}

#[test]
fn an_older_epoch_is_fenced() {
    let mut receiver = Receiver::restored(Received(5), 3, false);
    assert_eq!(receiver.admit(&record(6, 4, 0)), Ok(Admit::Append));
    assert_eq!(
        receiver.admit(&record(7, 3, 0)),
        Err(Refusal::Fenced {
            current: 4,
            found: 3
        })
    );
    assert!(receiver.open(3).is_err());
    assert!(receiver.open(4).is_ok());
    // A base does not pass the fence either.
    assert!(matches!(
        receiver.admit(&record(99, 3, BASE)),
        Err(Refusal::Fenced { .. })
    ));
    // What is there already is dropped, whatever its epoch: the lane sends it again after a reconnect.
    assert_eq!(receiver.admit(&record(5, 3, 0)), Ok(Admit::Duplicate));
}

#[test]
fn resume_table() {
    use Resume::*;
    let d = Durable;
    // (lane durable, last published, next is base, appliance durable) -> what follows
    let rows = [
        ((d(0), 0, false, 0), After(d(0))),
        ((d(0), 9, true, 0), AtBase),
        ((d(5), 9, false, 5), After(d(5))),
        ((d(5), 9, false, 7), After(d(7))),
        ((d(5), 9, true, 7), After(d(7))),
        ((d(5), 9, false, 9), After(d(9))),
        ((d(5), 9, false, 3), Restart { above_seq: 9 }),
        ((d(5), 9, true, 3), AtBase),
        ((d(5), 9, false, 12), Restart { above_seq: 12 }),
        ((d(5), 9, true, 12), Restart { above_seq: 12 }),
    ];
    for ((durable, published, base, appliance), expected) in rows {
        let got = resume(durable, published, base, appliance);
        assert_eq!(got, expected, "{durable:?} {published} {base} {appliance}");
    }
}

proptest! {
    /// However the sender stutters, each seq is appended once and in order.
    #[test]
    fn delivery_is_idempotent(jumps in proptest::collection::vec(0u64..40, 1..60)) {
        let mut receiver = Receiver::new();
        let mut appended = std::vec::Vec::new();
        let mut next = 1u64;
        for back in jumps {
            next = u64::max(1, next.saturating_sub(back % 20));
            for seq in next..next + 10 {
                let flags = if seq == 1 { BASE } else { 0 };
                if receiver.admit(&record(seq, 1, flags)).unwrap() == Admit::Append {
                    appended.push(seq);
                }
            }
            next += 10;
        }
        let expected: std::vec::Vec<u64> = (1..=appended.len() as u64).collect();
        prop_assert_eq!(appended, expected);
    }
}
