//! The region map by itself: what is asked for when.
#![allow(clippy::unwrap_used)]
use super::*;
use crate::sidecar::regions::{DEFAULT_REGION_SHIFT, decode};
use alloc::vec;

const ID: [u8; 16] = [5; 16];
const REGION: u64 = 1 << DEFAULT_REGION_SHIFT;
const PERIOD_NS: u64 = 1_000;

struct Shell {
    map: Intent,
    sidecar: Vec<u8>,
    now_ns: u64,
    published: u64,
    durable: u64,
    busy: Option<u64>,
}

impl Shell {
    /// A map of one block, in the sidecar with every bit set.
    fn new() -> Self {
        let mut shell = Self {
            map: Intent::full(ID, DEFAULT_REGION_SHIFT, 1, &[], PERIOD_NS),
            sidecar: vec![0; 4 * BLOCK_BYTES],
            now_ns: 0,
            published: 10,
            durable: 10,
            busy: None,
        };
        shell.write();
        shell
    }

    fn step(&mut self) -> IntentStep {
        let (map, busy) = (&mut self.map, self.busy);
        map.step(&Progress {
            now_ns: self.now_ns,
            published_seq: self.published,
            durable_seq: self.durable,
            busy: &|offset, len| busy.is_some_and(|at| offset <= at && at < offset + len),
        })
    }

    fn flushed(&mut self, ok: bool) {
        let (map, busy) = (&mut self.map, self.busy);
        let progress = Progress {
            now_ns: self.now_ns,
            published_seq: self.published,
            durable_seq: self.durable,
            busy: &|offset, len| busy.is_some_and(|at| offset <= at && at < offset + len),
        };
        map.flushed(ok, &progress);
    }

    fn write(&mut self) {
        let sidecar = &mut self.sidecar;
        let written: Result<(), ()> = self.map.write_all(|offset, bytes| {
            sidecar[offset as usize..offset as usize + BLOCK_BYTES].copy_from_slice(bytes);
            Ok(())
        });
        written.unwrap();
    }

    /// Regions whose bit the sidecar has.
    fn in_sidecar(&self) -> Intent {
        Intent::load(ID, &decode(&self.sidecar, &ID, 1).unwrap(), PERIOD_NS).unwrap()
    }

    /// A period ends; what it asks for is done.
    fn period(&mut self) {
        self.now_ns += PERIOD_NS;
        if self.step() == IntentStep::Flush {
            self.flushed(true);
        }
        self.write();
    }

    fn clear_all(&mut self) {
        for _ in 0..4 {
            self.period();
        }
        assert_eq!(self.map.wanted_bytes(), 0);
        assert_eq!(self.in_sidecar().wanted_bytes(), 0);
    }
}

#[test]
fn a_bit_is_wanted_once_and_lasts() {
    let mut shell = Shell::new();
    shell.clear_all();
    assert!(!shell.map.want(3 * REGION, 512), "not in the sidecar");
    assert!(shell.map.is_pending());
    assert_eq!(shell.in_sidecar().wanted_bytes(), 0);
    shell.write();
    assert!(shell.map.want(3 * REGION, REGION), "in the sidecar");
    assert!(!shell.map.want(4 * REGION - 1, 2), "half of it is");
    let ranges: Vec<_> = shell.in_sidecar().wanted_ranges().collect();
    assert_eq!(ranges, [(3 * REGION, REGION)]);
}

#[test]
fn what_comes_during_a_write_goes_into_the_next_one() {
    let mut shell = Shell::new();
    shell.clear_all();
    shell.map.want(0, 1);
    let IntentStep::Write { .. } = shell.step() else {
        panic!("a bit waits");
    };
    shell.map.want(REGION, 1);
    assert_eq!(shell.step(), IntentStep::Idle, "one write at a time");
    shell.map.written(true);
    assert!(shell.map.want(0, 1));
    assert!(!shell.map.want(REGION, 1) && shell.map.is_pending());
}

#[test]
fn a_region_must_rest_for_a_whole_period_and_be_durable_and_flushed() {
    let mut shell = Shell::new();
    shell.clear_all();
    shell.map.want(0, 1);
    shell.write();
    // Touched just before a period ends: that one and the next do not count.
    shell.map.touch(0, 1);
    shell.published = 20;
    shell.period();
    shell.period();
    assert_eq!(shell.map.wanted_bytes(), REGION);
    // Not durable downstream.
    shell.period();
    shell.period();
    assert_eq!(shell.map.wanted_bytes(), REGION);
    shell.durable = 20;
    // Marked, or in flight.
    shell.busy = Some(5);
    shell.period();
    assert_eq!(shell.map.wanted_bytes(), REGION);
    shell.busy = None;
    shell.now_ns += PERIOD_NS;
    assert_eq!(shell.step(), IntentStep::Flush);
    shell.flushed(false);
    assert_eq!(shell.map.wanted_bytes(), REGION, "the flush failed");
    // Touched while the disk is being flushed.
    shell.now_ns += PERIOD_NS;
    assert_eq!(shell.step(), IntentStep::Flush);
    shell.map.touch(0, 1);
    shell.flushed(true);
    assert_eq!(shell.map.wanted_bytes(), REGION);
    shell.clear_all();
    assert_eq!(shell.in_sidecar().relies_on_seq(), 20);
}

