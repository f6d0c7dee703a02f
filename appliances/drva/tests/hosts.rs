//! What hosts send, good and bad, to a real appliance process.
#![allow(clippy::unwrap_used, missing_docs)]

mod scripted;

use filter_core::wire::{ErrorCode, FrameHeader, FrameKind, Hello, Message, PeerRole, PortRole};
use scripted::{Disk, Site, cut_now};
use serde_json::json;
use std::io::Write;
use std::time::Duration;

const DATA: PortRole = PortRole::Data(0);

fn code_of(message: &Message) -> (ErrorCode, u64) {
    match message {
        Message::Error { code, seq, .. } => (*code, *seq),
        other => panic!("{other:?}"),
    }
}

/// The appliance dies between any two batches: what it acknowledged is there, and the host goes on
/// from it.
#[test]
fn what_is_acknowledged_survives_kill_9() {
    let site = Site::new(&["--cut-interval-ms", "50"]);
    let mut disk = Disk::new(1);
    let mut acknowledged = 0;
    let mut unacknowledged = disk.begin();
    for round in 0..6u8 {
        let mut drva = site.start();
        let mut link = drva.connect(DATA);
        let durable = link.open(1, &disk).unwrap();
        assert!(durable >= acknowledged, "{durable} < {acknowledged}");
        assert!(durable <= disk.seq);
        unacknowledged.retain(|record| record.header.seq > durable);
        link.records(1, &unacknowledged);
        for i in 0..40u64 {
            let record = disk.write(4096 * (i % 32), 4096, round * 40 + i as u8);
            link.records(1, std::slice::from_ref(&record));
            unacknowledged.push(record);
        }
        let half = disk.seq - 20;
        link.wait_durable(1, half);
        acknowledged = half;
        drva.kill();
    }
    let mut drva = site.start();
    let mut control = drva.connect(PortRole::Control);
    let mut link = drva.connect(DATA);
    let durable = link.open(1, &disk).unwrap();
    unacknowledged.retain(|record| record.header.seq > durable);
    unacknowledged.push(disk.write(0, 4096, 0xee));
    link.records(1, &unacknowledged);
    link.wait_durable(1, disk.seq);
    let mut disks = [disk];
    cut_now(&drva, &mut control, &mut disks, "all");
    drva.stop(Duration::from_secs(20));
    let (_, recovered) = site.recover();
    assert!(recovered[&disks[0].uuid] == disks[0].model.bytes, "differs");
}

#[test]
fn records_that_are_sent_again_are_taken_once() {
    let site = Site::new(&[]);
    let drva = site.start();
    let mut disk = Disk::new(1);
    let mut all = disk.begin();
    all.extend((0..20).map(|i| disk.write(i * 4096, 4096, i as u8)));
    let mut link = drva.connect(DATA);
    assert_eq!(link.open(1, &disk), Ok(0));
    link.records(1, &all[..15]);
    link.wait_durable(1, 15);
    drop(link);
    // A host that knows of no acknowledgement; one frame has old and new records.
    let mut link = drva.connect(DATA);
    assert_eq!(link.open(1, &disk), Ok(15));
    link.records(1, &all[..5]);
    link.records(1, &all[5..]);
    link.wait_durable(1, disk.seq);
    let status = drva.status();
    assert_eq!(status["records"], 22, "{status:#}");
    assert_eq!(status["duplicates"], 15, "{status:#}");
}

