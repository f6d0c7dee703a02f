//! A stack of real processes for the end-to-end tests: an appliance, a daemon, a VM.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

pub mod guest;
pub mod link;
pub mod site;

use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Every wait in these tests ends here.
pub const LIMIT: Duration = Duration::from_secs(60);
pub const DOMAIN: &str = "e2e";
/// One machine, one loopback: most tests are about something else than who speaks.
pub const PLAIN: &str = "--insecure-plain-text";

/// The test's numbers: the seed is printed, and can be given by JETDR_SEED.
pub fn seed() -> u64 {
    let seed = std::env::var("JETDR_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(7);
    println!("JETDR_SEED={seed}");
    seed
}

/// Numbers that are the same for the same seed.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// A client that must be there: `scripts/bootstrap.sh test` installs it.
pub fn client(program: &str) -> Command {
    let found = Command::new("sh")
        .arg("-c")
        .arg(format!("command -v {program}"))
        .output()
        .unwrap();
    let more = Path::new("/usr/sbin").join(program);
    assert!(
        found.status.success() || more.exists(),
        "{program} is not installed: run scripts/bootstrap.sh test"
    );
    Command::new(if found.status.success() {
        program.into()
    } else {
        more
    })
}

pub fn ok(output: std::io::Result<Output>) -> String {
    let output = output.unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{}\n{out}\n{err}", output.status);
    out.into_owned()
}

/// The command under test: this build's, or the one that JETDR names, where it is measured.
pub fn jetdr() -> Command {
    let given = std::env::var_os("JETDR");
    Command::new(given.unwrap_or_else(|| env!("CARGO_BIN_EXE_jetdr").into()))
}

/// A host keeps its id over a boot; its run folder does not outlive one.
pub fn new_host_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

/// A running `jetdr <part>`; killed when dropped.
pub struct Part {
    pub child: Child,
    pub ready: Value,
}

impl Part {
    pub fn start(log: &Path, arguments: &[String]) -> Self {
        Self::try_start(log, arguments).unwrap_or_else(|error| panic!("{arguments:?}: {error}"))
    }

    /// `Err`: what it said when it refused to start.
    pub fn try_start(log: &Path, arguments: &[String]) -> Result<Self, String> {
        let mut part = Self::spawn(log, arguments);
        match part.wait_ready() {
            true => Ok(part),
            false => {
                part.child.wait().unwrap();
                Err(std::fs::read_to_string(log).unwrap())
            }
        }
    }

    /// Starts it and does not wait.
    pub fn spawn(log: &Path, arguments: &[String]) -> Self {
        let errors = File::options().create(true).append(true).open(log).unwrap();
        let mut command = jetdr();
        command.args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        command.stderr(errors);
        Self {
            child: command.spawn().unwrap(),
            ready: Value::Null,
        }
    }

    /// Waits until it says that it is ready; `false`: it ended instead.
    pub fn wait_ready(&mut self) -> bool {
        let mut line = String::new();
        let mut stdout = BufReader::new(self.child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        let ready = line.strip_prefix("READY ");
        self.ready = ready.map_or(Value::Null, |json| serde_json::from_str(json).unwrap());
        ready.is_some()
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends a signal, by its name.
    pub fn signal(&self, name: &str) {
        let mut kill = Command::new("kill");
        kill.arg(format!("-{name}"))
            .arg(self.child.id().to_string());
        ok(kill.output());
    }

    /// SIGTERM; the exit must be a success.
    pub fn stop(&mut self) {
        self.signal("TERM");
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An appliance, a daemon and a VM, on free ports and in folders of their own.
pub struct Stack {
    pub dir: tempfile::TempDir,
    pub run: tempfile::TempDir,
    /// The host's, which outlives its run folder.
    pub host_id: String,
    pub disks: Vec<(String, PathBuf)>,
    pub drva: Option<Part>,
    pub daemon: Option<Part>,
    pub vm: Option<Part>,
    pub port_base: u64,
    pub store: String,
    pub store_options: Vec<String>,
    pub vm_more: Vec<String>,
    pub cut_interval_ms: u64,
    /// Where the daemon finds the appliance, if that is not the appliance's own ports.
    pub daemon_port_base: Option<u64>,
    /// How the appliance, and how the daemon is to speak.
    pub drva_security: Vec<String>,
    pub daemon_security: Vec<String>,
}

pub fn flag(key: &str, path: &Path) -> [String; 2] {
    [key.into(), path.display().to_string()]
}

impl Stack {
    /// Folders and empty disks; nothing runs yet.
    pub fn new(disks: &[(&str, u64)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let run = tempfile::Builder::new()
            .prefix("jd-")
            .tempdir_in("/dev/shm")
            .unwrap();
        let mut made = Vec::new();
        for (name, bytes) in disks {
            let path = dir.path().join(name);
            let label = name.split('.').next().unwrap().to_string();
            let mut create = jetdr();
            create
                .args(["simhost", "create"])
                .arg(&path)
                .arg(bytes.to_string());
            ok(create.output());
            made.push((label, path));
        }
        let store = dir.path().join("store").display().to_string();
        let mut stack = Self {
            dir,
            run,
            host_id: new_host_id(),
            disks: made,
            drva: None,
            daemon: None,
            vm: None,
            port_base: 0,
            store,
            store_options: Vec::new(),
            vm_more: Vec::new(),
            cut_interval_ms: 200,
            daemon_port_base: None,
            drva_security: vec![PLAIN.into()],
            daemon_security: vec![PLAIN.into()],
        };
        stack.vm_more.extend(["--domain".into(), DOMAIN.into()]);
        stack
    }

    /// The same, running.
    pub fn running(disks: &[(&str, u64)]) -> Self {
        let mut stack = Self::new(disks);
        stack.start_drva();
        stack.start_daemon();
        stack.start_vm();
        stack
    }

    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.log"))
    }

    pub fn drva_arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            "drva".into(),
            "--port-base".into(),
            self.port_base.to_string(),
        ];
        arguments.extend(flag("--data-dir", &self.dir.path().join("data")));
        arguments.extend(["--store".into(), self.store.clone()]);
        arguments.extend(["--cut-interval-ms".into(), self.cut_interval_ms.to_string()]);
        arguments.extend(flag("--status-socket", &self.run.path().join("drva.sock")));
        for option in &self.store_options {
            arguments.extend(["--store-opt".into(), option.clone()]);
        }
        arguments.extend(self.drva_security.iter().cloned());
        arguments
    }

    pub fn start_drva(&mut self) {
        let part = Part::start(&self.log("drva"), &self.drva_arguments());
        self.port_base = part.ready["port_base"].as_u64().unwrap();
        self.drva = Some(part);
    }

    pub fn start_daemon(&mut self) {
        let mut arguments = vec![
            "filterd".into(),
            "--port-base".into(),
            self.daemon_port_base.unwrap_or(self.port_base).to_string(),
        ];
        arguments.extend(flag("--run-dir", self.run.path()));
        arguments.extend(flag(
            "--status-socket",
            &self.run.path().join("filterd.sock"),
        ));
        arguments.extend(["--host-id".into(), self.host_id.clone()]);
        arguments.extend(self.daemon_security.iter().cloned());
        self.daemon = Some(Part::start(&self.log("filterd"), &arguments));
    }

    /// What a VM of this stack is started with.
    pub fn vm_arguments(&self) -> Vec<String> {
        let mut arguments = vec!["simhost".into(), "vm".into()];
        arguments.extend(flag("--run-dir", self.run.path()));
        arguments.extend(flag("--nbd-socket", &self.run.path().join("nbd.sock")));
        arguments.extend(flag("--control-socket", &self.run.path().join("vm.sock")));
        for (label, path) in &self.disks {
            arguments.extend(["--disk".into(), format!("{label}={}", path.display())]);
        }
        arguments.extend(self.vm_more.iter().cloned());
        arguments
    }

    pub fn start_vm(&mut self) {
        self.vm = Some(Part::start(&self.log("vm"), &self.vm_arguments()));
    }

    /// The host crashes and boots: its processes are gone and so is what its run folder held. They are
    /// not started again.
    pub fn reboot(&mut self) {
        for part in [&mut self.vm, &mut self.daemon] {
            part.take().unwrap().kill();
        }
        self.empty_run_folder();
        let boot_id = format!("{:032x}\n", guest::now_ns());
        std::fs::write(self.run.path().join("boot-id"), boot_id).unwrap();
    }

    /// What a host that was switched off has forgotten.
    pub fn empty_run_folder(&self) {
        for entry in std::fs::read_dir(self.run.path()).unwrap().flatten() {
            // The appliance is on another machine.
            if entry.path().is_dir() {
                std::fs::remove_dir_all(entry.path()).unwrap();
            } else if entry.file_name() != "drva.sock" {
                std::fs::remove_file(entry.path()).unwrap();
            }
        }
    }

    pub fn nbd_socket(&self) -> PathBuf {
        self.run.path().join("nbd.sock")
    }

    pub fn uri(&self, label: &str) -> String {
        format!("nbd+unix:///{label}?socket={}", self.nbd_socket().display())
    }

    pub fn command(&self, socket: &str, command: &Value) -> Value {
        let mut stream = UnixStream::connect(self.run.path().join(socket)).unwrap();
        stream.set_read_timeout(Some(LIMIT * 2)).unwrap();
        // The daemon has one answer, and does not wait for the question.
        let _ = writeln!(stream, "{command}");
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{socket}: {error}: {line}"))
    }

    pub fn vm_status(&self) -> Value {
        self.command("vm.sock", &json!({"cmd": "status"}))
    }

    pub fn daemon_status(&self) -> Value {
        self.command("filterd.sock", &json!({"cmd": "status"}))
    }

    pub fn domain(&self) -> Value {
        let status = self.command("drva.sock", &json!({"cmd": "status"}));
        let domains = status["domains"].as_array().unwrap();
        domains
            .iter()
            .find(|d| d["name"] == DOMAIN)
            .cloned()
            .unwrap_or_default()
    }

    /// Waits for a condition, with a deadline.
    pub fn wait(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let since = Instant::now();
        while !holds(self) {
            if since.elapsed() > LIMIT {
                let logs: String = ["drva", "filterd", "vm"]
                    .map(|name| std::fs::read_to_string(self.log(name)).unwrap_or_default())
                    .join("\n---\n");
                panic!(
                    "not in time: {what}\nVM: {}\ndomain: {}\n{logs}",
                    self.vm_status(),
                    self.domain()
                );
            }
            std::thread::sleep(Duration::from_millis(10)); // poll of another process
        }
    }

    /// Every disk streams, and all that was written is durable.
    pub fn settle(&self) {
        self.wait("the disks stream and are durable", |stack| {
            let status = stack.vm_status();
            status["disks"].as_array().unwrap().iter().all(|disk| {
                disk["state"] == "streaming" && disk["published_seq"] == disk["durable_seq"]
            })
        });
    }

    pub fn cut(&self, name: &str) -> u64 {
        let request = json!({"cmd": "cut", "domain": DOMAIN, "name": name});
        let answer = self.command("drva.sock", &request);
        answer["cut"].as_u64().unwrap_or_else(|| panic!("{answer}"))
    }

    pub fn container(&self) -> String {
        format!("{}/{DOMAIN}", self.store)
    }

    pub fn rocva(&self, arguments: &[&str]) -> Output {
        let mut command = jetdr();
        command
            .args(["rocva"])
            .args(arguments)
            .args(["--from", &self.container()]);
        for option in &self.store_options {
            command.args(["--store-opt", option]);
        }
        command.output().unwrap()
    }

    /// Settles, cuts, recovers from the store alone and compares every disk byte for byte.
    pub fn recover_and_compare(&self, name: &str) {
        self.settle();
        self.cut(name);
        self.compare_cut(name, Path::to_owned);
        ok(Ok(self.rocva(&["verify"])));
    }

    /// Recovers a cut from the store alone and compares every disk with the file that `as_it_was` gives
    /// for the disk's file.
    pub fn compare_cut(&self, name: &str, as_it_was: impl Fn(&Path) -> PathBuf) {
        let out = self.dir.path().join(format!("recovered-{name}"));
        let path = out.display().to_string();
        ok(Ok(self.rocva(&["recover", "--cut", name, "--out", &path])));
        for (label, disk) in &self.disks {
            let flat = if disk.extension().is_some_and(|e| e == "vmdk") {
                disk.with_file_name(format!("{label}-flat.vmdk"))
            } else {
                disk.clone()
            };
            let recovered = find(&out, &format!("{label}.raw"));
            assert_eq!(
                first_difference(&as_it_was(&flat), &recovered),
                None,
                "disk {label} at cut {name}"
            );
        }
    }

    /// The filter kept its side of the contract.
    pub fn assert_contract(&self) {
        let status = self.vm_status();
        assert_eq!(status["contract_violations"], 0, "{status}");
    }
}

/// A file below a folder whose name ends like this.
pub fn find(dir: &Path, end: &str) -> PathBuf {
    let mut found = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap().flatten() {
            if entry.path().is_dir() {
                folders.push(entry.path());
            } else if entry.file_name().to_string_lossy().ends_with(end) {
                found.push(entry.path());
            }
        }
    }
    assert_eq!(found.len(), 1, "{end} below {}: {found:?}", dir.display());
    found.remove(0)
}

/// The first byte in which two files differ.
pub fn first_difference(a: &Path, b: &Path) -> Option<u64> {
    let (left, right) = (File::open(a).unwrap(), File::open(b).unwrap());
    let len = left.metadata().unwrap().len();
    assert_eq!(
        len,
        right.metadata().unwrap().len(),
        "{} and {}",
        a.display(),
        b.display()
    );
    let (mut x, mut y) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < len {
        let step = (len - at).min(1 << 20) as usize;
        left.read_exact_at(&mut x[..step], at).unwrap();
        right.read_exact_at(&mut y[..step], at).unwrap();
        if let Some(i) = x[..step].iter().zip(&y[..step]).position(|(x, y)| x != y) {
            return Some(at + i as u64);
        }
        at += step as u64;
    }
    None
}
