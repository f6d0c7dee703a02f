#![allow(clippy::unwrap_used)]
use super::*;
use crate::disk::{Outcome, Route};
use crate::domain::{Asked, CloseError};
use crate::log::LogOptions;
use crate::outbox::Outbox;
use crate::presence::Host;
use filter_core::record::{
    FLAG_STREAM_BASE, FLAG_SYNC_BEGIN, FLAG_SYNC_END, RecordHeader, RecordKind,
};
use filter_core::wire::OpenLane;
use std::collections::{BTreeMap, BTreeSet};

const DISK: [u8; 16] = [3; 16];
const HOST: [u8; 16] = [5; 16];

/// A record without payload: markers with flags, else a ZERO.
fn record(seq: u64, flags: u8, cut_epoch: u32) -> Vec<u8> {
    let header = RecordHeader {
        kind: if flags == 0 {
            RecordKind::Zero
        } else {
            RecordKind::Sync
        },
        flags,
        payload_len: 0,
        payload_crc: 0,
        seq,
        stamp: seq,
        offset_bytes: 0,
        attach_epoch: 1,
        cut_epoch,
        time_ns: 0,
        range_len: if flags == 0 { 512 } else { 0 },
    };
    header.encode().to_vec()
}

fn present(domain: &Domain, disk_id: [u8; 16], host: [u8; 16]) -> (Arc<crate::disk::Disk>, u64) {
    let lane = OpenLane {
        disk_id,
        vm_id: [4; 16],
        attach_epoch: 1,
        again: false,
        attach_id: 0,
        map_generation: 0,
        lineage: Box::default(),
        durable_seq: 0,
        capacity_bytes: 1 << 20,
        base: Some(0),
        domain: "d".into(),
        vm_name: "vm".into(),
        disk_label: "disk".into(),
    };
    let route = Route {
        outbox: Arc::new(Outbox::new()),
        channel: 1,
    };
    let name = String::new();
    let host = Host { id: host, name };
    domain
        .open_lane(&lane, &host, route, None, &|_| Ok(()))
        .unwrap()
        .unwrap()
}

struct Fixture {
    uploader: Uploader,
    generation: u64,
    runtime: tokio::runtime::Runtime,
    _dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = LogOptions {
            segment_bytes: 1 << 20,
            max_bytes: 8 << 20,
        };
        let domain = Domain::open("d", &dir.path().join("d"), options).unwrap();
        let (_, generation) = present(&domain, DISK, HOST);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let store = dir.path().join("store");
        let uploader = Uploader {
            domain,
            url: StoreUrl::parse(store.to_str().unwrap(), &[]).unwrap(),
            options: WriterOptions::default(),
            runtime: runtime.handle().clone(),
        };
        Self {
            uploader,
            generation,
            runtime,
            _dir: dir,
        }
    }

    fn present(&self, disk: [u8; 16], host: [u8; 16]) -> u64 {
        present(&self.uploader.domain, disk, host).1
    }

    fn another_disk(&self, disk: [u8; 16]) -> ([u8; 16], u64) {
        (disk, self.present(disk, HOST))
    }

    fn send(&self, seq: u64, flags: u8, cut_epoch: u32) {
        self.send_to(&(DISK, self.generation), seq, flags, cut_epoch);
    }

    fn send_to(&self, (id, generation): &([u8; 16], u64), seq: u64, flags: u8, cut_epoch: u32) {
        let domain = &self.uploader.domain;
        let disk = domain.disk(id).unwrap();
        let bytes = record(seq, flags, cut_epoch);
        let len = bytes.len();
        let outcome = domain.data(&disk, *generation, bytes, len);
        assert_eq!(outcome, Outcome::Taken);
        let positions = BTreeMap::from([(*id, seq)]);
        assert!(domain.wait_durable(&positions, Duration::from_secs(30)));
    }

    fn close_cut(&self, epoch: u32, seq: u64) {
        self.ask_cut(Some(epoch));
        let cut = ClosedCut {
            epoch,
            time_ns: 1,
            name: None,
            positions: BTreeMap::from([(Uuid::from_bytes(DISK), seq)]),
            left_out: BTreeSet::new(),
        };
        self.uploader.domain.close_cut(cut).unwrap();
    }

    fn ask_cut(&self, epoch: Option<u32>) {
        let asked = epoch.map(|epoch| Asked {
            epoch,
            hosts: BTreeSet::from([HOST]),
            void: false,
        });
        self.uploader.domain.cuts.lock().outstanding = asked;
    }

    fn writer(&self) -> CutWriter {
        let info = DomainInfo::new(Uuid::from_bytes(self.uploader.domain.id), "d");
        let options = WriterOptions::default();
        let open = CutWriter::open(&self.uploader.url, &info, options);
        self.runtime.block_on(open).unwrap()
    }
}

fn steps(attempt: &mut Attempt<'_>) {
    while attempt.step().ok().unwrap() {}
}

fn fed(attempt: &Attempt<'_>) -> u64 {
    let fed = attempt.writer.fed_positions();
    fed.get(&Uuid::from_bytes(DISK)).map_or(0, |p| p.seq)
}

