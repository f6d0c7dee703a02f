//! Machines of a simulated cluster are protected by REST: the real package on the hosts, real certificates, an
//! appliance that speaks TLS; protected, moved, paused, resumed, recovered and unprotected while their guests
//! write.
#![allow(clippy::unwrap_used)]

#[path = "protected/managed.rs"]
mod managed;
mod support;

use managed::Managed;
use serde_json::{Value, json};
use simhost::nbd::client::{Client as Guest, Op};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use support::Site;
use vcenter::{Moid, Vcenter};

const BLOCK_BYTES: u32 = 4096;
const BLOCKS: u64 = 1024;

/// A guest that writes block after block. It ends with an error if a write fails.
struct Load {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: JoinHandle<std::io::Result<()>>,
}

impl Load {
    fn start(socket: &Path, first: u64) -> Self {
        let mut guest = Guest::connect_unix(socket, "disk0").unwrap();
        let (stop, written) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (until, count) = (stop.clone(), written.clone());
        let thread = std::thread::spawn(move || {
            for number in first.. {
                if until.load(Ordering::Relaxed) {
                    break;
                }
                let at = number * 7 % BLOCKS * u64::from(BLOCK_BYTES);
                let block = [number as u8; BLOCK_BYTES as usize];
                guest.call(&Op::Write(at, &block), false)?;
                count.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(std::time::Duration::from_micros(500)); // time under test: a quiet guest
            }
            guest.call(&Op::Flush, false)?;
            guest.disconnect();
            Ok(())
        });
        Self {
            stop,
            written,
            thread,
        }
    }

    fn goes_on(&self, site: &Site) {
        let from = self.written.load(Ordering::Relaxed);
        site.wait("the guest goes on", || {
            assert!(!self.thread.is_finished(), "the guest's connection failed");
            (self.written.load(Ordering::Relaxed) > from + 20).then_some(())
        });
    }

    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap().unwrap();
    }
}

/// The machine's view in the domain's.
fn seen(managed: &Managed, name: &str) -> Value {
    let path = format!("/domains/{}/protection", managed.domain);
    let domain = managed.get(&path);
    let vms = domain["vms"].as_array().unwrap();
    let found = vms.iter().find(|vm| vm["name"] == name);
    found.cloned().unwrap_or(Value::Null)
}

fn wait_state(site: &Site, managed: &Managed, name: &str, state: &str) -> Value {
    site.wait(&format!("{name} is {state}"), || {
        let vm = seen(managed, name);
        (vm["state"] == state).then_some(vm)
    })
}

/// The disk that the store gives back is the machine's disk, once all that was written until now is in a cut.
fn recovers(site: &Site, managed: &Managed, name: &str, vm: &Moid) {
    let now_ms = managed.now_ms();
    site.wait("a cut holds everything", || {
        let at_ms = seen(managed, name)["recoverable_at_ms"].as_i64();
        (at_ms >= Some(now_ms)).then_some(())
    });
    let out = tempfile::tempdir().unwrap();
    let from = managed.store().join("shop").display().to_string();
    let args = rocva::RecoverArgs {
        store: rocva::StoreArgs {
            from,
            store_opt: Vec::new(),
        },
        out: out.path().to_owned(),
        cut: "latest".into(),
        disks: vec![format!("{name}/disk0")],
        format: rocva::Format::Raw,
        force: false,
        json: false,
    };
    let command = rocva::Command::Recover(args);
    rocva::run(rocva::Args { command }).unwrap();
    let disk = &site.world.machine(vm.as_str()).unwrap().disks["disk0"];
    let mut files = Vec::new();
    let mut folders = vec![out.path().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            match path.is_dir() {
                true => folders.push(path),
                false => files.push(path),
            }
        }
    }
    let raw = files
        .iter()
        .find(|path| path.extension().is_some_and(|end| end == "raw"));
    let recovered = std::fs::read(raw.unwrap_or_else(|| panic!("{files:?}"))).unwrap();
    assert!(
        recovered == std::fs::read(disk).unwrap(),
        "{name}: what is recovered differs"
    );
}

