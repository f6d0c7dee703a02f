//! Snapshots, copies and growth of open disks: the order in which the filter is told, and the content.
#![allow(clippy::unwrap_used)]

mod vm_process;

use simhost::nbd::client::Op;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vm_process::{Vm, command, start, start_in, try_start_in};

struct Events {
    folder: tempfile::TempDir,
    library: PathBuf,
}

impl Events {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let library = conformance::compile_filter("eventfilter", folder.path()).unwrap();
        Self { folder, library }
    }

    fn log(&self) -> String {
        format!(
            "--property=event.log={}",
            self.folder.path().join("log").display()
        )
    }

    fn start(&self, more: &[&str]) -> Vm {
        let log = self.log();
        let mut all = vec![log.as_str()];
        all.extend(more);
        start(&self.library, &all)
    }

    /// What one disk's filter was told; the host must not have erred.
    fn told(&self, label: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.folder.path().join("log")).unwrap();
        assert!(!text.contains("BROKEN"), "{text}");
        let own = text.lines().filter_map(|line| line.strip_prefix(label));
        own.map(|line| line.trim().to_string()).collect()
    }
}

/// The calls after the open.
fn calls(told: &[String]) -> Vec<&str> {
    let calls = told.iter().map(String::as_str);
    calls.filter(|call| !call.contains('=')).collect()
}

/// Writes of a guest that goes on whatever happens; each must succeed.
struct Load {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<u64>>,
}

