//! The pace against a guest and a disk in virtual time, each shape with and without the sync.
#![allow(clippy::unwrap_used)]

use super::{Met, PROBE_NS, Pace, PaceConfig};
use crate::disk::{Config, Disk, Start};
use crate::lane::layout::MIN_RING_BYTES;
use crate::lane::producer::{Producer, Stamps};
use crate::lane::sync::{AtomicU32, AtomicU64};
use crate::lane::test_lane::{HeapLane, Numbers, with_seeds};
use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;
const MIB: u64 = 1 << 20;
const READ_BYTES: u64 = 256 << 10;
const READS: u32 = 2;
/// A paused or waiting sync asks again by the host's timer, which is late now and then.
const TIMER_LATE_NS: u64 = MS;

/// The disk below: servers with one queue, in order.
#[derive(Clone)]
struct Storage {
    free_ns: Vec<u64>,
    seek_ns: (u64, u64),
    bytes_per_us: u64,
    /// One I/O in a hundred takes longer.
    tail_ns: u64,
}

impl Storage {
    fn memory() -> Self {
        Self {
            free_ns: vec![0; 2],
            seek_ns: (15_000, 40_000),
            bytes_per_us: 3000,
            tail_ns: 60_000,
        }
    }

    fn spinning() -> Self {
        Self {
            free_ns: vec![0; 1],
            seek_ns: (2 * MS, 9 * MS),
            bytes_per_us: 150,
            tail_ns: 10 * MS,
        }
    }

    /// When an I/O that arrives now is done.
    fn serve(&mut self, now_ns: u64, bytes: u64, numbers: &mut Numbers) -> u64 {
        let tail = if numbers.chance(1) { self.tail_ns } else { 0 };
        let takes = numbers.between(self.seek_ns.0, self.seek_ns.1)
            + bytes * 1000 / self.bytes_per_us
            + numbers.below(tail + 1);
        let server = self.free_ns.iter_mut().min().unwrap();
        *server = now_ns.max(*server) + takes;
        *server
    }
}

/// How the guest behaves.
#[derive(Clone, Copy)]
enum Guest {
    Idle,
    /// I/Os per second, whatever the disk does.
    Paced(u64),
    /// Always this many under way.
    Depth(u32),
    /// Paced, during the first so many ms of each period of so many ms.
    Bursts(u64, u64, u64),
    /// Paced; from this second on its I/Os are of 256 KiB, from that second on of 4 KiB again.
    Changing(u64, u64, u64),
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrive,
    Done {
        since_ns: u64,
        wait_ns: u64,
    },
    SyncTimer,
    SyncDone,
    /// The timer that is only there to be late.
    Probe {
        due_ns: u64,
    },
}

/// The core that guest, filter and sync share, or none. An I/O that waits for it waits before the filter
/// sees it.
#[derive(Clone, Copy)]
struct Core {
    free_ns: u64,
    /// What the sync takes of it for each piece, beside what it copies.
    piece_ns: u64,
    bytes_per_us: u64,
}

impl Core {
    /// When who comes now gets it; it then keeps it for so long.
    fn get(&mut self, now_ns: u64, for_ns: u64) -> u64 {
        let from = now_ns.max(self.free_ns);
        self.free_ns = from + for_ns;
        from
    }
}

struct Outcome {
    /// (completed, latency), ns, while the sync ran (or all, without one).
    latencies: Vec<(u64, u64)>,
    finished_ns: Option<u64>,
    synced: u64,
    pace: Pace,
}

impl Outcome {
    fn p99_between(&self, from_ns: u64, to_ns: u64) -> u64 {
        let within = |(at, _): &&(u64, u64)| (from_ns..to_ns).contains(at);
        let mut all: Vec<_> = self
            .latencies
            .iter()
            .filter(within)
            .map(|(_, l)| *l)
            .collect();
        assert!(all.len() >= 100, "{} I/Os", all.len());
        all.sort_unstable();
        all[all.len() * 99 / 100]
    }

