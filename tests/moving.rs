//! A VM changes its host: it migrates while it runs, or its host dies and it is started on another one.
//! Two simulated hosts, each with its daemon, share a folder of disks and one appliance.
#![allow(clippy::unwrap_used)]

mod support;

use serde_json::json;
use std::process::{Child, Stdio};
use support::site::Site;
use support::{ok, seed};

const MIB: u64 = 1 << 20;
const DISK: u64 = 96 * MIB;
const REGION: u64 = MIB;

fn site() -> Site {
    seed();
    Site::running(&[("disk0.raw", DISK)])
}

fn start_vm(site: &Site, host: usize) {
    start_vm_that_drains(site, host, 200);
}

fn start_vm_that_drains(site: &Site, host: usize, handoff_ms: u64) {
    let more = [
        format!("--property=jetdr.region-bytes={REGION}"),
        "--property=jetdr.region-quiet-ms=100".into(),
        format!("--property=jetdr.handoff-drain-ms={handoff_ms}"),
    ];
    site.start_vm(host, &more);
}

fn write(site: &Site, started_at: usize, at: u64, len: u64) {
    let command = format!("write -P {} {at} {len}", at / MIB % 200 + 5);
    let uri = site.uri(started_at, "disk0");
    let mut qemu_io = support::client("qemu-io");
    ok(qemu_io.args(["-f", "raw", "-c", &command, &uri]).output());
}

fn rest(site: &Site, host: usize) {
    site.settle(host);
    site.wait("no region is in doubt", |site| {
        site.hosts[host].figure("intent_bytes") == 0
    });
}

/// fio, which verifies what it wrote; killed with the test.
struct Fio(Child);

impl Fio {
    fn start(site: &Site, seconds: u32) -> Self {
        let mut fio = support::client("fio");
        fio.current_dir(site.stack.dir.path());
        fio.args(["--name=m", "--thread", "--ioengine=nbd", "--rw=randwrite"]);
        fio.args(["--bs=4k", "--iodepth=4", "--rate_iops=2000", "--size=64M"]);
        fio.args(["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64"]);
        fio.args(["--time_based", &format!("--runtime={seconds}")]);
        fio.arg(format!("--uri={}", site.uri(0, "disk0")));
        fio.stdin(Stdio::null()).stdout(Stdio::null());
        Self(fio.spawn().unwrap())
    }

    fn runs(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Fio {
    /// Its server may be gone: then it would wait for ever.
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_running_vm_migrates_without_a_sync() {
    let site = site();
    // It is drained however busy this machine is.
    start_vm_that_drains(&site, 0, 20_000);
    site.settle(0);
    let mut fio = Fio::start(&site, 6);
    let (mut at, mut stuns) = (0, Vec::new());
    while fio.runs() && stuns.len() < 6 {
        // Only a disk that streams can be drained.
        site.wait("it streams", |site| {
            site.hosts[at].disk()["state"] == "streaming"
        });
        stuns.push(site.migrate(at));
        at = 1 - at;
        site.wait("it streams", |site| {
            site.hosts[at].disk()["state"] == "streaming"
        });
        assert_eq!(site.hosts[at].figure("synced_bytes"), 0, "no resync");
    }
    println!("{} migrations, stuns in us: {stuns:?}", stuns.len());
    assert!(stuns.len() >= 3, "fio ended early");
    assert!(fio.0.wait().unwrap().success(), "the guest saw an error");
    site.compare(at, "migrated");
}

#[test]
fn a_vm_that_migrates_while_the_link_is_down_takes_its_marks_along() {
    let mut site = site();
    start_vm(&site, 0);
    write(&site, 0, 0, 64 * MIB);
    rest(&site, 0);
    site.hosts[0].daemon.as_mut().unwrap().kill();
    // A block here and there: some stay in the lane, and the rest of what is written goes by the marks.
    for at in 0..20 {
        write(&site, 0, at * 3 * MIB, 4096);
    }
    site.migrate(0);
    site.settle(1);
    assert_eq!(site.hosts[1].compared_bytes(), 20 * 65_536);
    site.compare(1, "marks");
    let left = std::fs::read_dir(site.stack.dir.path()).unwrap().flatten();
    let sidecars = left.filter(|e| e.file_name().to_string_lossy().ends_with(".vmfd"));
    assert_eq!(sidecars.count(), 1, "the map is gone once it has served");
}

#[test]
fn a_vm_whose_host_died_goes_on_elsewhere_with_its_regions_only() {
    let mut site = site();
    start_vm(&site, 0);
    write(&site, 0, 0, 64 * MIB);
    rest(&site, 0);
    site.hosts[0].daemon.as_mut().unwrap().kill();
    write(&site, 0, 10 * MIB, 4096);
    write(&site, 0, 50 * MIB + 512, 4096);
    // The VM's process first, which holds the disk; the host's other parts with it.
    site.hosts[0].obey(&json!({"cmd": "kill", "vm": "vm"}));
    site.hosts[0].vms.as_mut().unwrap().kill();
    start_vm(&site, 1);
    site.settle(1);
    assert_eq!(site.hosts[1].compared_bytes(), 2 * REGION);
    // The dead host comes back, with a lane that holds what was never sent.
    site.hosts[0].start_daemon();
    site.wait("the host that lost the VM knows it", |site| {
        site.hosts[0].daemon_status()["lanes"][0]["fenced"] == true
    });
    write(&site, 1, 20 * MIB, MIB);
    site.compare(1, "elsewhere");
    site.stack.drva.as_mut().unwrap().stop();
}
