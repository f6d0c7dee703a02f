#![allow(clippy::unwrap_used)]
use super::*;
use crate::log::LogOptions;
use filter_core::record::{FLAG_STREAM_BASE, RecordHeader, RecordKind};
use std::time::Duration;
use uuid::Uuid;

fn record(seq: u64, flags: u8) -> Vec<u8> {
    let marker = flags != 0;
    let payload: &[u8] = if marker { &[] } else { &[7; 512] };
    let header = RecordHeader {
        kind: if marker {
            RecordKind::Sync
        } else {
            RecordKind::Write
        },
        flags,
        payload_len: payload.len() as u32,
        payload_crc: if marker { 0 } else { crc32c::crc32c(payload) },
        seq,
        stamp: seq,
        offset_bytes: 0,
        attach_epoch: 1,
        cut_epoch: 1,
        time_ns: 0,
        range_len: payload.len() as u32,
    };
    let mut out = header.encode().to_vec();
    out.extend_from_slice(payload);
    out
}

const BASE: u8 = FLAG_STREAM_BASE | FLAG_SYNC_BEGIN;

fn frame(records: &[(u64, u8)]) -> Vec<u8> {
    let records = records.iter().map(|(seq, flags)| record(*seq, *flags));
    records.collect::<Vec<_>>().concat()
}

fn disk() -> Disk {
    Disk::new(DiskInfo {
        uuid: Uuid::from_u128(5),
        vm_uuid: Uuid::from_u128(6),
        vm_name: "vm".into(),
        name: "disk".into(),
        capacity_bytes: 1 << 20,
    })
}

/// First and last seq of what is logged; what was refused.
type Admitted = (Option<(u64, u64)>, Option<(ErrorCode, u64)>);

fn admit(disk: &Disk, records: &[(u64, u8)]) -> Admitted {
    let bytes = frame(records);
    let (run, refused) = disk.stream.lock().admit(&bytes, &mut Counted::default());
    if let Some(run) = &run {
        // What is logged is exactly the records from first to last.
        let headers = RecordIter::with_crc(&bytes[run.start..run.end], crc32c::crc32c_append);
        let seqs: Vec<u64> = headers.map(|r| r.unwrap().header.seq).collect();
        assert_eq!(seqs.first(), Some(&run.first_seq));
        assert_eq!(seqs.last(), Some(&run.last_seq));
        assert!(
            seqs.windows(2).all(|pair| pair[0] + 1 == pair[1]),
            "{seqs:?}"
        );
    }
    let run = run.map(|run| (run.first_seq, run.last_seq));
    (run, refused.map(|(code, seq, _)| (code, seq)))
}

#[test]
fn each_record_is_logged_once_and_in_order() {
    let disk = disk();
    assert_eq!(admit(&disk, &[(1, 0)]), (None, Some((ErrorCode::Gap, 1))));
    assert_eq!(admit(&disk, &[(1, BASE), (2, 0)]), (Some((1, 2)), None));
    assert_eq!(admit(&disk, &[(1, BASE), (2, 0)]), (None, None));
    assert_eq!(admit(&disk, &[(2, 0), (3, 0)]), (Some((3, 3)), None));
    assert_eq!(
        admit(&disk, &[(4, 0), (6, 0)]),
        (Some((4, 4)), Some((ErrorCode::Gap, 6)))
    );
    // What came before is sent again only before what is new: this peer is confused.
    assert_eq!(
        admit(&disk, &[(5, 0), (3, 0), (6, 0)]),
        (Some((5, 5)), Some((ErrorCode::Gap, 3)))
    );
    assert_eq!(disk.received().0, 5);
}

#[test]
fn a_corrupt_record_takes_along_nothing_before_it() {
    let disk = disk();
    let mut bytes = frame(&[(1, BASE), (2, 0), (3, 0)]);
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    let (run, refused) = disk.stream.lock().admit(&bytes, &mut Counted::default());
    assert_eq!(run.map(|run| (run.first_seq, run.last_seq)), Some((1, 2)));
    assert_eq!(refused.map(|r| (r.0, r.1)), Some((ErrorCode::Corrupt, 3)));
}

#[test]
fn no_cut_ends_in_a_sync_or_where_records_were_lost() {
    let disk = disk();
    admit(&disk, &[(1, BASE), (2, 0), (3, FLAG_SYNC_END), (4, 0)]);
    // The lane was made anew: 5 to 8 never came.
    admit(&disk, &[(9, BASE), (10, FLAG_SYNC_END)]);
    let consistent: Vec<u64> = (1..=10).filter(|seq| disk.consistent_at(*seq)).collect();
    assert_eq!(consistent, [3, 4, 10]);
}

/// A stream that goes on in a new lane, with nothing lost between, costs the cuts of its sync and no
/// others: neither the one before, nor any after.
/// A position that was reported before the stream began anew is of the stream before, whatever numbers the
/// new one has.
#[test]
fn no_cut_waits_for_what_a_stream_before_was_to_bring() {
    let disk = disk();
    admit(&disk, &[(1, BASE), (2, FLAG_SYNC_END), (3, 0)]);
    let asked = disk.beginnings();
    assert!((1..=9).all(|seq| disk.is_of(asked, seq)));
    // Records 4 and 5 of the stream before never came; these are others.
    admit(&disk, &[(4, BASE), (5, FLAG_SYNC_END), (6, 0)]);
    assert!(disk.consistent_at(6));
    let reached: Vec<u64> = (1..=6).filter(|seq| disk.is_of(asked, *seq)).collect();
    assert_eq!(reached, [1, 2, 3]);
    assert!(disk.is_of(disk.beginnings(), 6));
    admit(&disk, &[(7, BASE)]);
    assert!(!disk.is_of(asked, 3), "not known any more");
}