#[test]
fn what_cannot_be_taken_is_refused_by_name_and_the_rest_goes_on() {
    let site = Site::new(&[]);
    let drva = site.start();
    let mut disk = Disk::new(1);
    let mut link = drva.connect(DATA);
    // The stream must begin with its base.
    assert_eq!(link.open(1, &disk), Ok(0));
    let begin = disk.begin();
    link.records(1, &begin[1..]);
    assert_eq!(code_of(&link.wait_error(1)), (ErrorCode::Gap, 2));
    assert_eq!(link.open(1, &disk), Ok(0));
    link.records(1, &begin);
    link.wait_durable(1, 2);
    // A flipped bit in a payload.
    let mut corrupt = disk.write(0, 4096, 1);
    let good = corrupt.clone();
    corrupt.payload[77] ^= 1;
    link.records(1, &[corrupt]);
    assert_eq!(code_of(&link.wait_error(1)), (ErrorCode::Corrupt, 3));
    // Records under way after the refusal are passed over, whatever they are.
    let next = disk.write(4096, 4096, 2);
    link.records(1, std::slice::from_ref(&next));
    assert_eq!(link.open(1, &disk), Ok(2));
    link.records(1, &[good, next]);
    link.wait_durable(1, 4);
    // A host that lost the VM.
    disk.open.attach_epoch = 2;
    let newer = disk.write(8192, 4096, 3);
    assert_eq!(link.open(2, &disk), Ok(4));
    link.records(2, &[newer]);
    link.wait_durable(2, 5);
    disk.open.attach_epoch = 1;
    let refused = link.open(3, &disk).unwrap_err();
    assert_eq!(code_of(&refused), (ErrorCode::Fenced, 2));
    // The channel that it took over from has ended.
    let stale = disk.write(0, 4096, 9);
    link.records(1, &[stale]);
    let mut other = Disk::new(2);
    assert_eq!(link.open(4, &other), Ok(0));
    link.records(4, &other.begin());
    link.wait_durable(4, 2);
    let disks = drva.status()["disks"].take();
    assert_eq!(disks[0]["received_seq"], 5, "{disks:#}");
    // A name that is none, a domain that is none.
    other.open.domain = "../x".into();
    let refused = link.open(5, &other).unwrap_err();
    assert_eq!(code_of(&refused), (ErrorCode::Domain, 0));
}

#[test]
fn a_domain_that_is_not_served_is_refused() {
    let site = Site::new(&["--domain", "another"]);
    let drva = site.start();
    let mut link = drva.connect(DATA);
    match *link.open(1, &Disk::new(1)).unwrap_err() {
        Message::Error { code, text, .. } => {
            assert_eq!(code, ErrorCode::Domain);
            assert!(text.contains("`scripted` is not served here"), "{text}");
        }
        other => panic!("{other:?}"),
    }
}

/// Frames that are none: the connection ends with a reason, and everybody else is served.
#[test]
fn bad_peers_harm_only_themselves() {
    let site = Site::new(&[]);
    let drva = site.start();
    let mut disk = Disk::new(1);
    let mut good = drva.connect(DATA);
    assert_eq!(good.open(1, &disk), Ok(0));
    good.records(1, &disk.begin());
    good.wait_durable(1, 2);

    let whole = |kind, body_len: u32| {
        let header = FrameHeader {
            kind,
            ..FrameHeader::data(1, 1, body_len)
        };
        header.encode().to_vec()
    };
    let mut bad_crc = whole(FrameKind::Data, 64);
    bad_crc[28] ^= 1;
    let other_protocol = Message::Hello(Hello {
        oldest: 900,
        newest: 901,
        role: PeerRole::Daemon,
        port_offset: 1,
        peer_id: [1; 16],
        incarnation: 1,
        name: "new".into(),
    });
    // What is sent instead of a hello, and after one; what the appliance says.
    let cases: Vec<(&str, bool, Vec<u8>, &str)> = vec![
        ("garbage", false, vec![0x5a; 4096], "magic"),
        (
            "data before hello",
            false,
            whole(FrameKind::Data, 64),
            "hello",
        ),
        ("wrong version", false, other_protocol.encode(0), "upgrade"),
        ("garbage later", true, vec![0xff; 64], "magic"),
        ("header CRC", true, bad_crc, "CRC"),
        (
            "length 2^32-1",
            true,
            whole(FrameKind::Data, u32::MAX),
            "at most",
        ),
        (
            "message length 2^32-1",
            true,
            whole(FrameKind::OpenLane, u32::MAX),
            "at most",
        ),
        ("message length 0", true, whole(FrameKind::OpenLane, 0), ""),
        (
            "a cut's answer here",
            true,
            Message::Heartbeat {
                clock_ns: 1,
                answer: false,
            }
            .encode(0),
            "-",
        ),
    ];
    for (what, after_hello, bytes, says) in cases {
        let mut link = if after_hello {
            drva.connect(DATA)
        } else {
            drva.connect_bare(DATA)
        };
        link.stream.write_all(&bytes).unwrap();
        if says == "-" {
            // No error at all: answered.
            assert!(matches!(
                link.next().1,
                Message::Heartbeat { answer: true, .. }
            ));
            continue;
        }
        let mut reason = None;
        while let Some((_, message)) = link.try_next() {
            if let Message::Error { text, .. } = message {
                reason = Some(text);
            }
        }
        let reason = reason.unwrap_or_else(|| panic!("{what}: closed without a reason"));
        assert!(reason.contains(says), "{what}: {reason}");
    }
    // DATA of no bytes on an open channel is nothing; a frame that is cut short ends at the close.
    good.raw_records(1, 3, &[]);
    let mut short = drva.connect(DATA);
    assert_eq!(short.open(1, &Disk::new(2)), Ok(0));
    short
        .stream
        .write_all(&whole(FrameKind::Data, 4096))
        .unwrap();
    short.stream.write_all(&[1; 100]).unwrap();
    drop(short);
    let record = disk.write(0, 4096, 1);
    good.records(1, &[record]);
    good.wait_durable(1, 3);
}

