//! What the appliance tells a sync of what it holds: right, or not known.
#![allow(clippy::unwrap_used, missing_docs)]

mod scripted;

use filter_core::wire::PortRole;
use recovery_store::sha256;
use scripted::store::{Random, random_record};
use scripted::{
    CAPACITY_BYTES, DOMAIN, Disk, Drva, Link, Site, answer_cut, cut_now, request_now, seed,
};
use std::time::{Duration, Instant};

const DATA: PortRole = PortRole::Data(0);
const BLOCK: usize = 64 << 10;
const BLOCKS: u32 = (CAPACITY_BYTES as usize / BLOCK) as u32;
const UNKNOWN: [u8; 16] = [0; 16];

fn hash(block: &[u8]) -> [u8; 16] {
    *sha256(block).first_chunk().unwrap()
}

fn hashes_of(disk: &Disk) -> Vec<[u8; 16]> {
    disk.model.bytes.chunks(BLOCK).map(hash).collect()
}

/// A disk that streams, with some content.
fn streaming(drva: &Drva, number: u128) -> (Link, Disk) {
    let mut link = drva.connect(DATA);
    let mut disk = Disk::new(number);
    link.open(1, &disk).unwrap();
    link.records(1, &disk.begin());
    for i in 0..20u64 {
        let record = disk.write(i * 40_960, 8192, 1 + i as u8 + number as u8);
        link.records(1, &[record]);
    }
    link.wait_durable(1, disk.seq);
    (link, disk)
}

#[test]
fn hashes_are_those_of_the_content_and_touched_blocks_are_not_known() {
    let site = Site::new(&[]);
    let drva = site.start();
    let mut control = drva.connect(PortRole::Control);
    let (mut link, disk) = streaming(&drva, 1);
    // No cut has it yet.
    assert!(link.ask_hashes(1, 0, BLOCKS).is_empty());
    let mut disks = [disk];
    cut_now(&drva, &mut control, &mut disks, "first");
    let mut expected = hashes_of(&disks[0]);
    assert_eq!(link.ask_hashes(1, 0, BLOCKS), expected);
    // The end of the disk lies in the middle of the question; no block has been written there.
    let tail = link.ask_hashes(1, 14 << 16, 4);
    assert_eq!(tail[..2], expected[14..]);
    assert_eq!(tail[2..], [UNKNOWN; 2]);
    assert_eq!(link.ask_hashes(1, 1 << 40, 3), [UNKNOWN; 3]);
    // Blocks that any record has touched since: a write over two, zeros, a failed write.
    let records = [
        disks[0].write(3 * BLOCK as u64 - 512, 1024, 0x77),
        disks[0].push(scripted::store::rec(
            1,
            filter_core::record::RecordKind::Zero,
            7 << 16,
            BLOCK as u32,
            Vec::new(),
        )),
        disks[0].push(scripted::store::rec(
            1,
            filter_core::record::RecordKind::Void,
            9 << 16,
            512,
            Vec::new(),
        )),
    ];
    link.records(1, &records);
    for touched in [2, 3, 7, 9] {
        expected[touched] = UNKNOWN;
    }
    // Not even durable yet: what was sent before the question counts.
    assert_eq!(link.ask_hashes(1, 0, BLOCKS), expected);
    // The next cut has all of it, and is asked from then on.
    cut_now(&drva, &mut control, &mut disks, "second");
    assert_eq!(link.ask_hashes(1, 0, BLOCKS), hashes_of(&disks[0]));
}

