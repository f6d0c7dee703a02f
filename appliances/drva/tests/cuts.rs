//! Every cut in the store is exactly what the disks were at it, whatever happened on the way.
#![allow(clippy::unwrap_used, missing_docs)]

mod scripted;

use filter_core::wire::PortRole;
use scripted::store::{Random, random_record};
use scripted::{
    CAPACITY_BYTES, DOMAIN, Disk, Drva, Link, Site, answer_cut, cut_now, next_request,
    positions_of, refuse_cut, seed, send_positions,
};
use serde_json::json;
use std::collections::BTreeMap;
use std::time::Duration;
use uuid::Uuid;

type Images = BTreeMap<Uuid, Vec<u8>>;

/// What has to be sent again after the appliance was killed, by disk.
type Unacknowledged = Vec<Vec<scripted::store::Rec>>;

fn connect(drva: &Drva, disks: &[Disk], left: &mut Unacknowledged) -> (Link, Link) {
    let control = drva.connect(PortRole::Control);
    let mut link = drva.connect(PortRole::Data(1));
    for ((channel, disk), left) in (1..).zip(disks).zip(left) {
        let durable = link.open(channel, disk).unwrap();
        left.retain(|record| record.header.seq > durable);
        if !left.is_empty() {
            link.records(channel, left);
        }
    }
    (control, link)
}

#[test]
fn a_cut_holds_exactly_its_records() {
    let seed = seed();
    let mut random = Random(seed);
    let site = Site::new(&["--cut-interval-ms", "20", "--part-bytes", "65536"]);
    let mut drva = site.start();
    let mut disks = [Disk::new(1), Disk::new(2), Disk::new(3)];
    let mut left: Unacknowledged = disks.iter_mut().map(Disk::begin).collect();
    let (mut control, mut link) = connect(&drva, &disks, &mut left);
    // What each epoch's cut must hold, if it comes to be.
    let mut expected: BTreeMap<u32, Images> = BTreeMap::new();
    let (mut kills, mut voids, mut answered) = (0, 0, 0usize);
    while answered < 60 {
        for _ in 0..1 + random.below(12) {
            let at = random.below(3) as usize;
            let record = random_record(&mut random, 1, CAPACITY_BYTES);
            let record = disks[at].push(record);
            link.records(at as u32 + 1, std::slice::from_ref(&record));
            left[at].push(record);
        }
        if random.below(15) == 0 && kills < 5 {
            kills += 1;
            drva.kill();
            drva = site.start();
            (control, link) = connect(&drva, &disks, &mut left);
        }
        // Something was written, so a cut is asked for.
        let epoch = next_request(&mut control);
        let current = disks[0].cut_epoch;
        if epoch <= current {
            // An appliance that was killed may ask for an epoch again; epochs never go back.
            refuse_cut(&mut control, current);
            continue;
        }
        // Not in one moment: as on a host, each disk takes the epoch up at a record of its own.
        let images = disks.iter().map(|d| (d.uuid, d.model.bytes.clone()));
        let images: Images = images.collect();
        let positions = positions_of(&disks);
        for disk in &mut disks {
            disk.cut_epoch = epoch;
        }
        for _ in 0..random.below(4) {
            let at = random.below(3) as usize;
            let record = random_record(&mut random, 1, CAPACITY_BYTES);
            let record = disks[at].push(record);
            link.records(at as u32 + 1, std::slice::from_ref(&record));
            left[at].push(record);
        }
        if random.below(5) == 0 {
            voids += 1;
            refuse_cut(&mut control, epoch);
        } else {
            answered += 1;
            expected.insert(epoch, images);
            send_positions(&mut control, epoch, positions);
        }
    }
    for disk in &disks {
        drva.wait_until("durable", |status| {
            status["disks"].as_array().unwrap().iter().any(|known| {
                known["uuid"] == json!(disk.uuid.to_string()) && known["durable_seq"] == disk.seq
            })
        });
    }
    drva.wait_until("uploaded", |status| status["cuts_waiting"] == 0);
    drva.stop(Duration::from_secs(20));
    let cuts = site.recover_all();
    println!(
        "{answered} answered, {voids} void, {kills} kills, {} cuts in the store",
        cuts.len()
    );
    // A kill can take the cut that was just answered; nothing else can.
    let lost = answered - cuts.len();
    assert!(lost <= kills, "{lost} cuts lost with {kills} kills");
    for (info, images) in &cuts {
        let expected = &expected[&info.cut_epoch];
        assert_eq!(images.len(), 3);
        for (disk, bytes) in images {
            let cut = info.cut;
            assert!(
                &expected[disk] == bytes,
                "cut {cut}: disk {disk} differs, JETDR_SEED={seed}"
            );
        }
    }
}