    fn p99(&self) -> u64 {
        self.p99_between(0, u64::MAX)
    }
}

struct World {
    guest: Guest,
    storage: Storage,
    numbers: Numbers,
    events: BinaryHeap<Reverse<(u64, Event)>>,
    pace: Pace,
    met: Met,
    core: Option<Core>,
    /// Timers are looked at.
    probes: bool,
    probing: bool,
    read_bytes: u64,
    seen: Vec<(u64, u64)>,
    left: u64,
    reading: u32,
    timer_armed: bool,
}

impl World {
    fn at(&mut self, when_ns: u64, event: Event) {
        self.events.push(Reverse((when_ns, event)));
    }

    /// When the guest issues its next I/O of its own accord.
    fn next_arrival(&mut self, now_ns: u64) -> Option<u64> {
        let mut gap = |per_second: u64| self.numbers.between(1, 2 * SECOND / per_second);
        match self.guest {
            Guest::Idle | Guest::Depth(_) => None,
            Guest::Paced(rate) | Guest::Changing(rate, ..) => Some(now_ns + gap(rate)),
            Guest::Bursts(rate, on_ms, period_ms) => {
                let next = now_ns + gap(rate);
                let (period, on) = (period_ms * MS, on_ms * MS);
                let within = next % period < on;
                Some(if within {
                    next
                } else {
                    next - next % period + period
                })
            }
        }
    }

    fn guest_bytes(&self, now_ns: u64) -> u64 {
        match self.guest {
            Guest::Changing(_, from, to) if (from..to).contains(&(now_ns / SECOND)) => 256 << 10,
            _ => 4096,
        }
    }

    fn arrive(&mut self, now_ns: u64) {
        let bytes = self.guest_bytes(now_ns);
        let from = self.core.as_mut().map_or(now_ns, |c| c.get(now_ns, 5_000));
        let done = self.storage.serve(from, bytes, &mut self.numbers);
        let (since_ns, wait_ns) = (from, from - now_ns);
        self.at(done, Event::Done { since_ns, wait_ns });
    }

    fn drive_sync(&mut self, now_ns: u64) {
        self.pace.observe(now_ns, &self.met);
        if self.probes && self.pace.watches() && !self.probing {
            self.probing = true;
            let due_ns = now_ns + PROBE_NS;
            self.at(due_ns, Event::Probe { due_ns });
        }
        let bytes = self.read_bytes;
        while self.left > 0 && self.reading < READS {
            match self.pace.take(bytes) {
                Ok(()) => {
                    self.left -= bytes;
                    self.reading += 1;
                    let done = self.storage.serve(now_ns, bytes, &mut self.numbers);
                    self.at(done, Event::SyncDone);
                }
                Err(wait_ns) => {
                    if !self.timer_armed {
                        self.timer_armed = true;
                        let late = self.numbers.below(TIMER_LATE_NS);
                        self.at(now_ns + wait_ns + late, Event::SyncTimer);
                    }
                    return;
                }
            }
        }
    }

