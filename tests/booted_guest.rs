//! A booted guest loses its power while it writes with fsync: recovered disks mount, their file systems
//! are clean, and every file that was synced before the cut is whole.
#![allow(clippy::unwrap_used)]

mod support;

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use support::guest::{Files, Guest, compare, now_ns};
use support::{Numbers, Stack, client, find, ok, seed};

const CAPACITY: u64 = 64 << 20;

/// A cut and what it has to hold.
struct Marked {
    name: String,
    expected: Files,
}

/// A stack whose disk has a file system with a journal, and a guest that writes to it.
fn writing_guest() -> (Stack, Guest) {
    let mut stack = Stack::new(&[("d0.raw", CAPACITY)]);
    let mut mkfs = client("mkfs.ext4");
    mkfs.args(["-q", "-F", "-E", "lazy_itable_init=0", "-J", "size=4"]);
    ok(mkfs.arg(&stack.disks[0].1).output());
    // Cuts are being taken all the time: one that is asked for by name must not be that one.
    stack.cut_interval_ms = 20;
    stack.start_drva();
    stack.start_daemon();
    stack.start_vm();
    let guest = Guest::boot(stack.dir.path(), "write", &stack.uri("d0"));
    guest.wait_for_line("MOUNTED");
    stack.settle();
    (stack, guest)
}

/// Asks for named cuts while the guest writes; each has to hold what was reported before it was asked.
fn take_cuts(stack: &Stack, guest: &Guest, count: usize) -> Vec<(String, u64)> {
    let take = |number| {
        guest.wait_for_files(6);
        let (name, asked_ns) = (format!("c{number}"), now_ns());
        stack.cut(&name);
        (name, asked_ns)
    };
    (0..count).map(take).collect()
}

/// The newest cut in the store, and what it has to hold.
fn newest_cut(stack: &Stack, guest: &Guest) -> Marked {
    let listing = ok(Ok(stack.rocva(&["list", "--json"])));
    let listing: Value = serde_json::from_str(&listing).unwrap();
    let cuts = listing["cuts"].as_array().unwrap();
    let newest = cuts.iter().max_by_key(|cut| cut["cut"].as_u64()).unwrap();
    Marked {
        name: newest["cut"].to_string(),
        // The time at which it was asked for.
        expected: guest.expected(newest["time_ns"].as_u64().unwrap()),
    }
}

/// Recovers a cut; a copy of it has its journal replayed, and must be clean and hold what was synced.
fn check_cut(stack: &Stack, cut: &Marked) -> PathBuf {
    let out = stack.dir.path().join(format!("cut-{}", cut.name));
    let path = out.display().to_string();
    ok(Ok(
        stack.rocva(&["recover", "--cut", &cut.name, "--out", &path])
    ));
    let recovered = find(&out, "d0.raw");
    let copy = out.join("replayed");
    std::fs::copy(&recovered, &copy).unwrap();
    let held = replay_and_read(&copy);
    let whole = compare(&format!("cut {}", cut.name), &cut.expected, &held);
    println!("cut {}: {whole} synced files are whole", cut.name);
    assert!(whole > 0);
    recovered
}

/// Replays the journal of an image, checks that it is clean, and hashes its files.
fn replay_and_read(image: &Path) -> BTreeMap<String, String> {
    let replay = client("e2fsck")
        .args(["-y", "-E", "journal_only"])
        .arg(image)
        .output();
    let replay = replay.unwrap();
    // 1: something was corrected, and that is the journal.
    assert!(matches!(replay.status.code(), Some(0 | 1)), "{replay:?}");
    assert_clean(image);
    let files = image.with_extension("files");
    std::fs::create_dir(&files).unwrap();
    let mut debugfs = client("debugfs");
    debugfs
        .arg("-R")
        .arg(format!("rdump / {}", files.display()));
    ok(debugfs.arg(image).output());
    let mut held = BTreeMap::new();
    for entry in std::fs::read_dir(&files).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_file() && !name.contains('.') {
            let sum = ok(client("sha256sum").arg(entry.path()).output());
            held.insert(name, sum.split(' ').next().unwrap().to_string());
        }
    }
    held
}

fn assert_clean(image: &Path) {
    ok(client("e2fsck").args(["-f", "-n"]).arg(image).output());
}

/// A guest mounts a disk, replays its journal itself and reads all.
fn check_in_a_guest(stack: &Stack, what: &str, disk: &str, expected: &Files) {
    let mut guest = Guest::boot(stack.dir.path(), "check", disk);
    let held = guest.held();
    let whole = compare(what, expected, &held);
    println!("{what}: mounted by a guest, {whole} synced files are whole");
    guest.wait_for_end();
    assert!(whole > 0);
}

/// Cuts the power in the middle of writing, by what `off` takes away; then recovered disks and the
/// primary are looked at.
fn power_cut(off: impl FnOnce(&mut Stack)) {
    let mut numbers = Numbers(seed());
    let (mut stack, mut guest) = writing_guest();
    let asked = take_cuts(&stack, &guest, 4);
    guest.wait_for_files(8 + ((numbers.next() >> 40) % 8) as usize);
    let before_ns = now_ns();
    guest.cut_power();
    off(&mut stack);
    // At the store alone: the newest cut, and an earlier one by chance.
    let newest = newest_cut(&stack, &guest);
    let recovered = check_cut(&stack, &newest);
    check_in_a_guest(
        &stack,
        "the newest cut",
        &recovered.display().to_string(),
        &newest.expected,
    );
    assert_clean(&recovered);
    let (name, asked_ns) = asked[((numbers.next() >> 40) % 4) as usize].clone();
    let expected = guest.expected(asked_ns);
    check_cut(&stack, &Marked { name, expected });
    // At the primary, after the restart: under the filter again.
    restart(&mut stack);
    check_in_a_guest(
        &stack,
        "the primary",
        &stack.uri("d0"),
        &guest.expected(before_ns),
    );
    stack.recover_and_compare("after");
    assert_clean(&stack.disks[0].1);
    stack.assert_contract();
}

/// Starts what was killed, as a host does: the appliance may come last.
fn restart(stack: &mut Stack) {
    if stack.drva.is_none() {
        stack.start_drva();
    }
    if stack.daemon.is_none() {
        stack.start_daemon();
    }
    stack.start_vm();
}

#[test]
fn a_guest_and_its_vm_lose_their_power() {
    power_cut(|stack| stack.vm.as_mut().unwrap().kill());
}

#[test]
fn everything_loses_its_power() {
    power_cut(|stack| {
        for part in [&mut stack.vm, &mut stack.daemon, &mut stack.drva] {
            part.take().unwrap().kill();
        }
    });
}
