//! From a real client's write to a recovered disk, through real processes.
#![allow(clippy::unwrap_used)]

#[path = "../recovery-store/tests/support/azurite.rs"]
mod azurite;
mod support;

use simhost::nbd::client::{Client, Op};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use support::{Stack, client, find, ok};

#[test]
fn nbdcopy_then_recover() {
    let stack = Stack::running(&[("d0.raw", 24 << 20)]);
    let source = stack.dir.path().join("source");
    let mut numbers = support::Numbers(support::seed());
    let bytes: Vec<u8> = (0..20 << 20).map(|_| numbers.next() as u8).collect();
    std::fs::write(&source, &bytes).unwrap();
    ok(client("nbdcopy").arg(&source).arg(stack.uri("d0")).output());
    stack.recover_and_compare("copied");
    let recovered = find(&stack.dir.path().join("recovered-copied"), "d0.raw");
    assert_eq!(
        &std::fs::read(recovered).unwrap()[..bytes.len()],
        &bytes[..]
    );
    stack.assert_contract();
}

#[test]
fn qemu_io_writes_zeros_and_discards_in_order() {
    let stack = Stack::running(&[("d0.raw", 16 << 20), ("d1.vmdk", 16 << 20)]);
    for label in ["d0", "d1"] {
        let mut io = client("qemu-io");
        io.args(["-f", "raw", "-c", "write -P 1 0 8M", "-c", "write -z 1M 1M"]);
        io.args([
            "-c",
            "discard 2M 1M",
            "-c",
            "write -P 2 1M 64k",
            "-c",
            "write -P 3 2560k 512",
        ]);
        io.args([
            "-c",
            "write -P 4 15M 1M",
            "-c",
            "flush",
            "-c",
            "read -P 2 1M 64k",
        ]);
        ok(io.arg(stack.uri(label)).output());
    }
    stack.recover_and_compare("first");
    // A second cut on top of the first: later data wins, the first cut stays as it was.
    let mut io = client("qemu-io");
    io.args(["-f", "raw", "-c", "write -P 9 0 4M"]);
    ok(io.arg(stack.uri("d0")).output());
    stack.recover_and_compare("second");
    let again = stack.dir.path().join("again").display().to_string();
    ok(Ok(stack.rocva(&[
        "recover", "--cut", "first", "--disk", "d0", "--out", &again,
    ])));
    let first = std::fs::read(find(again.as_ref(), "d0.raw")).unwrap();
    assert!(
        first[..1 << 20].iter().all(|byte| *byte == 1),
        "the first cut changed"
    );
    stack.assert_contract();
}

#[test]
fn fio_with_verification() {
    let stack = Stack::running(&[("d0.raw", 32 << 20)]);
    let mut fio = client("fio");
    fio.current_dir(stack.dir.path());
    fio.args([
        "--name=v",
        "--ioengine=nbd",
        "--rw=randwrite",
        "--bsrange=4k-64k",
        "--iodepth=16",
    ]);
    fio.args([
        "--size=32M",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
    ]);
    ok(fio.arg(format!("--uri={}", stack.uri("d0"))).output());
    stack.recover_and_compare("verified");
    stack.assert_contract();
}

/// The same path with Azure Blob as the store: each kind of client, a cut on top of a cut, and an older
/// cut afterwards.
#[test]
fn azure_blob_as_the_store() {
    let azurite = azurite::Azurite::start();
    let mut stack = Stack::new(&[("d0.raw", 24 << 20), ("d1.raw", 16 << 20)]);
    stack.store = azurite.container("end-to-end");
    stack.start_drva();
    stack.start_daemon();
    stack.start_vm();
    let source = stack.dir.path().join("source");
    let mut numbers = support::Numbers(support::seed());
    let bytes: Vec<u8> = (0..16 << 20).map(|_| numbers.next() as u8).collect();
    std::fs::write(&source, &bytes).unwrap();
    ok(client("nbdcopy").arg(&source).arg(stack.uri("d0")).output());
    stack.recover_and_compare("copied");
    let mut io = client("qemu-io");
    io.args(["-f", "raw", "-c", "write -P 7 1M 4M"]);
    io.args(["-c", "write -z 2M 1M", "-c", "discard 3M 512k"]);
    ok(io.arg(stack.uri("d0")).output());
    stack.recover_and_compare("patterns");
    let mut fio = client("fio");
    fio.current_dir(stack.dir.path());
    fio.args(["--name=v", "--ioengine=nbd", "--rw=randwrite", "--bs=16k"]);
    fio.args(["--iodepth=8", "--size=16M", "--verify=crc32c"]);
    fio.args(["--verify_fatal=1", "--verify_state_save=0"]);
    ok(fio.arg(format!("--uri={}", stack.uri("d1"))).output());
    stack.recover_and_compare("verified");
    let again = stack.dir.path().join("again").display().to_string();
    ok(Ok(stack.rocva(&[
        "recover", "--cut", "copied", "--disk", "d0", "--out", &again,
    ])));
    let first = std::fs::read(find(again.as_ref(), "d0.raw")).unwrap();
    assert!(first[..bytes.len()] == bytes, "the first cut changed");
    stack.assert_contract();
}

