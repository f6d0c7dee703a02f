#![allow(clippy::unwrap_used)]
use super::*;

/// A log was lost, and a sidecar put back or damaged: what the disk presents is older than what the store
/// holds of it.
#[test]
fn a_store_that_is_ahead_of_the_log_makes_the_disk_come_again() {
    let mut receiver = Receiver::new();
    assert!(!receiver.found_in_store(0, 0), "an empty store");
    assert!(receiver.found_in_store(100, 8));
    assert!(!receiver.found_in_store(100, 8), "known by now");
    assert!(receiver.syncing() && receiver.newest_epoch() == 8);
    let full_base = receiver.full_base_seq();
    let answer =
        |durable, published, base| resume(Durable(durable), published, base, 100, full_base);
    let above = |above_seq| Resume::Restart { above_seq };
    // Below it, around it, and beyond it: only a stream that begins above it is taken as it is.
    assert_eq!(answer(0, 50, Some(0)), above(100));
    assert_eq!(answer(90, 150, None), above(150));
    assert_eq!(answer(110, 150, None), above(150));
    assert_eq!(answer(110, 150, Some(50)), above(150));
    assert_eq!(answer(110, 150, Some(0)), Resume::AtBase);
}
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
    let mut receiver = Receiver::restored(Received(5), 3, false, 1);
    assert_eq!(receiver.admit(&record(6, 4, 0)), Ok(Admit::Append));
    assert_eq!(
        receiver.admit(&record(7, 3, 0)),
        Err(Refusal::Fenced {
            current: 4,
            found: 3
        })
    );
    assert!(receiver.open(attach(3, 0), NOTHING).is_err());
    assert!(receiver.open(attach(4, 0), NOTHING).is_ok());
    // A base does not pass the fence either.
    assert!(matches!(
        receiver.admit(&record(99, 3, BASE)),
        Err(Refusal::Fenced { .. })
    ));
    // What is there already is dropped, whatever its epoch: the lane sends it again after a reconnect.
    assert_eq!(receiver.admit(&record(5, 3, 0)), Ok(Admit::Duplicate));
    // Not so if it is of an opening that nothing has come of yet: then two records have one number.
    let (last, current) = (receiver.received().0, receiver.attach_epoch());
    let twice = Refusal::SeqTwice {
        seq: 5,
        last,
        current,
        found: current + 1,
    };
    assert_eq!(receiver.admit(&record(5, current + 1, 0)), Err(twice));
    assert!(twice.to_string().contains("record 5 of attach epoch"));
}

fn base(seq: u64, relies_on: u64) -> RecordHeader {
    RecordHeader {
        offset_bytes: relies_on,
        ..record(seq, 1, BASE)
    }
}

#[test]
fn a_base_is_taken_only_if_what_it_relies_on_is_here() {
    // (received, full base before, base's seq, relies on) -> whether it is taken
    let rows = [
        ((0, 0, 1, 0), true),
        ((0, 0, 9, 3), false), // a disk never seen, or a lost log
        ((50, 10, 60, 0), true),
        ((50, 10, 60, 50), true),
        ((50, 10, 60, 10), true),
        ((50, 10, 60, 9), false), // relies on what a full sync was to replace
        ((50, 10, 60, 51), false), // some of it never came
        ((50, 10, 51, 50), true),
    ];
    for ((received, full_base, seq, relies_on), taken) in rows {
        let mut receiver = Receiver::restored(Received(received), 1, false, full_base);
        let before = receiver;
        let refused = Err(Refusal::Base {
            seq,
            relies_on,
            full_base,
            last: received,
        });
        let expected = if taken { Ok(Admit::Append) } else { refused };
        let got = receiver.admit(&base(seq, relies_on));
        assert_eq!(got, expected, "{received} {full_base} {seq} {relies_on}");
        if taken {
            let full = if relies_on == 0 { seq } else { full_base };
            assert_eq!(receiver.full_base_seq(), full);
            assert!(receiver.syncing());
        } else {
            assert_eq!(receiver, before, "a refusal changes nothing");
        }
    }
}

/// Who lost the disk must not get it back by being the first to come again.
#[test]
fn an_epoch_older_than_one_presented_is_not_opened() {
    let mut receiver = Receiver::restored(Received(5), 3, false, 1);
    assert_eq!(receiver.open(attach(5, 0), NOTHING), Ok(()));
    let fenced = |current, found| Err(Refusal::Fenced { current, found });
    assert_eq!(receiver.open(attach(4, 0), NOTHING), fenced(5, 4));
    assert_eq!(receiver.open(attach(5, 0), NOTHING), Ok(()));
    // Records of a lane that was adopted come before those of its new epoch.
    assert_eq!(receiver.admit(&record(6, 3, 0)), Ok(Admit::Append));
    assert_eq!((receiver.attach_epoch(), receiver.newest_epoch()), (3, 5));
    assert_eq!(receiver.admit(&record(7, 5, 0)), Ok(Admit::Append));
    let refused = receiver.admit(&record(8, 4, 0)).map(|_| ());
    assert_eq!(refused, fenced(5, 4));
    // As it is after a restart of the receiver.
    let restored = Receiver::restored(Received(5), 3, false, 1).with_presented(attach(5, 0));
    assert_eq!(restored.may_open(attach(4, 0), NOTHING), fenced(5, 4));
    assert_eq!(Receiver::new().may_open(attach(1, 0), NOTHING), Ok(()));
}

