//! The processes of virtual machines on a host.
//!
//! Invariant: a machine has at most one process that has its disks open, on whatever host; a process that
//! ends is waited for. A guest's socket stays where the machine was powered on.

use super::{Host, signal};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// How long a process may take to say that it is ready, to stop, to answer.
const LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at a process that is about to end.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A disk of a machine.
#[derive(Clone, Debug)]
pub struct MachineDisk {
    /// The label by which guests find it.
    pub label: String,
    /// Its file.
    pub path: PathBuf,
}

/// What is needed to run a machine.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Its instance id.
    pub uuid: uuid::Uuid,
    /// Its disks.
    pub disks: Vec<MachineDisk>,
    /// The filter on its disks, and the filter's properties.
    pub filter: Option<(String, Vec<(String, String)>)>,
}

/// A running process of a machine.
#[derive(Debug)]
pub struct Process {
    child: Child,
    control: PathBuf,
    /// What it says after the first word.
    lines: Receiver<String>,
}

impl Process {
    /// Waits for the end; kills what does not end in time.
    fn end(&mut self) {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < deadline => std::thread::sleep(LOOK_EVERY),
                Ok(None) => {
                    let _ = self.child.kill();
                }
                Ok(Some(status)) => {
                    if !status.success() {
                        tracing::debug!("a machine's process ended with {status}");
                    }
                    return;
                }
                Err(_) => return,
            }
        }
    }
}

/// A command to a process, and its answer.
fn ask(socket: &Path, command: &Value) -> anyhow::Result<Value> {
    let asked = || {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(LIMIT))?;
        writeln!(&mut &stream, "{command}")?;
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        Ok::<_, anyhow::Error>(serde_json::from_str::<Value>(&line)?)
    };
    let answer = asked().with_context(|| format!("cannot ask {}", socket.display()))?;
    match answer.get("error").and_then(Value::as_str) {
        Some(error) => bail!("{error}"),
        None => Ok(answer),
    }
}

impl Host {
    fn socket(&self, name: &str, kind: &str) -> PathBuf {
        let folder = self.folder.join("machines");
        // A machine that comes back, or changes its filter here, has another process for a moment.
        let turn = uuid::Uuid::new_v4().simple().to_string();
        folder.join(format!("{name}-{}.{kind}", turn.get(..6).unwrap_or("0")))
    }

