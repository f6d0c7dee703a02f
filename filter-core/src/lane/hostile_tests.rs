//! Words and records that check by themselves and still cannot be: what random damage never hits,
//! since it breaks the CRC first.
#![allow(clippy::unwrap_used)]

use super::consumer::{Consumer, LaneFault};
use super::layout::MIN_RING_BYTES;
use super::producer::{Draft, Producer, Stamps};
use super::sync::{AtomicU32, AtomicU64, Ordering::Relaxed};
use super::test_lane::HeapLane;
use super::walk::scan;
use crate::position::{Durable, MAX_SEQ};
use crate::record::{HEADER_BYTES, RecordHeader, RecordKind, record_span_bytes};

const RING: u64 = MIN_RING_BYTES;

fn header(kind: RecordKind, seq: u64, payload_len: u32) -> RecordHeader {
    let pad = kind == RecordKind::Pad;
    let range_len = if payload_len == 0 { 512 } else { payload_len };
    RecordHeader {
        kind,
        flags: 0,
        payload_len,
        payload_crc: 0,
        seq: if pad { 0 } else { seq },
        stamp: seq,
        offset_bytes: 0,
        attach_epoch: 1,
        cut_epoch: 1,
        time_ns: 0,
        range_len: if pad { 0 } else { range_len },
    }
}

struct Ring(HeapLane);

impl Ring {
    /// An empty lane whose head and tail stand at `at`.
    fn standing_at(at: u64) -> Self {
        let lane = HeapLane::new(1 << 30, RING, 1);
        lane.memory().consumer().head.store(at, Relaxed);
        lane.memory().producer().tail.store(at, Relaxed);
        Self(lane)
    }

    fn put(&self, at: u64, header: &RecordHeader) {
        let offset = self.0.memory().geometry().data_at() + at % RING;
        let bytes = header.encode();
        // SAFETY: at least a header lies between each multiple of 64 and the ring's end.
        unsafe {
            self.0
                .base()
                .add(offset as usize)
                .copy_from_nonoverlapping(bytes.as_ptr(), HEADER_BYTES)
        };
    }

    fn tail(&self, to: u64) {
        self.0.memory().producer().tail.store(to, Relaxed);
    }

    /// What consumer and attach scan say of it.
    fn faults(&self) -> (bool, bool) {
        let memory = self.0.memory();
        let mut consumer = Consumer::attach(memory);
        let lost = consumer.restarting() || consumer.take(1 << 20).is_err();
        (lost, scan(memory).is_err())
    }
}

fn publish(producer: &mut Producer) {
    let (stamp, cut_epoch) = (AtomicU64::new(1), AtomicU32::new(1));
    let stamps = Stamps {
        stamp: &stamp,
        cut_epoch: &cut_epoch,
        time_ns: 0,
    };
    let draft = Draft {
        kind: RecordKind::Zero,
        offset_bytes: 0,
        len_bytes: 512,
        sources: &[],
    };
    let _ = producer.publish(&draft, &stamps).unwrap();
}

#[test]
fn a_record_ends_before_the_tail() {
    let ring = Ring::standing_at(0);
    ring.put(0, &header(RecordKind::Write, 1, 4096));
    let span = record_span_bytes(4096) as u64;
    ring.tail(span);
    assert_eq!(ring.faults(), (false, false));
    ring.tail(span - 64);
    assert_eq!(ring.faults(), (true, true));
}

#[test]
fn a_record_ends_before_the_ring_does() {
    let span = record_span_bytes(4096) as u64;
    let at = RING - span;
    let ring = Ring::standing_at(at);
    ring.put(at, &header(RecordKind::Write, 1, 4096));
    ring.tail(RING);
    assert_eq!(ring.faults(), (false, false), "just so");
    let ring = Ring::standing_at(at + 64);
    ring.put(at + 64, &header(RecordKind::Write, 1, 4096));
    ring.tail(RING + 64); // the tail is where such a record would end
    assert_eq!(ring.faults(), (true, true));
}

#[test]
fn a_pad_ends_where_the_ring_does() {
    for (payload_len, bad) in [(192, false), (128, true), (256, true), (0, true)] {
        let ring = Ring::standing_at(RING - 256);
        ring.put(RING - 256, &header(RecordKind::Pad, 0, payload_len));
        let end = RING - 256 + HEADER_BYTES as u64 + u64::from(payload_len);
        ring.put(end, &header(RecordKind::Zero, 1, 0));
        ring.tail(end + 64);
        assert_eq!(ring.faults(), (bad, bad), "{payload_len}");
    }
}

#[test]
fn a_tail_is_at_most_a_ring_ahead_and_never_goes_back() {
    for (tail, bad) in [
        (4096, false),
        (4096 + RING + 64, true),
        (4095, true),
        (4032, true),
        (0, true),
        (u64::MAX, true),
        (u64::MAX - 63, true),
    ] {
        let ring = Ring::standing_at(4096);
        ring.put(4096, &header(RecordKind::Zero, 1, 0)); // which is good, if it is read
        ring.tail(tail);
        let consumer = Consumer::attach(ring.0.memory());
        assert_eq!(consumer.restarting(), bad, "{tail}");
        let found = scan(ring.0.memory());
        assert_eq!(matches!(found, Err(LaneFault::Tail { .. })), bad, "{tail}");
    }
    // Backwards under a consumer that stands further on.
    let ring = Ring::standing_at(0);
    let mut producer = Producer::new(ring.0.memory(), 1, 0, 1);
    let mut consumer = Consumer::attach(ring.0.memory());
    publish(&mut producer);
    publish(&mut producer);
    assert_eq!(consumer.take(1 << 20).unwrap().unwrap().last_seq, 2);
    ring.tail(64);
    assert!(matches!(consumer.take(64), Err(LaneFault::Tail { .. })));
    assert_eq!(consumer.backlog_bytes(), 0);
    assert!(!consumer.is_drained());
}

