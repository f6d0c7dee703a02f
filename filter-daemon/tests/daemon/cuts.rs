//! Cuts: exact, quick, and without disks that are not ours any more.

use crate::appliance::{Peer, Ports, Server};
use crate::vm::{DISK, DOMAIN, Daemon, Host};
use crate::wait_for;
use filter_core::lane::layout::LaneState;
use filter_core::lane::ring;
use filter_core::mapping::monotonic_ns;
use filter_core::wire::{DiskReport, ErrorCode, Message, PortRole};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

fn positions(answer: Message, epoch: u32) -> HashMap<[u8; 16], u64> {
    match answer {
        Message::CutPositions {
            epoch: of,
            domain,
            positions,
        } => {
            assert_eq!((of, domain.as_str()), (epoch, DOMAIN));
            positions.into_iter().collect()
        }
        other => panic!("{other:?} instead of positions"),
    }
}

#[test]
fn positions_are_exact_under_load() {
    let server = Server::start();
    let host = Host::new();
    let disks = [[1; 16], [2; 16], [3; 16]];
    let mut vms = disks.map(|disk| host.vm(disk));
    let _daemon = Daemon::start(&host, server.base);
    for vm in &mut vms {
        let last = vm.push(512);
        server.wait_received(&vm.disk, last);
    }
    let stop = AtomicBool::new(false);
    let (cuts, lasts) = std::thread::scope(|scope| {
        let writers: Vec<_> = vms
            .iter_mut()
            .map(|vm| {
                let stop = &stop;
                scope.spawn(move || {
                    let mut last = 0;
                    while !stop.load(SeqCst) {
                        last = vm.push(3000);
                    }
                    last
                })
            })
            .collect();
        let cuts: Vec<_> = (2..22)
            .map(|epoch| (epoch, positions(server.cut(epoch, DOMAIN), epoch)))
            .collect();
        stop.store(true, SeqCst);
        let lasts: Vec<u64> = writers.into_iter().map(|w| w.join().unwrap()).collect();
        (cuts, lasts)
    });
    for (disk, last) in disks.iter().zip(lasts) {
        server.wait_received(disk, last);
    }
    let state = server.state();
    for (epoch, positions) in cuts {
        assert_eq!(positions.len(), disks.len());
        for (disk, seq) in positions {
            let log = &state.disks[&disk].log;
            let below = log.iter().take_while(|seen| seen.cut_epoch < epoch);
            assert_eq!(below.last().unwrap().seq, seq, "cut {epoch}");
        }
    }
}

