#![allow(clippy::unwrap_used)]
use super::reader::Reader;
use super::*;
use filter_core::record::{FLAG_STREAM_BASE, FLAG_SYNC_BEGIN, RecordHeader, RecordKind};
use std::sync::mpsc;

const DOMAIN: [u8; 16] = [9; 16];
const DISK: [u8; 16] = [1; 16];

fn options() -> LogOptions {
    LogOptions {
        segment_bytes: 64 << 10,
        max_bytes: 1 << 20,
    }
}

fn run(seq: u64, count: u64) -> Submission {
    let mut content = Vec::new();
    for seq in seq..seq + count {
        let payload = [seq as u8; 512];
        let header = RecordHeader {
            kind: RecordKind::Write,
            flags: 0,
            payload_len: 512,
            payload_crc: crc32c::crc32c(&payload),
            seq,
            stamp: seq,
            offset_bytes: seq * 512,
            attach_epoch: 1,
            cut_epoch: 1,
            time_ns: 0,
            range_len: 512,
        };
        content.extend_from_slice(&header.encode());
        content.extend_from_slice(&payload);
    }
    let len = content.len();
    let (kind, disk_id, epoch, time_ns) = (EntryKind::Run, DISK, 1, 0);
    Submission {
        kind,
        disk_id,
        first_seq: seq,
        last_seq: seq + count - 1,
        epoch,
        time_ns,
        content,
        len,
    }
}

/// The stream begins anew here, relying on an earlier seq or (0) on nothing.
fn base(seq: u64, relies_on: u64) -> Submission {
    let header = RecordHeader {
        kind: RecordKind::Sync,
        flags: FLAG_STREAM_BASE | FLAG_SYNC_BEGIN,
        payload_len: 0,
        payload_crc: 0,
        seq,
        stamp: seq,
        offset_bytes: relies_on,
        attach_epoch: 1,
        cut_epoch: 1,
        time_ns: 0,
        range_len: 0,
    };
    let content = header.encode().to_vec();
    let len = content.len();
    Submission {
        content,
        len,
        first_seq: seq,
        last_seq: seq,
        ..run(seq, 1)
    }
}

fn open(dir: &Path) -> (Log, Recovered, mpsc::Receiver<u64>) {
    let (tell, told) = mpsc::channel();
    let on_durable: OnDurable = Box::new(move |all| {
        for durable in all {
            let _ = tell.send(durable.seq);
        }
    });
    let (log, recovered) = Log::open(dir, DOMAIN, options(), on_durable).unwrap();
    (log, recovered, told)
}

fn put(log: &Log, submission: Submission) {
    let permit = log.reserve(submission.len, &|| false).unwrap();
    log.submit(permit, submission).unwrap();
}

fn wait_for(told: &mpsc::Receiver<u64>, seq: u64) {
    while told.recv_timeout(Duration::from_secs(20)).unwrap() < seq {}
}

fn seqs(log: &Log) -> Vec<u64> {
    let mut reader = Reader::new(log.segments().first().copied().unwrap_or(1));
    let mut seqs = Vec::new();
    while let Some((number, body)) = reader.next(log).unwrap() {
        for entry in format::Entries::new(&body, number).map(Result::unwrap) {
            if entry.kind == EntryKind::Run {
                seqs.extend(entry.first_seq..=entry.last_seq);
            }
        }
    }
    seqs
}

#[test]
fn what_was_acknowledged_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _, told) = open(dir.path());
    for i in 0..100 {
        put(&log, run(1 + i * 3, 3));
    }
    wait_for(&told, 300);
    assert_eq!(seqs(&log), (1..=300).collect::<Vec<_>>());
    assert!(log.segments().len() > 2, "several segments");
    drop(log);
    let (log, recovered, _told) = open(dir.path());
    assert_eq!(recovered.disks.get(&DISK).unwrap().last_seq, 300);
    assert_eq!(seqs(&log), (1..=300).collect::<Vec<_>>());
}

#[test]
fn commits_are_grouped() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _, told) = open(dir.path());
    for seq in 1..=400 {
        put(&log, run(seq, 1));
    }
    wait_for(&told, 400);
    let (batches, entries) = log.counts();
    assert_eq!(entries, 400);
    assert!(batches < 200, "{batches} batches for 400 submissions");
}

/// Whatever of the last batch reached the disk, the log goes on after the batches before it.
#[test]
fn a_torn_end_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _, told) = open(dir.path());
    put(&log, run(1, 5));
    wait_for(&told, 5);
    drop(log);
    let path = segment::path_of(dir.path(), 1);
    let whole_one = std::fs::read(&path).unwrap();
    let (log, _, told) = open(dir.path());
    put(&log, run(6, 5));
    wait_for(&told, 10);
    drop(log);
    let whole_two = std::fs::read(&path).unwrap();
    for cut in [1, 63, 64, 65, 500, 2000, 2900] {
        let mut torn = whole_one.clone();
        torn[4096..4096 + cut].copy_from_slice(&whole_two[4096..4096 + cut]);
        std::fs::write(&path, &torn).unwrap();
        let (log, recovered, told) = open(dir.path());
        assert_eq!(
            recovered.disks.get(&DISK).unwrap().last_seq,
            5,
            "torn after {cut} bytes"
        );
        put(&log, run(6, 2));
        wait_for(&told, 7);
        assert_eq!(seqs(&log), (1..=7).collect::<Vec<_>>());
    }
}

