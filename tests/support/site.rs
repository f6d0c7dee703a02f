//! Two simulated hosts, each with its daemon, that share a folder of disks and one appliance. They run
//! one VM, `vm`, which may change its host.
//!
//! Invariant: the VM's disks are those of the stack, and the guest's socket stays where the VM was started,
//! whatever host it runs on.

use super::{DOMAIN, LIMIT, PLAIN, Part, Stack, flag, new_host_id};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// A command to a process, and its answer.
pub fn ask(socket: &Path, command: &Value) -> Value {
    try_ask(socket, command).unwrap_or_else(|error| panic!("{}: {error}", socket.display()))
}

/// The same of a process that may be gone.
pub fn try_ask(socket: &Path, command: &Value) -> std::io::Result<Value> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(2 * LIMIT))?;
    // The daemon's socket answers whoever connects, and may be done before it is asked.
    let _ = writeln!(stream, "{command}");
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

/// A host: its folder, the process that runs VMs, the daemon.
pub struct Host {
    folder: tempfile::TempDir,
    log: PathBuf,
    id: String,
    pub vms: Option<Part>,
    pub daemon: Option<Part>,
    /// Where its daemon finds the appliance.
    pub port_base: u64,
}

impl Host {
    fn new(log: PathBuf) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("jd-")
            .tempdir_in("/dev/shm")
            .unwrap();
        Self {
            folder,
            log,
            id: new_host_id(),
            vms: None,
            daemon: None,
            port_base: 0,
        }
    }

    pub fn boot(&mut self) {
        let mut arguments = vec!["simhost".to_string(), "host".into()];
        arguments.extend(flag("--run-dir", &self.path("run")));
        arguments.extend(flag("--nbd-dir", &self.path("nbd")));
        arguments.extend(flag("--control-socket", &self.path("host.sock")));
        self.vms = Some(Part::start(&self.log, &arguments));
        self.start_daemon();
    }

    pub fn start_daemon(&mut self) {
        let mut arguments = vec!["filterd".to_string(), "--port-base".into()];
        arguments.push(self.port_base.to_string());
        arguments.extend(flag("--run-dir", &self.path("run")));
        arguments.extend(flag("--status-socket", &self.path("filterd.sock")));
        arguments.extend(["--host-id".into(), self.id.clone(), PLAIN.into()]);
        self.daemon = Some(Part::start(&self.log, &arguments));
    }

    /// It crashes: VM and daemon at one moment, then all else. It is off until it boots.
    pub fn crash(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        // It must see nothing of what happens while the others are killed.
        daemon.signal("STOP");
        let answer = self.obey(&json!({"cmd": "reboot"}));
        daemon.kill();
        self.vms.take().unwrap().kill();
        assert_eq!(answer["rebooted"], true, "{answer}");
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn obey(&self, command: &Value) -> Value {
        ask(&self.path("host.sock"), command)
    }

    fn vm_process(&self) -> Value {
        if self.vms.is_none() {
            return Value::Null;
        }
        self.obey(&json!({"cmd": "list"}))["vms"][0].take()
    }

    /// Whether no process of the VM runs here, not even one that waits for it to come.
    pub fn is_without_vm(&self) -> bool {
        self.vm_process()["running"] != true
    }

    /// Whether the VM runs here, and can be asked.
    pub fn has_vm(&self) -> bool {
        let process = self.vm_process();
        process["running"] == true && process["ready"]["incoming"].is_null()
    }

    pub fn vm_status(&self) -> Value {
        ask(&self.path("nbd/vm.control"), &json!({"cmd": "status"}))
    }

    pub fn daemon_status(&self) -> Value {
        ask(&self.path("filterd.sock"), &json!({"cmd": "status"}))
    }

    /// The VM's first disk.
    pub fn disk(&self) -> Value {
        let status = self.vm_status();
        assert_eq!(status["contract_violations"], 0, "{status}");
        status["disks"][0].clone()
    }

    pub fn figure(&self, name: &str) -> u64 {
        self.disk()[name].as_u64().unwrap()
    }

    /// What was read by syncs: sent, or found to be in the replica.
    pub fn compared_bytes(&self) -> u64 {
        self.figure("synced_bytes") + self.figure("held_bytes")
    }
}

