//! The disk machine driven at random, with a guest, a disk, a daemon and an appliance that are a few
//! vectors: whatever happens, each difference between disk and replica is marked, a sync ends only
//! when there is none, and in the end there is none.
#![allow(clippy::unwrap_used)]

use super::sync::{SyncStep, Ticket};
use super::{Change, Config, Decision, Disk, Start, Why};
use crate::lane::consumer::Consumer;
use crate::lane::dirty::DirtyMap;
use crate::lane::inflight::Token;
use crate::lane::layout::{DIRTY_BLOCK_BYTES, LaneState, MIN_RING_BYTES};
use crate::lane::producer::{Producer, Source, Stamps};
use crate::lane::sync::{AtomicU32, AtomicU64, Ordering::Relaxed};
use crate::lane::test_lane::{HeapLane, Numbers, noise, with_seeds};
use crate::lane::walk::scan;
use crate::position::Durable;
use crate::record::{FLAG_STREAM_BASE, FLAG_SYNC_END, RecordIter, RecordKind};
use crate::session::{Admit, Receiver};
use std::collections::VecDeque;

#[path = "driver_crash_tests.rs"]
mod crash;
#[path = "driver_ops_tests.rs"]
mod ops;

const BLOCK: usize = DIRTY_BLOCK_BYTES as usize;
const BUDGET_NS: u64 = 5_000_000;

/// A guest's I/O.
#[derive(Clone, Debug)]
struct Io {
    kind: RecordKind,
    at: usize,
    len: usize,
    data: Vec<u8>,
    /// Passed down, and on the disk although not yet completed.
    landed: bool,
}

impl Io {
    fn land(&self, disk: &mut [u8], len: usize) {
        let target = &mut disk[self.at..self.at + len];
        match self.kind {
            RecordKind::Write => target.copy_from_slice(&self.data[..len]),
            _ => target.fill(0),
        }
    }
}

/// A read of the sync that the disk has not answered yet.
struct Reading {
    ticket: Ticket,
    at: usize,
    /// What the disk held when the read was given to it.
    early: Vec<u8>,
}

#[derive(Debug, Default)]
struct Seen {
    deferred: u64,
    tracked: u64,
    finished: u64,
    failed: u64,
    touched: u64,
    gaps: u64,
    kills: u64,
    crashes: u64,
    intents: u64,
    spared_bytes: u64,
    held_bytes: u64,
    overlaps: u64,
    restarts: u64,
    grown: u64,
    compared: u64,
}

