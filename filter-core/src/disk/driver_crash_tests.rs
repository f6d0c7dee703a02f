//! The sidecar and the crash of a host: what the region map is for.

use super::*;
use crate::disk::hashes::Hash;
use crate::disk::intent::{Intent, IntentStep};
use crate::sidecar::{self, BLOCK_BYTES, regions};

const ID: [u8; 16] = [9; 16];
pub(super) const PERIOD_NS: u64 = 3_000_000;
/// Regions of 64 KiB to 256 KiB: the disk of the tests has few blocks.
const SHIFTS: [u64; 3] = [16, 17, 18];

/// The files that outlive the host, and what is on its way to them.
pub(super) struct Beside {
    sidecar: Vec<u8>,
    writing: Option<(usize, Box<[u8; BLOCK_BYTES]>)>,
    /// The disk's content when the flush that is under way began.
    flushing: Option<Vec<u8>>,
    /// What of the disk survives a loss of power.
    stable: Vec<u8>,
    pub(super) seq_floor: u64,
    /// The disk's length that the sidecar knows.
    pub(super) known_bytes: u64,
    pub(super) full_base: u64,
}

impl Beside {
    /// A sidecar with every bit set, as an open of a disk that was never synced leaves it.
    pub(super) fn new(numbers: &mut Numbers, primary: &[u8]) -> (Self, Intent) {
        let shift = numbers.pick(&SHIFTS) as u32;
        let mut beside = Self {
            sidecar: vec![0; sidecar::total_bytes(1) as usize],
            writing: None,
            flushing: None,
            stable: primary.to_vec(),
            seq_floor: 1 << 20,
            known_bytes: primary.len() as u64,
            full_base: 0,
        };
        let mut bits = [0; regions::BLOCK_WORDS];
        bits.fill(u64::MAX);
        let block = regions::RegionBlock {
            index: 0,
            shift,
            generation: 1,
            durable_seq: 0,
            bits,
        };
        beside.put(
            block.offset_bytes() as usize,
            &block.encode(&ID),
            &[true; 8],
        );
        let intent = beside.load();
        (beside, intent)
    }

    pub(super) fn load(&self) -> Intent {
        let found = regions::decode(&self.sidecar, &ID, 1).unwrap();
        Intent::load(ID, &found, PERIOD_NS).unwrap()
    }

    pub(super) const fn busy(&self) -> bool {
        self.writing.is_some() || self.flushing.is_some()
    }

    fn put(&mut self, at: usize, bytes: &[u8; BLOCK_BYTES], sectors: &[bool; 8]) {
        for (i, _) in sectors.iter().enumerate().filter(|(_, landed)| **landed) {
            let part = i * 512..(i + 1) * 512;
            self.sidecar[at + part.start..at + part.end].copy_from_slice(&bytes[part]);
        }
    }
}

/// Any function of a block's bytes that two different blocks of these tests do not share.
pub(super) fn hash(block: &[u8]) -> Hash {
    let mut sum = 0xcbf2_9ce4_8422_2325_u128;
    for word in block.as_chunks::<8>().0 {
        sum = (sum ^ u128::from(u64::from_le_bytes(*word))).wrapping_mul((1 << 88) + 0x13b);
        sum ^= sum >> 47;
    }
    (sum | 1).to_le_bytes()
}

impl World {
    /// Daemon and appliance tell what the replica holds: all of it, some, or nothing.
    pub(super) fn answer_hashes(&mut self) {
        let memory = self.lane.memory();
        let (theirs, ours) = (memory.producer(), memory.consumer());
        let ask = theirs.hash_ask.load(Relaxed);
        if ask == ours.hash_answer.load(Relaxed) || self.numbers.chance(30) {
            return;
        }
        let offset = theirs.hash_offset.load(Relaxed) as usize;
        let blocks = theirs.hash_blocks.load(Relaxed) as usize;
        self.replica
            .resize(self.primary.len().max(self.replica.len()), 0);
        for (i, words) in memory.hash_words().chunks(2).take(blocks).enumerate() {
            let at = offset + i * BLOCK;
            let known = at + BLOCK <= self.replica.len() && self.numbers.chance(80);
            let told = match known {
                true => hash(&self.replica[at..at + BLOCK]),
                false => Hash::default(),
            };
            for (word, bytes) in words.iter().zip(told.as_chunks::<8>().0) {
                word.store(u64::from_le_bytes(*bytes), Relaxed);
            }
        }
        let count = if self.numbers.chance(10) { 0 } else { blocks };
        ours.hash_count.store(count as u32, Relaxed);
        ours.hash_answer.store(ask, Relaxed);
    }

