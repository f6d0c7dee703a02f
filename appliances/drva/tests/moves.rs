//! A disk that goes from one host to another: who lost it never gets in the way, and cuts stay exact.
#![allow(clippy::unwrap_used, missing_docs)]

mod scripted;

use filter_core::lineage::{Attach, Lineage};
use filter_core::wire::{ErrorCode, Message, PortRole};
use scripted::{
    DOMAIN, Disk, Drva, HOST, Link, OTHER_HOST, Site, answer_cut, cut_now, next_request,
};
use serde_json::json;
use std::collections::BTreeMap;
use std::time::Duration;

const DATA: PortRole = PortRole::Data(0);

/// A refusal that says that a host lost the disk, and to which epoch.
fn fenced_by(message: &Message) -> u64 {
    match message {
        Message::Error {
            code: ErrorCode::Fenced,
            seq,
            ..
        } => *seq,
        other => panic!("{other:?}"),
    }
}

/// The disk as the host sees it that has it in this epoch.
fn in_epoch(attach_epoch: u32) -> Disk {
    let mut disk = Disk::new(1);
    disk.open.attach_epoch = attach_epoch;
    disk
}

#[test]
fn the_host_that_comes_with_the_newer_epoch_takes_the_disk_over() {
    let site = Site::new(&[]);
    let drva = site.start();
    let (mut a, mut b) = (drva.connect(DATA), drva.connect_as(OTHER_HOST, DATA));
    let (mut old, mut new) = (in_epoch(1), in_epoch(2));
    a.open(1, &old).unwrap();
    a.records(1, &old.begin());
    a.wait_durable(1, 2);
    assert_eq!(b.open(7, &new), Ok(2));
    // It learns at once that it has lost the disk, and by what.
    assert_eq!(fenced_by(&a.wait_error(1)), 2);
    // What it sends all the same is passed over; nor does it get the disk back.
    a.records(1, &[old.write(0, 4096, 1)]);
    assert_eq!(fenced_by(&a.open(2, &old).unwrap_err()), 2);
    new.seq = 2;
    b.records(7, &new.move_to_new_lane(2));
    b.wait_durable(7, new.seq);
    let status = drva.status();
    assert_eq!(status["disks"][0]["received_seq"], new.seq, "{status:#}");
}

/// A VM that starts again on the same host adopts its lane: nobody has lost the disk.
#[test]
fn a_lane_that_is_presented_again_with_a_newer_epoch_fences_nobody() {
    let site = Site::new(&[]);
    let drva = site.start();
    let mut host = drva.connect(DATA);
    let mut disk = in_epoch(1);
    host.open(1, &disk).unwrap();
    host.records(1, &disk.begin());
    host.wait_durable(1, 2);
    disk.open.attach_epoch = 2;
    assert_eq!(host.open(1, &disk), Ok(2));
    // Waiting fails at an ERROR on the channel.
    host.records(1, &[disk.write(0, 4096, 1)]);
    host.wait_durable(1, 3);
}

#[test]
fn the_host_that_lost_the_disk_does_not_get_it_by_coming_later() {
    let site = Site::new(&[]);
    let drva = site.start();
    let (mut a, mut b) = (drva.connect(DATA), drva.connect_as(OTHER_HOST, DATA));
    let (mut old, mut new) = (in_epoch(1), in_epoch(2));
    old.open.disk_label = "somebody else's name".into();
    b.open(7, &new).unwrap();
    assert_eq!(fenced_by(&a.open(1, &old).unwrap_err()), 2);
    a.records(1, &old.begin());
    // The newer host has sent nothing yet, and its channel stands.
    b.records(7, &new.begin());
    b.wait_durable(7, 2);
    let status = drva.status();
    assert_eq!(status["disks"][0]["received_seq"], 2, "{status:#}");
    assert_eq!(status["disks"][0]["label"], "disk1", "{status:#}");
}

/// The appliance remembers who presented what, too: the log has it once anything later is durable.
#[test]
fn a_restart_of_the_appliance_gives_the_disk_back_to_nobody() {
    let site = Site::new(&[]);
    let mut drva = site.start();
    let mut b = drva.connect_as(OTHER_HOST, DATA);
    let (old, new) = (in_epoch(1), in_epoch(2));
    // Nothing but the epoch is new.
    b.open(6, &old).unwrap();
    b.open(7, &new).unwrap();
    let mut other = Disk::new(2);
    b.open(8, &other).unwrap();
    b.records(8, &other.begin());
    b.wait_durable(8, 2);
    drva.kill();
    let drva = site.start();
    // In both orders.
    let (mut a, mut b) = (drva.connect(DATA), drva.connect_as(OTHER_HOST, DATA));
    assert_eq!(fenced_by(&a.open(1, &old).unwrap_err()), 2);
    assert_eq!(b.open(7, &new), Ok(0));
    assert_eq!(fenced_by(&a.open(2, &old).unwrap_err()), 2);
}