#[test]
fn nothing_is_cleared_while_a_bit_waits() {
    for flushing in [false, true] {
        let mut shell = Shell::new();
        shell.clear_all();
        shell.map.want(0, 1);
        shell.write();
        shell.map.touch(0, 1);
        shell.period();
        shell.period();
        if flushing {
            shell.now_ns += PERIOD_NS;
            assert_eq!(shell.step(), IntentStep::Flush);
        }
        shell.map.want(5 * REGION, 1);
        shell.flushed(true);
        // The write that sets the bit is under way, and one period ends after the other.
        assert!(matches!(shell.step(), IntentStep::Write { .. }));
        assert!(shell.map.is_pending());
        let (map, busy) = (&mut shell.map, |_, _| false);
        let progress = Progress {
            now_ns: 100 * PERIOD_NS,
            published_seq: 10,
            durable_seq: 10,
            busy: &busy,
        };
        assert_eq!(map.end_period(&progress), IntentStep::Idle);
        assert_eq!(map.wanted_bytes(), 2 * REGION);
        map.written(true);
        shell.now_ns = 200 * PERIOD_NS;
        shell.clear_all();
    }
}

#[test]
fn a_new_stream_begins_with_every_bit_and_relies_on_nothing() {
    let mut shell = Shell::new();
    shell.clear_all();
    assert_eq!(shell.map.relies_on_seq(), 10);
    shell.map.begin_anew();
    assert!(!shell.map.want(0, 1));
    shell.write();
    let found = shell.in_sidecar();
    assert_eq!(found.relies_on_seq(), 0);
    assert_eq!(found.wanted_ranges().count() as u64, BLOCK_REGIONS);
}

#[test]
fn a_write_that_failed_is_made_again_in_the_same_place() {
    let mut shell = Shell::new();
    shell.clear_all();
    shell.map.want(0, 1);
    let IntentStep::Write { offset_bytes, .. } = shell.step() else {
        panic!("a bit waits");
    };
    shell.map.written(false);
    assert!(shell.map.is_failing() && shell.map.is_pending());
    let IntentStep::Write {
        offset_bytes: again,
        bytes,
    } = shell.step()
    else {
        panic!("it still waits");
    };
    assert_eq!(again, offset_bytes, "the other copy is the whole one");
    shell.sidecar[again as usize..again as usize + BLOCK_BYTES].copy_from_slice(&*bytes);
    shell.map.written(true);
    assert!(!shell.map.is_failing() && shell.map.want(0, 1));
    assert_eq!(
        shell.in_sidecar().wanted_bytes(),
        REGION,
        "and counts as the newer"
    );
}

/// What tells a sidecar from an earlier one: each write raises it, only bits that were set are told.
#[test]
fn the_generation_that_is_told_rises_with_each_bit_that_is_set() {
    let mut shell = Shell::new();
    shell.clear_all();
    let (told, durable) = shell.map.generations();
    assert!(told < durable, "clearing bits tells nothing");
    shell.map.want(3 * REGION, 512);
    assert_eq!(shell.map.generations(), (told, durable), "not there yet");
    shell.write();
    assert_eq!(shell.map.generations(), (durable + 1, durable + 1));
    assert_eq!(shell.in_sidecar().generations().1, durable + 1);
    // A write that failed counts only once its successor is there.
    shell.map.want(5 * REGION, 512);
    let IntentStep::Write { .. } = shell.step() else {
        panic!("a bit waits");
    };
    shell.map.written(false);
    assert_eq!(shell.map.generations(), (durable + 1, durable + 1));
    shell.write();
    let (told, after) = shell.map.generations();
    assert!(told == after && after > durable + 1);
    assert_eq!(shell.in_sidecar().generations().1, after);
}

/// As long as something changes the sidecar is written once a period, so that copies of it differ.
#[test]
fn a_period_of_changes_leaves_a_trace_in_the_sidecar() {
    let mut shell = Shell::new();
    shell.clear_all();
    shell.map.want(REGION, 512);
    shell.write();
    let mut before = shell.map.generations();
    for _ in 0..5 {
        shell.map.touch(REGION, 512);
        shell.period();
        let now = shell.map.generations();
        assert_eq!((now.0, now.1 > before.1), (before.0, true), "{before:?}");
        before = now;
    }
    shell.clear_all();
    let at_rest = shell.map.generations();
    shell.period();
    assert_eq!(shell.map.generations(), at_rest, "nothing changed");
}

/// A change that did not wait for its bit: until the bit is there, no state of the sidecar is late enough.
#[test]
fn a_late_change_tells_more_than_the_sidecar_has_until_its_bit_is_there() {
    let mut shell = Shell::new();
    shell.clear_all();
    shell.map.want(REGION, 512);
    let IntentStep::Write { .. } = shell.step() else {
        panic!("a bit waits");
    };
    // It comes too late for the write under way, and passes before the next.
    shell.map.want(9 * REGION, 512);
    shell.map.pass_late(9 * REGION, 512);
    let (told, durable) = shell.map.generations();
    assert!(told > durable);
    shell.map.written(true);
    assert!(
        shell.map.generations().1 < told,
        "another write does not do"
    );
    for ok in [false, true] {
        assert!(shell.map.generations().1 < told);
        let step = shell.step();
        let IntentStep::Write {
            offset_bytes,
            bytes,
        } = step
        else {
            panic!("the bit waits");
        };
        if ok {
            let at = offset_bytes as usize;
            shell.sidecar[at..at + BLOCK_BYTES].copy_from_slice(&*bytes);
        }
        shell.map.written(ok);
    }
    let (told, durable) = shell.map.generations();
    assert_eq!(told, durable);
    // A map that is loaded knows only what is there: all of it may be late.
    let mut next = Intent::load(ID, &decode(&shell.sidecar, &ID, 1).unwrap(), PERIOD_NS).unwrap();
    assert_eq!(next.generations().1, durable);
    next.all_late();
    assert!(next.generations().0 > durable);
}
