#![allow(clippy::unwrap_used)]
use super::*;
use crate::disk::{Outcome, Route};
use crate::log::LogOptions;
use crate::session::Outbox;
use filter_core::record::{
    FLAG_STREAM_BASE, FLAG_SYNC_BEGIN, FLAG_SYNC_END, RecordHeader, RecordKind,
};
use filter_core::wire::OpenLane;
use std::collections::BTreeMap;

const DISK: [u8; 16] = [3; 16];

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
        let lane = OpenLane {
            disk_id: DISK,
            vm_id: [4; 16],
            attach_epoch: 1,
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
        let (_, generation) = domain.open_lane(&lane, [5; 16], route).unwrap();
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

    fn send(&self, seq: u64, flags: u8, cut_epoch: u32) {
        let domain = &self.uploader.domain;
        let disk = domain.disk(&DISK).unwrap();
        let bytes = record(seq, flags, cut_epoch);
        let len = bytes.len();
        let outcome = domain.data(&disk, self.generation, bytes, len);
        assert_eq!(outcome, Outcome::Taken);
        let positions = BTreeMap::from([(DISK, seq)]);
        assert!(domain.wait_durable(&positions, Duration::from_secs(30)));
    }

    fn close_cut(&self, epoch: u32, seq: u64) {
        let cut = ClosedCut {
            epoch,
            time_ns: 1,
            name: None,
            positions: BTreeMap::from([(Uuid::from_bytes(DISK), seq)]),
        };
        self.uploader.domain.close_cut(cut).unwrap();
    }

    fn ask_cut(&self, epoch: Option<u32>) {
        self.uploader.domain.cuts.lock().outstanding = epoch;
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
