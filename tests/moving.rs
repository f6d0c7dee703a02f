//! A VM changes its host: it migrates while it runs, or its host dies and it is started on another one.
//! Two simulated hosts, each with its daemon, share a folder of disks and one appliance.
#![allow(clippy::unwrap_used)]

mod support;

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;
use support::{DOMAIN, LIMIT, Part, find, first_difference, ok};

const MIB: u64 = 1 << 20;
const DISK: u64 = 96 * MIB;
const REGION: u64 = MIB;

fn ask(socket: &Path, command: &Value) -> Value {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    // The daemon's socket answers whoever connects, and may be done before it is asked.
    let _ = writeln!(stream, "{command}");
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

fn flags(pairs: &[(&str, &Path)]) -> Vec<String> {
    let pair = |(key, path): &(&str, &Path)| [(*key).to_string(), path.display().to_string()];
    pairs.iter().flat_map(pair).collect()
}

/// A host: its folder, the process that runs VMs, the daemon.
struct Host {
    folder: tempfile::TempDir,
    log: PathBuf,
    vms: Option<Part>,
    daemon: Option<Part>,
}

impl Host {
    fn start(log: PathBuf, port_base: u64) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("jd-")
            .tempdir_in("/dev/shm")
            .unwrap();
        let mut host = Self {
            folder,
            log,
            vms: None,
            daemon: None,
        };
        host.boot(port_base);
        host
    }

    fn boot(&mut self, port_base: u64) {
        let (run, nbd) = (self.path("run"), self.path("nbd"));
        let mut arguments = vec!["simhost".to_string(), "host".into()];
        arguments.extend(flags(&[
            ("--run-dir", &run),
            ("--nbd-dir", &nbd),
            ("--control-socket", &self.path("host.sock")),
        ]));
        self.vms = Some(Part::start(&self.log, &arguments));
        self.start_daemon(port_base);
    }

    fn start_daemon(&mut self, port_base: u64) {
        let mut arguments = vec!["filterd".to_string(), "--port-base".into()];
        arguments.push(port_base.to_string());
        arguments.extend(flags(&[
            ("--run-dir", &self.path("run")),
            ("--status-socket", &self.path("filterd.sock")),
        ]));
        self.daemon = Some(Part::start(&self.log, &arguments));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn obey(&self, command: &Value) -> Value {
        ask(&self.path("host.sock"), command)
    }

    fn disk(&self) -> Value {
        let status = ask(&self.path("nbd/vm.control"), &json!({"cmd": "status"}));
        assert_eq!(status["contract_violations"], 0, "{status}");
        status["disks"][0].clone()
    }

    fn figure(&self, name: &str) -> u64 {
        self.disk()[name].as_u64().unwrap()
    }

    /// What was read by syncs: sent, or found to be in the replica.
    fn compared_bytes(&self) -> u64 {
        self.figure("synced_bytes") + self.figure("held_bytes")
    }
}

struct Site {
    shared: tempfile::TempDir,
    drva: Part,
    port_base: u64,
    hosts: [Host; 2],
}

impl Site {
    fn new() -> Self {
        let shared = tempfile::tempdir().unwrap();
        let disk = std::fs::File::create(shared.path().join("disk0.raw")).unwrap();
        disk.set_len(DISK).unwrap();
        let mut arguments = vec!["drva".to_string(), "--port-base".into(), "0".into()];
        arguments.extend(flags(&[
            ("--data-dir", &shared.path().join("data")),
            ("--store", &shared.path().join("store")),
            ("--status-socket", &shared.path().join("drva.sock")),
        ]));
        arguments.extend(["--cut-interval-ms".into(), "100".into()]);
        let drva = Part::start(&shared.path().join("drva.log"), &arguments);
        let port_base = drva.ready["port_base"].as_u64().unwrap();
        let host = |name: &str| Host::start(shared.path().join(name), port_base);
        Self {
            hosts: [host("host-a.log"), host("host-b.log")],
            shared,
            drva,
            port_base,
        }
    }

    fn start_vm(&self, host: usize) {
        self.start_vm_that_drains(host, 200);
    }

    fn start_vm_that_drains(&self, host: usize, handoff_ms: u64) {
        let disk = self.shared.path().join("disk0.raw");
        let args = [
            format!("--disk=disk0={}", disk.display()),
            format!("--domain={DOMAIN}"),
            format!("--property=jetdr.region-bytes={REGION}"),
            "--property=jetdr.region-quiet-ms=100".into(),
            format!("--property=jetdr.handoff-drain-ms={handoff_ms}"),
        ];
        let started = self.hosts[host].obey(&json!({"cmd": "start", "vm": "vm", "args": args}));
        assert!(started["pid"].is_u64(), "{started}");
    }

    fn migrate(&self, from: usize) -> u64 {
        let to = self.hosts[1 - from].path("host.sock");
        let moved = self.hosts[from].obey(&json!({"cmd": "migrate", "vm": "vm", "to": to}));
        assert_eq!(moved["migrated"], true, "{moved}");
        assert_eq!(moved["end"]["verdict"], "clean", "{moved}");
        moved["stun_us"].as_u64().unwrap()
    }

    /// The guest's socket: it stays where it was when the VM was started.
    fn uri(&self, started_at: usize) -> String {
        let socket = self.hosts[started_at].path("nbd/vm.sock");
        format!("nbd+unix:///disk0?socket={}", socket.display())
    }

    fn write(&self, started_at: usize, at: u64, len: u64) {
        let command = format!("write -P {} {at} {len}", at / MIB % 200 + 5);
        let uri = self.uri(started_at);
        let mut qemu_io = support::client("qemu-io");
        ok(qemu_io.args(["-f", "raw", "-c", &command, &uri]).output());
    }

    fn wait(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let since = Instant::now();
        while !holds() {
            assert!(since.elapsed() < LIMIT, "not in time: {what}");
            std::thread::sleep(std::time::Duration::from_millis(10)); // poll of another process
        }
    }

    fn settle(&self, host: usize) {
        self.wait("the disk streams and is durable", || {
            let disk = self.hosts[host].disk();
            disk["state"] == "streaming" && disk["published_seq"] == disk["durable_seq"]
        });
    }

    fn rest(&self, host: usize) {
        self.settle(host);
        self.wait("no region is in doubt", || {
            self.hosts[host].figure("intent_bytes") == 0
        });
    }

    /// A cut, recovered, is what the disk holds.
    fn compare(&self, host: usize, name: &str) {
        self.settle(host);
        let cut = json!({"cmd": "cut", "domain": DOMAIN, "name": name});
        let answer = ask(&self.shared.path().join("drva.sock"), &cut);
        assert!(answer["cut"].is_u64(), "{answer}");
        let out = self.shared.path().join(name);
        let store = self.shared.path().join("store").join(DOMAIN);
        let mut rocva = Command::new(env!("CARGO_BIN_EXE_jetdr"));
        rocva.args(["rocva", "recover", "--cut", name, "--from"]);
        ok(rocva.arg(&store).arg("--out").arg(&out).output());
        let disk = self.shared.path().join("disk0.raw");
        assert_eq!(first_difference(&disk, &find(&out, "disk0.raw")), None);
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in ["drva.log", "host-a.log", "host-b.log"] {
                let text = std::fs::read_to_string(self.shared.path().join(name));
                eprintln!("--- {name}\n{}", text.unwrap_or_default());
            }
        }
    }
}

