//! A host that crashes or boots loses its lanes and dirty maps. Afterwards only the regions that the
//! sidecar names are copied again; if the sidecar cannot be relied on, all of the disk is.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use support::{Numbers, Part, Stack, seed};

const MIB: u64 = 1 << 20;
const DISK: u64 = 128 * MIB;
/// Of the region map that the tests ask for.
const REGION: u64 = MIB;

fn stack(disk: &str) -> Stack {
    let mut stack = Stack::new(&[(disk, DISK)]);
    let file = match disk.strip_suffix(".vmdk") {
        Some(label) => stack.dir.path().join(format!("{label}-flat.vmdk")),
        None => stack.disks[0].1.clone(),
    };
    // Something is on the disk before it is protected.
    write(&file, 0, 96 * MIB, seed());
    for property in [
        format!("jetdr.region-bytes={REGION}"),
        "jetdr.region-quiet-ms=100".into(),
    ] {
        stack.vm_more.extend(["--property".into(), property]);
    }
    stack.start_drva();
    stack.start_daemon();
    stack.start_vm();
    stack.settle();
    stack
}

/// Bytes that follow from the seed.
fn bytes(len: u64, seed: u64) -> Vec<u8> {
    let mut numbers = Numbers(seed | 1);
    (0..len / 8)
        .flat_map(|_| numbers.next().to_le_bytes())
        .collect()
}

fn write(path: &Path, at: u64, len: u64, seed: u64) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(&bytes(len, seed), at).unwrap();
}

fn figure(stack: &Stack, name: &str) -> u64 {
    stack.vm_status()["disks"][0][name].as_u64().unwrap()
}

fn guest_writes(stack: &Stack, at: u64, len: u64) {
    let label = &stack.disks[0].0;
    let pattern = format!("write -P {} {at} {len}", at / MIB % 200 + 3);
    let mut qemu_io = support::client("qemu-io");
    let qemu_io = qemu_io.args(["-f", "raw", "-c", &pattern, &stack.uri(label)]);
    support::ok(qemu_io.output());
}

/// Every region is durable in the log, flushed, and known to be.
fn rest(stack: &Stack) {
    stack.settle();
    stack.wait("no region is in doubt", |stack| {
        figure(stack, "intent_bytes") == 0
    });
}

/// The host loses its power and boots: all of its processes are gone, and its run folder.
fn crash(stack: &mut Stack) {
    stack.vm.as_mut().unwrap().kill();
    stack.daemon.as_mut().unwrap().kill();
    stack.empty_run_folder();
}

/// The host is up again; what it has sent anew when the disk streams, in bytes.
fn come_back(stack: &mut Stack) -> u64 {
    stack.start_daemon();
    stack.start_vm();
    stack.settle();
    figure(stack, "synced_bytes")
}

#[test]
fn a_crash_costs_the_regions_that_were_written() {
    let mut stack = stack("disk0.raw");
    rest(&stack);
    stack.cut("before");
    // What is written shortly before the crash, and not even sent.
    stack.daemon.as_mut().unwrap().kill();
    guest_writes(&stack, 10 * MIB, MIB);
    guest_writes(&stack, 70 * MIB + 4096, 8192);
    assert_eq!(figure(&stack, "intent_bytes"), 2 * REGION);
    crash(&mut stack);
    // Of the second region one block differs: the replica holds the others.
    let block = 64 * 1024;
    assert_eq!(come_back(&mut stack), REGION + block);
    assert_eq!(figure(&stack, "held_bytes"), REGION - block);
    stack.recover_and_compare("after-crash");
    stack.assert_contract();
}

#[test]
fn a_boot_after_an_orderly_stop_costs_nothing() {
    for disk in ["disk0.raw", "disk0.vmdk"] {
        let mut stack = stack(disk);
        guest_writes(&stack, MIB, MIB);
        stack.vm.as_mut().unwrap().stop();
        stack.daemon.as_mut().unwrap().kill();
        stack.empty_run_folder();
        assert_eq!(come_back(&mut stack), 0, "{disk}");
        guest_writes(&stack, 2 * MIB, MIB);
        stack.recover_and_compare("after-boot");
    }
}