/// What is on the disk before it is protected is in the first cut.
#[test]
fn existing_content_is_synced() {
    let mut stack = Stack::new(&[("d0.raw", 16 << 20)]);
    let mut numbers = support::Numbers(support::seed());
    let mut bytes: Vec<u8> = (0..16 << 20).map(|_| numbers.next() as u8).collect();
    bytes[4 << 20..9 << 20].fill(0);
    std::fs::write(&stack.disks[0].1, &bytes).unwrap();
    stack.start_drva();
    stack.start_daemon();
    stack.start_vm();
    stack.recover_and_compare("initial");
}

/// A lane that is too small for the load: the disk tracks, syncs, streams again; nothing is lost.
#[test]
fn overload_falls_back_and_comes_back() {
    let mut stack = Stack::new(&[("d0.raw", 64 << 20)]);
    stack
        .vm_more
        .extend(["--property".into(), "jetdr.ring-bytes=2097152".into()]);
    stack.start_drva();
    stack.start_vm(); // no daemon: the lane fills
    let mut io = client("qemu-io");
    io.args(["-f", "raw", "-c", "write -P 5 0 8M"]); // more than the ring can ever hold at once
    for i in 0..32 {
        io.arg("-c")
            .arg(format!("write -P {} {}k 256k", i + 6, 512 + i * 256));
    }
    ok(io.arg(stack.uri("d0")).output());
    let status = stack.vm_status();
    assert_eq!(status["disks"][0]["state"], "tracking", "{status}");
    assert!(
        status["host_deferred_max_ns"].as_u64().unwrap_or(0) < 50_000_000,
        "{status}"
    );
    stack.start_daemon();
    stack.recover_and_compare("after");
    stack.assert_contract();
}

/// A write that the disk fails is an error for the guest, and the replica follows the disk.
#[test]
fn a_failed_write_is_synced_from_the_disk() {
    let mut stack = Stack::new(&[("d0.raw", 16 << 20)]);
    stack
        .vm_more
        .extend(["--fault-write".into(), "d0:1048576:65536:2".into()]);
    stack.start_drva();
    stack.start_daemon();
    stack.start_vm();
    stack.settle();
    let mut io = client("qemu-io");
    io.args([
        "-f",
        "raw",
        "-c",
        "write -P 5 1M 64k",
        "-c",
        "write -P 6 4M 64k",
    ]);
    let output = io.arg(stack.uri("d0")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("failed"),
        "the guest did not see the failure: {said}"
    );
    stack.recover_and_compare("failed");
}

#[test]
fn vmdk_recovery_is_what_qemu_reads() {
    let stack = Stack::running(&[("d0.raw", 16 << 20)]);
    let mut io = client("qemu-io");
    io.args([
        "-f",
        "raw",
        "-c",
        "write -P 1 1M 3M",
        "-c",
        "write -P 2 9M 64k",
    ]);
    ok(io.arg(stack.uri("d0")).output());
    stack.settle();
    stack.cut("vmdk");
    for (format, flat) in [("vmdk-flat", true), ("vmdk-stream", false)] {
        let out = stack.dir.path().join(format).display().to_string();
        ok(Ok(stack.rocva(&[
            "recover", "--cut", "vmdk", "--format", format, "--out", &out,
        ])));
        let vmdk = find(out.as_ref(), "d0.vmdk");
        let mut compare = client("qemu-img");
        compare
            .args(["compare", "-f", "vmdk", "-F", "raw"])
            .arg(&vmdk)
            .arg(&stack.disks[0].1);
        ok(compare.output());
        if !flat {
            ok(client("qemu-img")
                .args(["check", "-f", "vmdk"])
                .arg(&vmdk)
                .output());
        }
    }
}

/// A sync beside a guest looks at how late timers are, since an I/O that waits for a core is not seen by
/// the filter before it has it.
#[test]
fn a_sync_beside_a_guest_watches_timers() {
    let mut stack = Stack::new(&[("d0.raw", 24 << 20)]);
    let mut numbers = support::Numbers(support::seed());
    let bytes: Vec<u8> = (0..3 << 20)
        .flat_map(|_| numbers.next().to_le_bytes())
        .collect();
    std::fs::write(find(stack.dir.path(), "d0.raw"), &bytes).unwrap();
    // Half a lane, and the sync waits for the daemon.
    stack.start_vm();
    let mut client = Client::connect_unix(&stack.nbd_socket(), "d0").unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let reader = std::thread::spawn({
        let done = done.clone();
        move || {
            while !done.load(Relaxed) {
                client.call(&Op::Read(0, 4096), false).unwrap();
            }
        }
    });
    stack.start_drva();
    stack.start_daemon();
    stack.wait("the sync to end beside a reader", |stack| {
        stack.vm_status()["disks"][0]["state"] == "streaming"
    });
    done.store(true, Relaxed);
    reader.join().unwrap();
    let log = std::fs::read_to_string(stack.log("vm")).unwrap();
    let end = log
        .lines()
        .find(|line| line.contains("its pace at the end"));
    let late = end.and_then(|line| line.split_once("timers are ")?.1.split_once(" us late"));
    let late_us: u64 = late.expect(&log).0.parse().unwrap();
    assert!(late_us > 0, "{end:?}");
}
