//! SIGKILL of each part, during load: after its restart streaming goes on, and what is recovered is
//! what the disk holds.
#![allow(clippy::unwrap_used)]

mod support;

use std::process::{Child, Stdio};
use std::time::Duration;
use support::{Stack, client, ok};

/// A load that is ended with the test, however that ends.
struct Load(Child);

impl Load {
    /// The guest must have seen no error.
    fn finish(mut self) {
        assert!(self.0.wait().unwrap().success(), "the guest saw an error");
    }
}

impl Drop for Load {
    /// Its server may be gone: then fio would wait for ever.
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn load(stack: &Stack, seconds: u32) -> Load {
    let mut fio = client("fio");
    // A job that is a process of its own would outlive fio.
    fio.arg("--thread");
    fio.current_dir(stack.dir.path());
    fio.args([
        "--name=l",
        "--ioengine=nbd",
        "--rw=randwrite",
        "--bs=4k",
        "--iodepth=8",
    ]);
    fio.args(["--size=32M", "--time_based", "--rate_iops=4000"]);
    fio.arg(format!("--runtime={seconds}"))
        .arg(format!("--uri={}", stack.uri("d0")));
    fio.stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    Load(fio.spawn().unwrap())
}

/// Waits until the load has come through to the appliance's log, this many records more.
fn wait_for_records(stack: &Stack, more: u64) {
    let before = stack.domain()["records"].as_u64().unwrap_or(0);
    stack.wait("records arrive", |s| {
        s.domain()["records"].as_u64().unwrap_or(0) >= before + more
    });
}

#[test]
fn the_vm_is_killed() {
    let mut stack = Stack::running(&[("d0.raw", 32 << 20)]);
    stack.settle();
    let fio = load(&stack, 60);
    wait_for_records(&stack, 2000);
    stack.vm.as_mut().unwrap().kill();
    drop(fio);
    stack.start_vm();
    // Only what was in flight is synced, not the disk.
    stack.settle();
    let synced = stack.domain()["received_bytes"].as_u64().unwrap();
    let fio = load(&stack, 2);
    fio.finish();
    stack.recover_and_compare("vm-killed");
    stack.assert_contract();
    assert!(synced > 0);
}

#[test]
fn the_vm_is_killed_and_resyncs_only_what_was_in_flight() {
    let mut stack = Stack::running(&[("d0.raw", 32 << 20)]);
    let mut io = client("qemu-io");
    io.args(["-f", "raw", "-c", "write -P 1 0 32M"]);
    ok(io.arg(stack.uri("d0")).output());
    stack.settle();
    let before = stack.domain()["received_bytes"].as_u64().unwrap();
    stack.vm.as_mut().unwrap().kill();
    stack.start_vm();
    stack.recover_and_compare("adopted");
    let after = stack.domain()["received_bytes"].as_u64().unwrap();
    assert!(
        after - before < 4 << 20,
        "{} bytes were sent again",
        after - before
    );
}

#[test]
fn the_daemon_is_killed() {
    let mut stack = Stack::running(&[("d0.raw", 32 << 20)]);
    stack.settle();
    let fio = load(&stack, 6);
    for _ in 0..3 {
        wait_for_records(&stack, 1000);
        stack.daemon.as_mut().unwrap().kill();
        stack.start_daemon();
    }
    fio.finish();
    stack.recover_and_compare("daemon-killed");
    stack.assert_contract();
}

#[test]
fn the_appliance_is_killed() {
    let mut stack = Stack::running(&[("d0.raw", 32 << 20)]);
    stack.settle();
    let fio = load(&stack, 6);
    for _ in 0..3 {
        wait_for_records(&stack, 1000);
        stack.drva.as_mut().unwrap().kill();
        stack.start_drva();
    }
    fio.finish();
    stack.recover_and_compare("appliance-killed");
    stack.assert_contract();
}

#[test]
fn all_are_killed_one_after_the_other() {
    let mut stack = Stack::running(&[("d0.raw", 32 << 20)]);
    stack.settle();
    let fio = load(&stack, 60);
    wait_for_records(&stack, 1000);
    stack.drva.as_mut().unwrap().kill();
    stack.daemon.as_mut().unwrap().kill();
    std::thread::sleep(Duration::from_millis(300)); // time under test: the lane fills meanwhile
    stack.vm.as_mut().unwrap().kill();
    drop(fio);
    stack.start_vm();
    stack.start_drva();
    stack.start_daemon();
    let fio = load(&stack, 2);
    fio.finish();
    stack.recover_and_compare("all-killed");
}

/// Stopped in order and started again: nothing is synced again.
#[test]
fn an_orderly_stop_needs_no_sync() {
    let mut stack = Stack::running(&[("d0.raw", 32 << 20)]);
    let mut io = client("qemu-io");
    io.args(["-f", "raw", "-c", "write -P 3 0 32M"]);
    ok(io.arg(stack.uri("d0")).output());
    stack.settle();
    stack.vm.as_mut().unwrap().stop();
    stack.daemon.as_mut().unwrap().stop();
    stack.drva.as_mut().unwrap().stop();
    stack.start_drva();
    stack.start_daemon();
    stack.start_vm();
    stack.settle();
    assert_eq!(
        stack.domain()["received_bytes"],
        0,
        "something was sent again"
    );
    ok(client("qemu-io")
        .args(["-f", "raw", "-c", "write -P 4 1M 64k"])
        .arg(stack.uri("d0"))
        .output());
    stack.recover_and_compare("restarted");
}
