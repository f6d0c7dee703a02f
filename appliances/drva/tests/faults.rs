//! Faults on request: the points are where they are said to be, and do what they are asked for.
#![allow(clippy::unwrap_used, missing_docs)]

mod scripted;

use filter_core::wire::{Message, PortRole};
use scripted::{Disk, Drva, Link, Site, answer_cut, cut_now, request_now};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const DATA: PortRole = PortRole::Data(0);

fn site(fault: &str) -> Site {
    let mut site = Site::new(&["--segment-bytes", "4194304", "--cut-interval-ms", "50"]);
    site.fault = Some(fault.into());
    site
}

fn begin(drva: &Drva) -> (Link, Disk) {
    let mut link = drva.connect(DATA);
    let mut disk = Disk::new(1);
    link.open(1, &disk).unwrap();
    link.records(1, &disk.begin());
    (link, disk)
}

/// So that the list cannot rot: each point in it is passed when all goes well, and no other.
#[test]
fn every_point_of_the_appliance_is_passed_in_a_normal_run() {
    let site = site("trace");
    let mut drva = site.start();
    let mut control = drva.connect(PortRole::Control);
    let (mut link, mut disk) = begin(&drva);
    // Several segments, so that the first can go.
    for i in 0..200u64 {
        let record = disk.write((i % 16) << 16, 64 << 10, i as u8);
        link.records(1, &[record]);
    }
    link.wait_durable(1, disk.seq);
    let mut disks = [disk];
    cut_now(&drva, &mut control, &mut disks, "all");
    assert!(!link.ask_hashes(1, 0, 1).is_empty());
    let ours = |name: &str| name.starts_with("drva.") || name.starts_with("store.");
    let deadline = Instant::now() + scripted::LIMIT;
    loop {
        let said = site.said();
        let passed = |name: &str| said.contains(&format!("fault point passed: {name}\n"));
        let points = fault::POINTS.iter().filter(|point| ours(point.name));
        let missing: Vec<&str> = points
            .map(|p| p.name)
            .filter(|name| !passed(name))
            .collect();
        assert!(!said.contains("not listed"), "{said}");
        if missing.is_empty() {
            break;
        }
        assert!(Instant::now() < deadline, "never passed: {missing:?}");
        if let Some(epoch) = request_now(&mut control) {
            answer_cut(&mut control, &mut disks, epoch);
        }
        std::thread::yield_now();
    }
    for point in fault::POINTS {
        let elsewhere = ["daemon.", "msa.", "install.", "uninstall."];
        let elsewhere = elsewhere.iter().any(|of| point.name.starts_with(of));
        let known = ours(point.name) || elsewhere;
        assert!(known, "{} is of no program that is tested", point.name);
    }
    drva.stop(Duration::from_secs(20));
}

#[test]
fn a_point_kills_at_the_passing_that_was_asked_for() {
    let mut site = site("drva.log.after-write:3");
    let mut drva = site.start();
    let (mut link, mut disk) = begin(&drva);
    link.wait_durable(1, 2);
    let mut sent = disk.seq;
    // Each batch is acknowledged but the one at which it dies.
    loop {
        let record = disk.write(0, 4096, disk.seq as u8);
        sent += 1;
        use std::io::Write;
        let header = filter_core::wire::FrameHeader::data(1, sent, 64 + 4096);
        let frame = [
            header.encode().as_slice(),
            &record.header.encode(),
            &record.payload,
        ]
        .concat();
        if link.stream.write_all(&frame).is_err() || link.try_next().is_none() {
            break;
        }
    }
    assert_eq!(drva.child.wait().unwrap().signal(), Some(9));
    site.fault = None;
    let drva = site.start();
    let durable = drva.connect(DATA).open(1, &disk).unwrap();
    assert!((2..=sent).contains(&durable), "{durable}");
}

#[test]
fn a_log_whose_volume_is_full_waits_and_goes_on() {
    let site = site("drva.log.allocate=error:2");
    let drva = site.start();
    let (mut link, disk) = begin(&drva);
    drva.wait_until("failing", |status| status["log"]["failing"] == true);
    assert_eq!(drva.status()["disks"][0]["durable_seq"], 0);
    link.wait_durable(1, disk.seq);
    let said = site.said();
    assert!(said.contains("No space left on device"), "{said}");
    assert_eq!(drva.status()["log"]["failing"], false);
}

/// What comes while the store is being read counts as well: the answer is as fresh as can be.
#[test]
fn a_block_that_is_touched_while_it_is_read_is_not_known() {
    let site = site("trace,drva.hashes-read=delay:3000");
    let drva = site.start();
    let mut control = drva.connect(PortRole::Control);
    let (mut link, disk) = begin(&drva);
    link.wait_durable(1, disk.seq);
    let mut disks = [disk];
    cut_now(&drva, &mut control, &mut disks, "first");
    let question = Message::HashRequest {
        offset_bytes: 0,
        blocks: 3,
    };
    link.send(&question, 1);
    let deadline = Instant::now() + scripted::LIMIT;
    while !site.said().contains("passed: drva.hashes-read") {
        assert!(Instant::now() < deadline, "the blocks are never read");
        std::thread::yield_now();
    }
    let record = disks[0].write(65536, 4096, 7);
    link.records(1, &[record]);
    link.wait_durable(1, disks[0].seq);
    let hashes = link.wait_hashes(1, 0);
    let known: Vec<bool> = hashes.iter().map(|hash| *hash != [0; 16]).collect();
    assert_eq!(known, [true, false, true]);
}

#[test]
fn a_store_that_fails_on_request_is_tried_again() {
    let site = site("store.before-put=error:3");
    let drva = site.start();
    let mut control = drva.connect(PortRole::Control);
    let (mut link, disk) = begin(&drva);
    link.wait_durable(1, disk.seq);
    cut_now(&drva, &mut control, &mut [disk], "late");
    assert!(site.said().contains("fault on request at store.before-put"));
}

#[test]
fn a_request_that_cannot_be_understood_ends_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let run = |fault: &str, arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_drva"));
        command.arg("--data-dir").arg(folder.path().join("data"));
        command.arg("--store").arg(folder.path().join("store"));
        command
            .args(["--port-base", "0", "--insecure-plain-text"])
            .args(arguments);
        command.env("JETDR_FAULT", fault).stdin(Stdio::null());
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), said)
    };
    let (fine, said) = run("drva.log.befor-write", &[]);
    assert!(
        !fine && said.contains("no point `drva.log.befor-write`"),
        "{said}"
    );
    let (fine, said) = run("drva.before-commit=error", &[]);
    assert!(
        !fine && said.contains("cannot fail with an error"),
        "{said}"
    );
    // Whoever asks for the list needs nothing else.
    let mut command = Command::new(env!("CARGO_BIN_EXE_drva"));
    let output = command.arg("--list-faults").output().unwrap();
    let list = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    for point in fault::POINTS {
        assert!(list.contains(point.name), "{list}");
    }
}