#[test]
fn what_nobody_can_know_is_answered_at_once() {
    let site = Site::new(&["--cut-interval-ms", "50"]);
    let mut drva = site.start();
    let mut control = drva.connect(PortRole::Control);
    let (mut link, disk) = streaming(&drva, 1);
    let mut disks = [disk];
    cut_now(&drva, &mut control, &mut disks, "first");
    // A channel that is not open; a disk that no cut has.
    assert!(link.ask_hashes(5, 0, 1).is_empty());
    let mut late = Disk::new(2);
    link.open(2, &late).unwrap();
    link.records(2, &late.begin());
    assert!(link.ask_hashes(2, 0, 1).is_empty());
    // The store is away.
    let container = site.store().join(DOMAIN);
    let away = site.dir.path().join("away");
    let expected = hashes_of(&disks[0]);
    assert_eq!(link.ask_hashes(1, 0, BLOCKS), expected);
    std::fs::rename(&container, &away).unwrap();
    std::fs::write(&container, "not a folder").unwrap();
    let since = Instant::now();
    assert!(link.ask_hashes(1, 0, BLOCKS).is_empty());
    assert!(since.elapsed() < Duration::from_secs(15));
    // Meanwhile records are acknowledged as ever.
    let record = disks[0].write(0, 4096, 0x55);
    link.records(1, &[record]);
    link.wait_durable(1, disks[0].seq);
    // And when it is back, it is known again, after a while.
    std::fs::remove_file(&container).unwrap();
    std::fs::rename(&away, &container).unwrap();
    let deadline = Instant::now() + scripted::LIMIT;
    let known = loop {
        let known = link.ask_hashes(1, 1 << 16, BLOCKS - 1);
        if !known.is_empty() {
            break known;
        }
        assert!(Instant::now() < deadline, "never known again");
        std::thread::yield_now();
    };
    assert_eq!(known, expected[1..]);
    // After a restart the log tells what was touched since the newest cut.
    drva.kill();
    let drva = site.start();
    let mut link = drva.connect(DATA);
    link.open(1, &disks[0]).unwrap();
    link.open(2, &late).unwrap();
    let mut known = expected;
    known[0] = UNKNOWN;
    assert_eq!(link.ask_hashes(1, 0, BLOCKS), known);
    assert!(link.ask_hashes(2, 0, BLOCKS).is_empty(), "no cut has it");
    let mut control = drva.connect(PortRole::Control);
    let [disk] = disks;
    let mut disks = [disk, late];
    cut_now(&drva, &mut control, &mut disks, "again");
    assert_eq!(link.ask_hashes(1, 0, BLOCKS), hashes_of(&disks[0]));
    assert_eq!(link.ask_hashes(2, 0, BLOCKS), hashes_of(&disks[1]));
}

/// Questions, records and cuts at once: whatever is answered is what the replica holds at some moment
/// between the question and the answer.
#[test]
fn no_answer_is_stale_whatever_happens_meanwhile() {
    let seed = seed();
    let mut random = Random(seed);
    let site = Site::new(&["--cut-interval-ms", "20", "--part-bytes", "65536"]);
    let drva = site.start();
    let mut control = drva.connect(PortRole::Control);
    let (mut link, disk) = streaming(&drva, 1);
    let mut disks = [disk];
    cut_now(&drva, &mut control, &mut disks, "first");
    let (mut known, mut unknown) = (0, 0);
    let deadline = Instant::now() + scripted::LIMIT;
    while known < 1500 {
        assert!(Instant::now() < deadline, "{known} known, {unknown} not");
        let write = |disks: &mut [Disk; 1], random: &mut Random, link: &mut Link| {
            let record = random_record(random, 1, CAPACITY_BYTES);
            let record = disks[0].push(record);
            link.records(1, &[record]);
        };
        for _ in 0..random.below(3) {
            write(&mut disks, &mut random, &mut link);
        }
        if let Some(epoch) = request_now(&mut control) {
            answer_cut(&mut control, &mut disks, epoch);
        }
        // What each block holds from the question on.
        let question = filter_core::wire::Message::HashRequest {
            offset_bytes: 0,
            blocks: BLOCKS,
        };
        let mut held: Vec<Vec<[u8; 16]>> = hashes_of(&disks[0]).iter().map(|h| vec![*h]).collect();
        link.send(&question, 1);
        for _ in 0..random.below(4) {
            write(&mut disks, &mut random, &mut link);
            for (held, now) in held.iter_mut().zip(hashes_of(&disks[0])) {
                held.push(now);
            }
        }
        let answer = link.wait_hashes(1, 0);
        for (block, (hash, held)) in answer.iter().zip(&held).enumerate() {
            let right = *hash == UNKNOWN || held.contains(hash);
            assert!(right, "block {block} is stale, JETDR_SEED={seed}");
        }
        let here = answer.iter().filter(|hash| **hash != UNKNOWN).count();
        known += here;
        unknown += BLOCKS as usize - here;
    }
    println!("{known} known, {unknown} not");
}

/// However many questions come, each is answered, and in order.
#[test]
fn too_many_questions_are_answered_too() {
    let site = Site::new(&[]);
    let drva = site.start();
    let mut control = drva.connect(PortRole::Control);
    let (mut link, disk) = streaming(&drva, 1);
    let mut disks = [disk];
    cut_now(&drva, &mut control, &mut disks, "first");
    let expected = hashes_of(&disks[0]);
    let questions = 500;
    for at in 0..questions {
        let question = filter_core::wire::Message::HashRequest {
            offset_bytes: (at % u64::from(BLOCKS)) << 16,
            blocks: 1,
        };
        link.send(&question, 1);
    }
    let mut answers = 0;
    while answers < questions {
        if let (
            1,
            filter_core::wire::Message::Hashes {
                offset_bytes,
                hashes,
            },
        ) = link.next()
        {
            let right = hashes
                .first()
                .is_none_or(|of| *of == expected[(offset_bytes >> 16) as usize]);
            assert!(right, "at {offset_bytes}");
            answers += 1;
        }
    }
}
