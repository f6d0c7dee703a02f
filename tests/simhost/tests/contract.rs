//! The host's checks fire for each filter that breaks a rule, and for none that keeps them all.
#![allow(clippy::unwrap_used)]

mod vm_process;

use simhost::contract::EXIT_VIOLATION;
use simhost::nbd::client::Op;
use std::path::Path;
use vm_process::{End, start};

/// One write, and the end of the VM.
fn run(library: &Path, properties: &[&str], more: &[&str]) -> End {
    let mut args: Vec<String> = properties
        .iter()
        .map(|p| format!("--property={p}"))
        .collect();
    args.extend(more.iter().map(|a| a.to_string()));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut vm = start(library, &args);
    let mut client = vm.client();
    let _ = client.call(&Op::Write(4096, &[7; 4096]), false);
    client.disconnect();
    vm.stop()
}

#[test]
fn a_filter_that_keeps_the_contract_ends_well() {
    let folder = tempfile::tempdir().unwrap();
    let library = conformance::compile_filter("passfilter", folder.path()).unwrap();
    for mode in ["pass", "defer", "hold", "early"] {
        let mut vm = start(&library, &[&format!("--property=pass.mode={mode}")]);
        let mut client = vm.client();
        for i in 0..200u64 {
            let data = [i as u8; 4096];
            client
                .call(&Op::Write(i * 8192, &data), i % 7 == 0)
                .unwrap();
            let back = client.call(&Op::Read(i * 8192, 4096), false).unwrap();
            assert!(back == data, "{mode}: write {i}");
        }
        client.call(&Op::Zero(0, 65536), false).unwrap();
        client.call(&Op::Trim(65536, 65536), false).unwrap();
        client.call(&Op::Flush, false).unwrap();
        assert!(client.call(&Op::Read(1, 512), false).is_err(), "unaligned");
        client.disconnect();
        let end = vm.stop();
        assert_eq!(end.code, Some(0), "{mode}: {}", end.log);
    }
}

#[test]
fn filters_that_break_the_contract_are_caught() {
    let folder = tempfile::tempdir().unwrap();
    let library = conformance::compile_filter("badfilter", folder.path()).unwrap();
    let caught = [
        ("no-verdict", "io_start's verdict 0 is none"),
        ("wrong-verdict", "io_start's verdict 77 is none"),
        ("fail-without-status", "FAIL without a status"),
        ("continue-undeferred", "answered, and then passed"),
        ("continue-twice", "Continue of I/O"),
        ("complete-twice", "Complete of I/O"),
        ("release-unheld", "Release of I/O"),
        ("done-completes", "io_done's verdict 2 is not allowed"),
        ("done-no-verdict", "io_done's verdict 0 is not allowed"),
        ("odd-sidecar", "not in multiples of 4096"),
        ("sidecar-left-open", "a sidecar is open after close"),
        ("sidecar-in-io", "sidecar_open called from Io"),
        ("flush-in-io", "work_flush called outside of a control call"),
        ("malformed-request", "submit of a malformed request"),
        ("submit-after-close", "submit on a closed disk"),
        ("heap-leak", "blocks of memory"),
        ("timer-left", "timers run after close"),
    ];
    for (how, what) in caught {
        let end = run(&library, &[&format!("bad.how={how}")], &[]);
        assert_eq!(
            end.code,
            Some(EXIT_VIOLATION),
            "{how} was not noticed: {}",
            end.log
        );
        assert!(end.log.contains(what), "{how}: {}", end.log);
    }
    let good = run(&library, &["bad.how=nothing"], &[]);
    assert_eq!(good.code, Some(0), "{}", good.log);
}

/// The client goes away; the host ends what the filter never answers, and stops.
#[test]
fn an_io_that_is_never_answered_does_not_wedge_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let library = conformance::compile_filter("badfilter", folder.path()).unwrap();
    let mut vm = start(&library, &["--property=bad.how=never-answers"]);
    let mut client = vm.client();
    client.submit(&Op::Write(0, &[1; 512]), false).unwrap();
    // Answered in order by one thread: once the read is, the write has been handed to the filter.
    client.submit(&Op::Read(0, 512), false).unwrap();
    client.next_done().unwrap();
    client.disconnect();
    let end = vm.stop();
    assert_eq!(end.code, Some(EXIT_VIOLATION), "{}", end.log);
    assert!(end.log.contains("held without end"), "{}", end.log);
}

#[test]
fn a_strict_vm_ends_at_the_first_violation() {
    let folder = tempfile::tempdir().unwrap();
    let library = conformance::compile_filter("badfilter", folder.path()).unwrap();
    let mut vm = start(&library, &["--property=bad.how=wrong-verdict", "--strict"]);
    let mut client = vm.client();
    assert!(client.call(&Op::Write(0, &[1; 512]), false).is_err());
    let end = vm.end();
    assert_eq!(end.code, Some(EXIT_VIOLATION), "{}", end.log);
}

#[test]
fn what_is_no_filter_is_refused_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing.so");
    let text = folder.path().join("text.so");
    std::fs::write(&text, "not a library").unwrap();
    let empty = folder.path().join("empty.c");
    std::fs::write(&empty, "int unrelated;\n").unwrap();
    let other = folder.path().join("other.so");
    let empty = empty.to_str().unwrap();
    conformance::compile(&[], &[empty, "-fPIC", "-shared"], &other).unwrap();
    for (library, what) in [
        (&missing, "cannot load"),
        (&text, "cannot load"),
        (&other, "is not a filter"),
    ] {
        let failed = std::panic::catch_unwind(|| drop(start(library, &[])));
        let reason = failed.unwrap_err();
        let reason = reason.downcast_ref::<String>().unwrap();
        assert!(reason.contains(what), "{reason}");
    }
}

/// Writes in flight from several clients when the process is killed; then it starts again.
#[test]
fn a_killed_vm_starts_again() {
    let folder = tempfile::tempdir().unwrap();
    let library = conformance::compile_filter("passfilter", folder.path()).unwrap();
    let mut vm = start(&library, &["--property=pass.mode=defer"]);
    let mut clients: Vec<_> = (0..3).map(|_| vm.client()).collect();
    for client in &mut clients {
        client.call(&Op::Write(0, &[9; 512]), true).unwrap();
        for i in 0..16 {
            client
                .submit(&Op::Write(i * 512, &[9; 512]), false)
                .unwrap();
        }
    }
    vm.child.kill().unwrap();
    assert_eq!(vm.end().code, None);
    let folder = std::mem::replace(&mut vm.folder, tempfile::tempdir().unwrap());
    let mut vm = vm_process::start_in(folder, &library, &[]);
    let mut client = vm.client();
    assert_eq!(client.call(&Op::Read(0, 512), false).unwrap(), [9; 512]);
    client.disconnect();
    let end = vm.stop();
    assert_eq!(end.code, Some(0), "{}", end.log);
}