    /// The shell takes a step for the region map, or one that it took has ended.
    pub(super) fn drive_intent(&mut self) {
        if let Some((at, bytes)) = self.beside.writing.take() {
            let ok = !self.numbers.chance(25);
            let mut sectors = [true; 8];
            if !ok {
                sectors
                    .iter_mut()
                    .for_each(|s| *s = self.numbers.chance(50));
            }
            self.beside.put(at, &bytes, &sectors);
            self.disk.intent_written(ok);
            self.seen.intents += 1;
        } else if let Some(content) = self.beside.flushing.take() {
            let ok = !self.numbers.chance(25);
            if ok {
                // Since then it may have been enlarged.
                let len = content.len();
                self.beside.stable.resize(self.primary.len(), 0);
                self.beside.stable[..len].copy_from_slice(&content);
            }
            self.disk.intent_flushed(ok, self.now_ns);
        } else {
            match self.disk.intent_step(self.now_ns) {
                IntentStep::Idle => {}
                IntentStep::Write {
                    offset_bytes,
                    bytes,
                } => {
                    self.beside.writing = Some((offset_bytes as usize, bytes));
                }
                IntentStep::Flush => self.beside.flushing = Some(self.primary.clone()),
            }
        }
    }

    /// Takes steps until nothing waits for the sidecar.
    pub(super) fn settle_intent(&mut self) {
        for _ in 0..200 {
            self.drive_intent();
        }
        assert!(
            !self.disk.intent_pending(),
            "the sidecar was given every chance"
        );
    }

    /// The sidecar is told of the disk's length once it has the bits of what is new.
    pub(super) fn know_length(&mut self) {
        self.settle_intent();
        self.beside.known_bytes = self.primary.len() as u64;
    }

    /// The host dies: lane and dirty map are gone, of what was not flushed any sector may be the old
    /// one. Then the disk is opened again.
    pub(super) fn crash(&mut self) {
        if !self.config.intent_strict && self.disk.intent_pending() {
            return; // what passed without its bit may be lost sight of: that is the bargain
        }
        self.seen.crashes += 1;
        self.held.clear();
        self.reading.clear();
        self.ends.clear();
        for (io, _) in std::mem::take(&mut self.inflight) {
            if self.numbers.chance(50) {
                io.land(&mut self.primary, io.len);
            }
        }
        if let Some((at, bytes)) = self.beside.writing.take() {
            let sectors: [bool; 8] = std::array::from_fn(|_| self.numbers.chance(50));
            self.beside.put(at, &bytes, &sectors);
        }
        self.beside.flushing = None;
        self.beside.stable.resize(self.primary.len(), 0);
        for at in (0..self.primary.len()).step_by(512) {
            if self.numbers.chance(50) {
                self.primary[at..at + 512].copy_from_slice(&self.beside.stable[at..at + 512]);
            }
        }
        self.beside.stable.copy_from_slice(&self.primary);
        self.open_after_crash();
    }