#[test]
fn resume_table() {
    use Resume::*;
    let d = Durable;
    let restart = |above_seq| Restart { above_seq };
    // (lane durable, last published, what the next record relies on if it is a base,
    //  appliance durable, its full base) -> what follows
    let rows = [
        ((d(0), 0, None, 0, 0), After(d(0))),
        ((d(0), 9, Some(0), 0, 0), AtBase),
        ((d(5), 9, None, 5, 1), After(d(5))),
        ((d(5), 9, None, 7, 1), After(d(7))),
        ((d(5), 9, None, 9, 1), After(d(9))),
        ((d(5), 9, None, 3, 1), restart(9)),
        ((d(5), 9, None, 12, 1), restart(12)),
        // A base that relies on nothing.
        ((d(5), 9, Some(0), 3, 1), AtBase),
        ((d(5), 9, Some(0), 5, 1), AtBase),
        ((d(5), 9, Some(0), 7, 6), After(d(7))), // the appliance has it already
        ((d(5), 9, Some(0), 7, 1), restart(9)),  // what it has there is another stream's
        ((d(5), 9, Some(0), 7, 7), restart(9)),  // as above
        ((d(5), 9, Some(0), 12, 1), restart(12)),
        // A base that relies on record 4.
        ((d(5), 9, Some(4), 4, 1), AtBase),
        ((d(5), 9, Some(4), 5, 4), AtBase),
        ((d(5), 9, Some(4), 3, 1), restart(9)), // the appliance lost some of it
        ((d(5), 9, Some(4), 0, 0), restart(9)), // or all
        ((d(5), 9, Some(4), 5, 5), restart(9)), // a full sync has begun above it
        ((d(5), 9, Some(4), 7, 1), After(d(7))),
        ((d(5), 9, Some(4), 7, 7), restart(9)),
        ((d(5), 9, Some(4), 12, 1), restart(12)),
    ];
    for ((durable, published, base, appliance, full_base), expected) in rows {
        let got = resume(durable, published, base, appliance, full_base);
        let row = (durable, published, base, appliance, full_base);
        assert_eq!(got, expected, "{row:?}");
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

const NOTHING: &Lineage = &Lineage::anew(0);

const fn attach(epoch: u32, id: u64) -> Attach {
    let generation = 0;
    Attach {
        epoch,
        id,
        generation,
    }
}

/// Disk and sidecar were rolled back: the next opening has an epoch that was there before.
#[test]
fn another_opening_of_the_same_epoch_is_fenced() {
    let mut receiver = Receiver::restored(Received(5), 2, false, 1);
    assert_eq!(receiver.open(attach(3, 77), NOTHING), Ok(()));
    assert_eq!(
        receiver.open(attach(3, 77), NOTHING),
        Ok(()),
        "it comes again"
    );
    let (current, found) = (3, 3);
    assert_eq!(
        receiver.open(attach(3, 78), NOTHING),
        Err(Refusal::Fenced { current, found })
    );
    let refused = receiver.open(attach(4, 78), NOTHING);
    assert_eq!(
        refused,
        Err(Refusal::RolledBack {
            current: 3,
            found: 4
        })
    );
    assert_eq!(refused.unwrap_err().fenced_by(), Some(4));
    // It rises: its stream begins anew.
    assert_eq!(receiver.open(attach(5, 78), &Lineage::anew(5)), Ok(()));
    let restored = Receiver::restored(Received(5), 2, false, 1).with_presented(attach(4, 78));
    assert!(restored.may_open(attach(4, 79), NOTHING).is_err());
    assert!(restored.may_open(attach(4, 78), NOTHING).is_ok());
    assert!(
        restored.may_open(attach(4, 0), NOTHING).is_ok(),
        "nothing is known of it"
    );
}

/// A disk that is put back to a copy from within its opening: its sidecar names that opening, and has come
/// less far than what the appliance was told.
#[test]
fn a_sidecar_from_before_what_was_told_is_rolled_back() {
    let told = |generation| Attach {
        generation,
        ..attach(3, 77)
    };
    let next = |found| (attach(4, 78), Lineage::anew(1).child(told(found)));
    let mut receiver = Receiver::restored(Received(5), 2, false, 1);
    assert_eq!(receiver.open(told(20), &Lineage::anew(1)), Ok(()));
    assert_eq!(receiver.open(told(30), &Lineage::anew(1)), Ok(()));
    assert_eq!(receiver.open(told(25), &Lineage::anew(1)), Ok(()));
    assert_eq!(receiver.presented(), told(30), "the highest counts");
    let restored = Receiver::restored(Received(5), 2, false, 1).with_presented(told(30));
    for known in [receiver, restored] {
        let refused = Err(Refusal::RolledBack {
            current: 3,
            found: 4,
        });
        let (attach, lineage) = next(29);
        assert_eq!(known.may_open(attach, &lineage), refused);
        let (attach, lineage) = next(30);
        assert_eq!(known.may_open(attach, &lineage), Ok(()));
    }
}
