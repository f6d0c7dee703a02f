//! Faults on request in the daemon.

use crate::appliance::Ports;
use crate::vm::{DISK, DOMAIN, Daemon, Host};
use crate::wait_for;
use filter_core::wire::{ErrorCode, FRAME_HEADER_BYTES, FrameHeader, Message, PortRole};
use std::io::Read;

/// So that the list cannot rot: each point in it is passed in what a daemon does all day.
#[test]
fn every_point_of_the_daemon_is_passed() {
    let (host, ports) = (Host::new(), Ports::bind());
    let mut vm = host.vm(DISK);
    let daemon = Daemon::start_with(&host, ports.base, "trace");
    let mut peer = ports.greet(PortRole::of_disk(&DISK));
    let channel = peer.open(0);
    let last = vm.push(4096);
    assert_eq!(peer.data(), [last]);
    peer.ack(channel, last);
    wait_for("it is acknowledged", || {
        daemon.lane(&DISK).unwrap()["durable_seq"] == last
    });
    let mut control = ports.greet(PortRole::Control);
    let cut = Message::CutRequest {
        epoch: 2,
        domain: DOMAIN.into(),
    };
    control.send(&cut, 0);
    assert!(matches!(
        control.message(),
        (0, Message::CutPositions { .. })
    ));
    let refusal = Message::Error {
        code: ErrorCode::Fenced,
        seq: 2,
        text: "epoch 2".into(),
    };
    peer.send(&refusal, channel);
    let points = fault::POINTS.iter().map(|point| point.name);
    for name in points.filter(|name| name.starts_with("daemon.")) {
        wait_for(name, || {
            daemon
                .log()
                .contains(&format!("fault point passed: {name}\n"))
        });
    }
    assert!(!daemon.log().contains("not listed"));
}

#[test]
fn a_daemon_that_dies_in_the_middle_of_a_frame_sends_it_again() {
    let (host, ports) = (Host::new(), Ports::bind());
    let mut vm = host.vm(DISK);
    let mut daemon = Daemon::start_with(&host, ports.base, "daemon.mid-frame:2");
    let mut peer = ports.greet(PortRole::of_disk(&DISK));
    let channel = peer.open(0);
    let first = vm.push(8192);
    assert_eq!(peer.data(), [first]);
    peer.ack(channel, first);
    // All that was sent to it is read: else the end of its connection would take along what it sent.
    wait_for("it is acknowledged", || {
        daemon.lane(&DISK).unwrap()["durable_seq"] == first
    });
    let last = vm.push(8192);
    let mut frame = Vec::new();
    let _ = peer.stream.read_to_end(&mut frame);
    let header = FrameHeader::decode(frame.first_chunk().unwrap()).unwrap();
    let whole = FRAME_HEADER_BYTES + header.body_len as usize;
    assert_eq!(header.word, last);
    assert!(
        (FRAME_HEADER_BYTES + 1..whole).contains(&frame.len()),
        "{}",
        frame.len()
    );
    wait_for("it is dead", || !daemon.is_running());
    let _daemon = Daemon::start(&host, ports.base);
    let mut peer = ports.greet(PortRole::of_disk(&DISK));
    let channel = peer.open(first);
    assert_eq!(peer.data(), [last]);
    peer.ack(channel, last);
}

#[test]
fn an_unknown_point_is_an_error_at_the_start() {
    let host = Host::new();
    let mut command = Daemon::command(&host, 40000);
    let output = command.env("JETDR_FAULT", "daemon.nowhere").output();
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("no point `daemon.nowhere`"),
        "{said}"
    );
}