#[test]
fn a_crash_amid_the_first_sync_costs_what_was_left_of_it() {
    let mut stack = stack("disk0.raw");
    rest(&stack);
    // The whole content is replaced while nobody takes it: tracking, then a sync of it all.
    stack.daemon.as_mut().unwrap().kill();
    for at in (0..96).step_by(8) {
        guest_writes(&stack, at * MIB, 8 * MIB);
    }
    crash(&mut stack);
    stack.start_daemon();
    stack.start_vm();
    stack.wait("a good part is known to be durable", |stack| {
        figure(stack, "intent_bytes") < 60 * MIB
    });
    let left = figure(&stack, "intent_bytes");
    crash(&mut stack);
    let synced = come_back(&mut stack);
    assert!(
        synced + figure(&stack, "held_bytes") <= left,
        "{synced} synced, {left} were left"
    );
    stack.recover_and_compare("after-two");
}

/// The disk is opened without the filter, and a block is written.
fn write_behind(stack: &Stack, at: u64) {
    let path = stack.disks[0].1.display().to_string();
    let mut nbd = vec!["simhost".to_string(), "nbd".into(), "--disk".into(), path];
    let socket = stack.dir.path().join("behind.sock");
    nbd.extend(["--socket".into(), socket.display().to_string()]);
    let mut other = Part::start(&stack.log("behind"), &nbd);
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    let mut qemu_io = support::client("qemu-io");
    let pattern = format!("write -P 9 {at} 4096");
    support::ok(qemu_io.args(["-f", "raw", "-c", &pattern, &uri]).output());
    other.stop();
}

#[test]
fn a_disk_that_was_opened_without_the_filter_is_synced_in_full() {
    for (disk, crashed) in [
        ("disk0.raw", false),
        ("disk0.vmdk", false),
        ("disk0.vmdk", true),
    ] {
        let mut stack = stack(disk);
        rest(&stack);
        match crashed {
            true => crash(&mut stack),
            false => stack.vm.as_mut().unwrap().stop(),
        }
        write_behind(&stack, 33 * MIB);
        if crashed {
            stack.start_daemon();
        }
        stack.start_vm();
        stack.settle();
        assert_eq!(figure(&stack, "synced_bytes"), DISK, "{disk}");
        stack.recover_and_compare("after-all");
    }
}

/// The sidecar says what was found out at an opening before the old lane is replaced: a death in
/// between must not make the next opening go on in that lane.
#[test]
fn what_one_opening_found_out_the_next_one_knows_if_it_dies() {
    let mut stack = stack("disk0.raw");
    rest(&stack);
    stack.vm.as_mut().unwrap().stop();
    write_behind(&stack, 33 * MIB);
    // Each opening dies a write of the sidecar later than the one before, until one lives.
    for nth in 1.. {
        stack
            .vm_more
            .extend(["--kill-at".into(), format!("sidecar-after:{nth}")]);
        let mut vm = Part::spawn(&stack.log("vm"), &stack.vm_arguments());
        stack.vm_more.truncate(stack.vm_more.len() - 2);
        if vm.wait_ready() {
            assert!(nth > 2, "an opening writes the map and the header");
            stack.vm = Some(vm);
            break;
        }
        vm.child.wait().unwrap();
    }
    // What lived may have some writes to go before it dies, too.
    stack.vm.as_mut().unwrap().kill();
    stack.start_vm();
    stack.settle();
    stack.recover_and_compare("after-all");
}

#[test]
fn an_appliance_that_lost_its_log_gets_all_of_the_disk() {
    let mut stack = stack("disk0.raw");
    rest(&stack);
    crash(&mut stack);
    stack.drva.as_mut().unwrap().kill();
    std::fs::remove_dir_all(stack.dir.path().join("data")).unwrap();
    std::fs::remove_dir_all(stack.dir.path().join("store")).unwrap();
    stack.start_drva();
    assert_eq!(come_back(&mut stack), DISK);
    stack.recover_and_compare("anew");
}

/// Copies of a disk and of what lies beside it: what a snapshot of the storage below, or a backup, holds.
struct Aside {
    dir: tempfile::TempDir,
    files: Vec<PathBuf>,
}