/// fio, which verifies what it wrote; killed with the test.
struct Fio(Child);

impl Fio {
    fn start(site: &Site, seconds: u32) -> Self {
        let mut fio = support::client("fio");
        fio.current_dir(site.shared.path());
        fio.args(["--name=m", "--thread", "--ioengine=nbd", "--rw=randwrite"]);
        fio.args(["--bs=4k", "--iodepth=4", "--rate_iops=2000", "--size=64M"]);
        fio.args(["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64"]);
        fio.args(["--time_based", &format!("--runtime={seconds}")]);
        fio.arg(format!("--uri={}", site.uri(0)));
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
    let site = Site::new();
    // It is drained however busy this machine is.
    site.start_vm_that_drains(0, 20_000);
    site.settle(0);
    let mut fio = Fio::start(&site, 6);
    let (mut at, mut stuns) = (0, Vec::new());
    while fio.runs() && stuns.len() < 6 {
        // Only a disk that streams can be drained.
        site.wait("it streams", || {
            site.hosts[at].disk()["state"] == "streaming"
        });
        stuns.push(site.migrate(at));
        at = 1 - at;
        site.wait("it streams", || {
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
    let mut site = Site::new();
    site.start_vm(0);
    site.write(0, 0, 64 * MIB);
    site.rest(0);
    site.hosts[0].daemon.as_mut().unwrap().kill();
    // A block here and there: some stay in the lane, and the rest of what is written goes by the marks.
    for at in 0..20 {
        site.write(0, at * 3 * MIB, 4096);
    }
    site.migrate(0);
    site.settle(1);
    assert_eq!(site.hosts[1].compared_bytes(), 20 * 65_536);
    site.compare(1, "marks");
    let left = std::fs::read_dir(site.shared.path()).unwrap().flatten();
    let sidecars = left.filter(|e| e.file_name().to_string_lossy().ends_with(".vmfd"));
    assert_eq!(sidecars.count(), 1, "the map is gone once it has served");
}

#[test]
fn a_vm_whose_host_died_goes_on_elsewhere_with_its_regions_only() {
    let mut site = Site::new();
    site.start_vm(0);
    site.write(0, 0, 64 * MIB);
    site.rest(0);
    site.hosts[0].daemon.as_mut().unwrap().kill();
    site.write(0, 10 * MIB, 4096);
    site.write(0, 50 * MIB + 512, 4096);
    // The VM's process first, which holds the disk; the host's other parts with it.
    site.hosts[0].obey(&json!({"cmd": "kill", "vm": "vm"}));
    site.hosts[0].vms.as_mut().unwrap().kill();
    site.start_vm(1);
    site.settle(1);
    assert_eq!(site.hosts[1].compared_bytes(), 2 * REGION);
    // The dead host comes back, with a lane that holds what was never sent.
    let port_base = site.port_base;
    site.hosts[0].start_daemon(port_base);
    site.wait("the host that lost the VM knows it", || {
        let status = ask(
            &site.hosts[0].path("filterd.sock"),
            &json!({"cmd": "status"}),
        );
        status["lanes"][0]["fenced"] == true
    });
    site.write(1, 20 * MIB, MIB);
    site.compare(1, "elsewhere");
    site.drva.stop();
}
