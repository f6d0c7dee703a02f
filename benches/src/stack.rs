//! All parts of one protected host, started as processes of their own: appliance, daemon, VMs.
//!
//! Invariant: the two VMs differ in the filter only: same disk length, same memory-backed folder,
//! same server. The appliance's log and store lie on the machine's disk, since they must be durable.

use crate::Settings;
use crate::nbd_alone::make_disk;
use crate::process::{Placement, Running, memory_folder, pin, wait_for};
use anyhow::Context;
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

/// How long an answer may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take until everything that was written is durable and stored.
const SETTLE_LIMIT: Duration = Duration::from_secs(180);

/// One VM with one disk.
pub struct Vm {
    _running: Running,
    /// Its process.
    pub pid: u32,
    /// Its disk.
    pub uri: String,
    control_socket: PathBuf,
}

impl Vm {
    /// What its process says of its disk.
    pub fn disk_status(&self) -> anyhow::Result<Value> {
        let mut status = ask(&self.control_socket, Some(r#"{"cmd":"status"}"#))?;
        Ok(status["disks"][0].take())
    }
}

/// The running parts.
pub struct Stack {
    // Dropped in this order: guests first, the appliance last.
    /// A VM whose disk goes through the filter.
    pub protected: Vm,
    /// The same without it.
    pub bare: Vm,
    daemon: Running,
    appliance: Running,
    status_socket: PathBuf,
    control_socket: PathBuf,
    _memory: TempDir,
    _disk: TempDir,
}

/// Where the protected disk's stream stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Every write is published, nothing is marked.
    pub streaming: bool,
    /// Last seq published.
    pub published: u64,
    /// Last seq that the appliance's log holds.
    pub durable: u64,
    /// Last seq that the store holds.
    pub uploaded: u64,
}

impl Progress {
    /// Everything written is in the appliance's log.
    pub const fn is_durable(&self) -> bool {
        self.streaming && self.durable == self.published && self.published > 0
    }

    fn parse(document: &Value) -> Option<Self> {
        let lane = document.get("lanes")?.get(0)?;
        let number = |key: &str| lane.get(key).and_then(Value::as_u64);
        Some(Self {
            streaming: lane.get("state")? == "streaming" && number("dirty_bytes")? == 0,
            published: number("published_seq")?,
            durable: number("durable_seq")?,
            uploaded: number("uploaded_seq")?,
        })
    }
}

/// Sends one line, if there is one, and reads one JSON document.
fn ask(socket: &Path, command: Option<&str>) -> anyhow::Result<Value> {
    let go = || -> anyhow::Result<Value> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        if let Some(command) = command {
            writeln!(stream, "{command}")?;
        }
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    };
    go().with_context(|| format!("ask {}", socket.display()))
}

fn control_socket(folder: &Path, vm: &str) -> PathBuf {
    folder.join(format!("{vm}.control"))
}

fn vm(settings: &Settings, folder: &Path, name: &str, more: &[&str]) -> anyhow::Result<Vm> {
    let disk = folder.join(format!("{name}.img"));
    let socket = folder.join(format!("{name}.sock"));
    let mut command = Command::new(&settings.jetdr);
    command.args(["simhost", "vm", "--name", name]);
    command
        .arg("--disk")
        .arg(format!("disk={}", disk.display()));
    command
        .arg("--run-dir")
        .arg(folder.join("run"))
        .arg("--nbd-socket")
        .arg(&socket);
    command
        .arg("--control-socket")
        .arg(control_socket(folder, name));
    command.args(more);
    let (running, ready) = Running::start_ready(&format!("VM {name}"), command)?;
    let pid = ready["pid"]
        .as_u64()
        .and_then(|pid| u32::try_from(pid).ok());
    let pid = pid.unwrap_or_else(|| running.pid());
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    Ok(Vm {
        _running: running,
        pid,
        uri,
        control_socket: control_socket(folder, name),
    })
}

/// Fills a disk with bytes that do not compress.
fn fill_with_noise(path: &Path, disk_bytes: u64) -> anyhow::Result<()> {
    let mut file = std::fs::File::options().write(true).open(path)?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut piece = vec![0u8; 1 << 20];
    for _ in 0..disk_bytes >> 20 {
        for word in piece.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&piece)?;
    }
    Ok(())
}

