//! Disks that nobody presents, hosts that cannot be asked, and what an operator can do about them.
#![allow(clippy::unwrap_used, missing_docs)]

mod scripted;

use filter_core::wire::{DiskReport, Message, PortRole};
use scripted::{DOMAIN, Disk, Drva, HOST, LIMIT, Link, OTHER_HOST, Site, hex_of};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const DATA: PortRole = PortRole::Data(0);

/// A host that answers for itself: its control connection, what it says of which disk.
struct Answers {
    control: Link,
    disks: Vec<([u8; 16], bool)>,
}

impl Answers {
    /// Answers a request for a cut, if one is there: each disk as far as it was written.
    fn answer(&mut self, disks: &mut [Disk]) {
        let Some(epoch) = scripted::request_now(&mut self.control) else {
            return;
        };
        let mut reports = Vec::new();
        for (disk_id, open) in &self.disks {
            let disk = disks.iter_mut().find(|d| d.open.disk_id == *disk_id);
            let disk = disk.unwrap();
            disk.cut_epoch = epoch;
            reports.push(DiskReport {
                disk_id: *disk_id,
                seq: disk.seq,
                open: *open,
                complete: true,
            });
        }
        let report = Message::CutReport {
            epoch,
            domain: DOMAIN.into(),
            disks: reports,
        };
        self.control.send(&report, 0);
    }
}

/// The hosts answer until the status is as wanted.
fn until(
    drva: &Drva,
    hosts: &mut [&mut Answers],
    disks: &mut [Disk],
    what: &str,
    good: impl Fn(&Value) -> bool,
) -> Value {
    let deadline = Instant::now() + LIMIT;
    loop {
        for host in hosts.iter_mut() {
            host.answer(disks);
        }
        let status = drva.status();
        if good(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "never {what}: {status:#}");
    }
}

/// Takes a named cut with these hosts.
fn cut(drva: &Drva, hosts: &mut [&mut Answers], disks: &mut [Disk], name: &str) -> Value {
    let command = json!({"cmd": "cut", "domain": DOMAIN, "name": name});
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| drva.ask(&command));
        while !waiter.is_finished() {
            hosts.iter_mut().for_each(|host| host.answer(disks));
            std::thread::yield_now();
        }
        waiter.join().unwrap()
    })
}

/// Two disks of one host, which stream, and their data connection.
fn streaming(drva: &Drva) -> (Answers, Link, [Disk; 2]) {
    let control = drva.connect_speaking(HOST, PortRole::Control, 2);
    let mut link = drva.connect_speaking(HOST, DATA, 2);
    let mut disks = [Disk::new(1), Disk::new(2)];
    for (channel, disk) in (1..).zip(&mut disks) {
        link.open(channel, disk).unwrap();
        link.records(channel, &disk.begin());
        link.records(channel, &[disk.write(0, 4096, channel as u8)]);
        link.wait_durable(channel, 3);
    }
    let open = disks.iter().map(|d| (d.open.disk_id, true)).collect();
    let host = Answers {
        control,
        disks: open,
    };
    (host, link, disks)
}

fn alarms(status: &Value) -> String {
    status["alarms"].to_string()
}

