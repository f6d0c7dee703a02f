//! The consumer's side, over plain memory: positions of cuts, the check of what was taken, faults.

use super::*;
use crate::lane::layout::{Geometry, Identity, MIN_RING_BYTES};
use crate::lane::producer::{Draft, Producer, Source, Stamps};
use crate::lane::sync::{AtomicU32, AtomicU64};
use alloc::alloc::{Layout, alloc_zeroed, dealloc};
use core::ptr::NonNull;

/// A lane in memory of this process.
struct Plain {
    memory: LaneMemory,
    base: NonNull<u8>,
    layout: Layout,
}

impl Plain {
    fn new() -> Self {
        let geometry = Geometry::for_disk(1 << 30, MIN_RING_BYTES).unwrap();
        let identity = Identity {
            geometry,
            disk_id: [1; 16],
            vm_id: [2; 16],
            boot_id: [3; 16],
            base_seq: 1,
            domain: "d".into(),
            vm_name: "v".into(),
            disk_label: "l".into(),
        };
        let layout = Layout::from_size_align(geometry.total_bytes() as usize, 4096).unwrap();
        // SAFETY: the size is not zero.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap();
        // SAFETY: fresh, zeroed, and freed only when `Plain` is dropped.
        let memory = unsafe { LaneMemory::create(base, layout.size(), &identity, 1 << 30) };
        let memory = memory.unwrap();
        Self {
            memory,
            base,
            layout,
        }
    }