impl Aside {
    fn copy(stack: &Stack) -> Self {
        let is_disk = |path: &PathBuf| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            name.starts_with("disk0")
        };
        let all = std::fs::read_dir(stack.dir.path()).unwrap();
        let files: Vec<_> = all
            .map(|entry| entry.unwrap().path())
            .filter(is_disk)
            .collect();
        assert!(files.len() >= 3, "descriptor, extent, sidecar: {files:?}");
        let dir = tempfile::tempdir_in(stack.dir.path()).unwrap();
        let aside = Self { dir, files };
        for file in &aside.files {
            std::fs::copy(file, aside.place(file)).unwrap();
        }
        aside
    }

    fn place(&self, file: &Path) -> PathBuf {
        self.dir.path().join(file.file_name().unwrap())
    }

    fn put_back(&self) {
        for file in &self.files {
            std::fs::copy(self.place(file), file).unwrap();
        }
    }
}

/// The disk and its sidecar as they were are put back.
#[test]
fn a_disk_that_was_rolled_back_with_its_sidecar_is_synced_in_full() {
    for booted in [false, true] {
        let mut stack = stack("disk0.vmdk");
        rest(&stack);
        stack.vm.as_mut().unwrap().stop();
        let aside = Aside::copy(&stack);
        stack.start_vm();
        stack.settle();
        assert_eq!(figure(&stack, "synced_bytes"), 0, "it adopts its lane");
        guest_writes(&stack, 40 * MIB, MIB);
        rest(&stack);
        stack.vm.as_mut().unwrap().stop();
        aside.put_back();
        if booted {
            stack.daemon.as_mut().unwrap().kill();
            stack.empty_run_folder();
            stack.start_daemon();
        }
        stack.start_vm();
        stack.wait("it was noticed", |stack| figure(stack, "epoch") == 3);
        stack.settle();
        assert!(figure(&stack, "synced_bytes") >= DISK);
        stack.recover_and_compare("rolled-back");
    }
}

/// What happens between the copy's return and the opening that the appliance hears of.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Between {
    /// The VM is killed alone, and its host goes on: the lane is there.
    Nothing,
    /// The host boots.
    Boot,
    /// It boots, and the disk is opened and written to while nothing reaches the appliance; it boots
    /// again.
    UnheardOpening,
}

/// The copy was made while the VM ran, and it has gone on in the same opening: neither a content id nor
/// an epoch tells the copy from the disk.
#[test]
fn a_disk_that_was_rolled_back_to_within_its_opening_is_synced_in_full() {
    for (between, epoch) in [
        (Between::Nothing, 2),
        (Between::Boot, 3),
        (Between::UnheardOpening, 4),
    ] {
        let mut stack = stack("disk0.vmdk");
        rest(&stack);
        guest_writes(&stack, 20 * MIB, MIB);
        let aside = Aside::copy(&stack);
        guest_writes(&stack, 40 * MIB, MIB); // a region of which the copy's map has no bit
        stack.settle();
        if between == Between::Nothing {
            stack.vm.as_mut().unwrap().kill();
        } else {
            crash(&mut stack);
        }
        aside.put_back();
        if between == Between::UnheardOpening {
            stack.start_vm();
            assert_eq!(figure(&stack, "epoch"), 2);
            for at in 50..60 {
                guest_writes(&stack, at * MIB, MIB);
            }
            stack.vm.as_mut().unwrap().kill();
            stack.empty_run_folder();
        }
        if between != Between::Nothing {
            stack.start_daemon();
        }
        stack.start_vm();
        stack.wait("it was noticed", |stack| figure(stack, "epoch") == epoch);
        stack.settle();
        assert!(figure(&stack, "synced_bytes") >= DISK, "{between:?}");
        stack.recover_and_compare("rolled-back");
        stack.assert_contract();
    }
}

/// The copy's map has every bit that it needs: its regions are read again, and nothing else.
#[test]
fn a_copy_that_lacks_no_bit_costs_its_regions() {
    let mut stack = stack("disk0.vmdk");
    rest(&stack);
    // Without a daemon nothing becomes durable, so no bit is cleared before the copy is made.
    stack.daemon.as_mut().unwrap().kill();
    guest_writes(&stack, 20 * MIB, MIB / 2);
    let aside = Aside::copy(&stack);
    guest_writes(&stack, 20 * MIB + MIB / 2, 4096);
    stack.start_daemon();
    stack.settle();
    crash(&mut stack);
    aside.put_back();
    let synced = come_back(&mut stack);
    assert_eq!(figure(&stack, "epoch"), 2, "nothing is wrong with it");
    assert!(synced <= REGION, "{synced}");
    stack.recover_and_compare("a-copy");
}
