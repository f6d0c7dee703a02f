//! A log that is damaged in its middle, or gone: what the appliance says, and how protection goes on in the
//! same container.
#![allow(clippy::unwrap_used, missing_docs)]

mod scripted;

use filter_core::wire::{ErrorCode, Message, PortRole};
use scripted::{DOMAIN, Disk, Drva, Link, Site, cut_now};
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;

const DATA: PortRole = PortRole::Data(0);

fn log_folder(site: &Site) -> PathBuf {
    site.data().join("domains").join(DOMAIN).join("log")
}

fn in_epoch(attach_epoch: u32) -> Disk {
    let mut disk = Disk::new(1);
    disk.open.attach_epoch = attach_epoch;
    disk
}

/// A disk of this epoch with a cut in the store; then the appliance is killed.
fn protected(site: &Site, attach_epoch: u32) -> Disk {
    let mut drva = site.start();
    let mut control = drva.connect(PortRole::Control);
    let mut link = drva.connect(DATA);
    let mut disk = in_epoch(attach_epoch);
    link.open(1, &disk).unwrap();
    link.records(1, &disk.begin());
    for turn in 0..20u64 {
        let record = disk.write(turn << 14, 8192, 1 + turn as u8);
        link.records(1, &[record]);
        link.wait_durable(1, disk.seq); // so that each is a batch of its own
    }
    let mut disks = [disk];
    cut_now(&drva, &mut control, &mut disks, "before");
    drva.kill();
    let [disk] = disks;
    disk
}

/// Presents a disk until the appliance has looked into the store and says that nothing stands.
fn present(drva: &Drva, disk: &Disk, held: u64) -> Link {
    let deadline = Instant::now() + scripted::LIMIT;
    loop {
        assert!(Instant::now() < deadline, "the store is never looked into");
        let mut link = drva.connect(DATA);
        match link.open(1, disk) {
            Ok(durable) if durable == held => return link,
            // Not yet: it is sent away when the container is open.
            Ok(_) => assert!(matches!(
                link.wait_error(1),
                Message::Error {
                    code: ErrorCode::Gap,
                    ..
                }
            )),
            Err(error) => panic!("{error:?}"),
        }
    }
}

/// The disk's stream begins anew above what is held, in this epoch; a cut of it comes into the store.
fn begin_anew(site: &Site, drva: &Drva, mut link: Link, mut disk: Disk, above: u64) {
    disk.seq = above;
    let records = [
        disk.push(scripted::store::stream_base(1)),
        disk.write(3 << 16, 16_384, 0x5a),
        disk.push(scripted::store::sync_end(1)),
    ];
    link.records(1, &records);
    link.wait_durable(1, disk.seq);
    let mut control = drva.connect(PortRole::Control);
    let model = disk.model.bytes.clone();
    let (uuid, mut disks) = (disk.uuid, [disk]);
    let number = cut_now(drva, &mut control, &mut disks, "after");
    let cuts = site.recover_all();
    let (last, found) = cuts.last().unwrap();
    assert_eq!((last.cut, last.name.as_deref()), (number, Some("after")));
    assert!(found[&uuid] == model, "the cut is what the disk holds");
    let stays = |name| cuts.iter().any(|(cut, _)| cut.name.as_deref() == name);
    assert!(stays(Some("before")), "what was there stays");
}

#[test]
fn a_log_that_is_damaged_in_its_middle_is_put_aside_and_the_disks_come_again() {
    let site = Site::new(&[]);
    let disk = protected(&site, 1);
    let mut segments = std::fs::read_dir(log_folder(&site)).unwrap();
    let segment = segments.next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[3 * 4096 + 70] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    // It is named, nothing is changed, and the message says what to do; all else is served.
    let file = segment.file_name().unwrap().to_str().unwrap();
    let names_it = |said: &str| {
        let named = said.contains(file) && said.contains("is damaged at byte");
        assert!(named, "{said}");
        let advised = said.contains("Move the folder that it lies in aside");
        assert!(advised, "{said}");
    };
    for _ in 0..2 {
        let mut drva = site.start();
        let status = drva.ask(&json!({"cmd": "status"}));
        assert_eq!(status["unopened"][0]["name"], DOMAIN, "{status}");
        names_it(status["unopened"][0]["why"].as_str().unwrap());
        let refused = drva.connect(DATA).open(1, &disk).unwrap_err();
        let Message::Error { code, text, .. } = *refused else {
            panic!("{refused:?}");
        };
        assert_eq!(code, ErrorCode::Domain);
        names_it(&text);
        let mut other = in_epoch(1);
        other.open.domain = "other".into();
        drva.connect(DATA).open(1, &other).unwrap();
        drva.kill();
    }
    // The appliance runs while the operator does that.
    let drva = site.start();
    drva.connect(DATA).open(1, &disk).unwrap_err();
    let aside = site.data().join("log-put-aside");
    std::fs::rename(log_folder(&site), aside).unwrap();
    let held = disk.seq;
    let link = present(&drva, &disk, held);
    begin_anew(&site, &drva, link, disk, held + 1000);
}

/// With the log gone only the store knows that the disk has been further: its sidecar was put back, or was
/// damaged and made anew.
#[test]
fn a_disk_that_is_behind_the_store_is_fenced_although_the_log_knows_nothing() {
    let site = Site::new(&[]);
    let before = protected(&site, 5);
    std::fs::remove_dir_all(log_folder(&site)).unwrap();
    let drva = site.start();
    let old = in_epoch(2);
    let deadline = Instant::now() + scripted::LIMIT;
    let current = loop {
        assert!(Instant::now() < deadline, "the store is never looked into");
        let mut link = drva.connect(DATA);
        match link.open(1, &old).map_err(|error| *error) {
            Ok(_) => drop(link.wait_error(1)),
            Err(Message::Error {
                code: ErrorCode::Fenced,
                seq,
                ..
            }) => break seq,
            Err(error) => panic!("{error:?}"),
        }
    };
    assert_eq!(current, 5);
    // It rises above that; what it held before it holds still.
    let mut risen = before;
    risen.open.attach_epoch = 6;
    let held = risen.seq;
    let link = present(&drva, &risen, held);
    begin_anew(&site, &drva, link, risen, held);
}