struct World {
    lane: HeapLane,
    disk: Disk,
    consumer: Consumer,
    receiver: Receiver,
    numbers: Numbers,
    noise: Vec<u8>,
    config: Config,
    stamp: AtomicU64,
    cut_epoch: AtomicU32,
    now_ns: u64,
    epoch: u32,
    /// The daemon was started anew at least once.
    reattached: bool,
    /// What the guest's disk holds.
    primary: Vec<u8>,
    replica: Vec<u8>,
    held: VecDeque<(Io, u64, Why)>,
    beside: crash::Beside,
    inflight: Vec<(Io, Token)>,
    reading: Vec<Reading>,
    /// For each SYNC_END that was published: its seq, and what the replica must hold then.
    ends: VecDeque<(u64, Vec<u8>)>,
    /// Percent of the steps in which the guest writes, and in which the daemon works.
    mood: (u64, u64),
    /// Writes that the guest has in flight at once.
    depth: usize,
    seen: Seen,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut numbers = Numbers::new(seed);
        let noise = noise(8 << 20);
        let capacity = numbers.between(10 * 128, 40 * 128) as usize * 512;
        let base_seq = numbers.pick(&[1, 1, 500]);
        let lane = HeapLane::new(1 << 30, MIN_RING_BYTES, base_seq);
        let producer = Producer::new(lane.memory(), 1, 0, base_seq);
        let config = Config {
            defer_budget_ns: BUDGET_NS,
            sync_read_bytes: numbers.between(1, 4) * DIRTY_BLOCK_BYTES,
            sync_reads: numbers.between(1, 4) as usize,
            intent_strict: numbers.chance(50),
            ..Config::default()
        };
        let (beside, intent) = crash::Beside::new(&mut numbers, &noise[..capacity]);
        let mut disk = Disk::new(producer, capacity as u64, Start::Full, Some(intent), config);
        let stamps = Stamps {
            stamp: &AtomicU64::new(0),
            cut_epoch: &AtomicU32::new(1),
            time_ns: 0,
        };
        disk.begin_base(&stamps).unwrap();
        Self {
            disk,
            beside,
            consumer: Consumer::attach(lane.memory()),
            receiver: Receiver::new(),
            primary: noise[..capacity].to_vec(),
            replica: vec![0; capacity],
            config,
            numbers,
            noise,
            stamp: AtomicU64::new(1),
            cut_epoch: AtomicU32::new(1),
            now_ns: 0,
            epoch: 1,
            reattached: false,
            held: VecDeque::new(),
            inflight: Vec::new(),
            reading: Vec::new(),
            ends: VecDeque::new(),
            mood: (40, 30),
            depth: 8,
            seen: Seen::default(),
            lane,
        }
    }

    fn marked(&self, at: usize, len: usize) -> bool {
        let map = DirtyMap::new(self.lane.memory());
        let (first, end) = (at / BLOCK, (at + len).div_ceil(BLOCK));
        (first..end).all(|block| map.is_set(block as u64))
    }

    /// What the disk will hold once everything passed down has landed.
    fn expected(&self) -> Vec<u8> {
        let mut bytes = self.primary.clone();
        for (io, _) in &self.inflight {
            io.land(&mut bytes, io.len);
        }
        bytes
    }

    /// Every difference is marked: for a replica that has applied everything published.
    fn compare(&mut self) {
        self.drain(u64::MAX);
        if self.consumer.restarting() {
            return; // what was dropped will be marked by the answer
        }
        let expected = self.expected();
        self.replica.resize(expected.len(), 0);
        let blocks = expected.chunks(BLOCK).zip(self.replica.chunks(BLOCK));
        for (block, (ours, theirs)) in blocks.enumerate() {
            let same = ours == theirs;
            assert!(
                same || self.marked(block * BLOCK, 1),
                "block {block} differs and is not marked, {:?}",
                self.disk.state()
            );
            assert!(same || self.disk.state() != LaneState::Streaming);
        }
        self.seen.compared += 1;
    }

    fn step(&mut self) {
        self.now_ns += self.numbers.below(400_000);
        if self.numbers.below(300) == 0 {
            self.depth = self.numbers.pick(&[1, 4, 8, 30]);
            self.mood =
                self.numbers
                    .pick(&[(60, 0), (40, 30), (10, 60), (70, 3), (0, 50), (30, 50)]);
        }
        let (guest, daemon) = self.mood;
        match self.numbers.below(100) {
            n if n < guest => self.guest_writes(),
            n if n < guest + daemon / 2 => self.complete(),
            _ if self.numbers.chance(daemon) => self.drain(3),
            _ => match self.numbers.below(1000) {
                0..250 => self.drive_sync(),
                250..500 => self.sync_read_back(),
                500..600 => self.drive_intent(),
                600..700 => self.retry(),
                700..800 => self.land(),
                800..930 => self.complete(),
                930..950 => self.compare(),
                950..960 => self.abort(),
                960..970 => self.grow(),
                970..973 => self.revert(),
                973..976 => self.kill(),
                976..980 => self.close(),
                980..982 => self.crash(),
                982..986 => {
                    if let Err(fault) = self.consumer.rewind() {
                        assert!(self.reattached, "{fault}");
                        let durable = self.consumer.durable().0;
                        self.consumer.request_restart(durable);
                    }
                }
                986..990 => {
                    self.consumer = Consumer::attach(self.lane.memory());
                    self.reattached = true;
                }
                990..992 => self.ask_for_restart(),
                992..995 => self.disk.enter_tracking(),
                _ => self.disk.tick(),
            },
        }
        let state = self.lane.memory().producer().state.load(Relaxed);
        assert_eq!(LaneState::from_word(state), Some(self.disk.state()));
        assert_eq!(self.disk.has_deferred(), !self.held.is_empty());
    }

    /// The guest rests: the disk must come to stream, and the replica to be the disk.
    fn settle(&mut self) {
        let mut rounds = 0;
        while self.disk.state() != LaneState::Streaming
            || !self.held.is_empty()
            || !self.inflight.is_empty()
            || !self.consumer.is_drained()
            || self.consumer.restarting()
        {
            self.now_ns += 1_000_000;
            self.drive_intent();
            self.drain(u64::MAX);
            self.retry();
            while !self.inflight.is_empty() {
                self.complete();
            }
            self.drive_sync();
            while !self.reading.is_empty() {
                self.sync_read_back();
            }
            rounds += 1;
            assert!(
                rounds < 5000,
                "never comes to stream: {:?}",
                self.disk.state()
            );
        }
        self.drain(u64::MAX);
        assert!(self.primary == self.replica, "the replica is another disk");
        assert!(self.ends.is_empty());
        assert_eq!(self.disk.dirty_bytes(), 0);
        assert!(!self.receiver.syncing());
        assert!(self.disk.close());
    }
}