#[test]
fn damage_in_the_middle_is_an_error_that_names_the_place() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _, told) = open(dir.path());
    for seq in 1..=4 {
        put(&log, run(seq, 1));
        wait_for(&told, seq);
    }
    drop(log);
    let path = segment::path_of(dir.path(), 1);
    let good = std::fs::read(&path).unwrap();
    for at in [4096, 4096 + 30, 4096 + 100, 4096 + 600] {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        std::fs::write(&path, &bad).unwrap();
        let error = recover::scan(&Folder::new(dir.path()), DOMAIN)
            .unwrap_err()
            .to_string();
        assert!(error.contains("damaged at byte 4096"), "{at}: {error}");
    }
}

#[test]
fn a_full_log_makes_submitters_wait_and_goes_on_after_a_release() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _, told) = open(dir.path());
    let log = Arc::new(log);
    let submitter = {
        let log = log.clone();
        std::thread::spawn(move || {
            for i in 0..400 {
                put(&log, run(1 + i * 50, 50));
            }
        })
    };
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while !log.usage().2 {
        assert!(
            std::time::Instant::now() < deadline,
            "the log never became full"
        );
        std::thread::yield_now();
    }
    assert!(log.usage().0 <= log.usage().1);
    let mut seen = 0;
    while seen < 400 * 50 {
        while let Ok(seq) = told.try_recv() {
            seen = seq;
        }
        log.release(&|_| seen, u32::MAX);
        assert!(std::time::Instant::now() < deadline, "stuck at {seen}");
        std::thread::yield_now();
    }
    submitter.join().unwrap();
}

#[test]
fn a_second_process_is_kept_out() {
    let dir = tempfile::tempdir().unwrap();
    let (_log, _, _told) = open(dir.path());
    let second = Log::open(dir.path(), DOMAIN, options(), Box::new(|_| {}));
    assert!(matches!(second.err(), Some(LogError::InUse(_))));
}

/// The store may hold more than a reader has come to: what it was to read next is freed.
#[test]
fn a_reader_goes_on_behind_what_was_freed_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _, told) = open(dir.path());
    let mut reader = Reader::new(1);
    for i in 0..20 {
        put(&log, run(1 + i * 20, 20));
        wait_for(&told, (i + 1) * 20);
    }
    assert!(log.segments().len() > 2);
    let (first, _) = reader.next(&log).unwrap().unwrap();
    log.release(&|_| 400, u32::MAX);
    let kept = log.segments().first().copied().unwrap();
    let mut numbers = vec![first];
    while let Some((number, _)) = reader.next(&log).unwrap() {
        numbers.push(number);
    }
    // The segment that it had open, to its end; then the one that is left.
    assert!(
        numbers.is_sorted() && numbers.contains(&kept),
        "{numbers:?}"
    );
    assert_eq!(numbers.last().copied(), Some(log.durable_batch()));
}

/// State at the start of a segment makes the segments before it dispensable.
#[test]
fn the_state_of_a_disk_survives_the_release_of_its_segments() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _, told) = open(dir.path());
    for i in 0..20 {
        put(&log, run(1 + i * 20, 20));
        wait_for(&told, (i + 1) * 20);
    }
    log.release(&|_| 400, u32::MAX);
    assert_eq!(log.segments().len(), 1);
    drop(log);
    let (_log, recovered, _told) = open(dir.path());
    let state = recovered.disks.get(&DISK).unwrap();
    assert_eq!((state.last_seq, state.attach_epoch), (400, 1));
}

/// A read that the storage refuses says nothing of what is there: it must not end the log.
/// What a base may rely on must be known for as long as the log is: from the record while it is there,
/// and from the states of later segments after that.
#[test]
fn the_last_full_base_of_a_disk_survives_restarts_and_released_segments() {
    let dir = tempfile::tempdir().unwrap();
    let full_base = |recovered: &Recovered| recovered.disks.get(&DISK).unwrap().full_base_seq;
    let (log, _, told) = open(dir.path());
    put(&log, base(40, 0));
    put(&log, run(41, 10));
    put(&log, base(60, 50));
    wait_for(&told, 60);
    drop(log);
    let (log, recovered, told) = open(dir.path());
    assert_eq!(full_base(&recovered), 40, "60 relies on what came before");
    for i in 0..100 {
        put(&log, run(61 + i * 3, 3));
    }
    wait_for(&told, 360);
    log.release(&|_| 300, 1);
    let first = log.segments().first().copied().unwrap();
    assert!(first > 3, "the bases are gone with their segment");
    drop(log);
    let (_log, recovered, _told) = open(dir.path());
    assert_eq!(full_base(&recovered), 40);
}

