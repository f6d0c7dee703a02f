//! Every record, once, in order, whatever happens to connections and lanes.

use crate::appliance::{Ports, Server};
use crate::vm::{DISK, Daemon, Host, Vm};
use crate::{DEADLINE, Numbers, wait_for};
use filter_core::record::RecordIter;
use filter_core::wire::{FrameKind, Message, PortRole};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

fn port() -> u16 {
    PortRole::of_disk(&DISK).offset()
}

#[test]
fn connections_that_end_anywhere_lose_and_double_nothing() {
    let mut numbers = Numbers::seeded(0x5eed);
    let server = Server::on(Ports::bind(), Numbers(numbers.draw() | 1));
    server.faults.breaks.store(true, SeqCst);
    let host = Host::new();
    let mut vm = host.vm(DISK);
    let _daemon = Daemon::start(&host, server.base);
    let end = Instant::now() + Duration::from_secs(4);
    let mut last = 0;
    while Instant::now() < end || server.state().connections < 12 {
        last = vm.push(512 * (1 + numbers.draw() % 200) as usize);
        assert!(Instant::now() < end + DEADLINE, "too few connections");
    }
    server.faults.breaks.store(false, SeqCst);
    server.wait_received(&DISK, last);
    let state = server.state();
    let disk = &state.disks[&DISK];
    assert!(disk.log.iter().map(|seen| seen.seq).eq(1..=last));
    println!("{last} records over {} connections", state.connections);
}

#[test]
fn the_daemon_killed_and_started_again_loses_nothing() {
    let server = Server::start();
    let host = Host::new();
    let mut vm = host.vm(DISK);
    let mut last = 0;
    for _ in 0..4 {
        let mut daemon = Daemon::start(&host, server.base);
        for _ in 0..500 {
            last = vm.push(20_000);
        }
        daemon.kill();
    }
    let _daemon = Daemon::start(&host, server.base);
    server.wait_received(&DISK, last);
    assert!(
        server.state().disks[&DISK]
            .log
            .iter()
            .map(|seen| seen.seq)
            .eq(1..=last)
    );
}

#[test]
fn a_lane_that_is_replaced_goes_on_in_the_new_epoch() {
    let server = Server::start();
    let host = Host::new();
    let mut vm = host.vm(DISK);
    let daemon = Daemon::start(&host, server.base);
    let last = vm.push(4096);
    server.wait_received(&DISK, last);
    for epoch in 2..6 {
        drop(vm);
        vm = Vm::new(&host.run, DISK, epoch, u64::from(epoch) * 1000);
        vm.marker(true, true);
        vm.marker(false, false);
        let last = vm.push(4096);
        server.wait_received(&DISK, last);
    }
    let state = server.state();
    let epochs: Vec<u32> = state.disks[&DISK]
        .log
        .iter()
        .map(|s| s.attach_epoch)
        .collect();
    assert!(epochs.is_sorted(), "{epochs:?}");
    assert_eq!(epochs.last(), Some(&5));
    drop(state);
    wait_for("the lanes that were replaced are closed", || {
        // Each epoch: one on the lane's first port, and each of the moves between the ports.
        let state = server.state();
        state.closes.len() + 1 >= state.opens.len()
    });
    wait_for("one lane is left", || {
        daemon.status()["lanes"].as_array().unwrap().len() == 1
    });
}

#[test]
fn a_lane_that_goes_is_closed() {
    let server = Server::start();
    let host = Host::new();
    let mut vm = host.vm(DISK);
    let daemon = Daemon::start(&host, server.base);
    let last = vm.push(4096);
    server.wait_received(&DISK, last);
    std::fs::remove_file(vm.lane.path()).unwrap();
    wait_for("CLOSE_LANE", || server.state().closes == [(DISK, port())]);
    wait_for("it is served no more", || daemon.lane(&DISK).is_none());
}