impl Load {
    fn start(vm: &Vm) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (mut client, until) = (vm.client(), stop.clone());
        let run = move || {
            let mut done = 0;
            while !until.load(Ordering::Relaxed) {
                for i in 0..8u64 {
                    let at = (2 << 20) + i * 4096;
                    client
                        .submit(&Op::Write(at, &[done as u8; 4096]), false)
                        .unwrap();
                }
                for _ in 0..8 {
                    assert_eq!(client.next_done().unwrap().error, 0);
                }
                done += 1;
            }
            done
        };
        Self {
            stop,
            thread: Some(std::thread::spawn(run)),
        }
    }

    fn finish(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

fn write(vm: &Vm, fill: u8) {
    vm.client()
        .call(&Op::Write(0, &[fill; 4096]), false)
        .unwrap();
}

fn read(vm: &Vm) -> u8 {
    vm.client().call(&Op::Read(0, 4096), false).unwrap()[0]
}

#[test]
fn snapshots_of_a_running_vm_come_in_order() {
    let events = Events::new();
    for hold in [None, Some("--property=event.hold=1")] {
        let _ = std::fs::remove_file(events.folder.path().join("log"));
        let mut vm = events.start(&hold.into_iter().collect::<Vec<_>>());
        let load = Load::start(&vm);
        for fill in 1..=3u8 {
            write(&vm, fill);
            let made = command(&vm, r#"{"cmd":"snapshot"}"#);
            assert_eq!(made["id"], fill, "{made}");
        }
        for back in [1u8, 3, 2] {
            let reverted = command(&vm, &format!(r#"{{"cmd":"revert","id":{back}}}"#));
            assert_eq!(reverted["id"], back, "{reverted}");
            assert_eq!(read(&vm), back);
        }
        command(&vm, r#"{"cmd":"consolidate","id":1}"#);
        let left = command(&vm, r#"{"cmd":"snapshots"}"#);
        assert_eq!(left["disks"][0]["current"], 2, "{left}");
        command(&vm, r#"{"cmd":"consolidate"}"#);
        assert_eq!(read(&vm), 2);
        assert!(load.finish() > 0);
        assert_eq!(vm.stop().code, Some(0));
        let told = events.told("disk0");
        let event = |name: &str| {
            let both = ["pre", "post"].map(|phase| format!("snapshot-{name}-{phase}"));
            let mut all = vec!["stun".to_string()];
            all.extend(both);
            all.push("unstun".into());
            all
        };
        let names = ["create", "create", "create", "revert", "revert", "revert"];
        let mut expected: Vec<String> = names.into_iter().flat_map(event).collect();
        expected.extend(event("consolidate"));
        expected.extend(event("consolidate"));
        assert_eq!(calls(&told), expected);
        assert!(!vm.folder.path().join("disk0.img.snapshots/1").exists());
    }
}

#[test]
fn the_sidecar_goes_back_with_the_content() {
    let events = Events::new();
    let mut vm = events.start(&[]);
    command(&vm, r#"{"cmd":"snapshot"}"#);
    assert_eq!(vm.stop().code, Some(0));
    let folder = std::mem::replace(&mut vm.folder, tempfile::tempdir().unwrap());
    // The second opening; the filter's stun writes that down before the content goes back.
    let mut vm = start_in(folder, &events.library, &[&events.log()]);
    let sidecar = vm.folder.path().join("disk0-0000006576656e74.vmfd");
    assert_eq!(std::fs::read(&sidecar).unwrap()[0], 2);
    command(&vm, r#"{"cmd":"revert","id":1}"#);
    assert_eq!(std::fs::read(&sidecar).unwrap()[0], 1);
    assert_eq!(vm.stop().code, Some(0));
    assert_eq!(
        std::fs::read(&sidecar).unwrap()[0],
        2,
        "the close wrote it anew"
    );
}

#[test]
fn what_did_not_happen_is_cancelled_for_those_that_had_agreed() {
    let events = Events::new();
    let second = events.folder.path().join("disk1.img");
    std::fs::File::create(&second)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let disk = format!("--disk=disk1={}", second.display());
    let mut vm = events.start(&[&disk]);
    let answer = command(&vm, r#"{"cmd":"revert","id":7}"#);
    let error = answer["error"].as_str().unwrap();
    assert!(error.contains("has no snapshot 7"), "{answer}");
    write(&vm, 1);
    assert_eq!(vm.stop().code, Some(0));
    for label in ["disk0", "disk1"] {
        let expected = [
            "stun",
            "snapshot-revert-pre",
            "snapshot-revert-cancel",
            "unstun",
        ];
        assert_eq!(calls(&events.told(label)), expected);
    }
}

#[test]
fn what_a_filter_refuses_does_not_happen() {
    let events = Events::new();
    for (call, asked) in [
        ("snapshot-create-pre", r#"{"cmd":"snapshot"}"#.to_string()),
        ("stun", r#"{"cmd":"snapshot"}"#.to_string()),
        (
            "clone-pre",
            format!(
                r#"{{"cmd":"clone","disk":"disk0","to":"{}"}}"#,
                events.folder.path().join("copy.img").display()
            ),
        ),
    ] {
        let mut vm = events.start(&[&format!("--property=event.refuse={call}")]);
        let answer = command(&vm, &asked);
        let error = answer["error"].as_str().unwrap();
        assert!(
            error.contains("refuses") && error.contains("-6"),
            "{answer}"
        );
        write(&vm, 1);
        assert_eq!(vm.stop().code, Some(0));
        assert!(!vm.folder.path().join("disk0.img.snapshots/1").exists());
        assert!(!events.folder.path().join("copy.img").exists());
    }
    // A filter without the calls cannot do it at all.
    let library = conformance::compile_filter("passfilter", events.folder.path()).unwrap();
    let vm = start(&library, &[]);
    let answer = command(&vm, r#"{"cmd":"snapshot"}"#);
    let error = answer["error"].as_str().unwrap();
    assert!(error.contains("has no `snapshot`"), "{answer}");
    write(&vm, 1);
}

#[test]
fn a_copy_of_an_open_disk_has_its_content_and_another_uuid() {
    let events = Events::new();
    let mut vm = events.start(&[]);
    write(&vm, 5);
    let load = Load::start(&vm);
    let copy = events.folder.path().join("copy.img");
    let asked = format!(
        r#"{{"cmd":"clone","disk":"disk0","to":"{}"}}"#,
        copy.display()
    );
    let made = command(&vm, &asked);
    let uuid = made["disk_uuid"].as_str().unwrap().replace('-', "");
    load.finish();
    let again = command(&vm, &asked);
    assert!(
        again["error"].as_str().unwrap().contains("copy.img"),
        "{again}"
    );
    assert_eq!(vm.stop().code, Some(0));
    let told = events.told("disk0");
    assert_eq!(calls(&told), ["clone-pre", "stun", "unstun", "clone-post"]);
    assert!(!told[0].contains(&uuid), "{told:?}");
    assert!(
        told.iter()
            .any(|line| line.starts_with(&format!("dest={uuid} "))),
        "{told:?}"
    );
    assert_eq!(std::fs::read(&copy).unwrap()[0], 5);
    let sidecar = events.folder.path().join("copy-0000006576656e74.vmfd");
    assert_eq!(
        std::fs::read(sidecar).unwrap()[0],
        1,
        "its sidecar was copied"
    );
    // Opened, it is the disk that was announced.
    let disk = format!("--disk=copied={}", copy.display());
    let mut vm = events.start(&[&disk]);
    assert_eq!(vm.stop().code, Some(0));
    assert!(events.told("copied")[0].contains(&uuid));
}

#[test]
fn a_disk_grows_in_order_and_not_against_the_filter() {
    let events = Events::new();
    let vmdk = events.folder.path().join("grown.vmdk");
    let create = Command::new(env!("CARGO_BIN_EXE_simhost"))
        .arg("create")
        .arg(&vmdk)
        .arg("1M")
        .status();
    assert!(create.unwrap().success());
    let disk = format!("--disk=grown={}", vmdk.display());
    let mut vm = events.start(&[&disk]);
    let asked = r#"{"cmd":"grow","disk":"grown","capacity_bytes":2097152}"#;
    assert_eq!(command(&vm, asked)["code"], 0);
    assert_eq!(vm.stop().code, Some(0));
    let told = events.told("grown");
    assert_eq!(calls(&told), ["stun", "grow", "unstun"]);
    assert!(told.contains(&"capacity=2097152".to_string()), "{told:?}");
    // The descriptor knows: it opens with its new capacity.
    let mut vm = events.start(&[&disk, "--property=event.refuse=grow"]);
    let status = command(&vm, r#"{"cmd":"status"}"#);
    assert_eq!(status["disks"][1]["capacity_bytes"], 2 << 20, "{status}");
    let asked = r#"{"cmd":"grow","disk":"grown","capacity_bytes":4194304}"#;
    assert_eq!(command(&vm, asked)["code"], -6);
    let status = command(&vm, r#"{"cmd":"status"}"#);
    assert_eq!(status["disks"][1]["capacity_bytes"], 2 << 20, "{status}");
    assert_eq!(vm.stop().code, Some(0));
}

fn snapshot(what: &str, disk: &Path, id: Option<u64>) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_simhost"))
        .args(["snapshot", what, "--disk"])
        .arg(disk)
        .args(id.map(|id| format!("--id={id}")))
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into(),
    )
}

#[test]
fn a_vm_that_is_off_goes_back_with_sidecar_and_ids() {
    let events = Events::new();
    let mut vm = events.start(&[]);
    let disk = vm.folder.path().join("disk0.img");
    write(&vm, 1);
    let (done, said) = snapshot("create", &disk, None);
    assert!(
        !done && said.contains("another process has it open"),
        "{said}"
    );
    assert_eq!(vm.stop().code, Some(0));
    assert!(snapshot("create", &disk, None).0);
    for _ in 0..2 {
        let folder = std::mem::replace(&mut vm.folder, tempfile::tempdir().unwrap());
        vm = start_in(folder, &events.library, &[&events.log()]);
        write(&vm, 2);
        assert_eq!(vm.stop().code, Some(0));
    }
    let (done, said) = snapshot("revert", &disk, Some(1));
    assert!(done, "{said}");
    let folder = std::mem::replace(&mut vm.folder, tempfile::tempdir().unwrap());
    vm = start_in(folder, &events.library, &[&events.log()]);
    assert_eq!(read(&vm), 1);
    drop(vm);
    // The sidecar says that this is the second opening, the host that nothing happened since the first.
    let told = events.told("disk0");
    let opens: Vec<&String> = told
        .iter()
        .filter(|line| line.starts_with("open"))
        .collect();
    let word = |line: &str, key: &str| {
        let mut words = line.split(' ').filter_map(|word| word.strip_prefix(key));
        words.next().unwrap().to_string()
    };
    assert_eq!(opens.len(), 4);
    assert_eq!(word(opens[3], "nr="), "2");
    assert_eq!(word(opens[3], "before="), word(opens[0], "id="));
    assert_ne!(word(opens[2], "before="), word(opens[0], "id="));
    assert_eq!(word(opens[3], "uuid="), word(opens[0], "uuid="));
}

#[test]
fn a_vm_that_dies_in_a_revert_finds_a_whole_state() {
    let events = Events::new();
    for (point, holds) in [("snapshot-pre", 2), ("snapshot-content", 1)] {
        let mut vm = events.start(&[]);
        write(&vm, 1);
        command(&vm, r#"{"cmd":"snapshot"}"#);
        write(&vm, 2);
        command(&vm, &format!(r#"{{"cmd":"kill-at","point":"{point}"}}"#));
        command(&vm, r#"{"cmd":"revert","id":1}"#);
        assert_eq!(vm.end().code, None);
        let folder = std::mem::replace(&mut vm.folder, tempfile::tempdir().unwrap());
        let (vm, line) = try_start_in(folder, &events.library, &[]);
        assert!(line.starts_with("READY"), "{point}");
        assert_eq!(read(&vm), holds, "{point}");
    }
}
