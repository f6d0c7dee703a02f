//! How a stream that begins anew is opened: what it relies on is told, and what the appliance does not
//! hold is synced.

use crate::appliance::{Peer, Ports, Server};
use crate::vm::{DISK, Daemon, Host, Vm};
use crate::wait_for;
use filter_core::wire::{Message, PortRole};
use std::time::Duration;

fn opened(peer: &mut Peer, channel: u32, durable_seq: u64, full_base_seq: u64) {
    let opened = Message::LaneOpened {
        durable_seq,
        attach_epoch: 1,
        full_base_seq,
    };
    peer.send(&opened, channel);
}

/// A lane whose first record relies on seq 90, and an appliance.
fn begin() -> (Host, Ports, Vm, Daemon, Peer) {
    let (host, ports) = (Host::new(), Ports::bind());
    let mut vm = Vm::fresh(&host.run, DISK, 2, 1000);
    assert_eq!(vm.begin_relying_on(90), 1000);
    let daemon = Daemon::start(&host, ports.base);
    let peer = ports.greet(PortRole::Bulk);
    (host, ports, vm, daemon, peer)
}

#[test]
fn a_base_is_sent_if_what_it_relies_on_is_there() {
    let (_host, _ports, vm, _daemon, mut peer) = begin();
    let (channel, lane) = peer.expect_open();
    assert_eq!((lane.base, lane.durable_seq), (Some(90), 999));
    opened(&mut peer, channel, 95, 40);
    assert_eq!(peer.data(), [1000]);
    assert!(!vm.producer.restart_requested());
}

#[test]
fn a_base_that_relies_on_what_is_not_there_is_made_anew() {
    // What the appliance holds, and where its last full sync began.
    for (durable, full_base) in [(89, 40), (95, 91), (0, 0)] {
        let (_host, _ports, mut vm, _daemon, mut peer) = begin();
        let (channel, _) = peer.expect_open();
        opened(&mut peer, channel, durable, full_base);
        wait_for("a new beginning is asked for", || {
            vm.producer.restart_requested()
        });
        vm.producer.restart();
        let base = vm.marker(true, true);
        assert!(base > 1000);
        // Nothing of the stream that was given up is sent.
        assert_eq!(peer.data(), [base]);
    }
}

/// Before its producer has published the base, nothing is known of how a lane is to be opened.
#[test]
fn a_lane_that_has_not_begun_is_left_alone() {
    let server = Server::start();
    let host = Host::new();
    let mut vm = Vm::fresh(&host.run, DISK, 1, 500);
    let daemon = Daemon::start(&host, server.base);
    daemon.expect_quiet("a lane that has not begun");
    std::thread::sleep(Duration::from_millis(300)); // time under test
    assert!(server.state().opens.is_empty());
    assert!(daemon.lane(&DISK).is_none());
    let base = vm.marker(true, true);
    server.wait_received(&DISK, base);
    assert_eq!(server.state().disks[&DISK].full_base, base);
}