#[test]
fn a_lane_that_goes_in_the_middle_of_a_frame_ends_in_order() {
    let (host, ports) = (Host::new(), Ports::bind());
    let mut vm = host.large_vm(DISK);
    let daemon = Daemon::start(&host, ports.base);
    let mut peer = ports.greet(PortRole::of_disk(&DISK));
    let channel = peer.open(0);
    let last = vm.fill(60 * 1024);
    daemon.wait_stuck(&DISK, last);
    std::fs::remove_file(vm.lane.path()).unwrap();
    drop(vm);
    wait_for("it is served no more", || daemon.lane(&DISK).is_none());
    // The frame that was begun is whole, and the channel's end follows on the same connection.
    let mut next = 1;
    loop {
        let frame = peer.frame().unwrap();
        if frame.header.kind == FrameKind::CloseLane {
            assert_eq!(frame.header.channel, channel);
            break;
        }
        if frame.header.kind == FrameKind::Data {
            for record in RecordIter::new(&frame.body) {
                assert_eq!(record.unwrap().header.seq, next);
                next += 1;
            }
        }
    }
    assert!(next > 1);
}

#[test]
fn what_an_earlier_connection_brought_may_be_acknowledged_early() {
    let (host, ports) = (Host::new(), Ports::bind());
    let mut vm = host.vm(DISK);
    let all = vm.free_bytes();
    for _ in 0..3 {
        vm.write(4096).unwrap();
    }
    let daemon = Daemon::start(&host, ports.base);
    let mut peer = ports.greet(PortRole::of_disk(&DISK));
    peer.open(0);
    while !peer.data().contains(&3) {}
    drop(peer);
    // The appliance has all three, but only the first was durable when the lane was opened again. It
    // does not say it twice: the daemon must remember.
    let mut peer = ports.greet(PortRole::of_disk(&DISK));
    let (channel, lane) = peer.expect_open();
    peer.ack(channel, 3);
    let attach_epoch = lane.attach_epoch;
    let opened = Message::LaneOpened {
        durable_seq: 1,
        attach_epoch,
        full_base_seq: 0,
    };
    peer.send(&opened, channel);
    assert_eq!(peer.data(), [2, 3]);
    wait_for("the ring is free", || vm.free_bytes() == all);
    assert!(!daemon.log().contains("broke the protocol"));
}

#[test]
fn a_sync_travels_over_the_bulk_port() {
    let server = Server::start();
    let host = Host::new();
    let mut vm = host.vm(DISK);
    let _daemon = Daemon::start(&host, server.base);
    let mut marks = Vec::new();
    let mut last = 0;
    for _ in 0..5 {
        (0..50).for_each(|_| last = vm.push(30_000));
        let begin = vm.marker(true, false);
        (0..50).for_each(|_| last = vm.push(30_000));
        let end = vm.marker(false, false);
        marks.push((begin, end));
        last = vm.push(512);
        // The lane is back at home before the next sync: so each record's port is known.
        server.wait_received(&DISK, last);
        wait_for("the lane comes home", || {
            let state = server.state();
            state.opens.last().is_some_and(|open| open.1 == port())
        });
    }
    server.wait_received(&DISK, last);
    let state = server.state();
    let log = &state.disks[&DISK].log;
    assert!(log.iter().map(|seen| seen.seq).eq(1..=last));
    // A frame may carry records of both sides of a marker; nearly all travel where they belong.
    let bulk = PortRole::Bulk.offset();
    for (begin, end) in marks {
        let inside = log.iter().filter(|s| s.seq > begin && s.seq < end);
        let right = inside.filter(|s| s.port == bulk).count();
        assert!(right > 10, "{right} of 50 over the bulk port");
    }
}

#[test]
fn a_lane_moves_although_its_connection_ended_before_it_could() {
    let (host, ports) = (Host::new(), Ports::bind());
    let mut vm = host.vm(DISK);
    let daemon = Daemon::start(&host, ports.base);
    let mut peer = ports.greet(PortRole::of_disk(&DISK));
    let (channel, lane) = peer.expect_open();
    // One frame, in which the marker is not the last record.
    vm.write(512).unwrap();
    let begin = vm.marker(true, false);
    let last = vm.write(512).unwrap();
    let attach_epoch = lane.attach_epoch;
    let opened = Message::LaneOpened {
        durable_seq: 0,
        attach_epoch,
        full_base_seq: 0,
    };
    peer.send(&opened, channel);
    assert_eq!(peer.data(), [1, begin, last]);
    // What comes behind it waits for the other port, and costs nothing meanwhile.
    let behind = vm.write(512).unwrap();
    daemon.expect_quiet("a lane that waits to be moved");
    peer.ack(channel, begin);
    wait_for("the marker is durable", || {
        daemon.lane(&DISK).unwrap()["durable_seq"] == begin
    });
    drop(peer);
    // The marker never comes again: the lane has to remember.
    let mut bulk = ports.greet(PortRole::Bulk);
    let channel = bulk.open(begin);
    let mut seqs = bulk.data();
    while !seqs.contains(&behind) {
        seqs.extend(bulk.data());
    }
    assert_eq!(seqs, [last, behind]);
    bulk.ack(channel, behind);
}

