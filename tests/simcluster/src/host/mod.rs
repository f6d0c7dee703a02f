//! One simulated host: a root folder, an address, the packages in the root, the processes that run there.
//!
//! | module | does |
//! |---|---|
//! | `download` | fetches a package as the host would: from its address, with its trust |
//! | `firewall` | what the rulesets in the root open |
//! | `install` | packages into the root, and out of it |
//! | `machines` | the processes of virtual machines |
//! | `options` | advanced options |
//! | `root` | a fresh root |
//!
//! Invariant: what a host has is what lies in its root: its firewall, services and filters are read from
//! there. Every process that it starts has the host's network (`csrc/hostnet.c`) and ends with it.

mod download;
mod firewall;
mod install;
mod machines;
mod options;
mod root;

pub use download::fetch;
pub use firewall::refresh;
pub use install::{HostError, Package, listing};
pub use machines::{Machine, MachineDisk};
pub use options::{OptionArgs, command as option_command};

use parking_lot::{Condvar, Mutex};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use vib_packaging::{AcceptanceLevel, Anchors};

/// What all hosts of a cluster share.
#[derive(Debug)]
pub struct Tools {
    /// This program, and its arguments before `vm`, `firewall-refresh` and the like.
    pub program: PathBuf,
    /// Arguments before those.
    pub prefix: Vec<String>,
    /// `libhostnet.so`.
    pub network: PathBuf,
    /// Whose signatures of packages count.
    pub signers: Option<Anchors>,
}

/// What can be changed of a host while it runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its version.
    pub version: String,
    /// Its build.
    pub build: u64,
    /// vCenter reaches it.
    pub is_reachable: bool,
    /// Its clock is ahead of vCenter's by so much.
    pub clock_ahead_ms: i64,
    /// Its CIM service runs.
    pub is_cim_running: bool,
    /// Its name servers.
    pub dns_servers: Vec<String>,
    /// A boot lays the root anew.
    pub is_stateless: bool,
    /// Packages below this level are refused.
    pub level: AcceptanceLevel,
    /// Neither signatures nor levels of packages are looked at.
    pub is_forced: bool,
    /// Work on its packages waits.
    pub is_held: bool,
}

/// A simulated host.
#[derive(Debug)]
pub struct Host {
    /// Its id in vCenter.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The address from which it dials, and on which its processes listen.
    pub address: Ipv4Addr,
    folder: PathBuf,
    tools: Arc<Tools>,
    settings: Mutex<Settings>,
    let_go: Condvar,
    /// One change of packages at a time.
    work: Mutex<()>,
    machines: Mutex<BTreeMap<String, machines::Process>>,
}

impl Host {
    /// A host that has booted for the first time.
    pub fn new(
        id: &str,
        name: &str,
        address: Ipv4Addr,
        folder: &Path,
        tools: Arc<Tools>,
        settings: Settings,
    ) -> anyhow::Result<Arc<Self>> {
        let host = Arc::new(Self {
            id: id.to_owned(),
            name: name.to_owned(),
            address,
            folder: folder.to_owned(),
            tools,
            settings: Mutex::new(settings),
            let_go: Condvar::new(),
            work: Mutex::default(),
            machines: Mutex::default(),
        });
        host.lay_root()?;
        host.boot()?;
        Ok(host)
    }

    /// The root folder.
    pub fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    /// What is set.
    pub fn settings(&self) -> Settings {
        self.settings.lock().clone()
    }

    /// Sets something.
    pub fn set<R>(&self, change: impl FnOnce(&mut Settings) -> R) -> R {
        let done = change(&mut self.settings.lock());
        self.let_go.notify_all();
        done
    }

    /// Waits while the host is held.
    fn wait_until_let_go(&self) {
        let mut settings = self.settings.lock();
        while settings.is_held {
            self.let_go.wait(&mut settings);
        }
    }

