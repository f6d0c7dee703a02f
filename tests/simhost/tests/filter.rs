//! The filter library in a VM process, without a daemon: it only tracks, and the guest never notices.
#![allow(clippy::unwrap_used)]

mod vm_process;

use simhost::nbd::client::Op;
use std::path::Path;
use std::time::Duration;
use vm_process::{Vm, command, start};

/// A VM with a control socket; the ring is as small as it may be, so that it is soon full.
fn start_small(more: &[&str]) -> Vm {
    let library = conformance::filter_library().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut args = vec!["--property=jetdr.ring-bytes=2097152"];
    args.extend(more);
    vm_process::start_in(folder, &library, &args)
}

#[test]
fn a_full_ring_delays_writes_within_the_budget_and_fails_none() {
    let mut vm = start_small(&[]);
    let mut clients: Vec<_> = (0..3).map(|_| vm.client()).collect();
    // 12 MiB through a ring of 2 MiB that nobody empties.
    for round in 0..16u64 {
        for (number, client) in clients.iter_mut().enumerate() {
            let data = vec![round as u8; 64 << 10];
            for i in 0..4 {
                let at = (number as u64 * 16 + i) * (64 << 10);
                client.submit(&Op::Write(at, &data), false).unwrap();
            }
        }
        for client in &mut clients {
            for _ in 0..4 {
                assert_eq!(client.next_done().unwrap().error, 0);
            }
        }
    }
    let status = command(&vm, r#"{"cmd":"status"}"#);
    assert_eq!(status["disks"][0]["state"], "tracking", "{status}");
    assert_eq!(status["contract_violations"], 0, "{status}");
    let deferred_ms = status["host_deferred_max_ns"].as_u64().unwrap() / 1_000_000;
    // 5 ms is the budget; the rest is for a machine that is busy with other tests.
    assert!(deferred_ms < 1000, "deferred for {deferred_ms} ms");
    for client in clients {
        client.disconnect();
    }
    let end = vm.stop();
    assert_eq!(end.code, Some(0), "{}", end.log);
}

/// A client with writes that the filter holds, if that could be seen within the longest budget.
fn with_held_writes(vm: &Vm) -> Option<simhost::nbd::client::Client> {
    let mut client = vm.client();
    let data = vec![1; 256 << 10];
    for i in 0..12 {
        client
            .submit(&Op::Write(i * (256 << 10), &data), false)
            .unwrap();
    }
    // Some fit into the ring. Once this read is done the last write has met the filter.
    client.submit(&Op::Read(0, 512), false).unwrap();
    while client.next_done().unwrap().data.is_empty() {}
    (client.in_flight() > 0).then_some(client)
}

#[test]
fn a_client_that_leaves_takes_its_held_writes_along() {
    // A machine that stands still for longer than the budget shows nothing: then once more.
    let seen = (0..5).any(|_| {
        let mut vm = start_small(&["--property=jetdr.defer-budget-us=1000000"]);
        let Some(client) = with_held_writes(&vm) else {
            return false;
        };
        drop(client);
        let end = vm.stop();
        assert_eq!(end.code, Some(0), "{}", end.log);
        true
    });
    assert!(seen, "no write was deferred");
}

/// Nobody takes what is captured: nothing waits for a log that is not there, and the alarm says so.
#[test]
fn write_through_without_a_daemon_falls_back_and_says_so() {
    let mut vm = start_small(&["--property=jetdr.ack=log"]);
    let mut client = vm.client();
    for i in 0..8 {
        client.call(&Op::Write(i * 4096, &[1; 4096]), true).unwrap();
    }
    let status = command(&vm, r#"{"cmd":"status"}"#);
    let alarms = status["disks"][0]["alarms"].as_u64().unwrap();
    assert_eq!(alarms & 0x20, 0x20, "{status}");
    assert_eq!(status["contract_violations"], 0, "{status}");
    client.disconnect();
    let end = vm.stop();
    assert_eq!(end.code, Some(0), "{}", end.log);
}

#[test]
fn a_property_that_makes_no_sense_is_refused_by_name() {
    for wrong in [
        "jetdr.ack=maybe",
        "jetdr.ack-budget-us=1",
        "jetdr.sync-floor-bytes-s=0",
    ] {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk0.img");
        std::fs::File::create(&disk)
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_simhost"))
            .args(["vm", "--name", "wrong"])
            .arg(format!("--disk=disk0={}", disk.display()))
            .arg(format!("--run-dir={}", folder.path().join("run").display()))
            .arg(format!(
                "--nbd-socket={}",
                folder.path().join("n.sock").display()
            ))
            .arg(format!(
                "--filter-lib={}",
                conformance::filter_library().unwrap().display()
            ))
            .arg(format!("--property={wrong}"))
            .output()
            .unwrap();
        assert!(!output.status.success());
        let text = String::from_utf8_lossy(&output.stderr);
        let (key, _) = wrong.split_once('=').unwrap();
        assert!(text.contains(key), "{text}");
    }
}

#[test]
fn a_failed_write_is_the_guests_to_see() {
    let mut vm = start_small(&["--fault-write=disk0:8192:512:1"]);
    let mut client = vm.client();
    client.call(&Op::Write(0, &[1; 4096]), false).unwrap();
    assert!(client.call(&Op::Write(8192, &[2; 4096]), false).is_err());
    client.call(&Op::Write(8192, &[3; 4096]), true).unwrap();
    assert_eq!(
        client.call(&Op::Read(8192, 4096), false).unwrap(),
        [3; 4096]
    );
    client.disconnect();
    let end = vm.stop();
    assert_eq!(end.code, Some(0), "{}", end.log);
}

#[test]
fn a_disk_that_is_open_cannot_be_opened_twice() {
    let vm = start_small(&[]);
    let disk = vm.folder.path().join("disk0.img");
    let second = std::process::Command::new(env!("CARGO_BIN_EXE_simhost"))
        .args(["vm", "--name", "thief"])
        .arg(format!("--disk=disk0={}", disk.display()))
        .arg(format!(
            "--run-dir={}",
            vm.folder.path().join("run").display()
        ))
        .arg(format!(
            "--nbd-socket={}",
            vm.folder.path().join("other.sock").display()
        ))
        .arg(format!(
            "--filter-lib={}",
            conformance::filter_library().unwrap().display()
        ))
        .output()
        .unwrap();
    assert!(!second.status.success());
    let text = String::from_utf8_lossy(&second.stderr);
    assert!(text.contains("another process has it open"), "{text}");
}

/// Killed at any moment, the VM starts again and keeps the contract.
#[test]
fn a_killed_vm_starts_again_under_the_filter() {
    let library = conformance::filter_library().unwrap();
    let mut folder = tempfile::tempdir().unwrap();
    for round in 0..5u8 {
        let mut vm = vm_process::start_in(folder, &library, &[]);
        let mut client = vm.client();
        if round > 0 {
            assert_eq!(client.call(&Op::Read(0, 512), false).unwrap(), [round; 512]);
        }
        client.call(&Op::Write(0, &[round + 1; 512]), true).unwrap();
        for i in 1..64 {
            client
                .submit(&Op::Write(i * 4096, &[round; 4096]), false)
                .unwrap();
        }
        vm.child.kill().unwrap();
        assert_eq!(vm.end().code, None);
        folder = std::mem::replace(&mut vm.folder, tempfile::tempdir().unwrap());
    }
    let mut vm = vm_process::start_in(folder, &library, &[]);
    assert_eq!(vm.stop().code, Some(0));
}

#[test]
fn a_stop_under_load_ends_in_time() {
    let library = conformance::filter_library().unwrap();
    let mut vm = start(Path::new(&library), &[]);
    let mut client = vm.client();
    let data = vec![5; 64 << 10];
    for i in 0..32 {
        client
            .submit(&Op::Write(i * (64 << 10), &data), false)
            .unwrap();
    }
    let from = std::time::Instant::now();
    let end = vm.stop();
    assert_eq!(end.code, Some(0), "{}", end.log);
    assert!(
        from.elapsed() < Duration::from_secs(20),
        "{:?}",
        from.elapsed()
    );
}