#[test]
fn moves_between_ports_and_broken_connections_together() {
    let mut numbers = Numbers::seeded(0xb0b);
    let server = Server::on(Ports::bind(), Numbers(numbers.draw() | 1));
    server.faults.breaks.store(true, SeqCst);
    let host = Host::new();
    let mut vm = host.vm(DISK);
    let daemon = Daemon::start(&host, server.base);
    let (mut last, mut syncing) = (0, false);
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        last = vm.push(512 * (1 + numbers.draw() % 100) as usize);
        if numbers.draw().is_multiple_of(40) && vm.free_bytes() > 4096 {
            syncing = !syncing;
            last = vm.marker(syncing, false);
        }
    }
    if syncing {
        last = vm.push(512);
        wait_for("room", || vm.free_bytes() > 4096);
        last = vm.marker(false, false).max(last);
    }
    server.faults.breaks.store(false, SeqCst);
    server.wait_received(&DISK, last);
    assert!(
        server.state().disks[&DISK]
            .log
            .iter()
            .map(|seen| seen.seq)
            .eq(1..=last)
    );
    wait_for("the lane ends up at home", || {
        daemon.lane(&DISK).is_some_and(|lane| {
            lane["port_offset"] == port() && lane["linked"] == true && lane["durable_seq"] == last
        })
    });
}

#[test]
fn no_wake_up_is_lost() {
    let server = Server::start();
    let host = Host::new();
    let mut vm = host.vm(DISK);
    let _daemon = Daemon::start(&host, server.base);
    let last = vm.push(512);
    server.wait_received(&DISK, last);
    let sleeping = vm.lane.memory();
    let (mut slow, mut worst) = (0, Duration::ZERO);
    for _ in 0..100 {
        // Relaxed in effect: a look from outside.
        wait_for("the daemon sleeps", || {
            sleeping.consumer().sleeping.load(SeqCst) != 0
        });
        let since = Instant::now();
        let last = vm.push(512);
        while server.state().disks[&DISK].last() < last {
            assert!(since.elapsed() < DEADLINE, "record {last} never came");
            std::thread::yield_now();
        }
        worst = worst.max(since.elapsed());
        // Without a wake-up it would be found after half a second.
        slow += u32::from(since.elapsed() > Duration::from_millis(250));
    }
    assert!(
        slow <= 2,
        "{slow} of 100 wake-ups were late, by up to {worst:?}"
    );
}

#[test]
fn only_durable_acknowledgements_free_the_ring() {
    let server = Server::start();
    server.faults.never_acks.store(true, SeqCst);
    let host = Host::new();
    let mut vm = host.vm(DISK);
    let daemon = Daemon::start(&host, server.base);
    let last = vm.fill(60 * 1024);
    server.wait_received(&DISK, last);
    let free = vm.free_bytes();
    assert!(vm.write(60 * 1024).is_err(), "the ring is full");
    assert_eq!(daemon.lane(&DISK).unwrap()["durable_seq"], 0);
    // Waiting for acknowledgements costs nothing.
    daemon.expect_quiet("nothing moves");
    assert_eq!(vm.free_bytes(), free);
    // Everything is still there for a daemon that comes after this one.
    drop(daemon);
    server.faults.never_acks.store(false, SeqCst);
    server.state().disks.clear();
    let _daemon = Daemon::start(&host, server.base);
    let last = vm.push(60 * 1024);
    server.wait_received(&DISK, last);
    assert!(
        server.state().disks[&DISK]
            .log
            .iter()
            .map(|seen| seen.seq)
            .eq(1..=last)
    );
}