    /// A command that runs on the host.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(self.root())
            .env("LD_PRELOAD", &self.tools.network)
            .env("SIMHOST_ADDRESS", self.address.to_string())
            .env("SIMHOST_FIREWALL", self.rules_path())
            .env_remove("JETDR_ROOT")
            .stdin(Stdio::null());
        command
    }

    /// This program as a command that runs on the host.
    pub fn own_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(&self.tools.program);
        command.args(&self.tools.prefix).args(arguments);
        command
    }

    /// Runs an init script (a name below `etc/init.d`) with a verb, to its end.
    pub fn script(&self, name: &str, verb: &[&str]) -> std::io::Result<Output> {
        let path = self.root().join("etc/init.d").join(name);
        self.command(&path).args(verb).output()
    }

    fn scripts(&self, folder: &str) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.root().join(folder));
        let mut found: Vec<PathBuf> = entries
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect();
        found.sort();
        found
    }

    /// The services of its init scripts, and whether they run.
    pub fn services(&self) -> Vec<(String, bool)> {
        let mut all = vec![("sfcbd-watchdog".into(), self.settings().is_cim_running)];
        for script in self.scripts("etc/init.d") {
            let Some(name) = script.file_name().and_then(|name| name.to_str()) else {
                continue;
            };
            let pid = self.root().join(format!("var/run/{name}.pid"));
            all.push((name.to_owned(), self.pid_in(&pid).is_some()));
        }
        all
    }

    /// The process of a pid file, if it lives and is one of this host's.
    fn pid_in(&self, file: &Path) -> Option<u32> {
        let pid: u32 = std::fs::read_to_string(file).ok()?.trim().parse().ok()?;
        let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
        let mark = format!("SIMHOST_FIREWALL={}", self.rules_path().display());
        let is_ours = environment
            .split(|b| *b == 0)
            .any(|one| one == mark.as_bytes());
        is_ours.then_some(pid)
    }

    /// After a boot: the run folder is empty, what the root holds is started.
    fn boot(&self) -> anyhow::Result<()> {
        root::empty(&self.root().join("var/run"))?;
        self.settle_packages()?;
        self.refresh_firewall()?;
        for package in self.packages() {
            self.mark_boot(&package)?;
        }
        for script in self.scripts("etc/init.d") {
            let output = self.command(&script).arg("start").output()?;
            if !output.status.success() {
                tracing::warn!("{}: {}", self.name, said(&output));
            }
        }
        Ok(())
    }

    /// Boots it: in order (`is_crash` false), or as after a power failure. Its machines are off then.
    pub fn reboot(&self, is_crash: bool) -> anyhow::Result<()> {
        let _one = self.work.lock();
        self.go_down(is_crash);
        if self.settings().is_stateless {
            self.lay_root()?;
        }
        self.boot()
    }

    /// Ends all of its processes.
    pub fn go_down(&self, is_crash: bool) {
        if is_crash {
            // Before anything of it hears of the others' end.
            self.kill_services();
        }
        self.end_machines(is_crash);
        if !is_crash {
            for script in self.scripts("etc/shutdown.d") {
                let _ = self.command(&script).output();
            }
        }
        self.kill_services();
    }

    fn kill_services(&self) {
        for suffix in ["watchdog.pid", "pid"] {
            for script in self.scripts("etc/init.d") {
                let name = script.file_name().unwrap_or_default().to_string_lossy();
                let file = self.root().join(format!("var/run/{name}.{suffix}"));
                if let Some(pid) = self.pid_in(&file) {
                    signal(pid, "KILL");
                }
            }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.go_down(true);
    }
}

/// Sends a signal.
fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill")
        .args([format!("-{name}"), pid.to_string()])
        .stderr(Stdio::null())
        .status();
    if let Err(error) = sent {
        tracing::warn!("cannot send {name} to {pid}: {error}");
    }
}

/// What a command said, shortly.
fn said(output: &Output) -> String {
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stderr),
        String::from_utf8_lossy(&output.stdout)
    );
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.is_empty())
        .take(8)
        .collect();
    match lines.is_empty() {
        true => format!("it ended with {}", output.status),
        false => lines.join("; "),
    }
}
