//! What happens to a protected disk besides writes: snapshots, clones, growth, trims, failed writes. Each
//! through the simulated host, with the real filter, daemon and appliance.
#![allow(clippy::unwrap_used)]

mod support;

use serde_json::{Value, json};
use support::{Part, Stack};

const MIB: u64 = 1 << 20;
const DISK: u64 = 64 * MIB;

fn stack(more: &[&str]) -> Stack {
    let mut stack = Stack::new(&[("disk0.vmdk", DISK)]);
    stack
        .vm_more
        .push("--property=jetdr.region-quiet-ms=100".into());
    stack
        .vm_more
        .extend(more.iter().map(|text| (*text).to_string()));
    stack.start_drva();
    stack.start_daemon();
    stack.start_vm();
    stack.settle();
    stack
}

fn qemu_io(stack: &Stack, commands: &[&str]) -> std::process::Output {
    let mut qemu_io = support::client("qemu-io");
    qemu_io.args(["-f", "raw", "-d", "unmap"]);
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    qemu_io.arg(stack.uri("disk0")).output().unwrap()
}

fn guest(stack: &Stack, commands: &[&str]) {
    support::ok(Ok(qemu_io(stack, commands)));
}

fn obey(stack: &Stack, command: Value) -> Value {
    let answer = stack.command("vm.sock", &command);
    assert!(answer.get("error").is_none(), "{command}: {answer}");
    answer
}

fn figure(stack: &Stack, name: &str) -> u64 {
    stack.vm_status()["disks"][0][name].as_u64().unwrap()
}

#[test]
fn a_snapshot_and_its_consolidation_cost_nothing() {
    let stack = stack(&[]);
    guest(&stack, &["write -P 1 0 1M"]);
    stack.settle();
    let before = figure(&stack, "synced_bytes");
    obey(&stack, json!({"cmd": "snapshot"}));
    guest(&stack, &["write -P 2 512k 1M"]);
    let second = obey(&stack, json!({"cmd": "snapshot"}));
    guest(&stack, &["write -P 3 1M 256k"]);
    stack.recover_and_compare("on-snapshots");
    obey(&stack, json!({"cmd": "consolidate", "id": second["id"]}));
    obey(&stack, json!({"cmd": "consolidate"}));
    guest(&stack, &["write -P 4 2M 256k"]);
    stack.recover_and_compare("consolidated");
    assert_eq!(
        figure(&stack, "synced_bytes"),
        before,
        "the content stayed as it was"
    );
    stack.assert_contract();
}

#[test]
fn a_revert_is_followed_by_a_sync_of_everything() {
    for crash in [false, true] {
        let mut stack = stack(&[]);
        guest(&stack, &["write -P 1 0 8M"]);
        stack.settle();
        let taken = obey(&stack, json!({"cmd": "snapshot"}));
        guest(&stack, &["write -P 2 0 16M"]);
        stack.settle();
        let before = figure(&stack, "synced_bytes");
        obey(&stack, json!({"cmd": "revert", "id": taken["id"]}));
        if crash {
            // Before the sync gets far the host is gone: the sidecar must know of the revert.
            stack.vm.as_mut().unwrap().kill();
            stack.daemon.as_mut().unwrap().kill();
            stack.empty_run_folder();
            stack.start_daemon();
            stack.start_vm();
            stack.settle();
            let read = figure(&stack, "synced_bytes") + figure(&stack, "held_bytes");
            assert!(read > 0, "the revert was forgotten");
        } else {
            stack.settle();
            assert!(figure(&stack, "synced_bytes") >= before + DISK);
        }
        stack.recover_and_compare("reverted");
        guest(&stack, &["read -P 1 0 8M", "read -P 0 8M 8M"]);
        stack.assert_contract();
    }
}

#[test]
fn a_snapshot_that_is_put_back_while_the_vm_is_off_is_noticed() {
    for boot in [false, true] {
        let mut stack = stack(&[]);
        guest(&stack, &["write -P 1 0 8M"]);
        stack.settle();
        let taken = obey(&stack, json!({"cmd": "snapshot"}));
        if boot {
            // Of an earlier opening: what the sidecar says of the present one the lane knew, which is gone.
            stack.vm.as_mut().unwrap().stop();
            stack.start_vm();
        }
        guest(&stack, &["write -P 2 0 16M"]);
        stack.settle();
        stack.vm.as_mut().unwrap().stop();
        if boot {
            stack.daemon.as_mut().unwrap().kill();
            stack.empty_run_folder();
            stack.start_daemon();
        }
        let path = stack.disks[0].1.display().to_string();
        let mut back = std::process::Command::new(env!("CARGO_BIN_EXE_jetdr"));
        back.args(["simhost", "snapshot", "revert", "--disk", &path, "--id"]);
        support::ok(back.arg(taken["id"].to_string()).output());
        stack.start_vm();
        // It may be found out by the sidecar at once, or by the appliance a moment later.
        stack.wait("everything was read", |stack| {
            figure(stack, "synced_bytes") + figure(stack, "held_bytes") >= DISK
        });
        stack.recover_and_compare("put-back");
        guest(&stack, &["read -P 1 0 8M", "read -P 0 8M 8M"]);
    }
}