#[test]
fn a_disk_whose_host_died_keeps_cuts_away_until_it_is_set_aside_or_opened_again() {
    let site = Site::new(&["--cut-interval-ms", "50"]);
    let mut drva = site.start();
    let (mut host, mut link, mut disks) = streaming(&drva);
    let first = cut(&drva, &mut [&mut host], &mut disks, "both");
    assert!(first["cut"].is_u64(), "{first}");
    // Its lane is gone, and it was not closed in order.
    host.disks.truncate(1);
    link.send(&Message::CloseLane { in_order: false }, 2);
    link.records(1, &[disks[0].write(4096, 4096, 7)]);
    let lost = |status: &Value| alarms(status).contains("was not closed in order");
    let status = until(&drva, &mut [&mut host], &mut disks, "an alarm", lost);
    assert!(alarms(&status).contains("vm/disk2"), "{status:#}");
    // An appliance that is restarted knows that still.
    drop((host, link));
    drva.kill();
    let mut drva = site.start();
    let mut link = drva.connect_speaking(HOST, DATA, 2);
    link.open(1, &disks[0]).unwrap();
    let mut host = Answers {
        control: drva.connect_speaking(HOST, PortRole::Control, 2),
        disks: vec![(disks[0].open.disk_id, true)],
    };
    link.records(1, &[disks[0].write(8192, 4096, 8)]);
    let status = until(&drva, &mut [&mut host], &mut disks, "an alarm", lost);
    assert_eq!(status["cuts_closed"], 0, "{status:#}");
    // Without it, by order; that lasts, too.
    let uuid = disks[1].uuid.to_string();
    let order = json!({"cmd": "set-aside", "domain": DOMAIN, "disk": uuid});
    assert_eq!(drva.ask(&order)["set_aside"], true);
    let without = cut(&drva, &mut [&mut host], &mut disks, "without");
    assert!(without["cut"].is_u64(), "{without}");
    // It is opened again, and is in cuts again with what came before.
    disks[1].open.attach_epoch = 2;
    link.open(2, &disks[1]).unwrap();
    link.records(2, &[disks[1].write(12288, 4096, 9)]);
    link.wait_durable(2, disks[1].seq);
    host.disks.push((disks[1].open.disk_id, true));
    let again = cut(&drva, &mut [&mut host], &mut disks, "again");
    assert!(again["cut"].is_u64(), "{again}");
    drva.stop(Duration::from_secs(20));
    let cuts = site.recover_all();
    let named = |name: &str| {
        let found = cuts
            .iter()
            .find(|(cut, _)| cut.name.as_deref() == Some(name));
        found.unwrap()
    };
    let (info, images) = named("without");
    assert_eq!((info.disks.len(), images.len()), (1, 1));
    let (_, images) = named("again");
    for disk in &disks {
        assert!(images[&disk.uuid] == disk.model.bytes, "differs");
    }
}

#[test]
fn a_host_that_cannot_be_asked_keeps_cuts_away_while_a_disk_may_be_open_there() {
    let site = Site::new(&["--cut-interval-ms", "50"]);
    let drva = site.start();
    let (mut host, mut link, mut disks) = streaming(&drva);
    // The second disk moves to another host, and back again; that host's link is cut then.
    let mut other = drva.connect_speaking(OTHER_HOST, DATA, 2);
    disks[1].open.attach_epoch = 2;
    other.open(1, &disks[1]).unwrap();
    link.wait_error(2); // it has lost the disk
    disks[1].open.attach_epoch = 3;
    link.open(2, &disks[1]).unwrap();
    drop(other);
    // All that there is is open here.
    let good = cut(&drva, &mut [&mut host], &mut disks, "open");
    assert!(good["cut"].is_u64(), "{good}");
    // Its VM is switched off: now it may have been started there.
    host.disks[1].1 = false;
    link.records(1, &[disks[0].write(4096, 4096, 7)]);
    let absent = |status: &Value| alarms(status).contains("cannot be asked");
    let status = until(&drva, &mut [&mut host], &mut disks, "an alarm", absent);
    assert!(alarms(&status).contains("vm/disk2"), "{status:#}");
    // That host comes, and says that it has no disk.
    let mut there = Answers {
        control: drva.connect_speaking(OTHER_HOST, PortRole::Control, 2),
        disks: Vec::new(),
    };
    let good = cut(&drva, &mut [&mut host, &mut there], &mut disks, "asked");
    assert!(good["cut"].is_u64(), "{good}");
    let forget = json!({"cmd": "forget-host", "domain": DOMAIN, "host": hex_of(OTHER_HOST)});
    let refused = drva.ask(&forget)["error"].to_string();
    assert!(refused.contains("is connected"), "{refused}");
    // It goes, and an operator says that it does not come back.
    drop(there);
    link.records(1, &[disks[0].write(4096, 4096, 8)]);
    until(&drva, &mut [&mut host], &mut disks, "an alarm", absent);
    let forgotten = drva.ask(&forget);
    assert_eq!(forgotten["forgotten"], hex_of(OTHER_HOST), "{forgotten}");
    let good = cut(&drva, &mut [&mut host], &mut disks, "forgotten");
    assert!(good["cut"].is_u64(), "{good}");
}