    fn run(mut self, until_ns: u64, sync: bool) -> Outcome {
        let all = self.left;
        if let Guest::Depth(depth) = self.guest {
            for i in 0..depth {
                self.at(u64::from(i) * 1000, Event::Arrive);
            }
        } else if let Some(first) = self.next_arrival(0) {
            self.at(first, Event::Arrive);
        }
        if sync {
            self.at(0, Event::SyncTimer);
        }
        let mut finished_ns = None;
        while let Some(Reverse((now_ns, event))) = self.events.pop() {
            if now_ns >= until_ns || finished_ns.is_some() {
                break;
            }
            match event {
                Event::Arrive => {
                    self.arrive(now_ns);
                    if let Some(next) = self.next_arrival(now_ns) {
                        self.at(next, Event::Arrive);
                    }
                }
                Event::Done { since_ns, wait_ns } => {
                    self.met.ios.add(now_ns - since_ns);
                    self.seen.push((now_ns, now_ns - since_ns + wait_ns));
                    if matches!(self.guest, Guest::Depth(_)) {
                        self.at(now_ns + 2000, Event::Arrive);
                    }
                }
                Event::SyncTimer => {
                    self.timer_armed = false;
                    self.drive_sync(now_ns);
                }
                Event::Probe { due_ns } => {
                    // 50 us are what timers are late by on a machine without anything to do.
                    let late_ns = 50_000 + self.numbers.below(10_000);
                    let from = self.core.as_mut().map_or(now_ns, |c| c.get(now_ns, 3_000));
                    self.met.timers.add(from + late_ns - due_ns);
                    self.probing = self.pace.watches();
                    if self.probing {
                        let due_ns = from + PROBE_NS;
                        self.at(due_ns, Event::Probe { due_ns });
                    }
                }
                Event::SyncDone => {
                    self.reading -= 1;
                    let bytes = self.read_bytes;
                    if let Some(core) = &mut self.core {
                        core.get(now_ns, core.piece_ns + bytes * 1000 / core.bytes_per_us);
                    }
                    if self.left == 0 && self.reading == 0 {
                        finished_ns = Some(now_ns);
                    }
                    self.drive_sync(now_ns);
                }
            }
        }
        Outcome {
            latencies: self.seen,
            finished_ns,
            synced: all - self.left,
            pace: self.pace,
        }
    }
}

fn run_with(
    config: PaceConfig,
    guest: Guest,
    storage: Storage,
    seed: u64,
    sync_bytes: u64,
    seconds: u64,
) -> Outcome {
    let world = World {
        guest,
        storage,
        numbers: Numbers::new(seed),
        events: BinaryHeap::new(),
        pace: Pace::new(config),
        met: Met::default(),
        core: None,
        probes: false,
        probing: false,
        read_bytes: READ_BYTES,
        seen: Vec::new(),
        left: sync_bytes,
        reading: 0,
        timer_armed: false,
    };
    world.run(seconds * SECOND, sync_bytes > 0)
}

fn run(guest: Guest, storage: Storage, seed: u64, sync_bytes: u64, seconds: u64) -> Outcome {
    run_with(
        PaceConfig::default(),
        guest,
        storage,
        seed,
        sync_bytes,
        seconds,
    )
}

/// MiB per second of what was synced.
fn speed(outcome: &Outcome, seconds: u64) -> u64 {
    let ns = outcome.finished_ns.unwrap_or(seconds * SECOND);
    outcome.synced * 1000 / (ns / MS) / MIB
}

/// The guest's p99 rises by at most a fifth; returns the sync's speed in MiB/s.
fn assert_yields(name: &str, guest: Guest, storage: &Storage, seed: u64) -> u64 {
    let seconds = 60;
    let alone = run(guest, storage.clone(), seed, 0, seconds);
    let both = run(guest, storage.clone(), seed, 1 << 50, seconds);
    let (before, during) = (alone.p99(), both.p99());
    let speed = speed(&both, seconds);
    let figures = both.pace.figures();
    println!("{name}: p99 {before} -> {during} ns, {speed} MiB/s, {figures:?}");
    assert!(during * 100 <= before * 120, "{name}: {before} -> {during}");
    speed
}

#[test]
fn a_paced_guest_on_memory_keeps_its_p99() {
    with_seeds(5, |seed| {
        let speed = assert_yields("paced", Guest::Paced(2000), &Storage::memory(), seed);
        assert!(speed >= 20, "{speed} MiB/s: it need not be that slow");
    });
}

#[test]
fn a_sparse_guest_on_memory_keeps_its_p99() {
    with_seeds(5, |seed| {
        assert_yields("sparse", Guest::Paced(100), &Storage::memory(), seed);
    });
}

#[test]
fn guests_with_queues_on_memory_keep_their_p99() {
    with_seeds(1, |seed| {
        assert_yields("depth 1", Guest::Depth(1), &Storage::memory(), seed);
        assert_yields("depth 16", Guest::Depth(16), &Storage::memory(), seed);
    });
}

