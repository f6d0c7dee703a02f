//! Producer and consumer of one lane as processes of their own, each killed with SIGKILL at random
//! moments and restarted: no record is lost, none comes twice, none is torn, and both always go on.
//!
//! JETDR_TORTURE_SECONDS (10) says for how long, JETDR_SEED which moments.
#![cfg(all(feature = "mapping", not(loom)))]
#![allow(clippy::unwrap_used)]

use filter_core::lane::consumer::Consumer;
use filter_core::lane::layout::{Geometry, Identity, MIN_RING_BYTES};
use filter_core::lane::producer::{Draft, Producer, PublishError, Source, Stamps};
use filter_core::lane::sync::{AtomicU32, AtomicU64, Ordering::Relaxed};
use filter_core::lane::walk::scan;
use filter_core::mapping::{MappedLane, RunFolder};
use filter_core::position::Durable;
use filter_core::record::{RecordIter, RecordKind};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const DISK: [u8; 16] = [5; 16];

struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// What record `seq` holds: its length and its bytes follow from the seq alone.
fn payload(seq: u64) -> Vec<u8> {
    let mut numbers = Numbers(seq.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let len = 512 * (1 + numbers.next() % 64) as usize;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        bytes.extend_from_slice(&numbers.next().to_le_bytes());
    }
    bytes
}