/// What was stamped for a cut that is asked for waits, and is fed when that cut is settled, also when
/// the next one was asked for before the upload had looked.
#[test]
fn what_was_held_is_fed_once_its_cut_is_settled() {
    let fixture = Fixture::new();
    let mut attempt = Attempt::new(&fixture.uploader, fixture.writer());
    fixture.send(1, FLAG_STREAM_BASE | FLAG_SYNC_BEGIN, 1);
    fixture.send(2, FLAG_SYNC_END, 1);
    steps(&mut attempt);
    assert_eq!(fed(&attempt), 2);
    fixture.ask_cut(Some(2));
    fixture.send(3, 0, 1);
    fixture.send(4, 0, 2);
    steps(&mut attempt);
    assert_eq!(fed(&attempt), 3, "4 waits for the cut of epoch 2");
    // That cut came to nothing, and the next is asked for.
    fixture.ask_cut(Some(3));
    fixture.send(5, 0, 2);
    fixture.send(6, 0, 3);
    steps(&mut attempt);
    assert_eq!(fed(&attempt), 5, "6 waits for the cut of epoch 3");
    fixture.close_cut(3, 5);
    steps(&mut attempt);
    let newest = fixture.uploader.domain.cuts.lock().newest.clone();
    assert!(newest.is_some(), "the cut of epoch 3 is in the store");
    assert_eq!(fed(&attempt), 6);
}

fn newest(fixture: &Fixture) -> Option<u64> {
    let cuts = fixture.uploader.domain.cuts.lock();
    cuts.newest.as_ref().map(|(number, ..)| *number)
}

/// The host that has the disk next may be behind with its epochs: a closed cut is what its positions
/// say.
#[test]
fn a_closed_cut_takes_what_lies_up_to_its_positions_whatever_the_epoch() {
    let fixture = Fixture::new();
    let mut attempt = Attempt::new(&fixture.uploader, fixture.writer());
    fixture.send(1, FLAG_STREAM_BASE | FLAG_SYNC_BEGIN, 7);
    fixture.send(2, FLAG_SYNC_END, 7);
    // Stamped by a host that was far ahead, before this cut was asked for.
    fixture.send(3, 0, 7);
    fixture.ask_cut(Some(5));
    steps(&mut attempt);
    assert_eq!(fed(&attempt), 0, "7 is no epoch below 5");
    fixture.close_cut(5, 3);
    // By the next host: beyond the cut, although its epoch is below.
    fixture.send(4, 0, 1);
    let committed = newest(&fixture);
    assert_eq!(committed, None);
    steps(&mut attempt);
    assert_eq!(
        newest(&fixture),
        Some(1),
        "the cut of epoch 5 is in the store"
    );
    assert_eq!(fed(&attempt), 4, "and what waited for it is fed");
    let void = fixture
        .uploader
        .domain
        .figures
        .cuts_void
        .load(Ordering::Relaxed);
    assert_eq!(void, 0);
}

/// A disk that came after the positions were found is not in the cut: nothing of it is fed before.
#[test]
fn a_disk_without_a_position_waits_for_the_cut() {
    let fixture = Fixture::new();
    let mut attempt = Attempt::new(&fixture.uploader, fixture.writer());
    fixture.send(1, FLAG_STREAM_BASE | FLAG_SYNC_BEGIN, 1);
    fixture.send(2, FLAG_SYNC_END, 1);
    steps(&mut attempt);
    // The cut is not whole before the late disk's record is met.
    fixture.close_cut(2, 3);
    let late = fixture.another_disk([8; 16]);
    fixture.send_to(&late, 1, FLAG_STREAM_BASE | FLAG_SYNC_BEGIN, 1);
    fixture.send(3, 0, 1);
    steps(&mut attempt);
    assert_eq!(newest(&fixture), Some(1), "the cut is in the store");
    let fed = attempt.writer.fed_positions();
    assert_eq!(
        fed[&Uuid::from_bytes(late.0)].seq,
        1,
        "it is fed after the cut"
    );
}

/// A position in the gap before a base can never be reached: the cut is void, and the upload goes on.
#[test]
fn a_cut_that_ends_with_a_record_that_does_not_exist_is_void() {
    let fixture = Fixture::new();
    let mut attempt = Attempt::new(&fixture.uploader, fixture.writer());
    fixture.send(1, FLAG_STREAM_BASE | FLAG_SYNC_BEGIN, 1);
    fixture.send(2, FLAG_SYNC_END, 1);
    fixture.close_cut(2, 5);
    fixture.send(9, FLAG_STREAM_BASE | FLAG_SYNC_BEGIN, 2);
    fixture.send(10, FLAG_SYNC_END, 2);
    steps(&mut attempt);
    assert_eq!((newest(&fixture), fed(&attempt)), (None, 10));
    fixture.close_cut(3, 10);
    steps(&mut attempt);
    assert_eq!(newest(&fixture), Some(1));
}

/// Between the request and the end of a cut only the host that was asked may present disks.
#[test]
fn a_disk_from_another_host_voids_the_cut_that_is_asked_for() {
    let fixture = Fixture::new();
    fixture.send(1, FLAG_STREAM_BASE | FLAG_SYNC_BEGIN, 1);
    fixture.send(2, FLAG_SYNC_END, 1);
    let domain = fixture.uploader.domain.clone();
    let closes = |host| {
        fixture.ask_cut(Some(2));
        fixture.present(DISK, host);
        let positions = BTreeMap::from([(Uuid::from_bytes(DISK), 2)]);
        let cut = ClosedCut {
            epoch: 2,
            time_ns: 1,
            name: None,
            positions,
            left_out: BTreeSet::new(),
        };
        domain.close_cut(cut)
    };
    assert!(matches!(closes([6; 16]), Err(CloseError::Moved)));
    assert!(domain.cuts.lock().closed.is_empty());
    assert!(closes(HOST).is_ok());
    // Nobody waits for positions of a cut that is void.
    fixture.ask_cut(Some(3));
    fixture.present(DISK, [6; 16]);
    let since = std::time::Instant::now();
    assert!(!domain.wait_durable(&BTreeMap::from([(DISK, 9)]), Duration::from_secs(60)));
    assert!(since.elapsed() < Duration::from_secs(20));
}