/// A log that was written before bases could rely on anything has states that say nothing of it.
#[test]
fn a_state_without_a_full_base_lets_nothing_be_relied_on_but_all_of_it() {
    let mut state = DiskState::default();
    let entry = Entry {
        kind: EntryKind::State,
        disk_id: DISK,
        first_seq: 0,
        last_seq: 77,
        epoch: 1,
        content: &[],
    };
    recover::note_run(&mut state, &entry);
    assert_eq!(state.full_base_seq, 77);
}

#[test]
fn a_read_error_is_not_the_end_of_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _, told) = open(dir.path());
    put(&log, run(1, 5));
    wait_for(&told, 5);
    drop(log);
    // Reading a folder fails with EISDIR, whoever asks.
    let path = segment::path_of(dir.path(), 1);
    std::fs::rename(&path, dir.path().join("away")).unwrap();
    std::fs::create_dir(&path).unwrap();
    let error = recover::scan(&Folder::new(dir.path()), DOMAIN).unwrap_err();
    assert!(
        matches!(error, LogError::Io { what: "read", .. }),
        "{error}"
    );
    std::fs::remove_dir(&path).unwrap();
    std::fs::rename(dir.path().join("away"), &path).unwrap();
    let (_log, recovered, _told) = open(dir.path());
    assert_eq!(recovered.disks.get(&DISK).unwrap().last_seq, 5);
}

/// A crash can leave a new segment whose first batch, the state of every disk, was not written. Records
/// that follow after the restart must not make the older segments dispensable without that state.
#[test]
fn an_empty_segment_after_a_crash_does_not_cost_the_state_of_a_disk() {
    const OTHER: [u8; 16] = [2; 16];
    let dir = tempfile::tempdir().unwrap();
    let (log, _, told) = open(dir.path());
    let mut quiet = run(1, 7);
    quiet.disk_id = OTHER;
    put(&log, quiet);
    wait_for(&told, 7);
    drop(log);
    let recovered = recover::scan(&Folder::new(dir.path()), DOMAIN).unwrap();
    drop(segment::SegmentWriter::create(dir.path(), recovered.next_batch, 64 << 10).unwrap());
    let (log, _, told) = open(dir.path());
    for i in 0..20 {
        put(&log, run(1 + i * 20, 20));
        wait_for(&told, (i + 1) * 20);
    }
    log.release(&|_| 400, u32::MAX);
    assert_eq!(log.segments().len(), 1);
    drop(log);
    let (_log, recovered, _told) = open(dir.path());
    assert_eq!(recovered.disks.get(&OTHER).map(|s| s.last_seq), Some(7));
    assert_eq!(recovered.disks.get(&DISK).map(|s| s.last_seq), Some(400));
}

/// Fills the log until its writer waits and the queue has no room.
fn fill(log: &Log) {
    let mut seq = 1;
    while !(log.is_full() && log.queue_is_full()) {
        if log.queue_is_full() {
            std::thread::yield_now();
        } else {
            put(log, run(seq, 50));
            seq += 50;
        }
    }
}

#[test]
fn whoever_waits_for_room_can_give_up_and_is_sent_away_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _, _told) = open(dir.path());
    fill(&log);
    assert!(matches!(
        log.reserve(1, &|| true).err(),
        Some(LogError::GivenUp)
    ));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| log.reserve(1, &|| false).err());
        let reader = scope.spawn(|| log.wait_beyond(u64::MAX, Duration::from_secs(60)));
        log.close();
        assert!(matches!(waiting.join().unwrap(), Some(LogError::Closing)));
        reader.join().unwrap();
    });
}

/// A permit that is not used, or used for less, gives back what it held.
#[test]
fn room_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _, told) = open(dir.path());
    drop(log.reserve(QUEUE_BYTES, &|| false).unwrap());
    assert_eq!(log.shared.queue.lock().bytes, 0);
    let permit = log.reserve(QUEUE_BYTES, &|| false).unwrap();
    let submission = run(1, 2);
    log.submit(permit, submission).unwrap();
    wait_for(&told, 2);
    log.close();
    assert_eq!(log.shared.queue.lock().bytes, 0);
}

#[test]
fn reserved_bytes_of_a_batch_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _, told) = open(dir.path());
    put(&log, run(1, 1));
    wait_for(&told, 1);
    drop(log);
    let path = segment::path_of(dir.path(), 1);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[50] = 1;
    let crc = crc32c::crc32c(&bytes[..60]);
    bytes[60..64].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let error = recover::scan(&Folder::new(dir.path()), DOMAIN)
        .unwrap_err()
        .to_string();
    assert!(error.contains("reserved bytes"), "{error}");
}