#[test]
fn the_scan_lets_a_seq_jump_forward_and_never_back() {
    for (seqs, next) in [
        ([1, 2], Some(3)),
        ([1, 9], Some(10)),
        ([9, 9], None),
        ([9, 1], None),
    ] {
        let ring = Ring::standing_at(0);
        ring.put(0, &header(RecordKind::Zero, seqs[0], 0));
        ring.put(64, &header(RecordKind::Zero, seqs[1], 0));
        ring.tail(128);
        let found = scan(ring.0.memory()).ok().map(|scan| scan.next_seq);
        assert_eq!(found, next, "{seqs:?}");
    }
    let ring = Ring::standing_at(0);
    ring.put(0, &header(RecordKind::Zero, MAX_SEQ / 2, 0));
    ring.tail(64);
    assert!(scan(ring.0.memory()).is_err(), "no room for seqs is left");
    let ring = Ring::standing_at(0);
    let words = ring.0.memory();
    words.producer().last_stamp.store(u64::MAX, Relaxed);
    assert!(scan(words).is_err(), "no room for stamps is left");
}

/// The producer goes on from its own truth, whatever its page and the consumer's say.
#[test]
fn a_nonsense_answer_to_a_restart_is_asked_for_again() {
    let spoil: [fn(&HeapLane); 4] = [
        |lane| lane.memory().producer().restart_at.store(64, Relaxed),
        |lane| lane.memory().producer().restart_at.store(1, Relaxed),
        |lane| {
            lane.memory()
                .producer()
                .restart_seq
                .store(u64::MAX, Relaxed)
        },
        |lane| {
            lane.memory()
                .producer()
                .restart_seq
                .store(MAX_SEQ / 2, Relaxed)
        },
    ];
    for (case, spoil) in spoil.into_iter().enumerate() {
        let ring = Ring::standing_at(0);
        let mut producer = Producer::new(ring.0.memory(), 1, 0, 1);
        let mut consumer = Consumer::attach(ring.0.memory());
        consumer.request_restart(5);
        producer.restart();
        spoil(&ring.0);
        assert_eq!(consumer.take(64), Ok(None), "case {case}");
        assert!(consumer.restarting() && producer.restart_requested());
        producer.restart();
        publish(&mut producer);
        let run = consumer.take(64).unwrap().unwrap();
        assert_eq!(run.first_seq, 6, "case {case}");
        assert!(consumer.release(Durable(6)));
        assert_eq!(producer.free_bytes(), RING);
    }
}

#[test]
fn a_restart_above_what_no_stream_reaches_is_not_believed() {
    for above in [MAX_SEQ / 2, MAX_SEQ - 1, MAX_SEQ, u64::MAX] {
        let ring = Ring::standing_at(0);
        let mut producer = Producer::new(ring.0.memory(), 1, 0, 1);
        let mut consumer = Consumer::attach(ring.0.memory());
        consumer.request_restart(above);
        producer.restart();
        publish(&mut producer);
        assert_eq!(producer.published().0, 1);
        assert_eq!(consumer.take(64).unwrap().unwrap().first_seq, 1);
    }
}

#[test]
fn a_durable_seq_that_cannot_be_asks_for_a_restart() {
    for durable in [MAX_SEQ / 2, MAX_SEQ, u64::MAX] {
        let ring = Ring::standing_at(0);
        ring.0
            .memory()
            .consumer()
            .durable_seq
            .store(durable, Relaxed);
        let mut producer = Producer::new(ring.0.memory(), 1, 0, 1);
        publish(&mut producer);
        let mut consumer = Consumer::attach(ring.0.memory());
        assert!(consumer.restarting());
        assert_eq!(consumer.take(64), Ok(None));
        producer.restart();
        publish(&mut producer);
        assert_eq!(consumer.take(64).unwrap().unwrap().first_seq, 2);
    }
}

#[test]
fn a_head_that_cannot_be_frees_nothing() {
    let ring = Ring::standing_at(0);
    let mut producer = Producer::new(ring.0.memory(), 1, 0, 1);
    publish(&mut producer);
    let free = RING - 64;
    assert_eq!(producer.free_bytes(), free);
    for (count, head) in [1, 63, 128, u64::MAX, u64::MAX - 63, 1 << 63]
        .into_iter()
        .enumerate()
    {
        ring.0.memory().consumer().head.store(head, Relaxed);
        assert_eq!(producer.free_bytes(), free, "{head}");
        assert_eq!(producer.bad_heads(), count as u64 + 1);
    }
    ring.0.memory().consumer().head.store(64, Relaxed);
    assert_eq!(producer.free_bytes(), RING);
    // Backwards.
    ring.0.memory().consumer().head.store(0, Relaxed);
    assert_eq!(producer.free_bytes(), RING);
    assert_eq!(producer.bad_heads(), 7);
}
