//! A disk that is opened without a lane of its own: its guest runs, nothing of it is replicated, and no cut says
//! otherwise, whatever an earlier opening has left on the host.
#![allow(clippy::unwrap_used)]

mod support;

use serde_json::json;
use std::path::Path;
use support::{DOMAIN, Stack, client, ok, seed};

const DISK: u64 = 8 << 20;

fn write(stack: &Stack, pattern: u8) {
    let command = format!("write -P {pattern} 0 64k");
    let mut qemu_io = client("qemu-io");
    let uri = stack.uri("disk0");
    ok(qemu_io.args(["-f", "raw", "-c", &command, &uri]).output());
}

fn figure(stack: &Stack, name: &str) -> u64 {
    stack.domain()[name].as_u64().unwrap()
}

#[test]
fn no_cut_is_closed_over_a_disk_whose_lane_could_not_be_made() {
    seed();
    let mut stack = Stack::running(&[("disk0.raw", DISK)]);
    write(&stack, 1);
    stack.settle();
    stack.vm.as_mut().unwrap().stop();
    stack.cut("closed-in-order"); // it stands where it stands

    let before = stack.vm_more.len();
    let too_small = "jetdr.ring-bytes=1";
    stack
        .vm_more
        .extend(["--property".into(), too_small.into()]);
    stack.start_vm();
    write(&stack, 2);
    let log = std::fs::read_to_string(stack.log("vm")).unwrap();
    assert!(log.contains("not replicated"), "{log}");
    // A cut that is asked for meanwhile waits until the disk is replicated again.
    let void = figure(&stack, "cuts_void");
    let asked = json!({"cmd": "cut", "domain": DOMAIN, "name": "again"});
    let socket = stack.run.path().join("drva.sock");
    let waiting = std::thread::spawn(move || support::site::ask(&socket, &asked));
    stack.wait("a void cut", |stack| figure(stack, "cuts_void") > void);
    assert!(!waiting.is_finished());

    // The next opening that can replicate copies all of it.
    stack.vm.as_mut().unwrap().stop();
    stack.vm_more.truncate(before);
    stack.start_vm();
    stack.settle();
    let answer = waiting.join().unwrap();
    assert!(answer["cut"].is_u64(), "{answer}");
    stack.compare_cut("again", Path::to_owned);
}