#[test]
fn every_difference_is_marked_and_in_the_end_there_is_none() {
    let total = std::cell::RefCell::new(Seen::default());
    with_seeds(24, |seed| {
        let mut world = World::new(seed);
        for _ in 0..4000 {
            world.step();
        }
        world.settle();
        let (mut sum, seen) = (total.borrow_mut(), &world.seen);
        sum.deferred += seen.deferred;
        sum.tracked += seen.tracked;
        sum.finished += seen.finished;
        sum.failed += seen.failed;
        sum.touched += seen.touched + world.disk.counters().sync_touched;
        sum.gaps += seen.gaps;
        sum.kills += seen.kills;
        sum.crashes += seen.crashes;
        sum.intents += seen.intents;
        sum.spared_bytes += seen.spared_bytes;
        sum.held_bytes += seen.held_bytes + world.disk.counters().sync_held_bytes;
        sum.overlaps += seen.overlaps;
        sum.restarts += seen.restarts;
        sum.grown += seen.grown;
        sum.compared += seen.compared;
    });
    let seen = total.into_inner();
    println!("{seen:?}");
    if std::env::var_os("JETDR_SEED").is_none() {
        let often = [
            seen.deferred,
            seen.tracked,
            seen.finished,
            seen.failed,
            seen.touched,
            seen.kills,
            seen.crashes,
            seen.intents,
            seen.spared_bytes,
            seen.held_bytes,
            seen.overlaps,
            seen.restarts,
            seen.grown,
            seen.compared,
        ];
        assert!(often.iter().all(|count| *count >= 10), "{seen:?}");
    }
}

#[test]
fn a_disk_never_shrinks() {
    let mut world = World::new(1);
    let now = world.primary.len() as u64;
    let marked = world.disk.dirty_bytes();
    for smaller in [0, 1, now - 1, now - 512] {
        assert!(!world.disk.grow(smaller), "{smaller}");
    }
    assert!(world.disk.grow(now));
    assert!(!world.disk.grow(u64::MAX));
    let most = world.lane.memory().geometry().max_capacity_bytes();
    assert!(!world.disk.grow(most + 1));
    assert_eq!(world.disk.capacity_bytes(), now);
    assert_eq!(world.disk.dirty_bytes(), marked);
    assert!(world.disk.grow(most));
    assert_eq!(world.disk.capacity_bytes(), most);
}

/// Neither a write nor the note of a failed one comes between a restart and its SYNC_BEGIN.
#[test]
fn nothing_comes_before_a_new_beginning() {
    let mut world = World::new(2);
    world.depth = 100;
    while world.inflight.len() < 2 {
        world.guest_writes();
    }
    let first = |world: &mut World| {
        let run = world.consumer.take(0).unwrap().unwrap();
        assert!(world.consumer.release(Durable(run.last_seq)));
        (run.len_bytes, run.marker)
    };
    assert_eq!(first(&mut world), (64, Some(true)), "of a fresh lane");
    world.ask_for_restart();
    world.disk.tick();
    let published = world.disk.producer().published();
    let (_, token) = world.inflight.remove(0);
    let stamps = Stamps {
        stamp: &AtomicU64::new(9),
        cut_epoch: &AtomicU32::new(1),
        time_ns: 0,
    };
    assert!(world.disk.done(token, false, &stamps).sync);
    assert_eq!(world.disk.producer().published(), published);
    let count = world.inflight.len();
    while world.inflight.len() == count {
        world.guest_writes();
    }
    assert_eq!(first(&mut world), (64, Some(true)), "of a restart");
}