#[test]
fn orders_that_cannot_be_followed_say_why() {
    let site = Site::new(&["--cut-interval-ms", "50"]);
    let drva = site.start();
    let (_host, _link, _disks) = streaming(&drva);
    let cases = [
        (json!({"cmd": "set-aside"}), "needs a domain"),
        (json!({"cmd": "set-aside", "domain": "x"}), "no domain `x`"),
        (json!({"cmd": "set-aside", "domain": DOMAIN}), "name a disk"),
        (
            json!({"cmd": "set-aside", "domain": DOMAIN, "disk": "zz"}),
            "not a disk's id",
        ),
        (
            json!({"cmd": "take-back", "domain": DOMAIN, "vm": "another"}),
            "no such disk",
        ),
        (
            json!({"cmd": "forget-host", "domain": DOMAIN}),
            "needs a host",
        ),
        (
            json!({"cmd": "forget-host", "domain": DOMAIN, "host": "nobody"}),
            "ever had a disk",
        ),
    ];
    for (command, says) in cases {
        let answer = drva.ask(&command);
        let error = answer["error"].as_str().unwrap_or_default();
        assert!(error.contains(says), "{command}: {answer}");
    }
}

/// Each of two who ask for a cut of one name gets one that was begun after they asked.
#[test]
fn two_that_ask_for_one_name_each_get_a_cut_that_holds_what_was_written_before() {
    let site = Site::new(&["--cut-interval-ms", "50"]);
    let mut drva = site.start();
    let (mut host, mut link, mut disks) = streaming(&drva);
    let command = json!({"cmd": "cut", "domain": DOMAIN, "name": "same"});
    let (early, late) = std::thread::scope(|scope| {
        let early = scope.spawn(|| drva.ask(&command));
        // The cut for the first is begun, and not answered yet.
        drva.wait_until("asked for", |status| status["cuts_wanted"] == 1);
        let epoch = loop {
            let epoch = scripted::next_request(&mut host.control);
            // Whichever was begun before the name was asked for comes to nothing.
            scripted::refuse_cut(&mut host.control, 0);
            if drva.status()["cuts_wanted"] == 1 {
                break epoch;
            }
        };
        let begun = scripted::next_request(&mut host.control);
        assert!(begun > epoch);
        let report = |disks: &[Disk]| Message::CutReport {
            epoch: begun,
            domain: DOMAIN.into(),
            disks: disks
                .iter()
                .map(|disk| DiskReport {
                    disk_id: disk.open.disk_id,
                    seq: disk.seq,
                    open: true,
                    complete: true,
                })
                .collect(),
        };
        let report = report(&disks);
        for disk in &mut disks {
            disk.cut_epoch = begun;
        }
        link.records(1, &[disks[0].write(16384, 4096, 0x77)]);
        link.wait_durable(1, disks[0].seq);
        let late = scope.spawn(|| drva.ask(&command));
        drva.wait_until("asked for twice", |status| status["cuts_wanted"] == 2);
        host.control.send(&report, 0);
        while !(early.is_finished() && late.is_finished()) {
            host.answer(&mut disks);
            std::thread::yield_now();
        }
        (early.join().unwrap(), late.join().unwrap())
    });
    let number = |answer: &Value| answer["cut"].as_u64().unwrap_or_else(|| panic!("{answer}"));
    assert!(number(&early) < number(&late), "{early} {late}");
    drva.stop(Duration::from_secs(20));
    let cuts = site.recover_all();
    let of = |wanted: u64| cuts.iter().find(|(cut, _)| cut.cut == wanted).unwrap();
    let (_, images) = of(number(&late));
    assert!(images[&disks[0].uuid] == disks[0].model.bytes, "lacks it");
    let (_, images) = of(number(&early));
    assert!(images[&disks[0].uuid] != disks[0].model.bytes);
}
