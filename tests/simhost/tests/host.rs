//! A host with VMs: started, killed, restarted, rebooted, stopped.
#![allow(clippy::unwrap_used)]

mod host_process;

use host_process::Host;
use serde_json::{Value, json};
use simhost::nbd::client::Op;
use std::path::Path;

#[test]
fn vms_are_processes_of_their_own() {
    let library = conformance::filter_library().unwrap();
    let mut host = Host::start();
    let boot = || std::fs::read_to_string(host.folder.path().join("run/boot-id")).unwrap();
    let first_boot = boot();
    let one = host.start_vm("one", &library, &[]);
    let two = host.start_vm("two", &library, &[]);
    assert_ne!(one["pid"], two["pid"]);
    assert!(
        one["pid"]
            .as_u64()
            .is_some_and(|pid| pid != u64::from(host.child.id()))
    );
    host.client("one")
        .call(&Op::Write(0, &[1; 512]), true)
        .unwrap();

    let twice = host.start_vm("one", &library, &[]);
    assert!(
        twice["error"].as_str().unwrap().contains("is running"),
        "{twice}"
    );
    let killed = host.obey(&json!({"cmd": "kill", "vm": "one"}));
    assert_eq!(
        (&killed["verdict"], &killed["signal"]),
        (&json!("killed"), &json!(9))
    );
    // The other one has noticed nothing.
    host.client("two")
        .call(&Op::Write(0, &[2; 512]), true)
        .unwrap();
    let again = host.obey(&json!({"cmd": "restart", "vm": "one"}));
    assert_ne!(again["pid"], one["pid"], "{again}");
    let data = host.client("one").call(&Op::Read(0, 512), false).unwrap();
    assert_eq!(data, [1; 512]);
    let stopped = host.obey(&json!({"cmd": "stop", "vm": "two"}));
    assert_eq!(stopped["verdict"], "clean", "{stopped}");

    let rebooted = host.obey(&json!({"cmd": "reboot"}));
    assert_eq!(rebooted["rebooted"], true, "{rebooted}");
    assert_ne!(boot(), first_boot);
    let listed = host.obey(&json!({"cmd": "list"}));
    let running = |vm: &Value| vm["running"] == true;
    assert!(
        !listed["vms"].as_array().unwrap().iter().any(running),
        "{listed}"
    );
    let after = host.obey(&json!({"cmd": "restart", "vm": "two"}));
    assert!(after["pid"].is_u64(), "{after}");
    assert_eq!(host.stop(), Some(0));
}

#[test]
fn a_power_cut_takes_what_no_flush_covered() {
    let folder = tempfile::tempdir().unwrap();
    let library = conformance::compile_filter("passfilter", folder.path()).unwrap();
    let mut host = Host::start();
    let run_dir = host.folder.path().join("run");
    let boot = || std::fs::read_to_string(run_dir.join("boot-id")).unwrap();
    let first_boot = boot();
    host.start_vm("one", &library, &["--volatile-cache"]);
    host.start_vm("two", &library, &[]);
    std::fs::write(run_dir.join("lane"), "in memory").unwrap();
    for vm in ["one", "two"] {
        let mut client = host.client(vm);
        client.call(&Op::Write(0, &[1; 4096]), false).unwrap();
        client.call(&Op::Flush, false).unwrap();
        client.call(&Op::Write(512, &[2; 512]), false).unwrap();
        client.call(&Op::Zero(1024, 512), false).unwrap();
    }
    // A killed process is no power cut: what it wrote is there.
    host.obey(&json!({"cmd": "restart", "vm": "one"}));
    let read = |vm: &str, at| host.client(vm).call(&Op::Read(at, 512), false).unwrap()[0];
    assert_eq!((read("one", 512), read("one", 1024)), (2, 0));
    let cut = host.obey(&json!({"cmd": "power-cut"}));
    assert_eq!(cut["lost"][0]["writes"], 2, "{cut}");
    assert_eq!(cut["lost"][1], Value::Null, "{cut}");
    assert_ne!(boot(), first_boot);
    assert!(!run_dir.join("lane").exists(), "the run folder is emptied");
    for vm in ["one", "two"] {
        host.obey(&json!({"cmd": "restart", "vm": vm}));
    }
    assert_eq!((read("one", 512), read("one", 1024)), (1, 1));
    assert_eq!((read("two", 512), read("two", 1024)), (2, 0), "no cache");
    let wrong = host.obey(&json!({"cmd": "power-cut", "keep": 2}));
    assert!(wrong["error"].as_str().unwrap().contains("keep"), "{wrong}");
    assert_eq!(host.stop(), Some(0));
}

#[test]
fn an_end_that_nobody_asked_for_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let library = conformance::compile_filter("badfilter", folder.path()).unwrap();
    let mut host = Host::start();
    host.start_vm(
        "bad",
        &library,
        &["--property=bad.how=wrong-verdict", "--strict"],
    );
    let _ = host.client("bad").call(&Op::Write(0, &[1; 512]), false);
    let event = host.next_event();
    assert_eq!(event["vm"], "bad");
    assert_eq!(event["what"]["verdict"], "contract broken", "{event}");
    assert_eq!(event["what"]["asked_for"], false, "{event}");
    // The host ends with a failure too: nobody can miss it.
    assert_eq!(host.stop(), Some(1));
}

#[test]
fn commands_that_cannot_be_obeyed_are_answered() {
    let mut host = Host::start();
    let missing = Path::new("/nonexistent/libfilter.so");
    for (answer, what) in [
        (host.obey(&json!({"cmd": "dance"})), "cmd is one of"),
        (host.obey(&json!([1, 2])), "cmd is one of"),
        (
            host.obey(&json!({"cmd": "stop", "vm": "none"})),
            "there is no VM",
        ),
        (host.obey(&json!({"cmd": "stop"})), "`vm` is missing"),
        (
            host.obey(&json!({"cmd": "start", "vm": "../x", "args": []})),
            "no name of a VM",
        ),
        (
            host.obey(&json!({"cmd": "start", "vm": "x"})),
            "`args` is missing",
        ),
        (
            host.obey(&json!({"cmd": "start", "vm": "x", "args": [1]})),
            "strings",
        ),
        (host.start_vm("y", missing, &[]), "did not get ready"),
    ] {
        let text = answer["error"].as_str().unwrap_or_default();
        assert!(text.contains(what), "{what}: {answer}");
    }
    assert_eq!(host.stop(), Some(0));
}
