//! An appliance that refuses a lane or a record: what the daemon makes of each reason.

use crate::appliance::{Peer, Ports};
use crate::vm::{DISK, Daemon, Host, Vm};
use crate::wait_for;
use filter_core::wire::{ErrorCode, Message, PortRole};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

fn role() -> PortRole {
    PortRole::of_disk(&DISK)
}

fn begin() -> (Host, Ports, Vm, Daemon, Peer) {
    let (host, ports) = (Host::new(), Ports::bind());
    let vm = host.vm(DISK);
    let daemon = Daemon::start(&host, ports.base);
    let peer = ports.greet(role());
    (host, ports, vm, daemon, peer)
}

fn refuse(peer: &mut Peer, channel: u32, code: ErrorCode, seq: u64, text: &str) {
    let text = text.into();
    peer.send(&Message::Error { code, seq, text }, channel);
}

#[test]
fn a_domain_that_is_not_served_is_asked_for_ever_more_rarely() {
    let (_host, _ports, _vm, daemon, mut peer) = begin();
    let since = Instant::now();
    for _ in 0..4 {
        let (channel, _) = peer.expect_open();
        refuse(&mut peer, channel, ErrorCode::Domain, 0, "not served here");
    }
    // 0.5, 1 and 2 s lie between four attempts.
    assert!(since.elapsed() > Duration::from_secs(3));
    let said = |text: &str| daemon.log().matches(text).count();
    wait_for("it is said once", || said("not served here") == 1);
    let (channel, _) = peer.expect_open();
    refuse(&mut peer, channel, ErrorCode::Limit, 0, "too many disks");
    wait_for("a new reason is said", || said("too many disks") == 1);
    assert_eq!(said("not served here"), 1);
}

#[test]
fn a_gap_that_is_always_found_does_not_become_a_tight_loop() {
    let (_host, _ports, mut vm, daemon, mut peer) = begin();
    vm.write(512).unwrap();
    let since = Instant::now();
    let mut opens = 0;
    while opens < 7 {
        if let Ok(frame) = peer.frame() {
            let channel = frame.header.channel;
            match frame.header.kind {
                filter_core::wire::FrameKind::OpenLane => {
                    opens += 1;
                    let opened = Message::LaneOpened {
                        durable_seq: 0,
                        attach_epoch: 1,
                        full_base_seq: 0,
                    };
                    peer.send(&opened, channel);
                }
                _ => refuse(&mut peer, channel, ErrorCode::Gap, 1, "a gap"),
            }
        }
    }
    let took = since.elapsed();
    assert!(took > Duration::from_millis(800), "seven times in {took:?}");
    assert_eq!(daemon.log().matches("a gap").count(), 1);
}

#[test]
fn a_record_that_was_damaged_on_the_way_is_sent_again() {
    let (_host, ports, mut vm, daemon, mut peer) = begin();
    let last = vm.write(4096).unwrap();
    // Refused as often as one likes: the ring's own content is good, so no resync is asked for.
    for _ in 0..3 {
        let channel = peer.open(0);
        assert_eq!(peer.data(), [last]);
        refuse(&mut peer, channel, ErrorCode::Corrupt, last, "CRC");
        peer.wait_gone();
        peer = ports.greet(role());
    }
    let channel = peer.open(0);
    assert_eq!(peer.data(), [last]);
    peer.ack(channel, last);
    wait_for("it is acknowledged", || {
        daemon.lane(&DISK).unwrap()["durable_seq"] == last
    });
    assert!(!vm.producer.restart_requested());
    assert_eq!(daemon.lane(&DISK).unwrap()["faults"], 0);
}

#[test]
fn a_record_that_is_damaged_in_the_ring_makes_the_disk_sync_anew() {
    let (_host, _ports, mut vm, daemon, mut peer) = begin();
    vm.write(4096).unwrap();
    vm.write(4096).unwrap();
    let mut file = std::fs::File::options();
    let file = file.write(true).open(vm.lane.path()).unwrap();
    let at = vm.lane.memory().geometry().data_at() + 64 + 4096 + 64 + 100;
    file.write_all_at(b"x", at).unwrap();
    let channel = peer.open(0);
    let mut seen = 0;
    while seen < 2 {
        let frame = peer.frame().unwrap();
        seen += filter_core::record::RecordIter::new(&frame.body).count();
    }
    // As an appliance does: it has taken the first, the next is bad.
    peer.ack(channel, 1);
    refuse(&mut peer, channel, ErrorCode::Corrupt, 2, "CRC");
    wait_for("a new beginning is asked for", || {
        vm.producer.restart_requested()
    });
    vm.producer.restart();
    let base = vm.marker(true, true);
    let channel = peer.open(1);
    assert_eq!(peer.data(), [base]);
    peer.ack(channel, base);
    wait_for("the status says so", || {
        daemon.lane(&DISK).unwrap()["faults"] == 1
    });
}

#[test]
fn a_fenced_lane_is_silent_until_its_epoch_changes() {
    let (host, ports, mut vm, daemon, mut peer) = begin();
    vm.write(512).unwrap();
    let (channel, lane) = peer.expect_open();
    assert_eq!(lane.attach_epoch, 1);
    refuse(
        &mut peer,
        channel,
        ErrorCode::Fenced,
        2,
        "epoch 2 has attached",
    );
    let told = |vm: &Vm| {
        let words = vm.lane.memory();
        words.consumer().fenced_epoch.load(SeqCst)
    };
    wait_for("the filter is told", || told(&vm) == 2);
    wait_for("it knows that it is fenced", || {
        daemon.lane(&DISK).unwrap()["fenced"] == true
    });
    // It says nothing, whatever the VM does, and looks for nothing either.
    vm.fill(60 * 1024);
    daemon.expect_quiet("a fenced lane that is full");
    // The VM comes back with a newer epoch.
    drop(vm);
    let vm = Vm::new(&host.run, DISK, 3, 1000);
    let channel = loop {
        match peer.message() {
            (_, Message::CloseLane { .. }) => {}
            (channel, Message::OpenLane(lane)) => {
                assert_eq!(lane.attach_epoch, 3);
                break channel;
            }
            (_, other) => panic!("{other:?}"),
        }
    };
    // A disk that was rolled back: the same lane goes on with an epoch above the one that fenced it.
    refuse(&mut peer, channel, ErrorCode::Fenced, 8, "epoch 8");
    wait_for("the filter is told", || told(&vm) == 8);
    let words = vm.lane.memory();
    words.producer().attach_epoch.store(9, SeqCst);
    let (channel, lane) = peer.expect_open();
    assert_eq!(lane.attach_epoch, 9);
    assert_eq!(told(&vm), 8, "until the appliance takes it");
    let opened = Message::LaneOpened {
        durable_seq: 999,
        attach_epoch: 8,
        full_base_seq: 1,
    };
    peer.send(&opened, channel);
    wait_for("the filter is told", || told(&vm) == 0);
    drop(ports);
}

/// An epoch that came while the lane was being refused was not what was refused.
#[test]
fn a_refusal_counts_for_the_epoch_that_was_presented() {
    let (_host, _ports, vm, _daemon, mut peer) = begin();
    let (channel, lane) = peer.expect_open();
    assert_eq!(lane.attach_epoch, 1);
    let words = vm.lane.memory();
    words.producer().attach_epoch.store(3, SeqCst);
    refuse(&mut peer, channel, ErrorCode::Fenced, 2, "epoch 2");
    let (_, lane) = peer.expect_open();
    assert_eq!(lane.attach_epoch, 3);
}