#[test]
fn two_machines_go_through_protection_and_out_of_it_while_their_guests_write() {
    let site = Site::new(3);
    let managed = Managed::new(&site);
    let vms = ["web", "db"].map(|name| {
        let vm = site.vm(name, &site.hosts[0], 1);
        site.power(&vm, true);
        vm
    });
    let load = |name: &str| Load::start(&site.world.guest_socket(name), 1);
    let (web, db) = (load("web"), load("db"));
    web.goes_on(&site);
    let output = managed.succeeds(
        "protect-vms",
        json!({"domain": "shop", "vms": ["web", "db"]}),
    );
    assert!(output.contains("the policy is on 1 disks"), "{output}");
    for name in ["web", "db"] {
        wait_state(&site, &managed, name, "recoverable");
    }
    let policies = site.client.policies().unwrap();
    assert_eq!(policies.len(), 1, "{policies:?}");
    db.end();
    recovers(&site, &managed, "db", &vms[1]);
    // It moves, and is recoverable there.
    let task = site
        .world
        .migrate(vms[0].as_str(), Some(&site.hosts[1]))
        .unwrap();
    let end = simcluster::control::wait(&site.world, &task);
    assert_eq!(end["state"], "success", "{end}");
    web.goes_on(&site);
    let moved_ms = managed.now_ms();
    site.wait("a cut after the move", || {
        let vm = seen(&managed, "web");
        let at_ms = vm["recoverable_at_ms"].as_i64();
        (vm["state"] == "recoverable" && at_ms > Some(moved_ms)).then_some(())
    });
    // Paused it is degraded, the other one is not, and the newest cut that holds it gets older.
    managed.succeeds("pause-vms", json!({"vms": ["web"]}));
    let paused = wait_state(&site, &managed, "web", "degraded");
    assert!(
        paused["reason"].as_str().unwrap().contains("paused"),
        "{paused}"
    );
    web.goes_on(&site);
    // It moves meanwhile, unheard of.
    let task = site
        .world
        .migrate(vms[0].as_str(), Some(&site.hosts[2]))
        .unwrap();
    let end = simcluster::control::wait(&site.world, &task);
    assert_eq!(end["state"], "success", "{end}");
    web.goes_on(&site);
    let other = load("db");
    other.goes_on(&site);
    other.end();
    recovers(&site, &managed, "db", &vms[1]);
    let later = seen(&managed, "web");
    assert_eq!(
        later["recoverable_at_ms"], paused["recoverable_at_ms"],
        "{later}"
    );
    // Resumed, what was written meanwhile is sent.
    managed.succeeds("resume-vms", json!({"vms": ["web"]}));
    let paused_at_ms = paused["recoverable_at_ms"].as_i64();
    site.wait("web is recoverable again", || {
        let vm = seen(&managed, "web");
        let at_ms = vm["recoverable_at_ms"].as_i64();
        (vm["state"] == "recoverable" && at_ms > paused_at_ms).then_some(())
    });
    web.goes_on(&site);
    web.end();
    recovers(&site, &managed, "web", &vms[0]);
    // One leaves, the other stays recoverable; then that leaves too.
    let output = managed.succeeds("unprotect-vms", json!({"vms": ["db"]}));
    assert!(
        output.contains("a cut holds what was written until now"),
        "{output}"
    );
    let again = load("web");
    again.goes_on(&site);
    again.end();
    recovers(&site, &managed, "web", &vms[0]);
    assert_eq!(site.client.policies().unwrap().len(), 1);
    managed.succeeds("unprotect-vms", json!({"vms": ["web"]}));
    assert!(site.client.policies().unwrap().is_empty());
    for vm in site.client.vms(&site.cluster).unwrap() {
        assert!(
            vm.disks.iter().all(|disk| disk.filters.is_empty()),
            "{vm:?}"
        );
    }
    let last = load("web");
    last.goes_on(&site);
    last.end();
    assert!(
        managed.store().join("shop/domain.json").exists(),
        "the container stays"
    );
    managed.succeeds("disable-cluster", json!({"protected_cluster": "One"}));
}