/// A VM that was switched off does not keep the others' cuts away.
#[test]
fn a_closed_lane_stands_where_it_stood() {
    let site = Site::new(&["--cut-interval-ms", "50"]);
    let mut drva = site.start();
    let mut control = drva.connect(PortRole::Control);
    let mut link = drva.connect(DATA);
    let mut disks = [Disk::new(1), Disk::new(2)];
    for (channel, disk) in (1..).zip(&mut disks) {
        link.open(channel, disk).unwrap();
        link.records(channel, &disk.begin());
        link.records(channel, &[disk.write(0, 4096, channel as u8)]);
        link.wait_durable(channel, 3);
    }
    link.send(&Message::CloseLane { in_order: true }, 2);
    drva.wait_until("detached", |status| {
        status["disks"][1]["connected"] == json!(false)
    });
    let record = disks[0].write(4096, 4096, 7);
    link.records(1, &[record]);
    // Only the first disk is reported from here on.
    let (present, _) = disks.split_at_mut(1);
    cut_now(&drva, &mut control, present, "one");
    drva.stop(Duration::from_secs(20));
    let (cuts, recovered) = site.recover();
    let last = cuts.last().unwrap();
    assert_eq!(last.disks.len(), 2);
    assert!(recovered[&disks[1].uuid] == disks[1].model.bytes, "differs");
}

/// It sends, and reads nothing of what it is answered.
#[test]
fn a_host_that_does_not_read_is_cut_off() {
    let site = Site::new(&[]);
    let drva = site.start();
    let mut deaf = drva.connect(PortRole::Control);
    let question = Message::Heartbeat {
        clock_ns: 1,
        answer: false,
    };
    let many = question.encode(0).repeat(1000);
    let deadline = std::time::Instant::now() + scripted::LIMIT;
    while deaf.stream.write_all(&many).is_ok() {
        assert!(std::time::Instant::now() < deadline, "it is not cut off");
    }
    // What is told is the reason, and who else is connected goes on.
    while !site.said().contains("does not read what it is answered") {
        let said = site.said();
        assert!(std::time::Instant::now() < deadline, "{said}");
        std::thread::yield_now();
    }
    let mut disk = Disk::new(1);
    let mut link = drva.connect(DATA);
    assert_eq!(link.open(1, &disk), Ok(0));
    link.records(1, &disk.begin());
    link.wait_durable(1, disk.seq);
}