#[test]
fn an_epoch_that_is_past_is_refused_with_the_present_one() {
    let server = Server::start();
    let host = Host::new();
    let mut vm = host.vm(DISK);
    let _daemon = Daemon::start(&host, server.base);
    let last = vm.push(512);
    server.wait_received(&DISK, last);
    assert_eq!(positions(server.cut(9, DOMAIN), 9)[&DISK], last);
    match server.cut(9, DOMAIN) {
        Message::Error { seq, .. } => assert_eq!(seq, 9),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_cut_does_not_wait_for_records_to_be_sent() {
    let (host, ports) = (Host::new(), Ports::bind());
    let mut vm = host.large_vm(DISK);
    let daemon = Daemon::start(&host, ports.base);
    let mut control = ports.greet(PortRole::Control);
    // The data port takes the lane and then reads nothing: most of the ring stays untaken.
    let mut peer = ports.greet(PortRole::of_disk(&DISK));
    peer.open(0);
    wait_for("the lane is open", || {
        daemon.lane(&DISK).is_some_and(|l| l["linked"] == true)
    });
    let last = vm.fill(60 * 1024);
    let since = Instant::now();
    let request = Message::CutRequest {
        epoch: 2,
        domain: DOMAIN.into(),
    };
    control.send(&request, 0);
    let (_, answer) = control.message();
    assert_eq!(positions(answer, 2)[&DISK], last);
    let took = since.elapsed();
    assert!(took < Duration::from_millis(1500), "{took:?}");
    // Nor for a connection.
    drop(peer);
    let request = Message::CutRequest {
        epoch: 3,
        domain: DOMAIN.into(),
    };
    control.send(&request, 0);
    let (_, answer) = control.message();
    assert_eq!(positions(answer, 3)[&DISK], last);
}

#[test]
fn a_fenced_lane_is_no_part_of_a_cut() {
    let (host, ports) = (Host::new(), Ports::bind());
    let other = (8..=255)
        .map(|n| [n; 16])
        .find(|id| PortRole::of_disk(id) != PortRole::of_disk(&DISK))
        .unwrap();
    let (mut fenced, mut vm) = (host.vm(DISK), host.vm(other));
    fenced.write(512).unwrap();
    let last = vm.push(512);
    let daemon = Daemon::start(&host, ports.base);
    let mut control = ports.greet(PortRole::Control);
    let mut peer = ports.greet(PortRole::of_disk(&DISK));
    let (channel, _) = peer.expect_open();
    let refusal = Message::Error {
        code: ErrorCode::Fenced,
        seq: 0,
        text: "epoch 2 has attached".into(),
    };
    peer.send(&refusal, channel);
    let mut good = ports.greet(PortRole::of_disk(&other));
    let channel = good.open(0);
    assert_eq!(good.data(), [last]);
    good.ack(channel, last);
    wait_for("one is fenced, one is open", || {
        daemon.lane(&DISK).is_some_and(|l| l["fenced"] == true)
            && daemon
                .lane(&other)
                .is_some_and(|l| l["durable_seq"] == last)
    });
    for epoch in 2..4 {
        let request = Message::CutRequest {
            epoch,
            domain: DOMAIN.into(),
        };
        control.send(&request, 0);
        let (_, answer) = control.message();
        let positions = positions(answer, epoch);
        assert_eq!(positions, HashMap::from([(other, last)]));
        // Nor when it tracks, as it will when nobody takes its records.
        fenced.producer.set_state(LaneState::Tracking);
    }
}

#[test]
fn cuts_while_lanes_move_never_stall() {
    let server = Server::start();
    let host = Host::new();
    let mut vm = host.vm(DISK);
    let _daemon = Daemon::start(&host, server.base);
    let last = vm.push(512);
    server.wait_received(&DISK, last);
    let mut worst = Duration::ZERO;
    for (round, epoch) in (2..32).enumerate() {
        vm.marker(true, false);
        vm.marker(false, false);
        for _ in 0..round {
            vm.push(4096);
        }
        let since = Instant::now();
        let answer = server.cut(epoch, DOMAIN);
        worst = worst.max(since.elapsed());
        // The disk streams: only the way of its lane from port to port goes on.
        let seq = positions(answer, epoch)[&DISK];
        assert_eq!(seq, vm.producer.published().seq());
    }
    assert!(worst < Duration::from_millis(1500), "{worst:?}");
}

#[test]
fn a_disk_that_syncs_voids_the_cut() {
    let server = Server::start();
    let host = Host::new();
    let mut vm = host.vm(DISK);
    let _daemon = Daemon::start(&host, server.base);
    let last = vm.push(512);
    server.wait_received(&DISK, last);
    vm.marker(true, false);
    assert!(matches!(server.cut(2, DOMAIN), Message::Error { .. }));
    vm.marker(false, false);
    let seq = vm.push(512);
    assert_eq!(positions(server.cut(3, DOMAIN), 3)[&DISK], seq);
}

fn request(control: &mut Peer, epoch: u32) -> HashMap<[u8; 16], DiskReport> {
    let request = Message::CutRequest {
        epoch,
        domain: DOMAIN.into(),
    };
    control.send(&request, 0);
    match control.message() {
        (
            0,
            Message::CutReport {
                epoch: of, disks, ..
            },
        ) => {
            assert_eq!(of, epoch);
            disks.into_iter().map(|disk| (disk.disk_id, disk)).collect()
        }
        (_, other) => panic!("{other:?}"),
    }
}

/// From protocol 2 on each disk is reported by itself: whether a VM has it open, whether its stream is whole.
#[test]
fn a_report_says_which_disks_are_open_and_which_are_whole() {
    let (host, ports) = (Host::new(), Ports::bind());
    let daemon = Daemon::start(&host, ports.base);
    // A host without any lane is there to be asked.
    let mut control = ports.greet_speaking(PortRole::Control, 2);
    assert_eq!(request(&mut control, 2), HashMap::new());
    assert!(!host.path("domains").join(format!("{DOMAIN}.cut")).exists());
    let [open, shut, syncs] = [[1; 16], [2; 16], [3; 16]];
    let mut vms = [open, shut, syncs].map(|disk| host.vm(disk));
    let lasts = vms.each_mut().map(|vm| vm.push(512));
    vms[2].marker(true, false);
    let [_open, closing, _syncs] = vms;
    closing.producer.set_state(LaneState::Closed);
    drop(closing);
    wait_for("the lanes are found", || {
        [open, shut, syncs]
            .iter()
            .all(|disk| daemon.lane(disk).is_some())
    });
    let reports = request(&mut control, 3);
    let report = |disk_id, seq, open, complete| DiskReport {
        disk_id,
        seq,
        open,
        complete,
    };
    assert_eq!(reports[&open], report(open, lasts[0], true, true));
    assert_eq!(reports[&shut], report(shut, lasts[1], false, true));
    assert!(!reports[&syncs].complete && reports[&syncs].open);
}

/// For a cut of several hosts completions are held from before the epoch moves until the appliance ends it.
#[test]
fn a_hold_lasts_until_it_is_released() {
    let (host, ports) = (Host::new(), Ports::bind());
    let mut vm = host.vm(DISK);
    let daemon = Daemon::start_with_args(&host, ports.base, &["--cut-hold-ms", "1000"]);
    let mut control = ports.greet_speaking(PortRole::Control, 2);
    let last = vm.push(512);
    wait_for("the lane is found", || daemon.lane(&DISK).is_some());
    let page = host.run.cut_page(DOMAIN).unwrap();
    let (epoch, domain) = (2, || DOMAIN.to_string());
    let hold = Message::CutHold {
        epoch,
        domain: domain(),
    };
    control.send(&hold, 0);
    let held = Message::CutHeld {
        epoch,
        domain: domain(),
    };
    assert_eq!(control.message(), (0, held));
    assert!(ring::hold_until(page.hold()) > monotonic_ns());
    assert_eq!(page.epoch().load(SeqCst), epoch);
    let release = Message::CutRelease {
        epoch,
        domain: domain(),
    };
    control.send(&release, 0);
    match control.message() {
        (0, Message::CutReport { disks, .. }) => assert_eq!(disks[0].seq, last),
        (_, other) => panic!("{other:?}"),
    }
    assert_eq!(ring::hold_until(page.hold()), 0);
    assert_eq!(daemon.status()["holds"], 1);
    assert_eq!(daemon.status()["holds_over"], 0);
}

/// An appliance that does not end a hold in time gets no cut, and nobody waits for it any longer.
#[test]
fn a_hold_that_is_over_is_no_cut() {
    let (host, ports) = (Host::new(), Ports::bind());
    let mut vm = host.vm(DISK);
    let daemon = Daemon::start_with_args(&host, ports.base, &["--cut-hold-ms", "5"]);
    let mut control = ports.greet_speaking(PortRole::Control, 2);
    vm.push(512);
    wait_for("the lane is found", || daemon.lane(&DISK).is_some());
    let page = host.run.cut_page(DOMAIN).unwrap();
    for epoch in 2..4 {
        let hold = Message::CutHold {
            epoch,
            domain: DOMAIN.into(),
        };
        control.send(&hold, 0);
        assert!(matches!(control.message(), (0, Message::CutHeld { .. })));
        match control.message() {
            (0, Message::Error { text, .. }) => {
                assert!(text.contains("held for as long"), "{text}")
            }
            (_, other) => panic!("{other:?}"),
        }
        assert_eq!(ring::hold_until(page.hold()), 0);
        // A release that comes too late is no harm.
        let release = Message::CutRelease {
            epoch,
            domain: DOMAIN.into(),
        };
        control.send(&release, 0);
    }
    assert_eq!(request(&mut control, 4).len(), 1);
    let status = daemon.status();
    assert_eq!(
        (&status["holds"], &status["holds_over"]),
        (&2.into(), &2.into())
    );
    assert!(
        status["longest_hold_us"].as_u64().unwrap() <= 5000,
        "{status}"
    );
}

/// A daemon that stops says which disks stand where they stand.
#[test]
fn a_daemon_that_stops_tells_which_disks_were_closed_in_order() {
    let server = Server::start();
    let host = Host::new();
    let [open, shut] = [[1; 16], [2; 16]];
    let mut vms = [open, shut].map(|disk| host.vm(disk));
    let lasts = vms.each_mut().map(|vm| vm.push(512));
    let [_open, closing] = vms;
    let mut daemon = Daemon::start(&host, server.base);
    for (disk, last) in [open, shut].iter().zip(lasts) {
        wait_for("delivered", || {
            daemon
                .lane(disk)
                .is_some_and(|lane| lane["durable_seq"] == last)
        });
    }
    closing.producer.set_state(LaneState::Closed);
    drop(closing);
    daemon.stop();
    wait_for("the appliance is told", || {
        !server.state().closes.is_empty()
    });
    let closed: Vec<_> = server.state().closed_in_order.clone();
    assert_eq!(closed, [shut]);
}

#[test]
fn a_domain_that_is_not_here_leaves_no_trace() {
    let server = Server::start();
    let host = Host::new();
    let mut vm = host.vm(DISK);
    let _daemon = Daemon::start(&host, server.base);
    let last = vm.push(512);
    server.wait_received(&DISK, last);
    for name in ["elsewhere", "../../etc", ""] {
        assert!(matches!(server.cut(2, name), Message::Error { .. }));
    }
    let pages = std::fs::read_dir(host.path("domains")).unwrap().flatten();
    let pages: Vec<_> = pages.map(|page| page.file_name()).collect();
    assert_eq!(pages, [std::ffi::OsString::from(format!("{DOMAIN}.cut"))]);
}
