//! Filters driven by a C host in memory: the filter library, and the reference filter in C.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};

/// Hosts of this version, of the oldest and of a later one.
const TABLES: [&str; 3] = ["full", "required", "larger"];

fn drive(program: &Path, library: &Path, tables: &str, properties: &[&str]) -> Output {
    let run_dir = tempfile::tempdir().unwrap();
    let seed = std::env::var("JETDR_SEED").unwrap_or_else(|_| "20260707".into());
    eprintln!("seed {seed} (JETDR_SEED), tables {tables}, {properties:?}");
    Command::new(program)
        .arg(library)
        .arg(run_dir.path())
        .args([tables, &seed])
        .args(properties)
        .output()
        .unwrap()
}

fn passes(program: &Path, library: &Path, tables: &str, properties: &[&str]) {
    let output = drive(program, library, tables, properties);
    let text = String::from_utf8_lossy(&output.stdout);
    let log = String::from_utf8_lossy(&output.stderr);
    let failed: Vec<&str> = text.lines().filter(|l| l.starts_with("not ok")).collect();
    assert!(
        output.status.success(),
        "{}: {failed:#?}\n{log}",
        output.status
    );
    // A driver that ended early has not said how many checks there were.
    assert!(text.contains("\n1.."), "{text}");
}

#[test]
fn the_filter_library_keeps_the_contract() {
    let folder = tempfile::tempdir().unwrap();
    let program = conformance::compile_driver(folder.path()).unwrap();
    let library = conformance::filter_library().unwrap();
    let properties = ["jetdr.domain=conformance", "jetdr.ring-bytes=2097152"];
    for tables in TABLES {
        passes(&program, &library, tables, &properties);
    }
}

#[test]
fn the_reference_filter_keeps_the_contract() {
    let folder = tempfile::tempdir().unwrap();
    let program = conformance::compile_driver(folder.path()).unwrap();
    let library = conformance::compile_filter("passfilter", folder.path()).unwrap();
    for tables in TABLES {
        for mode in ["pass", "defer", "hold", "early"] {
            passes(&program, &library, tables, &[&format!("pass.mode={mode}")]);
        }
    }
}

/// The driver is a check only if it fails: each of these filters breaks one rule.
#[test]
fn filters_that_break_the_contract_are_caught() {
    let folder = tempfile::tempdir().unwrap();
    let program = conformance::compile_driver(folder.path()).unwrap();
    let library = conformance::compile_filter("badfilter", folder.path()).unwrap();
    for (how, what) in [
        ("no-verdict", "io_start's verdict is none"),
        ("wrong-verdict", "io_start's verdict is none"),
        ("fail-without-status", "FAIL without a status"),
        (
            "continue-undeferred",
            "answered, and then got another verdict",
        ),
        (
            "continue-twice",
            "io_continue of an I/O that is not deferred",
        ),
        (
            "release-unheld",
            "io_release of a completion that is not held",
        ),
        ("done-completes", "io_done's verdict is neither"),
        ("done-no-verdict", "io_done's verdict is neither"),
        ("odd-sidecar", "not in multiples of 4096"),
        ("sidecar-left-open", "a sidecar is left open"),
        (
            "sidecar-in-io",
            "sidecar_open from a context that must not block",
        ),
        ("flush-in-io", "work_flush outside of a control call"),
        ("malformed-request", "submit of a malformed request"),
        ("submit-after-close", "submit on a disk that is not open"),
        ("heap-leak", "memory of the heap is left behind"),
        ("timer-left", "a timer is left running"),
    ] {
        let output = drive(&program, &library, "full", &[&format!("bad.how={how}")]);
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{how} was not noticed");
        assert!(log.contains(what), "{how}: {log}");
    }
}