    fn open_after_crash(&mut self) {
        let intent = self.beside.load();
        let relies_on = intent.relies_on_seq();
        let synced_bytes = intent.wanted_bytes().min(self.primary.len() as u64);
        self.seen.spared_bytes += self.primary.len() as u64 - synced_bytes;
        self.seen.touched += self.disk.counters().sync_touched;
        self.seen.held_bytes += self.disk.counters().sync_held_bytes;
        let base_seq = self.beside.seq_floor + 1;
        self.beside.seq_floor += 1 << 20;
        self.epoch += 1;
        self.lane = HeapLane::new(1 << 30, MIN_RING_BYTES, base_seq);
        let producer = Producer::new(self.lane.memory(), self.epoch, 0, base_seq);
        let capacity = self.primary.len() as u64;
        let start = Start::Regions;
        self.disk = Disk::new(producer, capacity, start, Some(intent), self.config);
        let stamps = Stamps {
            stamp: &self.stamp,
            cut_epoch: &self.cut_epoch,
            time_ns: self.now_ns,
        };
        self.disk.begin_base(&stamps).unwrap();
        self.disk.grown_since(self.beside.known_bytes);
        self.know_length();
        self.consumer = Consumer::attach(self.lane.memory());
        self.lane.memory().consumer().linked.store(1, Relaxed);
        self.reattached = false;
        assert_eq!(self.consumer.next_base(), Some(relies_on));
        // As daemon and appliance do when the lane is opened.
        let received = self.receiver.received().0;
        if relies_on > 0 && !(self.beside.full_base..=received).contains(&relies_on) {
            self.consumer.request_restart(received);
        }
    }
}

/// A disk that rests has no bit set, and a crash after that costs nothing.
#[test]
fn a_crash_costs_what_was_written_since() {
    let mut world = World::new(5);
    world.settle();
    let capacity = world.primary.len() as u64;
    for _ in 0..20 {
        world.now_ns += PERIOD_NS;
        world.drain(u64::MAX);
        world.settle_intent();
    }
    assert_eq!(world.disk.intent().unwrap().wanted_bytes(), 0);
    world.crash();
    assert_eq!(world.disk.dirty_bytes(), 0);
    world.settle();
    assert_eq!(world.seen.spared_bytes, capacity);
    // One write: its region is all that is read again.
    world.settle_intent();
    while world.inflight.is_empty() {
        world.guest_writes();
        world.settle_intent();
        world.retry();
    }
    let written: u64 = world.inflight.iter().map(|(io, _)| io.len as u64).sum();
    world.crash();
    let marked = world.disk.dirty_bytes();
    assert!(
        marked > 0 && marked <= written + 4 * (1 << 18),
        "{marked} for {written}"
    );
    world.settle();
}

/// A question about blocks comes with no record: a daemon that sleeps must be woken for it all the same.
#[test]
fn a_question_wakes_a_daemon_that_sleeps() {
    let mut world = World::new(5);
    world.config.sync_hashes = true;
    world.settle();
    for _ in 0..20 {
        world.now_ns += PERIOD_NS;
        world.drain(u64::MAX);
        world.settle_intent();
    }
    while world.inflight.is_empty() {
        world.guest_writes();
        world.settle_intent();
        world.retry();
    }
    world.crash();
    world.drain(u64::MAX);
    let lane = world.lane.memory();
    let step = |world: &mut World| {
        let stamps = Stamps {
            stamp: &world.stamp,
            cut_epoch: &world.cut_epoch,
            time_ns: world.now_ns,
        };
        world.disk.sync_step(&stamps)
    };
    let after_ns = 0;
    lane.consumer().sleeping.store(1, Relaxed);
    let wake = true;
    assert_eq!(step(&mut world), SyncStep::Wait { wake, after_ns });
    assert_eq!(lane.producer().hash_ask.load(Relaxed), 1);
    let wake = false;
    assert_eq!(step(&mut world), SyncStep::Wait { wake, after_ns }, "once");
}

/// A stream that an appliance without the disk's past is asked to rely on starts in full.
#[test]
fn another_appliance_gets_all_of_it() {
    let mut world = World::new(6);
    world.settle();
    for _ in 0..20 {
        world.now_ns += PERIOD_NS;
        world.drain(u64::MAX);
        world.settle_intent();
    }
    world.receiver = Receiver::new();
    world.replica.fill(0);
    world.crash();
    world.disk.tick();
    let all = world.primary.len() as u64;
    assert!(world.disk.dirty_bytes() >= all);
    assert!(world.disk.intent().unwrap().wanted_bytes() >= all);
    world.settle();
}