#[test]
fn a_base_that_relies_on_all_that_came_costs_only_its_own_sync() {
    let disk = disk();
    admit(&disk, &[(1, BASE), (2, FLAG_SYNC_END), (3, 0), (4, 0)]);
    let mut base = RecordHeader::decode(&record(9, BASE)).unwrap();
    base.offset_bytes = 4;
    let bytes = [
        base.encode().to_vec(),
        frame(&[(10, FLAG_SYNC_END), (11, 0)]),
    ]
    .concat();
    let (run, refused) = disk.stream.lock().admit(&bytes, &mut Counted::default());
    assert!(refused.is_none() && run.is_some());
    let consistent: Vec<u64> = (1..=11).filter(|seq| disk.consistent_at(*seq)).collect();
    assert_eq!(consistent, [2, 3, 4, 10, 11]);
    // One that relies on what a full sync was to replace is refused, and changes nothing.
    let mut stale = base;
    (stale.seq, stale.offset_bytes) = (20, 12);
    let (run, refused) = disk
        .stream
        .lock()
        .admit(&stale.encode(), &mut Counted::default());
    assert!(run.is_none());
    assert_eq!(refused.map(|r| (r.0, r.1)), Some((ErrorCode::Gap, 20)));
    assert_eq!(disk.received().0, 11);
}

/// A refusal for the epoch names the newest one: the host has to go above it, or to leave the disk.
#[test]
fn a_record_of_an_older_epoch_is_refused_with_the_newest_one() {
    let disk = disk();
    admit(&disk, &[(1, BASE), (2, FLAG_SYNC_END)]);
    let mut newer = RecordHeader::decode(&record(3, FLAG_SYNC_BEGIN)).unwrap();
    newer.attach_epoch = 7;
    let bytes = [newer.encode().to_vec(), frame(&[(4, 0)])].concat();
    let mut stream = disk.stream.lock();
    let (run, refused) = stream.admit(&bytes, &mut Counted::default());
    assert_eq!(run.map(|run| run.last_seq), Some(3));
    assert_eq!(refused.map(|r| (r.0, r.1)), Some((ErrorCode::Fenced, 7)));
}

fn log(dir: &std::path::Path) -> Log {
    let options = LogOptions {
        segment_bytes: 64 << 10,
        max_bytes: 128 << 10,
    };
    Log::open(dir, [9; 16], options, Box::new(|_| {}))
        .unwrap()
        .0
}

fn route() -> Route {
    Route {
        outbox: Arc::new(Outbox::new()),
        channel: 1,
    }
}

#[test]
fn a_superseded_channel_logs_nothing_and_its_end_is_not_the_end_of_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, log) = (disk(), log(dir.path()));
    let first = disk
        .attach(opening(1), &Lineage::default(), [1; 16], route(), None)
        .unwrap()
        .unwrap();
    let second = disk
        .attach(opening(1), &Lineage::default(), [1; 16], route(), None)
        .unwrap()
        .unwrap();
    let bytes = frame(&[(1, BASE)]);
    let (outcome, _) = disk.take(&log, first, bytes.clone(), bytes.len());
    assert_eq!(outcome, Outcome::Superseded);
    disk.detach(first, false);
    assert!(disk.is_attached());
    let (outcome, counted) = disk.take(&log, second, bytes.clone(), bytes.len());
    assert_eq!((outcome, counted.records), (Outcome::Taken, 1));
    // News over the first channel that were still under way: they take nothing from the second.
    let news = disk.attach(
        opening(1),
        &Lineage::default(),
        [1; 16],
        route(),
        Some(first),
    );
    assert_eq!(news, Ok(None));
    let news = disk.attach(
        opening(1),
        &Lineage::default(),
        [1; 16],
        route(),
        Some(second),
    );
    let second = news.unwrap().unwrap();
    disk.detach(second, false);
    assert!(!disk.is_attached());
    let (outcome, _) = disk.take(&log, second, bytes.clone(), bytes.len());
    assert_eq!(outcome, Outcome::Superseded);
}

/// While the log has no room, everything that only looks must go on, and a host that comes again must
/// get its disk: else status, cuts and the log's own writer hang.
#[test]
fn waiting_for_room_holds_no_lock_and_ends_with_the_channel() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, log) = (disk(), log(dir.path()));
    let generation = disk
        .attach(opening(1), &Lineage::default(), [1; 16], route(), None)
        .unwrap()
        .unwrap();
    let mut seq = 1;
    let mut flags = BASE;
    std::thread::scope(|scope| {
        let feeder = scope.spawn(|| {
            loop {
                let records: Vec<_> = (seq..seq + 100).map(|seq| (seq, 0)).collect();
                let mut bytes = frame(&[(seq, flags)]);
                bytes.extend(frame(&records[1..]));
                let len = bytes.len();
                match disk.take(&log, generation, bytes, len).0 {
                    Outcome::Taken => (seq, flags) = (seq + 100, 0),
                    other => return other,
                }
            }
        });
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while !(log.is_full() && log.queue_is_full()) {
            assert!(std::time::Instant::now() < deadline, "never full");
            std::thread::yield_now();
        }
        assert!(disk.received().0 > 0);
        disk.durable(&Durability {
            disk_id: [0; 16],
            seq: 1,
            time_ns: 0,
        });
        disk.attach(opening(1), &Lineage::default(), [1; 16], route(), None)
            .unwrap()
            .unwrap();
        assert_eq!(feeder.join().unwrap(), Outcome::Superseded);
    });
}

const fn opening(epoch: u32) -> Attach {
    let (id, generation) = (0, 0);
    Attach {
        epoch,
        id,
        generation,
    }
}