#[test]
fn a_clone_is_a_disk_of_its_own() {
    let mut stack = stack(&[]);
    guest(&stack, &["write -P 1 0 8M"]);
    let to = stack.dir.path().join("copy.vmdk");
    obey(&stack, json!({"cmd": "clone", "disk": "disk0", "to": to}));
    guest(&stack, &["write -P 2 4M 1M"]);
    stack.recover_and_compare("original");
    // The copy runs in a VM of its own, at the same time, in the same domain.
    let mut arguments = vec![
        "simhost".to_string(),
        "vm".into(),
        "--name".into(),
        "two".into(),
    ];
    let disk = format!("copy={}", to.display());
    for (key, value) in [
        ("--run-dir", stack.run.path().display().to_string()),
        (
            "--nbd-socket",
            stack.run.path().join("two.sock").display().to_string(),
        ),
        (
            "--control-socket",
            stack.run.path().join("two-vm.sock").display().to_string(),
        ),
        ("--domain", support::DOMAIN.to_string()),
        ("--disk", disk),
    ] {
        arguments.extend([key.to_string(), value]);
    }
    let _two = Part::start(&stack.log("vm-two"), &arguments);
    stack.wait("the copy is synced in full, and streams", |stack| {
        let status = stack.command("two-vm.sock", &json!({"cmd": "status"}));
        let disk = &status["disks"][0];
        let durable = disk["published_seq"] == disk["durable_seq"];
        disk["state"] == "streaming" && durable && disk["synced_bytes"] == DISK
    });
    stack.disks.push(("copy".into(), to));
    stack.recover_and_compare("both");
}

#[test]
fn a_disk_that_grows_keeps_its_cuts() {
    let stack = stack(&[]);
    guest(&stack, &["write -P 1 0 8M"]);
    stack.recover_and_compare("small");
    obey(
        &stack,
        json!({"cmd": "grow", "disk": "disk0", "capacity_bytes": DISK * 2}),
    );
    guest(&stack, &[&format!("write -P 7 {} 4M", DISK + MIB)]);
    stack.recover_and_compare("large");
    // The cut from before is as it was.
    let out = stack.dir.path().join("small-again");
    let path = out.display().to_string();
    support::ok(Ok(
        stack.rocva(&["recover", "--cut", "small", "--out", &path])
    ));
    let recovered = support::find(&out, "disk0.raw");
    assert_eq!(std::fs::metadata(recovered).unwrap().len(), DISK);
    stack.assert_contract();
}

#[test]
fn trims_and_zeroes_keep_their_place_among_writes() {
    let stack = stack(&[]);
    let before = figure(&stack, "synced_bytes");
    for round in 0..8 {
        guest(
            &stack,
            &[
                &format!("write -P {} 0 1M", round + 1),
                "discard 256k 256k",
                &format!("write -P {} 384k 16k", round + 20),
                "write -z 512k 128k",
                &format!("write -P {} 530k 4k", round + 40),
                "write -z -u 768k 128k",
            ],
        );
        // Else the lane may fill on a busy machine: this is about order, not about overload.
        stack.settle();
    }
    stack.recover_and_compare("trimmed");
    assert_eq!(
        figure(&stack, "synced_bytes"),
        before,
        "all of it as records, in order"
    );
    stack.assert_contract();
}

#[test]
fn a_failed_write_is_made_up_for() {
    let stack = stack(&[
        "--fault",
        "what=write,do=tear,disk=disk0,offset_bytes=1048576,len_bytes=65536,count=3",
    ]);
    guest(&stack, &["write -P 1 0 512k"]);
    for _ in 0..3 {
        let failed = qemu_io(&stack, &["write -P 9 1M 64k"]);
        assert!(!failed.status.success(), "the disk's error is the guest's");
    }
    stack.recover_and_compare("torn");
    guest(&stack, &["write -P 2 1M 64k"]);
    stack.recover_and_compare("whole");
    stack.assert_contract();
}