#[test]
fn bursts_keep_their_p99() {
    with_seeds(5, |seed| {
        let guest = Guest::Bursts(5000, 300, 1500);
        assert_yields("bursts", guest, &Storage::memory(), seed);
    });
}

#[test]
fn an_idle_guest_gets_full_speed_within_a_second() {
    let outcome = run(Guest::Idle, Storage::memory(), 1, 4096 * MIB, 10);
    let reads_ns = |bytes: u64| bytes / READ_BYTES * (READ_BYTES * 1000 / 3000 + 40_000);
    let alone = reads_ns(4096 * MIB) / 2;
    let took = outcome.finished_ns.unwrap();
    assert!(took <= alone + SECOND, "{took} ns, {alone} at full speed");
}

/// On a spinning disk every read of the sync is a seek that the guest feels: the floor rules, and
/// costs what so many seeks cost.
#[test]
fn where_the_floor_forces_more_it_costs_no_more_than_the_floor() {
    with_seeds(3, |seed| {
        for (depth, floor) in [(1, 4 * MIB), (16, 4 * MIB), (1, MIB)] {
            let config = PaceConfig {
                floor_bytes_s: floor,
                ..PaceConfig::default()
            };
            let guest = Guest::Depth(depth);
            let alone = run(guest, Storage::spinning(), seed, 0, 60);
            let sync = 30 * floor;
            let both = run_with(config, guest, Storage::spinning(), seed, sync, 60);
            let took = both.finished_ns.expect("the floor makes it end");
            let upto = |o: &Outcome| o.latencies.iter().filter(|(at, _)| *at < took).count() as u64;
            let (before, during) = (upto(&alone), upto(&both));
            println!("depth {depth}: {before} -> {during} I/Os in {took} ns");
            // A read takes 11 ms at most with its seek, so the floor takes this share of the disk;
            // a tenth more for the first rise.
            let share = floor / READ_BYTES * 11 * 100 / 1000;
            assert!(
                during * 100 >= before * (100 - share - 10),
                "{before} -> {during}"
            );
            // With sixteen of the guest's I/Os before each read it cannot even reach the floor.
            assert!(took <= 40 * SECOND, "{took} ns");
            assert!(took >= 20 * SECOND, "{took} ns: above the floor");
        }
    });
}

#[test]
fn a_guest_whose_own_latency_changes_is_followed() {
    with_seeds(5, |seed| {
        let guest = Guest::Changing(1000, 20, 40);
        let storage = Storage {
            bytes_per_us: 1000,
            ..Storage::memory()
        };
        let alone = run(guest, storage.clone(), seed, 0, 60);
        let both = run(guest, storage, seed, 1 << 50, 60);
        let parts = [(0, 20), (20, 40), (40, 60)];
        for (from, to) in parts.map(|(from, to)| (from * SECOND, to * SECOND)) {
            let (before, during) = (alone.p99_between(from, to), both.p99_between(from, to));
            println!("from {from}: p99 {before} -> {during} ns");
            assert!(during * 100 <= before * 120, "{before} -> {during}");
        }
        assert!(speed(&both, 60) >= 15, "{} MiB/s", speed(&both, 60));
    });
}

#[test]
fn the_most_that_is_allowed_holds_for_an_idle_guest_too() {
    let config = PaceConfig {
        max_bytes_s: 50 * MIB,
        ..PaceConfig::default()
    };
    let outcome = run_with(config, Guest::Idle, Storage::memory(), 1, 200 * MIB, 60);
    let took = outcome.finished_ns.unwrap();
    assert!((4 * SECOND..=5 * SECOND).contains(&took), "{took} ns");
}

#[test]
fn a_pace_that_nobody_watches_limits_nothing() {
    let mut pace = Pace::new(PaceConfig::default());
    assert!((0..1000).all(|_| pace.take(1 << 30).is_ok()));
}

