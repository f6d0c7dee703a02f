//! A write and a sync of the same block, in every order of their steps with up to three
//! preemptions (loom), a kill of the VM's
//! process at any of them, and the guards taken out one and two at a time.
//!
//! The disk's machine, its dirty map and its in-flight table are the product's own. Every step is
//! taken under the disk's lock, as the machine demands, so the lock is where loom changes threads; a
//! kill in the middle of a step is the torture test's matter. The guest's disk and the replica
//! are a few bytes beside it: a write lands at some step between its start and its completion, a
//! read sees what the disk holds at its own step.
//!
//! What each guard is for, as the tests below find it:
//!
//! | taken out | a write that is marked (the disk tracked) | a write that is published (a sync runs) |
//! |---|---|---|
//! | nothing | sound | sound |
//! | second mark | sound: the sync reads nothing that is in flight | (is not marked) |
//! | in-flight check | sound: the second mark brings the block back | **lost**: an old content after the new one |
//! | second mark and in-flight check | **lost**: this is "marking once" | |
//! | first mark | sound: the second mark; after a kill: the leftovers | (is not marked) |
//! | first and second mark | **lost** | |
//! | touch check | sound: the in-flight check and the marks | **lost**: an old content after the new one |
//! | leftovers | sound: the first mark | **lost by a kill**: published, and perhaps not on the disk |
//! | leftovers and first mark | **lost by a kill** | |
//!
//! So the two marks, the in-flight check and the leftovers cover each other for marked writes, in
//! pairs: each is there because the other may be wrong (the table is full, a check has a hole).
//! For published writes the in-flight check, the touch check and the leftovers each stand alone.
//!
//! Run: `RUSTFLAGS="--cfg loom" cargo test --release -p filter-core --test loom_sync --target-dir target/loom`
#![cfg(loom)]
#![allow(clippy::unwrap_used)]

use filter_core::disk::guard::{Guard, Guards};
use filter_core::disk::sync::SyncStep;
use filter_core::disk::{Change, Config, Decision, Disk, Start};
use filter_core::lane::inflight::Token;
use filter_core::lane::layout::{Geometry, Identity, LaneMemory, LaneState, MIN_RING_BYTES};
use filter_core::lane::producer::{Producer, Source, Stamps};
use filter_core::lane::sync::{AtomicU32, AtomicU64};
use filter_core::lane::walk::scan;
use filter_core::record::{RecordIter, RecordKind};
use loom::sync::{Arc, Mutex};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;

const DISK_BYTES: usize = 1024;
const OLD: [u8; DISK_BYTES] = [1; DISK_BYTES];
const NEW: [u8; 512] = [2; 512];
const LOST: &str = "a write is lost";

/// The guest's write and the state that it meets.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Write {
    /// The disk tracks when the write starts; then its sync begins.
    Marked,
    /// The disk's sync is under way, the block still to be read.
    Published,
}

#[derive(Clone, Copy)]
struct Setup {
    write: Write,
    kill: bool,
    guards: Guards,
}

/// A lane on the heap.
struct Lane {
    base: NonNull<u8>,
    layout: Layout,
    memory: LaneMemory,
}

impl Lane {
    fn new() -> Self {
        let geometry = Geometry::for_disk(DISK_BYTES as u64, MIN_RING_BYTES).unwrap();
        let identity = Identity {
            geometry,
            disk_id: [1; 16],
            vm_id: [2; 16],
            boot_id: [3; 16],
            base_seq: 1,
            domain: "model".into(),
            vm_name: "vm".into(),
            disk_label: "disk".into(),
        };
        let len = geometry.total_bytes() as usize;
        let layout = Layout::from_size_align(len, 4096).unwrap();
        // SAFETY: the size is not zero.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap();
        // SAFETY: just allocated, zeroed, nobody else's, and freed with this value only.
        let memory =
            unsafe { LaneMemory::create(base, len, &identity, DISK_BYTES as u64) }.unwrap();
        Self {
            base,
            layout,
            memory,
        }
    }

