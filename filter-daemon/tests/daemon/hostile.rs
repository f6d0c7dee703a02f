//! An appliance that breaks the protocol: the daemon leaves it, says why, comes back, loses nothing.

use crate::appliance::{Peer, Ports};
use crate::vm::{DISK, Daemon, Host};
use crate::wait_for;
use filter_core::crc::crc32c;
use filter_core::wire::{ErrorCode, FrameHeader, FrameKind, Message, PortRole};
use std::io::Read;
use std::time::{Duration, Instant};

fn role() -> PortRole {
    PortRole::of_disk(&DISK)
}

/// After whatever happened: a proper session gets every record.
fn recovers(ports: &Ports, last: u64) {
    let mut peer = ports.greet(role());
    let channel = peer.open(0);
    let mut seqs = Vec::new();
    while seqs.len() < last as usize {
        seqs.extend(peer.data());
    }
    assert_eq!(seqs, (1..=last).collect::<Vec<_>>());
    peer.ack(channel, last);
}

fn logs(daemon: &Daemon, text: &str) {
    wait_for(&format!("the log says `{text}`"), || {
        daemon.log().contains(text)
    });
}

/// A host with three records, a daemon, and the first connection to the data port, not greeted.
fn begin() -> (Host, Ports, Daemon, Peer) {
    let (host, ports) = (Host::new(), Ports::bind());
    let mut vm = host.vm(DISK);
    for _ in 0..3 {
        vm.write(4096).unwrap();
    }
    let daemon = Daemon::start(&host, ports.base);
    let peer = ports.accept(role());
    (host, ports, daemon, peer)
}

#[test]
fn a_version_that_it_does_not_speak() {
    let (_host, ports, daemon, mut peer) = begin();
    let mut hello = peer.hello();
    (hello.oldest, hello.newest) = (7, 9);
    peer.send(&Message::Hello(hello), 0);
    peer.wait_gone();
    logs(&daemon, "speaks protocols 7 to 9");
    recovers(&ports, 3);
}

#[test]
fn garbage_instead_of_a_hello() {
    let (_host, ports, daemon, mut peer) = begin();
    peer.send_raw(&[0xa5; 4096]);
    peer.wait_gone();
    logs(&daemon, "not a jetdr peer");
    recovers(&ports, 3);
}

#[test]
fn garbage_after_the_lane_was_opened() {
    let (_host, ports, daemon, mut peer) = begin();
    peer.greet();
    peer.open(0);
    peer.send_raw(&[0x5a; 64]);
    peer.wait_gone();
    logs(&daemon, "not a jetdr peer");
    recovers(&ports, 3);
}

#[test]
fn a_frame_that_ends_in_the_middle() {
    let (_host, ports, daemon, mut peer) = begin();
    peer.greet();
    let channel = peer.open(0);
    let ack = Message::Ack {
        durable_seq: 1,
        uploaded_seq: 0,
    };
    let frame = ack.encode(channel);
    peer.send_raw(&frame[..frame.len() - 1]);
    peer.stream.shutdown(std::net::Shutdown::Write).unwrap();
    peer.wait_gone();
    assert_eq!(daemon.lane(&DISK).unwrap()["durable_seq"], 0);
    recovers(&ports, 3);
}

/// A header with a good CRC and this kind and length.
fn header(kind: u8, len: u32) -> Vec<u8> {
    let header = FrameHeader {
        kind: FrameKind::Ack,
        body_len: len,
        channel: 0,
        word: 0,
        body_crc: 0,
    };
    let mut raw = header.encode().to_vec();
    raw[4] = kind;
    let crc = crc32c(0, &raw[..28]);
    raw[28..].copy_from_slice(&crc.to_le_bytes());
    raw
}

#[test]
fn a_frame_of_four_gibibytes() {
    let (_host, ports, daemon, mut peer) = begin();
    peer.greet();
    peer.open(0);
    peer.send_raw(&header(FrameKind::Ack as u8, u32::MAX));
    peer.wait_gone();
    logs(&daemon, "body of 4294967295 bytes");
    recovers(&ports, 3);
}

#[test]
fn lengths_are_limited_by_kind() {
    // Each is announced and never sent: who waits for it waits for ever.
    for (kind, len) in [
        (FrameKind::Data as u8, 1 << 20),
        (FrameKind::Ack as u8, 256 * 1024),
        (FrameKind::OpenLane as u8, 200),
        (FrameKind::CutRequest as u8, 256 * 1024),
        (FrameKind::Hello as u8, 100),
    ] {
        let (_host, ports, _daemon, mut peer) = begin();
        peer.greet();
        peer.open(0);
        let since = Instant::now();
        peer.send_raw(&header(kind, len));
        peer.wait_gone();
        let took = since.elapsed();
        assert!(took < Duration::from_secs(10), "kind {kind}: {took:?}");
        recovers(&ports, 3);
    }
}