fn produce(run: &RunFolder) {
    let _lock = loop {
        // The process before this one is dead; its lock goes with it.
        match run.lock_disk(&DISK).unwrap() {
            Some(lock) => break lock,
            None => std::thread::yield_now(),
        }
    };
    let lane = MappedLane::open(&run.lane_path(&DISK)).unwrap();
    let found = scan(lane.memory()).unwrap();
    let epoch = lane.memory().producer().attach_epoch.load(Relaxed) + 1;
    let mut producer = Producer::new(lane.memory(), epoch, found.tail, found.next_seq);
    let (stamp, cut_epoch) = (AtomicU64::new(found.last_stamp), AtomicU32::new(1));
    loop {
        let seq = producer.published().seq() + 1;
        let bytes = payload(seq);
        let sources = [Source::from_slice(&bytes)];
        let draft = Draft {
            kind: RecordKind::Write,
            offset_bytes: seq % 1000 * 65536,
            len_bytes: bytes.len() as u64,
            sources: &sources,
        };
        let stamps = Stamps {
            stamp: &stamp,
            cut_epoch: &cut_epoch,
            time_ns: seq,
        };
        match producer.publish(&draft, &stamps) {
            Ok(group) => assert_eq!(group.last.seq(), seq),
            Err(PublishError::Full { .. }) => std::thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    }
}

/// The seqs that were noted as durable: a file of eight bytes each.
fn noted(path: &Path) -> Vec<u64> {
    let bytes = std::fs::read(path).unwrap();
    // A kill in the middle of a write leaves a piece of a number: it was not noted.
    bytes
        .as_chunks::<8>()
        .0
        .iter()
        .map(|raw| u64::from_le_bytes(*raw))
        .collect()
}

fn consume(run: &RunFolder, truth: &Path) {
    let lane = MappedLane::open(&run.lane_path(&DISK)).unwrap();
    let mut consumer = Consumer::attach(lane.memory());
    assert!(!consumer.restarting(), "the lane did not check");
    let all = noted(truth);
    let file = OpenOptions::new().write(true).open(truth).unwrap();
    file.set_len(all.len() as u64 * 8).unwrap();
    let mut file = OpenOptions::new().append(true).open(truth).unwrap();
    let mut last = all.last().copied().unwrap_or(0);
    consumer.resume_after(Durable(last)).unwrap();
    loop {
        let Some(taken) = consumer.take(256 * 1024).unwrap() else {
            std::thread::yield_now();
            continue;
        };
        let mut bytes = vec![0u8; taken.len_bytes];
        // SAFETY: the run lies in the lane's mapping, which lives here; a raw copy.
        unsafe {
            bytes
                .as_mut_ptr()
                .copy_from_nonoverlapping(taken.base, taken.len_bytes)
        };
        let mut notes = Vec::new();
        for record in RecordIter::new(&bytes) {
            let record = record.unwrap();
            assert_eq!(
                record.header.seq,
                last + 1,
                "a record is missing or came twice"
            );
            assert_eq!(
                record.payload,
                payload(record.header.seq),
                "record {}",
                last + 1
            );
            last = record.header.seq;
            notes.extend_from_slice(&last.to_le_bytes());
        }
        file.write_all(&notes).unwrap();
        assert!(consumer.release(Durable(last)));
    }
}

/// Runs in the children only.
#[test]
fn child() {
    let Ok(role) = std::env::var("JETDR_TORTURE_ROLE") else {
        return;
    };
    let dir = std::env::var("JETDR_TORTURE_DIR").unwrap();
    let run = RunFolder::open(Path::new(&dir)).unwrap();
    match role.as_str() {
        "producer" => produce(&run),
        _ => consume(&run, &Path::new(&dir).join("truth")),
    }
}

fn start(role: &str, dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env("JETDR_TORTURE_ROLE", role)
        .env("JETDR_TORTURE_DIR", dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(
            File::options()
                .append(true)
                .open(dir.join("errors"))
                .unwrap(),
        )
        .spawn()
        .unwrap()
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

#[test]
fn torture() {
    let seed = number("JETDR_SEED", 0x5eed);
    let seconds = number("JETDR_TORTURE_SECONDS", 10);
    println!("JETDR_SEED={seed} JETDR_TORTURE_SECONDS={seconds}");
    let dir = tempfile::Builder::new()
        .prefix("jt-")
        .tempdir_in("/dev/shm")
        .unwrap();
    let run = RunFolder::open(dir.path()).unwrap();
    let truth = dir.path().join("truth");
    File::create(&truth).unwrap();
    File::create(dir.path().join("errors")).unwrap();
    let identity = Identity {
        geometry: Geometry::for_disk(1 << 30, MIN_RING_BYTES).unwrap(),
        disk_id: DISK,
        vm_id: [6; 16],
        boot_id: run.boot_id().unwrap(),
        base_seq: 1,
        domain: "torture".into(),
        vm_name: "vm".into(),
        disk_label: "disk".into(),
    };
    drop(MappedLane::create(&run, &identity, 1 << 30).unwrap());

    let mut numbers = Numbers(seed | 1);
    let mut children = [start("producer", dir.path()), start("consumer", dir.path())];
    let (mut kills, mut seen) = (0, 0);
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        // Both are given time to get somewhere: progress is what shows that nothing is wedged.
        let deadline = Instant::now() + Duration::from_secs(10);
        let goal = seen + 1 + numbers.next() % 2000;
        while seen < goal {
            seen = std::fs::metadata(&truth).unwrap().len() / 8;
            let errors = std::fs::read_to_string(dir.path().join("errors")).unwrap();
            assert!(!errors.contains("panicked"), "seed {seed}: {errors}");
            assert!(
                Instant::now() < deadline,
                "seed {seed}: no progress beyond {seen}"
            );
            std::thread::sleep(Duration::from_micros(200)); // poll of other processes
        }
        let which = numbers.next() % 3;
        for (i, role) in ["producer", "consumer"].into_iter().enumerate() {
            if which == 2 || which == i as u64 {
                children[i].kill().unwrap();
                children[i].wait().unwrap();
                children[i] = start(role, dir.path());
                kills += 1;
            }
        }
    }
    for child in &mut children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let seqs = noted(&truth);
    assert!(
        seqs.iter().enumerate().all(|(i, seq)| *seq == i as u64 + 1),
        "seed {seed}"
    );
    assert!(kills > 5, "only {kills} kills");
    println!("{} records, {kills} kills", seqs.len());
}
