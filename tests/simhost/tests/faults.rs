//! Faults below the filter, on request: in a VM's process, with a guest that looks at what comes of them.
#![allow(clippy::unwrap_used)]

mod vm_process;

use simhost::nbd::client::Op;
use std::path::{Path, PathBuf};
use vm_process::{Vm, command, start, start_in, try_start_in};

fn event_filter(folder: &Path) -> PathBuf {
    conformance::compile_filter("eventfilter", folder).unwrap()
}

fn disk_of(vm: &Vm) -> Vec<u8> {
    std::fs::read(vm.folder.path().join("disk0.img")).unwrap()
}

/// How many sectors of the first so many hold this byte throughout.
fn sectors(disk: &[u8], of: usize, fill: u8) -> usize {
    let sectors = disk.chunks(512).take(of);
    sectors.filter(|s| s.iter().all(|b| *b == fill)).count()
}

#[test]
fn a_torn_write_leaves_old_and_new_sectors() {
    let folder = tempfile::tempdir().unwrap();
    let library = event_filter(folder.path());
    let mut vm = start(&library, &["--fault-seed=11"]);
    let mut client = vm.client();
    client.call(&Op::Write(0, &[1; 65536]), false).unwrap();
    let asked = command(
        &vm,
        r#"{"cmd":"fault","what":"write","do":"tear","count":1}"#,
    );
    assert_eq!(asked["id"], 1, "{asked}");
    assert!(client.call(&Op::Write(0, &[2; 65536]), false).is_err());
    let disk = disk_of(&vm);
    let (old, new) = (sectors(&disk, 128, 1), sectors(&disk, 128, 2));
    assert!(
        old > 0 && new > 0 && old + new == 128,
        "{old} old, {new} new"
    );
    client.call(&Op::Write(0, &[3; 65536]), false).unwrap();
    let listed = command(&vm, r#"{"cmd":"faults"}"#);
    assert_eq!(listed["seed"], 11, "{listed}");
    assert_eq!(listed["faults"][0]["struck"], 1, "{listed}");
    // Zeros can be torn too.
    command(
        &vm,
        r#"{"cmd":"fault","what":"write","do":"tear","count":1}"#,
    );
    assert!(client.call(&Op::Zero(0, 65536), false).is_err());
    let disk = disk_of(&vm);
    let (old, new) = (sectors(&disk, 128, 3), sectors(&disk, 128, 0));
    assert!(
        old > 0 && new > 0 && old + new == 128,
        "{old} old, {new} new"
    );
    client.disconnect();
    assert_eq!(vm.stop().code, Some(0));
}

#[test]
fn a_process_dies_in_the_middle_of_a_write() {
    let folder = tempfile::tempdir().unwrap();
    let library = event_filter(folder.path());
    let torn = "--fault=what=write,do=tear-kill,offset_bytes=65536,len_bytes=65536";
    let mut vm = start(&library, &[torn, "--fault-seed=5"]);
    let mut client = vm.client();
    client.call(&Op::Write(0, &[1; 65536]), false).unwrap();
    assert!(client.call(&Op::Write(65536, &[2; 65536]), false).is_err());
    assert_eq!(vm.end().code, None, "killed");
    let disk = disk_of(&vm);
    assert_eq!(sectors(&disk, 128, 1), 128);
    let new = sectors(&disk, 256, 2);
    assert!(new > 0 && new < 128, "{new}");
}

#[test]
fn points_of_a_write_are_where_they_say() {
    let folder = tempfile::tempdir().unwrap();
    let library = event_filter(folder.path());
    for (point, landed) in [("io-started", 0), ("io-written", 8)] {
        let mut vm = start(&library, &[&format!("--kill-at={point}:3")]);
        let mut client = vm.client();
        for i in 0..2u64 {
            client.call(&Op::Write(i << 16, &[9; 4096]), false).unwrap();
        }
        assert!(client.call(&Op::Write(2 << 16, &[9; 4096]), false).is_err());
        let end = vm.end();
        assert_eq!(end.code, None, "{point}: {}", end.log);
        assert!(end.log.contains(point), "{}", end.log);
        let third = &disk_of(&vm)[2 << 16..];
        assert_eq!(sectors(third, 8, 9), landed, "{point}");
    }
}

/// What a sidecar holds, and whether all of it is of one write.
fn sidecar(folder: &Path) -> (u64, bool) {
    let bytes = std::fs::read(folder.join("disk0-0000006576656e74.vmfd")).unwrap();
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let whole = (0..4096).step_by(8).all(|at| word(at) == word(0));
    (word(0), whole)
}

#[test]
fn points_and_tears_of_a_sidecar_are_where_they_say() {
    let compiled = tempfile::tempdir().unwrap();
    let library = event_filter(compiled.path());
    // The filter's first write at an open is its only one.
    for (how, holds, whole) in [
        ("--kill-at=sidecar-before", 1, true),
        ("--kill-at=sidecar-after", 2, true),
        ("--fault=what=sidecar,do=tear-kill", 0, false),
        ("--kill-at=open-before", 1, true),
        ("--kill-at=open-after", 2, true),
    ] {
        let mut vm = start(&library, &[]);
        assert_eq!(vm.stop().code, Some(0));
        let folder = std::mem::replace(&mut vm.folder, tempfile::tempdir().unwrap());
        assert_eq!(sidecar(folder.path()), (1, true));
        let (mut vm, line) = try_start_in(folder, &library, &[how, "--fault-seed=2"]);
        let end = vm.end();
        assert_eq!((line.as_str(), end.code), ("", None), "{how}: {}", end.log);
        let (found, is_whole) = sidecar(vm.folder.path());
        assert_eq!(is_whole, whole, "{how}");
        assert!(!whole || found == holds, "{how}: {found}");
        // And it starts again.
        let folder = std::mem::replace(&mut vm.folder, tempfile::tempdir().unwrap());
        assert_eq!(
            start_in(folder, &library, &[]).stop().code,
            Some(0),
            "{how}"
        );
    }
}

#[test]
fn a_sidecar_that_cannot_be_written_is_told_to_the_filter() {
    let compiled = tempfile::tempdir().unwrap();
    let library = event_filter(compiled.path());
    let how = "--fault=what=sidecar,do=fail";
    let (mut vm, line) = try_start_in(tempfile::tempdir().unwrap(), &library, &[how]);
    assert_eq!(line, "");
    let end = vm.end();
    assert_eq!(end.code, Some(1), "{}", end.log);
    assert!(end.log.contains("refuses to open"), "{}", end.log);
}

#[test]
fn a_close_can_be_the_end() {
    let compiled = tempfile::tempdir().unwrap();
    let library = event_filter(compiled.path());
    for point in ["close-before", "close-after"] {
        let mut vm = start(&library, &[]);
        let armed = command(&vm, &format!(r#"{{"cmd":"kill-at","point":"{point}"}}"#));
        assert_eq!(armed["armed"], point);
        assert_eq!(vm.stop().code, None, "{point}");
    }
}

#[test]
fn a_delay_delays() {
    let compiled = tempfile::tempdir().unwrap();
    let library = event_filter(compiled.path());
    let vm = start(
        &library,
        &["--fault=what=flush,do=delay,delay_us=300000,count=1"],
    );
    let mut client = vm.client();
    let time = |client: &mut simhost::nbd::client::Client| {
        let from = std::time::Instant::now();
        client.call(&Op::Flush, false).unwrap();
        from.elapsed().as_millis()
    };
    assert!(time(&mut client) >= 300);
}

#[test]
fn what_is_no_fault_is_refused_by_flag_and_by_command() {
    let compiled = tempfile::tempdir().unwrap();
    let library = event_filter(compiled.path());
    for (flag, what) in [
        ("--fault=what=disk,do=fail", "unknown variant `disk`"),
        ("--kill-at=somewhere", "there is no point `somewhere`"),
        ("--fault-write=disk0:1", "expected LABEL:OFFSET"),
    ] {
        let (mut vm, _) = try_start_in(tempfile::tempdir().unwrap(), &library, &[flag]);
        let end = vm.end();
        assert!(end.log.contains(what), "{flag}: {}", end.log);
    }
    let vm = start(&library, &[]);
    for (asked, what) in [
        (
            r#"{"cmd":"fault","what":"disk","do":"fail"}"#,
            "unknown variant `disk`",
        ),
        (r#"{"cmd":"kill-at","point":"x"}"#, "known are open-before"),
        (
            r#"{"cmd":"grow","disk":"none","capacity_bytes":1}"#,
            "labelled `none`",
        ),
        (r#"{"cmd":"dance"}"#, "cmd is one of"),
    ] {
        let answer = command(&vm, asked);
        let error = answer["error"].as_str().unwrap_or_default();
        assert!(error.contains(what), "{asked}: {answer}");
    }
}