    /// Starts a process. `waits`: for a machine that comes to that socket.
    fn spawn(&self, machine: &Machine, waits: Option<&Path>) -> anyhow::Result<(Process, Value)> {
        let control = self.socket(&machine.name, "control");
        let nbd = self.socket(&machine.name, "sock");
        let mut command = self.own_command(&["vm"]);
        command
            .args(["--name", &machine.name, "--uuid"])
            .arg(machine.uuid.to_string())
            .arg("--control-socket")
            .arg(&control);
        for disk in &machine.disks {
            let flag = format!("--disk={}={}", disk.label, disk.path.display());
            command.arg(flag);
        }
        match waits {
            Some(socket) => command.arg("--incoming").arg(socket),
            None => command.arg("--nbd-socket").arg(&nbd),
        };
        self.filter_arguments(machine, &mut command)?;
        let log = self
            .folder
            .join("log")
            .join(format!("{}.log", machine.name));
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(log)?;
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("cannot start the machine's process")?;
        let stdout = child.stdout.take().context("it has no stdout")?;
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = send.send(line); // nobody need hear it
            }
        });
        let mut process = Process {
            child,
            control,
            lines,
        };
        let word = if waits.is_some() {
            "WAITING "
        } else {
            "READY "
        };
        match process.hear(word) {
            Ok(ready) => Ok((process, ready)),
            Err(error) => {
                let _ = process.child.kill();
                process.end();
                let name = &machine.name;
                Err(error.context(format!(
                    "{name} does not start on {}: see its log",
                    self.name
                )))
            }
        }
    }

    fn filter_arguments(
        &self,
        machine: &Machine,
        command: &mut std::process::Command,
    ) -> anyhow::Result<()> {
        let Some((filter, properties)) = &machine.filter else {
            command
                .arg("--no-filter")
                .arg("--run-dir")
                .arg(&self.folder);
            return Ok(());
        };
        let library = self.library(filter);
        let library = library.with_context(|| format!("{} has no filter {filter}", self.name))?;
        command
            .arg("--filter-lib")
            .arg(library)
            .arg("--run-dir")
            .arg(self.run_folder(filter));
        for (key, value) in properties {
            match key.as_str() {
                "jetdr.domain" => command.arg(format!("--domain={value}")),
                _ => command.arg(format!("--property={key}={value}")),
            };
        }
        Ok(())
    }

    /// Powers a machine on; where guests reach its disks.
    pub fn power_on(&self, machine: &Machine) -> anyhow::Result<PathBuf> {
        if self.machines.lock().contains_key(&machine.name) {
            bail!("{} is running", machine.name);
        }
        let (process, ready) = self.spawn(machine, None)?;
        let socket = ready.get("nbd_socket").and_then(Value::as_str);
        let socket = PathBuf::from(socket.context("it serves its disks nowhere")?);
        self.machines.lock().insert(machine.name.clone(), process);
        Ok(socket)
    }

    /// Powers a machine off, in order or not.
    pub fn power_off(&self, name: &str, is_crash: bool) {
        let process = self.machines.lock().remove(name);
        if let Some(mut process) = process {
            signal(process.child.id(), if is_crash { "KILL" } else { "TERM" });
            process.end();
        }
    }

    /// The machines whose processes run.
    pub fn running(&self) -> Vec<String> {
        let mut machines = self.machines.lock();
        machines.retain(|name, process| match process.child.try_wait() {
            Ok(Some(status)) => {
                tracing::warn!("{name} ended by itself on {}: {status}", self.name);
                false
            }
            _ => true,
        });
        machines.keys().cloned().collect()
    }

    /// What a machine's process says of itself.
    pub fn ask_machine(&self, name: &str, command: &Value) -> anyhow::Result<Value> {
        let control = self.machines.lock().get(name).map(|p| p.control.clone());
        let control = control.with_context(|| format!("{name} does not run on {}", self.name))?;
        ask(&control, command)
    }

    /// Moves a running machine to another host, or to another process of this one: `to_be` is the machine
    /// as it is there (its filter may be another). Its guests go on.
    pub fn hand_over(&self, to: &Host, to_be: &Machine) -> anyhow::Result<()> {
        let name = &to_be.name;
        self.ask_machine(name, &json!({"cmd": "migrate-prepare"}))?;
        let incoming = to.socket(name, "incoming");
        let cancel = || self.ask_machine(name, &json!({"cmd": "migrate-cancel"}));
        let (mut process, _) = to.spawn(to_be, Some(&incoming)).inspect_err(|_| {
            let _ = cancel();
        })?;
        let go = json!({"cmd": "migrate-go", "to": incoming});
        if let Err(error) = self.ask_machine(name, &go) {
            let _ = process.child.kill();
            process.end();
            return Err(error.context(format!("{name} stays on {}", self.name)));
        }
        let ready = process.hear("READY ");
        let old = self.machines.lock().remove(name);
        if let Some(mut old) = old {
            old.end();
        }
        to.machines.lock().insert(name.clone(), process);
        ready.map(drop)
    }

    pub(super) fn end_machines(&self, is_crash: bool) {
        let mut all = std::mem::take(&mut *self.machines.lock());
        for process in all.values() {
            signal(process.child.id(), if is_crash { "KILL" } else { "TERM" });
        }
        all.values_mut().for_each(Process::end);
    }
}

impl Process {
    /// Waits for a line that begins with a word; its document.
    fn hear(&mut self, word: &str) -> anyhow::Result<Value> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left);
            let line = line.with_context(|| format!("it does not say {}", word.trim()))?;
            if let Some(document) = line.strip_prefix(word) {
                return Ok(serde_json::from_str(document)?);
            }
        }
    }
}