/// A name may be used again; who asks gets the cut that was taken for it, not an old one.
#[test]
fn a_name_used_again_names_a_new_cut() {
    let site = Site::new(&["--cut-interval-ms", "20"]);
    let drva = site.start();
    let mut control = drva.connect(PortRole::Control);
    let mut link = drva.connect(PortRole::Data(0));
    let mut disks = [Disk::new(1)];
    link.open(1, &disks[0]).unwrap();
    link.records(1, &disks[0].begin());
    link.wait_durable(1, 2);
    let numbers: Vec<u64> = (0..3)
        .map(|_| cut_now(&drva, &mut control, &mut disks, "again"))
        .collect();
    assert!(
        numbers.windows(2).all(|pair| pair[0] < pair[1]),
        "{numbers:?}"
    );
    let bad = drva.ask(&json!({"cmd": "cut", "domain": DOMAIN, "name": "a\nb"}));
    assert!(bad["error"].to_string().contains("1 to 128 bytes"), "{bad}");
}

/// A cut that was under way when somebody asked may lack what was written before they asked.
#[test]
fn a_name_is_not_given_to_a_cut_that_was_asked_for_before() {
    let site = Site::new(&["--cut-interval-ms", "20"]);
    let drva = site.start();
    let mut control = drva.connect(PortRole::Control);
    let mut link = drva.connect(PortRole::Data(0));
    let mut disks = [Disk::new(1)];
    link.open(1, &disks[0]).unwrap();
    link.records(1, &disks[0].begin());
    let first = next_request(&mut control);
    let positions = positions_of(&disks);
    disks[0].cut_epoch = first;
    let late = disks[0].write(0, 4096, 9);
    link.records(1, &[late]);
    link.wait_durable(1, disks[0].seq);
    std::thread::scope(|scope| {
        let asked =
            scope.spawn(|| drva.ask(&json!({"cmd": "cut", "domain": DOMAIN, "name": "has-it"})));
        drva.wait_until("the name is asked for", |status| status["cuts_wanted"] == 1);
        send_positions(&mut control, first, positions);
        let second = next_request(&mut control);
        answer_cut(&mut control, &mut disks, second);
        let answer = asked.join().unwrap();
        assert!(answer["cut"].is_u64(), "{answer}");
    });
    let cuts = site.recover_all();
    let named = cuts
        .iter()
        .find(|(info, _)| info.name.as_deref() == Some("has-it"));
    let (info, images) = named.unwrap();
    assert!(info.cut_epoch > first);
    assert_eq!(images[&disks[0].uuid], disks[0].model.bytes);
}

/// Nobody who waits for a cut makes the appliance try without a pause while a disk syncs.
#[test]
fn a_cut_that_cannot_be_taken_is_tried_again_at_intervals() {
    let every = Duration::from_millis(300);
    let site = Site::new(&["--cut-interval-ms", "300"]);
    let drva = site.start();
    let mut control = drva.connect(PortRole::Control);
    let mut link = drva.connect(PortRole::Data(0));
    let mut disks = [Disk::new(1)];
    link.open(1, &disks[0]).unwrap();
    let begin = disks[0].begin();
    link.records(1, &begin[..1]);
    drva.wait_until("it syncs", |status| status["disks"][0]["syncing"] == true);
    let since = std::time::Instant::now();
    std::thread::scope(|scope| {
        let before = drva.status()["cuts_void"].as_u64().unwrap();
        let asked =
            scope.spawn(|| drva.ask(&json!({"cmd": "cut", "domain": DOMAIN, "name": "patient"})));
        drva.wait_until("three tries", |status| {
            status["cuts_void"].as_u64().unwrap() >= before + 3
        });
        assert!(since.elapsed() >= every, "{:?}", since.elapsed());
        link.records(1, &begin[1..]);
        while !asked.is_finished() {
            if let Some(epoch) = scripted::request_now(&mut control) {
                answer_cut(&mut control, &mut disks, epoch);
            }
            std::thread::yield_now();
        }
        let answer = asked.join().unwrap();
        assert!(answer["cut"].is_u64(), "{answer}");
    });
}