/// The steering itself is seen to matter: without it the same guest's p99 doubles.
#[test]
fn without_a_pace_the_guest_would_notice() {
    let config = PaceConfig {
        floor_bytes_s: u64::MAX,
        ..PaceConfig::default()
    };
    let guest = Guest::Paced(2000);
    let alone = run(guest, Storage::memory(), 1, 0, 20);
    let both = run_with(config, guest, Storage::memory(), 1, 1 << 50, 20);
    assert!(
        both.p99() > 2 * alone.p99(),
        "{} {}",
        alone.p99(),
        both.p99()
    );
}

/// A guest that shares its core with the sync, on a disk in memory.
fn run_on_one_core(seed: u64, sync_bytes: u64, probes: bool) -> Outcome {
    let core = Core {
        free_ns: 0,
        piece_ns: 15_000,
        bytes_per_us: 3000,
    };
    let world = World {
        guest: Guest::Paced(2000),
        storage: Storage::memory(),
        numbers: Numbers::new(seed),
        events: BinaryHeap::new(),
        pace: Pace::new(PaceConfig::default()),
        met: Met::default(),
        core: Some(core),
        probes,
        probing: false,
        read_bytes: READ_BYTES,
        seen: Vec::new(),
        left: sync_bytes,
        reading: 0,
        timer_armed: false,
    };
    world.run(20 * SECOND, sync_bytes > 0)
}

/// What waits for a core is not seen by who looks at the I/Os alone: timers see it.
#[test]
fn a_guest_on_the_syncs_core_is_yielded_to() {
    let shown = Cell::new(0);
    with_seeds(3, |seed| {
        let alone = run_on_one_core(seed, 0, false).p99();
        let blind = run_on_one_core(seed, 100 << 30, false);
        let seeing = run_on_one_core(seed, 100 << 30, true);
        let (without, with) = (
            blind.p99_between(5 * SECOND, 20 * SECOND),
            seeing.p99_between(5 * SECOND, 20 * SECOND),
        );
        eprintln!(
            "seed {seed}: alone {alone}, blind {without} at {}, seeing {with} at {}",
            blind.pace.figures().rate_bytes_s >> 20,
            seeing.pace.figures().rate_bytes_s >> 20
        );
        assert!(
            with <= alone * 12 / 10,
            "seed {seed}: {alone} ns alone, {with} with"
        );
        shown.set(shown.get() + u32::from(without > alone * 12 / 10));
    });
    assert!(shown.get() > 0, "the model shows nothing");
}

/// The disk's machine asks the pace, and loses no mark by waiting.
#[test]
fn a_disks_sync_waits_for_its_pace() {
    use crate::disk::sync::SyncStep;

    let bytes = 8 * READ_BYTES;
    let lane = lane_for(bytes);
    let mut disk = disk_of(&lane, bytes);
    let stamps = Stamps {
        stamp: &AtomicU64::new(0),
        cut_epoch: &AtomicU32::new(1),
        time_ns: 1,
    };
    let latencies = Met::default();
    for ms in 0..490 {
        disk.observe(SECOND + ms * MS, &latencies);
        let step = disk.sync_step(&stamps);
        assert!(
            matches!(step, SyncStep::Wait { after_ns: 1.., .. }),
            "{step:?}"
        );
    }
    disk.observe(2 * SECOND, &latencies);
    let step = disk.sync_step(&stamps);
    let SyncStep::Read {
        offset_bytes,
        len_bytes,
        ..
    } = step
    else {
        panic!("the guest is idle: {step:?}");
    };
    assert_eq!(offset_bytes, 0, "what had to wait is still the first");
    assert_eq!(len_bytes, READ_BYTES);
}

fn lane_for(bytes: u64) -> HeapLane {
    HeapLane::new(bytes, MIN_RING_BYTES, 1)
}

fn disk_of(lane: &HeapLane, bytes: u64) -> Disk {
    let producer = Producer::new(lane.memory(), 1, 0, 1);
    Disk::new(producer, bytes, Start::Full, None, Config::default())
}