    /// What a receiver of the whole stream holds.
    fn replica(&self) -> [u8; DISK_BYTES] {
        let len = scan(self.memory).unwrap().tail as usize;
        let mut bytes = vec![0; len];
        let from = self.memory.geometry().data_at() as usize;
        // SAFETY: the stream never fills the ring, so these bytes lie in it; nobody writes them now.
        unsafe {
            let data = self.base.as_ptr().add(from);
            bytes.as_mut_ptr().copy_from_nonoverlapping(data, len);
        }
        let mut replica = OLD;
        for record in RecordIter::new(&bytes) {
            let record = record.unwrap();
            let header = record.header;
            let at = header.offset_bytes as usize;
            if matches!(header.kind, RecordKind::Write | RecordKind::Sync) {
                replica[at..at + record.payload.len()].copy_from_slice(record.payload);
            }
        }
        replica
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

/// Everything that the lock protects, and the disk below.
struct World {
    disk: Disk,
    lane: Lane,
    stamp: AtomicU64,
    cut_epoch: AtomicU32,
    primary: [u8; DISK_BYTES],
    killed: bool,
    config: Config,
}

// SAFETY: the lane's memory is this value's own, and reached under the lock that holds it.
unsafe impl Send for World {}

impl World {
    fn new(setup: Setup) -> Self {
        let lane = Lane::new();
        let config = Config {
            guards: setup.guards,
            ..Config::default()
        };
        let producer = Producer::new(lane.memory, 1, 0, 1);
        let mut disk = Disk::new(producer, DISK_BYTES as u64, Start::Clean, None, config);
        match setup.write {
            Write::Marked => disk.enter_tracking(),
            Write::Published => disk.change_ends(true), // everything is to be synced
        }
        Self {
            disk,
            lane,
            stamp: AtomicU64::new(0),
            cut_epoch: AtomicU32::new(1),
            primary: OLD,
            killed: false,
            config,
        }
    }

    fn start(&mut self) -> Token {
        let change = Change {
            kind: RecordKind::Write,
            offset_bytes: 0,
            len_bytes: NEW.len() as u64,
            sources: &[Source::from_slice(&NEW)],
        };
        let stamps = Stamps {
            stamp: &self.stamp,
            cut_epoch: &self.cut_epoch,
            time_ns: 1,
        };
        match self.disk.start(&change, &stamps) {
            Decision::Pass { token, .. } => token,
            Decision::Defer(_) => panic!("the ring has room"),
        }
    }

    fn land(&mut self) {
        self.primary[..NEW.len()].copy_from_slice(&NEW);
    }

    fn done(&mut self, token: Token) {
        let stamps = Stamps {
            stamp: &self.stamp,
            cut_epoch: &self.cut_epoch,
            time_ns: 1,
        };
        let _ = self.disk.done(token, true, &stamps);
    }

    fn sync_step(&mut self) -> SyncStep {
        let stamps = Stamps {
            stamp: &self.stamp,
            cut_epoch: &self.cut_epoch,
            time_ns: 1,
        };
        self.disk.tick();
        self.disk.sync_step(&stamps)
    }

    fn sync_read(&mut self, ticket: filter_core::disk::sync::Ticket, data: &[u8]) {
        let stamps = Stamps {
            stamp: &self.stamp,
            cut_epoch: &self.cut_epoch,
            time_ns: 1,
        };
        let _ = self.disk.sync_read(ticket, Some(data), &stamps);
    }

    /// The process is gone: another one opens the disk.
    fn reopen(&mut self) {
        let found = scan(self.lane.memory).unwrap();
        let producer = Producer::new(self.lane.memory, 2, found.tail, found.next_seq);
        self.disk = Disk::new(
            producer,
            DISK_BYTES as u64,
            Start::Marked,
            None,
            self.config,
        );
    }

    /// Lets the sync come to its end, alone, and compares.
    fn settle(&mut self) {
        for _ in 0..16 {
            match self.sync_step() {
                SyncStep::Read {
                    ticket,
                    offset_bytes,
                    len_bytes,
                    ..
                } => {
                    let at = offset_bytes as usize;
                    let data = self.primary[at..at + len_bytes as usize].to_vec();
                    self.sync_read(ticket, &data);
                }
                SyncStep::Wait { .. } => {}
                SyncStep::Idle | SyncStep::Finished { .. } => break,
            }
        }
        assert!(self.disk.state() == LaneState::Streaming, "no end");
        assert!(self.disk.dirty_bytes() == 0, "a mark that nobody looks at");
        assert!(self.lane.replica() == self.primary, "{LOST}");
    }
}

/// One step of a thread of the VM's process; `None` once it is killed.
fn step<R>(world: &Mutex<World>, act: impl FnOnce(&mut World) -> R) -> Option<R> {
    let mut world = world.lock().unwrap();
    (!world.killed).then(|| act(&mut world))
}

fn guest(world: &Mutex<World>, started: Option<Token>) -> Option<()> {
    let token = match started {
        Some(token) => token,
        None => step(world, World::start)?,
    };
    step(world, World::land)?;
    step(world, |world| world.done(token))
}

fn sync(world: &Mutex<World>) -> Option<()> {
    for _ in 0..2 {
        if let SyncStep::Read {
            ticket,
            offset_bytes,
            len_bytes,
            ..
        } = step(world, World::sync_step)?
        {
            let at = offset_bytes as usize;
            let data = step(world, |world| {
                world.primary[at..at + len_bytes as usize].to_vec()
            })?;
            step(world, |world| world.sync_read(ticket, &data))?;
        }
    }
    Some(())
}

fn run(setup: Setup) {
    let mut world = World::new(setup);
    // What tracks when a write starts is over when its sync begins.
    let started = (setup.write == Write::Marked).then(|| world.start());
    let world = Arc::new(Mutex::new(world));
    let theirs = world.clone();
    let guest = loom::thread::spawn(move || guest(&theirs, started));
    let killer = setup.kill.then(|| {
        let theirs = world.clone();
        loom::thread::spawn(move || theirs.lock().unwrap().killed = true)
    });
    let _ = sync(&world);
    let _ = guest.join().unwrap();
    if let Some(killer) = killer {
        killer.join().unwrap();
    }
    let mut world = world.lock().unwrap();
    if world.killed {
        world.reopen();
    }
    world.settle();
}

fn check(write: Write, kill: bool, out: &[Guard]) {
    // A thread of loom's has a small stack, too small to find out where a panic came from.
    static QUIET: std::sync::Once = std::sync::Once::new();
    QUIET.call_once(|| std::panic::set_hook(Box::new(|why| eprintln!("{why}"))));
    let guards = Guards::without(out);
    let setup = Setup {
        write,
        kill,
        guards,
    };
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(move || run(setup));
}

/// Whether loom finds an order in which a write is lost.
fn loses(write: Write, kill: bool, out: &[Guard]) -> bool {
    let Err(why) = catch_unwind(AssertUnwindSafe(|| check(write, kill, out))) else {
        return false;
    };
    let why = why.downcast_ref::<String>().map(String::as_str);
    assert_eq!(why, Some(LOST), "another failure");
    true
}

const EVERYTHING: [(Write, bool); 4] = [
    (Write::Marked, false),
    (Write::Marked, true),
    (Write::Published, false),
    (Write::Published, true),
];

#[test]
fn sound() {
    for (write, kill) in EVERYTHING {
        check(write, kill, &[]);
    }
}

/// The sentence of the design: with the first mark only, and nothing that covers for the second.
#[test]
fn marking_once_loses_a_write() {
    let out = [Guard::SecondMark, Guard::InFlight];
    assert!(loses(Write::Marked, false, &out));
}

#[test]
fn the_second_mark_and_the_in_flight_check_cover_each_other() {
    for kill in [false, true] {
        check(Write::Marked, kill, &[Guard::SecondMark]);
        check(Write::Marked, kill, &[Guard::InFlight]);
    }
}

#[test]
fn without_either_mark_a_write_is_lost() {
    let out = [Guard::FirstMark, Guard::SecondMark];
    assert!(loses(Write::Marked, false, &out));
}

#[test]
fn the_first_mark_and_the_leftovers_cover_each_other() {
    for guard in [Guard::FirstMark, Guard::Leftovers] {
        check(Write::Marked, false, &[guard]);
        check(Write::Marked, true, &[guard]);
    }
    let out = [Guard::FirstMark, Guard::Leftovers];
    check(Write::Marked, false, &out);
    assert!(loses(Write::Marked, true, &out));
}

#[test]
fn a_marked_write_does_not_need_the_touch_check() {
    check(Write::Marked, false, &[Guard::Touch]);
    check(Write::Marked, true, &[Guard::Touch]);
}

#[test]
fn without_the_in_flight_check_a_published_write_is_overwritten() {
    assert!(loses(Write::Published, false, &[Guard::InFlight]));
}

#[test]
fn without_the_touch_check_a_published_write_is_overwritten() {
    assert!(loses(Write::Published, false, &[Guard::Touch]));
}

#[test]
fn without_the_leftovers_a_kill_loses_a_published_write() {
    check(Write::Published, false, &[Guard::Leftovers]);
    assert!(loses(Write::Published, true, &[Guard::Leftovers]));
}