/// What an opening goes back to, and how far its region map had come: the log has it before the records
/// that rely on it.
#[test]
fn a_disk_that_does_not_go_on_from_what_was_told_is_refused() {
    let site = Site::new(&[]);
    let mut drva = site.start();
    let mut host = drva.connect(DATA);
    let mut disk = in_epoch(1);
    (disk.open.attach_id, disk.open.map_generation) = (11, 40);
    *disk.open.lineage = Lineage::anew(1);
    host.open(1, &disk).unwrap();
    host.records(1, &disk.begin());
    (disk.open.again, disk.open.map_generation) = (true, 50);
    host.send(&Message::OpenLane(disk.open.clone()), 1);
    host.records(1, &[disk.write(0, 4096, 1)]);
    host.wait_durable(1, disk.seq);
    let next = |found| {
        let mut next = in_epoch(2);
        next.open.attach_id = 12;
        *next.open.lineage = Lineage::anew(1).child(Attach {
            epoch: 1,
            id: 11,
            generation: found,
        });
        next
    };
    for restarted in [false, true] {
        if restarted {
            drva.kill();
            drva = site.start();
            host = drva.connect(DATA);
        }
        assert_eq!(fenced_by(&host.open(2, &next(49)).unwrap_err()), 2);
    }
    assert_eq!(host.open(3, &next(50)), Ok(disk.seq));
}

/// News that came too late: the lane was opened elsewhere, or the channel was closed.
#[test]
fn late_news_of_a_lane_takes_nothing_from_its_present_channel() {
    let site = Site::new(&[]);
    let drva = site.start();
    let (mut before, mut now) = (drva.connect(DATA), drva.connect(PortRole::Bulk));
    let mut disk = in_epoch(1);
    before.open(1, &disk).unwrap();
    now.open(1, &disk).unwrap();
    now.records(1, &disk.begin());
    now.wait_durable(1, disk.seq);
    let mut news = disk.open.clone();
    news.again = true;
    for channel in [1, 1, 9] {
        before.send(&Message::OpenLane(news.clone()), channel);
    }
    before.send(&Message::CloseLane { in_order: false }, 1);
    before.send(&Message::OpenLane(news), 1);
    let (clock_ns, answer) = (1, false);
    before.send(&Message::Heartbeat { clock_ns, answer }, 0);
    // Once it is answered all of that was taken.
    while !matches!(before.next(), (0, Message::Heartbeat { .. })) {}
    now.records(1, &[disk.write(0, 4096, 1)]);
    now.wait_durable(1, disk.seq);
}

struct Moving {
    drva: Drva,
    disk: Disk,
    control: Link,
    link: Link,
    /// What each cut must hold, if it comes to be.
    images: BTreeMap<u32, Vec<u8>>,
}

/// A disk that streams from the first host.
fn streaming(site: &Site) -> Moving {
    let drva = site.start();
    let control = drva.connect(PortRole::Control);
    let mut link = drva.connect(DATA);
    let mut disk = Disk::new(1);
    link.open(1, &disk).unwrap();
    link.records(1, &disk.begin());
    link.records(1, &[disk.write(0, 8192, 1), disk.write(65536, 4096, 2)]);
    link.wait_durable(1, disk.seq);
    Moving {
        drva,
        disk,
        control,
        link,
        images: BTreeMap::new(),
    }
}

impl Moving {
    /// The other host presents the disk in a new lane and writes, as yet in the first epoch.
    fn move_to_other_host(&mut self) -> (Link, Link) {
        let control = self.drva.connect_as(OTHER_HOST, PortRole::Control);
        let mut link = self.drva.connect_as(OTHER_HOST, DATA);
        let disk = &mut self.disk;
        disk.cut_epoch = 1;
        let begin = disk.move_to_new_lane(2);
        assert_eq!(link.open(1, disk), Ok(disk.open.base.unwrap()));
        link.records(1, &begin);
        link.records(1, &[disk.write(4096, 8192, 3)]);
        link.wait_durable(1, disk.seq);
        (control, link)
    }

