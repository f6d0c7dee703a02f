//! Damage: any word or byte of a lane may change at any moment, by a defect or by malice.
//!
//! Each side then faults, waits, or goes on with what is right: it never panics, and the consumer
//! never hands out a header that was not published. (A payload that was damaged is told by its CRC,
//! at the receiver: the consumer does not read payloads.)
#![allow(clippy::unwrap_used)]

use super::consumer::{Consumer, LaneFault, Run};
use super::dirty::DirtyMap;
use super::inflight::InFlight;
use super::layout::{CONSUMER_AT, INFLIGHT_AT, MIN_RING_BYTES, PAGE_BYTES, PRODUCER_AT};
use super::producer::{Draft, Producer, PublishError, Source, Stamps};
use super::sync::{AtomicU32, AtomicU64, Ordering::Relaxed};
use super::test_lane::{HeapLane, Numbers, noise, with_seeds};
use super::walk::scan;
use crate::position::Durable;
use crate::record::{RecordError, RecordHeader, RecordIter, RecordKind};
use std::cell::Cell;
use std::collections::HashMap;
use std::sync::OnceLock;

const RING: u64 = MIN_RING_BYTES;

static NOISE: OnceLock<Vec<u8>> = OnceLock::new();

struct World {
    lane: HeapLane,
    numbers: Numbers,
    noise: &'static [u8],
    stamp: AtomicU64,
    cut_epoch: AtomicU32,
    producer: Producer,
    consumer: Consumer,
    /// What was published under each seq; a seq may come again after the producer's own page was
    /// damaged and a new producer went by it.
    published: HashMap<u64, Vec<(RecordHeader, usize)>>,
    damaged_ring: bool,
    sizes: &'static [u64],
    faults: u64,
    runs: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let lane = HeapLane::new(1 << 30, RING, 1);
        Self {
            numbers: Numbers::new(seed),
            noise: NOISE.get_or_init(|| noise(1 << 20)),
            stamp: AtomicU64::new(0),
            cut_epoch: AtomicU32::new(1),
            producer: Producer::new(lane.memory(), 1, 0, 1),
            consumer: Consumer::attach(lane.memory()),
            published: HashMap::new(),
            damaged_ring: false,
            sizes: &[1, 64, 4096, 60_000, 200_000, 262_144],
            faults: 0,
            runs: 0,
            lane,
        }
    }

    fn publish(&mut self) {
        let len = self.numbers.pick(self.sizes);
        let kind = self
            .numbers
            .pick(&[RecordKind::Write, RecordKind::Write, RecordKind::Zero]);
        let noise_at = self.numbers.below(700_000) as usize;
        let sources = [Source::from_slice(&self.noise[noise_at..][..len as usize])];
        let offset_bytes = self.numbers.below(1 << 29);
        let draft = Draft {
            kind,
            offset_bytes,
            len_bytes: len,
            sources: if kind == RecordKind::Zero {
                &[]
            } else {
                &sources
            },
        };
        let stamps = Stamps {
            stamp: &self.stamp,
            cut_epoch: &self.cut_epoch,
            time_ns: 1,
        };
        let attach_epoch = self.producer.attach_epoch();
        match self.producer.publish(&draft, &stamps) {
            Ok(group) => {
                let header = RecordHeader {
                    kind,
                    flags: 0,
                    payload_len: if kind == RecordKind::Write {
                        len as u32
                    } else {
                        0
                    },
                    payload_crc: 0,
                    seq: group.last.seq(),
                    stamp: self.stamp.load(Relaxed),
                    offset_bytes,
                    attach_epoch,
                    cut_epoch: 1,
                    time_ns: 1,
                    range_len: len as u32,
                };
                let list = self.published.entry(header.seq).or_default();
                list.push((header, noise_at));
            }
            Err(PublishError::Full { free, .. }) => assert!(free <= RING),
            // Only a scan that believed a damaged word could lead here.
            Err(error) => panic!("{error}"),
        }
    }

    /// Changes something in the pages or the ring, as nobody should.
    fn damage(&mut self) {
        let tail = self.lane.memory().producer().tail.load(Relaxed);
        let data_at = self.lane.memory().geometry().data_at() as usize;
        let words = [(PRODUCER_AT, 128), (CONSUMER_AT, 64)];
        if self.numbers.chance(40) {
            // Near the tail lie the records that were not taken yet.
            let back = self.numbers.pick(&[64, 4096, 200_000, RING]);
            let at = tail.wrapping_sub(self.numbers.below(back)) % RING;
            let bit = 1 << self.numbers.below(8);
            // SAFETY: inside the ring of this process's own memory; nobody else runs.
            unsafe { *self.lane.base().add(data_at + at as usize) ^= bit };
            self.damaged_ring = true;
            return;
        }
        let (page, len) = self.numbers.pick(&words);
        let at = page + self.numbers.below(len / 4) as usize * 4;
        let value = match self.numbers.below(8) {
            0 => 0,
            1 => u32::MAX,
            2 => u32::MAX << 6,
            3 => self.numbers.next() as u32,
            4 => (self.numbers.next() as u32) & !63,
            _ => {
                // SAFETY: as above; the words are atomics, of which this is an aligned half.
                let now = unsafe { self.lane.base().add(at).cast::<u32>().read() };
                now ^ (1 << self.numbers.below(32))
            }
        };
        // SAFETY: as above.
        unsafe { self.lane.base().add(at).cast::<u32>().write(value) };
        if self.numbers.chance(30) {
            let at = at & !7;
            let value = self.numbers.pick(&[
                0,
                u64::MAX,
                u64::MAX - 1,
                u64::MAX - 63,
                1 << 63,
                tail,
                tail.wrapping_sub(RING),
                tail.wrapping_add(64),
                tail.wrapping_add(RING),
            ]);
            // SAFETY: as above.
            unsafe { self.lane.base().add(at).cast::<u64>().write(value) };
        }
    }

    fn check_run(&mut self, run: &Run) {
        self.runs += 1;
        let at = self.lane.ring_offset(run.base).unwrap();
        assert!(at + run.len_bytes as u64 <= RING, "goes round");
        let mut bytes = vec![0; run.len_bytes];
        // SAFETY: just checked to lie inside the ring, which lives as long as `self`.
        unsafe {
            bytes
                .as_mut_ptr()
                .copy_from_nonoverlapping(run.base, run.len_bytes)
        };
        let mut next = run.first_seq;
        for record in RecordIter::new(&bytes) {
            let record = match record {
                Ok(record) => record,
                Err(RecordError::PayloadCrc { seq, .. }) if self.damaged_ring => {
                    assert!(self.published.contains_key(&seq));
                    return;
                }
                Err(error) => panic!("{error}"),
            };
            assert_eq!(record.header.seq, next);
            let known = self.published.get(&next).unwrap();
            let same = known.iter().any(|(header, noise_at)| {
                let payload_crc = record.header.payload_crc;
                let expected = RecordHeader {
                    payload_crc,
                    ..*header
                };
                let noise = &self.noise[*noise_at..][..record.payload.len()];
                record.header == expected && record.payload == noise
            });
            assert!(same, "record {next} was not published");
            next += 1;
        }
        assert_eq!(next, run.last_seq + 1);
    }

    fn fault(&mut self, result: Result<(), LaneFault>) {
        if result.is_err() {
            self.faults += 1;
            let durable = self.consumer.durable().0;
            self.consumer.request_restart(durable);
        }
    }

    fn attach_producer(&mut self) {
        let memory = self.lane.memory();
        match scan(memory) {
            Ok(found) => {
                InFlight::leftovers(memory, DirtyMap::new(memory));
                self.stamp.fetch_max(found.last_stamp, Relaxed);
                let epoch = self.producer.attach_epoch() + 1;
                self.producer = Producer::new(memory, epoch, found.tail, found.next_seq);
            }
            // The attach decision: a new lane takes the place of this one.
            Err(_) => {
                self.faults += 1;
                self.lane = HeapLane::new(1 << 30, RING, 1);
                self.producer = Producer::new(self.lane.memory(), 1, 0, 1);
                self.consumer = Consumer::attach(self.lane.memory());
                self.published.clear();
                self.damaged_ring = false;
            }
        }
    }

    fn take(&mut self) {
        match self.consumer.take(300_000) {
            Ok(Some(run)) => self.check_run(&run),
            Ok(None) => {}
            Err(fault) => self.fault(Err(fault)),
        }
    }

    fn step(&mut self) {
        match self.numbers.below(100) {
            0..40 => self.publish(),
            40..65 => self.take(),
            65..80 => {
                let (durable, sent) = (self.consumer.durable().0, self.consumer.sent().0);
                let to = self.numbers.between(durable, sent.max(durable));
                self.consumer.release(Durable(to));
            }
            80..84 => {
                let result = self.consumer.rewind();
                self.fault(result);
            }
            84..86 => {
                let to = self.consumer.durable().0.saturating_add(1);
                let result = self.consumer.resume_after(Durable(to));
                self.fault(result);
            }
            86..90 => self.consumer = Consumer::attach(self.lane.memory()),
            90..92 => self.attach_producer(),
            92..97 => {
                if self.producer.restart_requested() {
                    self.producer.restart();
                }
            }
            _ => {
                let _ = (self.consumer.state(), self.consumer.next_is_base());
                let _ = (self.consumer.is_drained(), self.consumer.backlog_bytes());
                let _ = self.consumer.prepare_sleep();
                self.consumer.awake();
                assert!(self.producer.free_bytes() <= RING);
            }
        }
    }

    /// No more damage: a record that is published now must arrive, if need be after a restart of the
    /// stream, of the consumer or of the producer.
    fn heal(&mut self) {
        for round in 0..60 {
            if self.producer.restart_requested() {
                self.producer.restart();
            }
            let before = self.producer.published();
            self.publish();
            let last = self.producer.published();
            loop {
                match self.consumer.take(1 << 20) {
                    Ok(Some(run)) => self.check_run(&run),
                    Ok(None) => break,
                    Err(fault) => break self.fault(Err(fault)),
                }
            }
            let sent = self.consumer.sent();
            assert!(self.consumer.release(Durable(sent.0)));
            if before != last && sent.0 == last.0 {
                return;
            }
            match round {
                20 => self.consumer = Consumer::attach(self.lane.memory()),
                40 => self.attach_producer(),
                _ => {}
            }
        }
        panic!("wedged: {:?} {:?}", self.producer, self.consumer.sent());
    }
}

