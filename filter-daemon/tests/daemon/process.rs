//! The process: how it starts, what it costs, how it ends.

use crate::appliance::{Ports, Server};
use crate::vm::{DISK, Daemon, Host};
use crate::wait_for;
use filter_core::wire::PortRole;
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

#[test]
fn sigterm_stops_it_under_steady_load() {
    let server = Server::start();
    let host = Host::new();
    let mut vm = host.vm(DISK);
    let mut daemon = Daemon::start(&host, server.base);
    let last = vm.push(512);
    server.wait_received(&DISK, last);
    let stop = AtomicBool::new(false);
    let took = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(SeqCst) {
                while vm.write(64 * 1024).is_ok() {}
                std::thread::yield_now();
            }
        });
        wait_for("the load is steady", || {
            server.state().disks[&DISK].last() > last + 500
        });
        let took = daemon.stop();
        stop.store(true, SeqCst);
        took
    });
    assert!(took < Duration::from_secs(3), "{took:?}");
    assert!(!host.path("status").exists(), "the status socket is left");
}

#[test]
fn a_full_socket_costs_no_processor() {
    let (host, ports) = (Host::new(), Ports::bind());
    let mut vm = host.large_vm(DISK);
    let daemon = Daemon::start(&host, ports.base);
    let mut peer = ports.greet(PortRole::of_disk(&DISK));
    peer.open(0);
    // More than the sockets hold, and less than a quarter of the ring; then all of it.
    let mut last = 0;
    (0..200).for_each(|_| last = vm.push(60 * 1024));
    daemon.wait_stuck(&DISK, last);
    daemon.expect_quiet("a full socket");
    let last = vm.fill(60 * 1024);
    daemon.wait_stuck(&DISK, last);
    daemon.expect_quiet("a full socket and a full ring");
}

#[test]
fn an_idle_daemon_costs_no_processor() {
    let server = Server::start();
    let host = Host::new();
    let mut vm = host.vm(DISK);
    let daemon = Daemon::start(&host, server.base);
    let last = vm.push(512);
    server.wait_received(&DISK, last);
    daemon.expect_quiet("nothing to do");
}

#[test]
fn lanes_that_are_not_open_ask_for_no_wake_ups() {
    let (host, ports) = (Host::new(), Ports::bind());
    let vm = host.vm(DISK);
    let base = ports.base;
    drop(ports); // nobody is there
    let daemon = Daemon::start(&host, base);
    wait_for("the lane is known", || daemon.lane(&DISK).is_some());
    let memory = vm.lane.memory();
    for _ in 0..500 {
        assert_eq!(memory.consumer().sleeping.load(SeqCst), 0);
        std::thread::sleep(Duration::from_millis(1)); // time under test
    }
    daemon.expect_quiet("nobody to talk to");
}

#[test]
fn only_a_dead_socket_is_removed() {
    let host = Host::new();
    // A file of somebody else.
    std::fs::write(host.path("status"), "mine").unwrap();
    let said = Daemon::refuses_to_start(&host);
    assert!(said.contains("status"), "{said}");
    assert_eq!(
        std::fs::read_to_string(host.path("status")).unwrap(),
        "mine"
    );
    std::fs::remove_file(host.path("status")).unwrap();
    // A socket that somebody serves.
    let living = UnixListener::bind(host.path("status")).unwrap();
    assert!(Daemon::refuses_to_start(&host).contains("another process"));
    assert!(host.path("status").exists());
    // The socket of a process that is gone.
    drop(living);
    let daemon = Daemon::start(&host, 40000);
    assert!(daemon.status()["lanes"].as_array().unwrap().is_empty());
}

#[test]
fn a_client_that_reads_nothing_does_not_hold_the_status_up() {
    let host = Host::new();
    let daemon = Daemon::start(&host, 40000);
    let _silent: Vec<UnixStream> = (0..20)
        .map(|_| UnixStream::connect(host.path("status")).unwrap())
        .collect();
    assert!(daemon.status()["lanes"].as_array().unwrap().is_empty());
}

#[test]
fn the_hosts_identity_lasts_or_is_given() {
    let host = Host::new();
    drop(Daemon::start(&host, 40000));
    let id = std::fs::read_to_string(host.path("host-id")).unwrap();
    assert_eq!(id.trim().len(), 32);
    drop(Daemon::start(&host, 40000));
    assert_eq!(std::fs::read_to_string(host.path("host-id")).unwrap(), id);
    // One that was torn is named, not replaced.
    std::fs::write(host.path("host-id"), &id[..7]).unwrap();
    assert!(Daemon::refuses_to_start(&host).contains("host-id"));
    // Given by the operator.
    let ports = Ports::bind();
    let _vm = host.vm(DISK);
    let mut child = Daemon::command(&host, ports.base)
        .args(["--host-id", "000102030405060708090a0b0c0d0e0f"])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut peer = ports.accept(PortRole::of_disk(&DISK));
    let mut raw = [0u8; 32 + 2 + 2 + 1 + 1 + 16];
    peer.stream.read_exact(&mut raw).unwrap();
    assert_eq!(raw[38..], std::array::from_fn::<u8, 16, _>(|n| n as u8));
    child.kill().unwrap();
    child.wait().unwrap();
}