    /// A cut by the host that has the disk now, and what is in the store after that.
    fn last_cut(mut self, site: &Site, control: &mut Link) {
        let mut disks = [self.disk];
        let number = cut_now(&self.drva, control, &mut disks, "moved");
        let [disk] = disks;
        self.drva.stop(Duration::from_secs(20));
        let cuts = site.recover_all();
        assert_eq!(cuts.last().unwrap().0.cut, number);
        let mut before = Vec::new();
        for (info, disks) in &cuts {
            // Every cut after the move holds the same: nothing was written between them.
            let image = self.images.get(&info.cut_epoch);
            before.extend(image.map(|_| info.cut_epoch));
            let expected = image.unwrap_or(&disk.model.bytes);
            assert!(&disks[&disk.uuid] == expected, "cut {} differs", info.cut);
        }
        assert!(before.iter().eq(self.images.keys()), "{before:?}");
        assert!(cuts.len() > before.len());
    }
}

#[test]
fn a_cut_is_void_if_the_disk_moves_while_it_is_taken() {
    let site = Site::new(&["--cut-interval-ms", "50"]);
    let mut moving = streaming(&site);
    let epoch = next_request(&mut moving.control);
    let positions = scripted::positions_of(std::slice::from_ref(&moving.disk));
    let (mut control, mut link) = moving.move_to_other_host();
    scripted::send_positions(&mut moving.control, epoch, positions);
    moving.drva.wait_until("void", |status| {
        status["cuts_void"].as_u64().unwrap() > 0 && status["cuts_closed"] == 0
    });
    let record = moving.disk.write(12288, 4096, 4);
    link.records(1, &[record]);
    moving.last_cut(&site, &mut control);
}

/// The cut was closed before the disk moved, and is not in the store yet: what the next host sends
/// with an epoch that is behind is not of it.
#[test]
fn a_closed_cut_stays_exact_although_the_next_host_is_behind_with_its_epoch() {
    let site = Site::new(&["--cut-interval-ms", "50"]);
    let mut moving = streaming(&site);
    let first = next_request(&mut moving.control);
    let mut disks = [moving.disk];
    answer_cut(&mut moving.control, &mut disks, first);
    moving.images.insert(first, disks[0].model.bytes.clone());
    moving
        .drva
        .wait_until("in the store", |s| s["cuts_closed"] == 1);
    // The next one does not get there: the container is gone for a while.
    let container = site.store().join(DOMAIN);
    let away = site.dir.path().join("away");
    std::fs::rename(&container, &away).unwrap();
    std::fs::write(&container, "not a folder").unwrap();
    let record = disks[0].write(32768, 4096, 9);
    moving.link.records(1, &[record]);
    let second = next_request(&mut moving.control);
    moving.images.insert(second, disks[0].model.bytes.clone());
    answer_cut(&mut moving.control, &mut disks, second);
    [moving.disk] = disks;
    moving.drva.wait_until("closed", |s| s["cuts_waiting"] == 1);
    let (mut control, _link) = moving.move_to_other_host();
    std::fs::remove_file(&container).unwrap();
    std::fs::rename(&away, &container).unwrap();
    moving.drva.wait_until("committed", |status| {
        status["cuts_waiting"] == 0 && status["cuts_closed"] == json!(2)
    });
    assert_ne!(HOST, OTHER_HOST);
    moving.last_cut(&site, &mut control);
}

/// A disk that grows while a cut is being taken: told on the channel that is open, it costs nothing, and
/// the next cut has the new size.
#[test]
fn a_disk_that_grows_costs_no_cut_and_no_new_stream() {
    let site = Site::new(&["--cut-interval-ms", "50"]);
    let mut moving = streaming(&site);
    let mut disks = [moving.disk];
    let first = next_request(&mut moving.control);
    let small = disks[0].open.capacity_bytes;
    let image = disks[0].model.bytes.clone();
    // Larger by far than what is written: nothing but the news tells of it.
    disks[0].grow(3 * small);
    let channel = 1;
    let link = &mut moving.link;
    link.send(&Message::OpenLane(disks[0].open.clone()), channel);
    answer_cut(&mut moving.control, &mut disks, first);
    let status = moving
        .drva
        .wait_until("in the store", |s| s["cuts_closed"] == 1);
    assert_eq!(status["disks"][0]["capacity_bytes"], json!(3 * small));
    link.records(channel, &[disks[0].write(small - 4096, 12288, 0x66)]);
    link.wait_durable(channel, disks[0].seq);
    cut_now(&moving.drva, &mut moving.control, &mut disks, "grown");
    assert_eq!(moving.drva.status()["cuts_void"], 0);
    moving.drva.stop(Duration::from_secs(20));
    let cuts = site.recover_all();
    let (info, recovered) = cuts.first().unwrap();
    assert_eq!(info.cut_epoch, first);
    assert!(recovered[&disks[0].uuid].starts_with(&image));
    let (info, recovered) = cuts.last().unwrap();
    assert_eq!(info.disks[0].capacity_bytes, 3 * small);
    assert!(recovered[&disks[0].uuid] == disks[0].model.bytes, "differs");
}