#[test]
fn a_hello_that_comes_byte_by_byte_does_not_hold_the_daemon() {
    let (host, _ports, mut daemon, mut peer) = begin();
    let hello = Message::Hello(peer.hello()).encode(0);
    peer.send_raw(&hello[..3]);
    // A lane of the same port that comes meanwhile is noticed, and the daemon can be stopped.
    let mut other = (0..=255).map(|n| [n; 16]);
    let disk = other
        .find(|id| *id != DISK && PortRole::of_disk(id) == role())
        .unwrap();
    let _vm = host.vm(disk);
    let since = Instant::now();
    wait_for("the second lane is served", || daemon.lane(&disk).is_some());
    assert!(since.elapsed() < Duration::from_secs(3));
    peer.send_raw(&hello[3..5]);
    assert!(daemon.stop() < Duration::from_secs(3));
}

#[test]
fn what_came_before_the_end_is_still_taken() {
    let (_host, _ports, daemon, mut peer) = begin();
    peer.greet();
    let channel = peer.open(0);
    let mut seqs = peer.data();
    while seqs.len() < 3 {
        seqs.extend(peer.data());
    }
    peer.ack(channel, 3);
    peer.stream.shutdown(std::net::Shutdown::Write).unwrap();
    wait_for("the last acknowledgement counts", || {
        daemon.lane(&DISK).unwrap()["durable_seq"] == 3
    });
}

#[test]
fn an_acknowledgement_of_what_was_never_sent() {
    let (_host, ports, daemon, mut peer) = begin();
    peer.greet();
    let channel = peer.open(0);
    peer.ack(channel, 1000);
    peer.wait_gone();
    logs(&daemon, "acknowledged record 1000");
    assert_eq!(daemon.lane(&DISK).unwrap()["durable_seq"], 0);
    recovers(&ports, 3);
}

#[test]
fn an_acknowledgement_frees_nothing_that_is_still_being_sent() {
    let (host, ports) = (Host::new(), Ports::bind());
    let mut vm = host.large_vm(DISK);
    let daemon = Daemon::start(&host, ports.base);
    let mut peer = ports.greet(role());
    let channel = peer.open(0);
    // Nobody reads: the socket fills, and a frame gets stuck in the middle.
    let last = vm.fill(60 * 1024);
    let before = daemon.wait_stuck(&DISK, last);
    let free = vm.free_bytes();
    peer.ack(channel, before);
    peer.wait_gone();
    logs(&daemon, "acknowledged record");
    assert_eq!(
        vm.free_bytes(),
        free,
        "bytes of a frame under way were freed"
    );
    recovers(&ports, last);
}

#[test]
fn an_error_about_a_channel_that_is_closed_harms_nobody() {
    let (_host, _ports, daemon, mut peer) = begin();
    peer.greet();
    let channel = peer.open(0);
    let stale = Message::Error {
        code: ErrorCode::NoChannel,
        seq: 0,
        text: "no such channel".into(),
    };
    peer.send(&stale, channel + 1000);
    let mut seqs = Vec::new();
    while seqs.len() < 3 {
        seqs.extend(peer.data());
    }
    peer.ack(channel, 3);
    wait_for("the session goes on", || {
        daemon.lane(&DISK).unwrap()["durable_seq"] == 3
    });
    assert!(!daemon.log().contains("no such channel"));
}

#[test]
fn an_appliance_that_closes_after_the_hello_is_not_hammered() {
    let (_host, ports, daemon, mut peer) = begin();
    peer.greet();
    drop(peer);
    let mut times = vec![Instant::now()];
    for _ in 0..6 {
        drop(ports.greet(role()));
        times.push(Instant::now());
    }
    let took = times[6] - times[0];
    assert!(
        took > Duration::from_secs(2),
        "six attempts within {took:?}"
    );
    let lines = daemon.log().lines().count();
    assert!(lines < 10, "{lines} lines in the log");
    // A proper session, and the wait is short again.
    let mut peer = ports.greet(role());
    let channel = peer.open(0);
    while !peer.data().contains(&3) {}
    peer.ack(channel, 3);
    wait_for("the acknowledgement counts", || {
        daemon.lane(&DISK).unwrap()["durable_seq"] == 3
    });
    drop(peer);
    let since = Instant::now();
    ports.greet(role());
    assert!(since.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_flood_of_heartbeats_is_not_stored() {
    let (_host, ports, daemon, mut peer) = begin();
    peer.greet();
    peer.open(0);
    // Asked without end, never read: the daemon must neither grow nor stop reading.
    let ask = Message::Heartbeat {
        clock_ns: 1,
        answer: false,
    };
    let many: Vec<u8> = std::iter::repeat_n(ask.encode(0), 1000).flatten().collect();
    for _ in 0..1500 {
        peer.send_raw(&many);
    }
    // It may leave or go on; it must be there and small.
    let status = daemon.status();
    assert!(status["lanes"].is_array());
    let mut statm = String::new();
    let path = format!("/proc/{}/statm", daemon.pid());
    std::fs::File::open(path)
        .unwrap()
        .read_to_string(&mut statm)
        .unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    assert!(pages * 4096 < 48 << 20, "{pages} pages");
    drop(peer);
    recovers(&ports, 3);
}