impl Drop for Host {
    /// A VM outlives the process that started it.
    fn drop(&mut self) {
        if self.vms.is_some() {
            let kill = json!({"cmd": "kill", "vm": "vm"});
            let _ = try_ask(&self.path("host.sock"), &kill);
        }
    }
}

pub struct Site {
    // Dropped in this order: the hosts' processes before the folders that they use.
    pub hosts: [Host; 2],
    /// The appliance, the disks and the store; its own daemon and VM stay unused.
    pub stack: Stack,
}

impl Site {
    /// Folders and empty disks; nothing runs yet.
    pub fn new(disks: &[(&str, u64)]) -> Self {
        let mut stack = Stack::new(disks);
        stack.cut_interval_ms = 100;
        let hosts = ["host-a", "host-b"].map(|name| Host::new(stack.log(name)));
        Self { hosts, stack }
    }

    /// The same with the appliance and both hosts running.
    pub fn running(disks: &[(&str, u64)]) -> Self {
        let mut site = Self::new(disks);
        site.stack.start_drva();
        for host in &mut site.hosts {
            host.port_base = site.stack.port_base;
            host.boot();
        }
        site
    }

    pub fn start_vm(&self, host: usize, more: &[String]) {
        let disks = self.stack.disks.iter();
        let disk = |(label, path): &(String, PathBuf)| format!("--disk={label}={}", path.display());
        let mut args: Vec<String> = disks.map(disk).collect();
        args.push(format!("--domain={DOMAIN}"));
        args.extend_from_slice(more);
        let started = self.hosts[host].obey(&json!({"cmd": "start", "vm": "vm", "args": args}));
        assert!(started["pid"].is_u64(), "{started}");
    }

    /// Whom to ask for a migration to the other host, and how.
    pub fn migration(&self, from: usize) -> (PathBuf, Value) {
        let to = self.hosts[1 - from].path("host.sock");
        let command = json!({"cmd": "migrate", "vm": "vm", "to": to});
        (self.hosts[from].path("host.sock"), command)
    }

    /// What the host says to a migration to the other one.
    pub fn try_migrate(&self, from: usize) -> std::io::Result<Value> {
        let (socket, command) = self.migration(from);
        try_ask(&socket, &command)
    }

    /// Moves the VM; the guest stood for so many us.
    pub fn migrate(&self, from: usize) -> u64 {
        let moved = self.try_migrate(from).unwrap();
        assert_eq!(moved["migrated"], true, "{moved}");
        assert_eq!(moved["end"]["verdict"], "clean", "{moved}");
        moved["stun_us"].as_u64().unwrap()
    }

    /// The guest's socket.
    pub fn nbd_socket(&self, started_at: usize) -> PathBuf {
        self.hosts[started_at].path("nbd/vm.sock")
    }

    pub fn uri(&self, started_at: usize, label: &str) -> String {
        let socket = self.nbd_socket(started_at);
        format!("nbd+unix:///{label}?socket={}", socket.display())
    }

    pub fn wait(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let since = Instant::now();
        while !holds(self) {
            assert!(since.elapsed() < LIMIT, "not in time: {what}");
            std::thread::sleep(std::time::Duration::from_millis(10)); // poll of another process
        }
    }

    /// Every disk streams, and all that was written is durable.
    pub fn settle(&self, host: usize) {
        self.wait("the disks stream and are durable", |site| {
            let status = site.hosts[host].vm_status();
            assert_eq!(status["contract_violations"], 0, "{status}");
            status["disks"].as_array().unwrap().iter().all(|disk| {
                disk["state"] == "streaming" && disk["published_seq"] == disk["durable_seq"]
            })
        });
    }

    /// A cut, recovered from the store alone, is what the disks hold.
    pub fn compare(&self, host: usize, name: &str) {
        self.settle(host);
        self.stack.cut(name);
        self.stack.compare_cut(name, Path::to_owned);
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in ["drva", "host-a", "host-b"] {
                let text = std::fs::read_to_string(self.stack.log(name));
                eprintln!("--- {name}\n{}", text.unwrap_or_default());
            }
        }
    }
}