#[test]
fn a_damaged_lane_faults_and_never_lies() {
    let (faults, runs) = (Cell::new(0), Cell::new(0));
    with_seeds(150, |seed| {
        let mut world = World::new(seed);
        let damage = world.numbers.pick(&[1, 5, 20]);
        for _ in 0..600 {
            if world.numbers.chance(damage) {
                world.damage();
            }
            world.step();
        }
        world.heal();
        faults.set(faults.get() + world.faults);
        runs.set(runs.get() + world.runs);
    });
    println!("{faults:?} {runs:?}");
    if std::env::var_os("JETDR_SEED").is_none() {
        assert!(
            faults.get() > 100 && runs.get() > 1000,
            "{faults:?} {runs:?}"
        );
    }
}

/// A single change of one word: everything that follows goes by it, and nothing comes to harm.
#[test]
fn each_bit_of_the_shared_words_may_flip() {
    let bits =
        (PRODUCER_AT * 8..(PRODUCER_AT + 128) * 8).chain(CONSUMER_AT * 8..(CONSUMER_AT + 64) * 8);
    let mut faults = 0;
    for bit in bits {
        println!("bit {bit}");
        let mut world = World::new(bit as u64);
        world.sizes = &[1, 64, 4096, 10_000];
        for _ in 0..20 {
            world.step();
        }
        // SAFETY: inside this process's own memory; nobody else runs.
        unsafe { *world.lane.base().add(bit / 8) ^= 1 << (bit % 8) };
        if bit % 2 == 0 {
            world.take();
        } else {
            world.consumer = Consumer::attach(world.lane.memory());
        }
        for _ in 0..20 {
            world.step();
        }
        world.heal();
        faults += world.faults;
    }
    assert!(faults > 0);
}

#[test]
fn leftovers_of_a_damaged_table_stay_inside_the_map() {
    let lane = HeapLane::new(1 << 30, RING, 1);
    let mut numbers = Numbers::new(11);
    for at in (INFLIGHT_AT..INFLIGHT_AT + PAGE_BYTES).step_by(8) {
        let value = numbers.pick(&[0, 1, u64::MAX, 1 << 63, (1 << 33) - 1, 65_536]);
        // SAFETY: inside this process's own memory; nobody else runs.
        unsafe { lane.base().add(at).cast::<u64>().write(value) };
    }
    let before: Vec<u64> = ring_words(&lane);
    InFlight::leftovers(lane.memory(), DirtyMap::new(lane.memory()));
    assert_eq!(before, ring_words(&lane), "marked beyond the map");
}

/// The first words of the ring, which lie right behind the map.
fn ring_words(lane: &HeapLane) -> Vec<u64> {
    let at = lane.memory().geometry().data_at() as usize;
    // SAFETY: inside the ring, aligned.
    (0..64)
        .map(|i| unsafe { lane.base().add(at + i * 8).cast::<u64>().read() })
        .collect()
}