impl Stack {
    /// Starts everything; returns when the protected disk's first sync is over.
    pub fn start(settings: &Settings, disk_bytes: u64) -> anyhow::Result<Self> {
        let temporary = |folder| {
            tempfile::Builder::new()
                .prefix("jetdr-bench-")
                .tempdir_in(folder)
        };
        let memory = temporary(memory_folder()).context("make a folder in memory")?;
        let disk =
            temporary(std::env::temp_dir()).context("make a folder for the log and store")?;
        std::fs::create_dir(disk.path().join("store"))?;

        let mut command = Command::new(&settings.jetdr);
        command
            .arg("drva")
            .arg("--data-dir")
            .arg(disk.path().join("log"));
        command.arg("--store").arg(disk.path().join("store"));
        command.args(["--port-base", "0", "--insecure-plain-text"]);
        let (appliance, ready) = Running::start_ready("jetdr drva", command)?;
        let port_base = ready["port_base"]
            .as_u64()
            .context("the appliance names no port_base")?;

        let status_socket = memory.path().join("daemon.sock");
        let mut command = Command::new(&settings.jetdr);
        command
            .arg("filterd")
            .arg("--run-dir")
            .arg(memory.path().join("run"));
        command.args(["--drva", "127.0.0.1", "--port-base", &port_base.to_string()]);
        command.arg("--insecure-plain-text");
        command.arg("--status-socket").arg(&status_socket);
        let (daemon, _) = Running::start_ready("jetdr filterd", command)?;

        let make = |name: &str| make_disk(&memory.path().join(format!("{name}.img")), disk_bytes);
        make("protected")?;
        make("bare")?;
        let protected = vm(settings, memory.path(), "protected", &[])?;
        let bare = vm(settings, memory.path(), "bare", &["--no-filter"])?;
        let stack = Self {
            protected,
            bare,
            daemon,
            appliance,
            status_socket,
            control_socket: control_socket(memory.path(), "protected"),
            _memory: memory,
            _disk: disk,
        };
        stack.settle()?;
        Ok(stack)
    }

    /// One more VM under the filter, with properties (`key=value`). With `content` its disk is full of
    /// bytes that do not compress, so that its first sync has something to do; it begins at once.
    pub fn add_vm(
        &self,
        settings: &Settings,
        name: &str,
        disk_bytes: u64,
        content: bool,
        properties: &[&str],
    ) -> anyhow::Result<Vm> {
        let path = self._memory.path().join(format!("{name}.img"));
        make_disk(&path, disk_bytes)?;
        if content {
            fill_with_noise(&path, disk_bytes)?;
        }
        let more: Vec<_> = properties.iter().flat_map(|p| ["--property", p]).collect();
        vm(settings, self._memory.path(), name, &more)
    }

    /// Waits until every disk streams, and all of it is stored.
    pub fn settle_all(&self) -> anyhow::Result<()> {
        wait_for("every disk to be stored", SETTLE_LIMIT, || {
            let status = ask(&self.status_socket, None)?;
            let lanes = status["lanes"].as_array().context("no lanes")?;
            let stored = lanes.iter().all(|lane| {
                let idle = lane["state"] == "streaming" || lane["state"] == "closed";
                idle && lane["uploaded_seq"] == lane["published_seq"]
            });
            Ok(stored.then_some(()))
        })
    }

    /// Where the stream stands now; `None` while the daemon has no lane.
    pub fn progress(&self) -> anyhow::Result<Option<Progress>> {
        Ok(Progress::parse(&ask(&self.status_socket, None)?))
    }

    /// How often the disk has fallen back to marking writes instead of streaming them.
    pub fn tracking_count(&self) -> anyhow::Result<u64> {
        let status = ask(&self.control_socket, Some(r#"{"cmd":"status"}"#))?;
        let count = status["disks"][0]["tracking_count"].as_u64();
        count.context("the VM's status has no tracking_count")
    }

    /// Waits until everything written is in the appliance's log.
    pub fn wait_durable(&self) -> anyhow::Result<Progress> {
        wait_for("everything written to be durable", SETTLE_LIMIT, || {
            Ok(self.progress()?.filter(Progress::is_durable))
        })
    }

    /// Waits until nobody has anything left to do, so that the next run has the machine to itself.
    pub fn settle(&self) -> anyhow::Result<()> {
        wait_for("everything written to be stored", SETTLE_LIMIT, || {
            let progress = self.progress()?;
            let stored = |p: &Progress| p.is_durable() && p.uploaded == p.published;
            Ok(progress.filter(stored).map(drop))
        })
    }

    /// Leaves the first core to guests and their VMs: an appliance is another machine.
    pub fn stand_apart(&self) -> anyhow::Result<()> {
        let core = Placement::Apart.server();
        pin(self.daemon.pid(), core)?;
        pin(self.appliance.pid(), core)
    }

    /// Puts both VMs where the placement wants them. The daemon and the appliance stay free: they
    /// are nobody's peer.
    pub fn place(&self, placement: Placement) -> anyhow::Result<()> {
        pin(self.protected.pid, placement.server())?;
        pin(self.bare.pid, placement.server())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read_from_the_daemons_status() {
        let lane = |state: &str, dirty: u64, durable: u64| {
            let text = format!(
                r#"{{"lanes":[{{"state":"{state}","dirty_bytes":{dirty},"published_seq":9,
                "durable_seq":{durable},"uploaded_seq":8}}]}}"#
            );
            Progress::parse(&serde_json::from_str(&text).expect("valid JSON"))
        };
        let all = lane("streaming", 0, 9).expect("complete");
        assert!(all.is_durable());
        assert_eq!((all.published, all.durable, all.uploaded), (9, 9, 8));
        assert!(!lane("streaming", 0, 8).expect("complete").is_durable());
        assert!(!lane("streaming", 4096, 9).expect("complete").is_durable());
        assert!(!lane("tracking", 0, 9).expect("complete").is_durable());
        assert_eq!(Progress::parse(&serde_json::json!({"lanes": []})), None);
        assert!(!Progress::default().is_durable(), "nothing published yet");
    }
}