    fn damage(&self, position: u64) {
        let (at, _) = self.memory.data(position);
        // SAFETY: inside the ring, which nobody else uses at this moment.
        unsafe { at.write(at.read() ^ 1) };
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // SAFETY: made with this layout; the producer and the consumer of the test are gone.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

fn write(producer: &mut Producer, epoch: u32, len: usize) -> u64 {
    let bytes = vec![epoch as u8; len];
    let draft = Draft {
        kind: RecordKind::Write,
        offset_bytes: 0,
        len_bytes: len as u64,
        sources: &[Source::from_slice(&bytes)],
    };
    let stamps = Stamps {
        stamp: &AtomicU64::new(0),
        cut_epoch: &AtomicU32::new(epoch),
        time_ns: 0,
    };
    producer.publish(&draft, &stamps).unwrap().last.seq()
}

fn tail(memory: LaneMemory) -> u64 {
    ring::observe_tail::<Sound>(&memory.producer().tail)
}

#[test]
fn a_cuts_position_does_not_depend_on_how_much_was_taken() {
    let plain = Plain::new();
    let mut producer = Producer::new(plain.memory, 1, 0, 1);
    let mut consumer = Consumer::attach(plain.memory);
    assert_eq!(consumer.last_seq_before(0, 1), Ok(Some(0)));
    let mut ends = Vec::new();
    // Three records of each epoch from 1 to 4; they go round the ring's end several times.
    let (mut seq, mut freed) = (0, 0);
    for round in 0..40u32 {
        for epoch in 1..=4 {
            for _ in 0..3 {
                seq = write(&mut producer, round * 4 + epoch, 20_000);
            }
            ends.push((round * 4 + epoch, seq, tail(plain.memory)));
        }
        for taken in 0..=12 {
            for (epoch, last, _) in ends.iter().filter(|(epoch, ..)| *epoch > round * 4) {
                let found = consumer.last_seq_before(tail(plain.memory), *epoch);
                assert_eq!(found, Ok(Some(*last)), "{taken} taken");
            }
            if taken < 12 {
                assert!(consumer.take(1).unwrap().is_some());
            }
        }
        // Not beyond `end`, although what follows has the same epoch.
        let middle = ends[ends.len() - 4];
        assert_eq!(consumer.last_seq_before(0, middle.0), Ok(Some(middle.1)));
        freed += 12;
        assert!(consumer.release(Durable(freed)));
    }
    // And after a reconnect, when most is to be taken again.
    consumer.rewind().unwrap();
    let (epoch, last, _) = ends[ends.len() - 2];
    assert!(last <= seq);
    // All that is durable by now counts as taken, whatever its epoch.
    assert_eq!(
        consumer.last_seq_before(tail(plain.memory), epoch + 1),
        Ok(Some(seq))
    );
}

#[test]
fn a_position_before_the_rest_of_the_same_epoch() {
    let plain = Plain::new();
    let mut producer = Producer::new(plain.memory, 1, 0, 1);
    let consumer = Consumer::attach(plain.memory);
    write(&mut producer, 1, 512);
    let end = tail(plain.memory);
    write(&mut producer, 1, 512);
    assert_eq!(consumer.last_seq_before(end, 1), Ok(Some(1)));
}

#[test]
fn while_a_restart_is_awaited_there_is_no_position() {
    let plain = Plain::new();
    let mut producer = Producer::new(plain.memory, 1, 0, 1);
    let mut consumer = Consumer::attach(plain.memory);
    write(&mut producer, 1, 512);
    consumer.request_restart(7);
    assert_eq!(consumer.restart_above(), 7);
    assert_eq!(consumer.last_seq_before(tail(plain.memory), 1), Ok(None));
}

#[test]
fn damage_in_the_ring_is_told_from_a_whole_one() {
    let plain = Plain::new();
    let mut producer = Producer::new(plain.memory, 1, 0, 1);
    let mut consumer = Consumer::attach(plain.memory);
    for _ in 0..3 {
        write(&mut producer, 1, 4096);
    }
    let span = 4096 + HEADER_BYTES as u64;
    plain.damage(2 * span + HEADER_BYTES as u64 + 7);
    assert!(consumer.take(2 * span as usize).unwrap().is_some());
    assert_eq!(
        consumer.check_taken(),
        Ok(()),
        "the third was not taken yet"
    );
    assert!(consumer.take(1).unwrap().is_some());
    let fault = consumer.check_taken();
    let wrong = matches!(
        fault,
        Err(LaneFault::Record { at, error: RecordError::PayloadCrc { seq: 3, .. } }) if at == 2 * span
    );
    assert!(wrong, "{fault:?}");
    // What is free is nobody's business any more.
    assert!(consumer.release(Durable(3)));
    assert_eq!(consumer.check_taken(), Ok(()));
}

#[test]
fn good_records_before_a_fault_are_handed_out() {
    let plain = Plain::new();
    let mut producer = Producer::new(plain.memory, 1, 0, 1);
    let mut consumer = Consumer::attach(plain.memory);
    for _ in 0..3 {
        write(&mut producer, 1, 512);
    }
    plain.damage(2 * (512 + HEADER_BYTES as u64));
    let run = consumer.take(1 << 20).unwrap().unwrap();
    assert_eq!((run.first_seq, run.last_seq), (1, 2));
    assert_eq!(consumer.sent().seq(), 2);
    assert!(consumer.take(1 << 20).is_err());
    assert!(consumer.release(Durable(2)));
    assert_eq!(consumer.sent().seq(), consumer.durable().seq());
}

#[test]
fn a_restart_that_is_answered_with_nonsense_is_asked_for_again() {
    let plain = Plain::new();
    let mut producer = Producer::new(plain.memory, 1, 0, 1);
    let mut consumer = Consumer::attach(plain.memory);
    write(&mut producer, 1, 512);
    consumer.request_restart(9);
    producer.restart();
    let words = plain.memory.producer();
    for nonsense in [tail(plain.memory) + 64, 7] {
        words.restart_at.store(nonsense, Relaxed);
        assert_eq!(consumer.take(1), Ok(None));
        assert!(producer.restart_requested(), "position {nonsense}");
        // Until it has answered there is nothing to look for: who sleeps is right.
        assert!(consumer.prepare_sleep());
        producer.restart();
    }
    assert_eq!(consumer.take(1), Ok(None));
    assert!(!consumer.restarting());
    assert_eq!(consumer.durable(), Durable(9));
}

#[test]
fn a_head_that_somebody_else_changed_is_told_again() {
    let plain = Plain::new();
    let mut producer = Producer::new(plain.memory, 1, 0, 1);
    let mut consumer = Consumer::attach(plain.memory);
    let seq = write(&mut producer, 1, 512);
    assert!(consumer.take(1 << 20).unwrap().is_some());
    assert!(consumer.release(Durable(seq)));
    let head = plain.memory.consumer().head.load(Relaxed);
    // Lower than it was, and no position that the producer could not have seen: the ring looks fuller than
    // it is, and a producer that waits for room publishes nothing.
    plain.memory.consumer().head.store(head - 64, Relaxed);
    assert_eq!(consumer.take(1 << 20), Ok(None));
    assert_eq!(plain.memory.consumer().head.load(Relaxed), head);
}
