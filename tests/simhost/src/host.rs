//! A host: runs each VM as a process of its own, on command, and tells how each ended.
//!
//! Invariant: a VM's name is used by at most one running process; each process that was started is
//! waited for, so its end is always known. A reboot is what it is in life: every VM is killed, the run
//! folder is emptied, the boot id changes.
//!
//! Commands come over a unix socket, one JSON document a line, one answer a line: `start` (vm, args),
//! `stop`, `kill`, `restart` (vm), `list`, `reboot`, `power-cut` (keep, seed), `migrate` (vm, to); `receive`
//! and `withdraw` are for the other host of a migration. What happens by itself is told on stdout, as
//! `EVENT {json}`.

use crate::disk::{Format, undo};
use crate::socket::UnixSocket;
use anyhow::{Context, bail};
use parking_lot::{Condvar, Mutex, MutexGuard};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// How long a VM may take to be ready.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long a VM may take to stop before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// How often the processes are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Most VMs of a host.
const MAX_VMS: usize = 256;
/// The longest command.
const MAX_COMMAND_BYTES: u64 = 1 << 20;

/// A host with its VMs.
#[derive(clap::Args, Clone, Debug)]
pub struct HostArgs {
    /// The host's run folder, shared with the filter daemon. It gets a `boot-id`.
    #[arg(long)]
    pub run_dir: PathBuf,
    /// Folder of the VMs' sockets: `<vm>.sock` (NBD) and `<vm>.control`.
    #[arg(long)]
    pub nbd_dir: PathBuf,
    /// Unix socket for commands.
    #[arg(long)]
    pub control_socket: PathBuf,
}

/// How a VM's process ended.
#[derive(Clone, Copy, Debug)]
struct End {
    status: ExitStatus,
    asked_for: bool,
}

impl End {
    fn to_json(self) -> Value {
        let verdict = match (self.status.code(), self.status.signal()) {
            (Some(0), _) => "clean",
            (Some(crate::contract::EXIT_VIOLATION), _) => "contract broken",
            (Some(_), _) => "failed",
            (None, _) => "killed",
        };
        json!({
            "code": self.status.code(), "signal": self.status.signal(),
            "verdict": verdict, "asked_for": self.asked_for,
        })
    }
}

struct Vm {
    args: Vec<String>,
    child: Child,
    ready: Value,
    asked_to_end: bool,
    end: Option<End>,
}

/// The host.
struct Host {
    args: HostArgs,
    program: PathBuf,
    prefix: Vec<OsString>,
    vms: Mutex<BTreeMap<String, Vm>>,
    ended: Condvar,
}

/// The arguments with which this program was called before `host`: `vm` follows the same.
fn prefix() -> Vec<OsString> {
    let before = std::env::args_os().skip(1).take_while(|a| a != "host");
    before.chain([OsString::from("vm")]).collect()
}

/// A command to another process, and its answer.
fn ask(socket: &Path, command: &Value) -> anyhow::Result<Value> {
    let ask = || {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(2 * START_LIMIT))?;
        writeln!(&mut &stream, "{command}")?;
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        if line.is_empty() {
            return Err(std::io::Error::other("it ended without an answer"));
        }
        Ok(serde_json::from_str::<Value>(&line)?)
    };
    let answer = ask().with_context(|| format!("cannot ask {}", socket.display()))?;
    match answer.get("error").and_then(Value::as_str) {
        Some(error) => Err(Refused(error.into()).into()),
        None => Ok(answer),
    }
}

/// An answer that is an error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

fn event(name: &str, vm: &str, what: &Value) {
    // Nobody need read them, and the host goes on when nobody does.
    let event = json!({"event": name, "vm": vm, "what": what});
    let _ = writeln!(std::io::stdout(), "EVENT {event}");
}

fn is_name(name: &str) -> bool {
    let known = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
    (1..=64).contains(&name.len()) && name.bytes().all(known) && !name.starts_with('.')
}

fn write_boot_id(run_dir: &Path) -> anyhow::Result<()> {
    let path = run_dir.join("boot-id");
    let new = run_dir.join("boot-id.new");
    std::fs::write(&new, format!("{}\n", uuid::Uuid::new_v4().simple()))
        .and_then(|()| std::fs::rename(&new, &path))
        .with_context(|| format!("cannot write {}", path.display()))
}

impl Host {
    fn new(args: HostArgs) -> anyhow::Result<Self> {
        for folder in [&args.run_dir, &args.nbd_dir] {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot make the folder {}", folder.display()))?;
        }
        // A host process that starts again is not a boot: what the run folder holds is still good.
        if !args.run_dir.join("boot-id").exists() {
            write_boot_id(&args.run_dir)?;
        }
        Ok(Self {
            args,
            program: std::env::current_exe().context("where is this program?")?,
            prefix: prefix(),
            vms: Mutex::default(),
            ended: Condvar::new(),
        })
    }

    /// `arrives`: it comes from another host, with its sockets.
    fn spawn(
        &self,
        name: &str,
        args: &[String],
        arrives: bool,
    ) -> anyhow::Result<(Child, ChildStdout)> {
        let (flag, socket) = if arrives {
            ("--incoming", format!("{name}.incoming"))
        } else {
            ("--nbd-socket", format!("{name}.sock"))
        };
        let mut child = Command::new(&self.program)
            .args(&self.prefix)
            .args(["--name", name])
            .arg("--run-dir")
            .arg(&self.args.run_dir)
            .arg(flag)
            .arg(self.args.nbd_dir.join(socket))
            .arg("--control-socket")
            .arg(self.args.nbd_dir.join(format!("{name}.control")))
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        let stdout = child.stdout.take().context("the VM has no stdout")?;
        Ok((child, stdout))
    }

    fn start(self: &Arc<Self>, name: &str, args: Vec<String>) -> anyhow::Result<Value> {
        self.begin(name, args, false)
    }

    /// Starts a process that waits for a VM of another host.
    fn receive(self: &Arc<Self>, name: &str, args: Vec<String>) -> anyhow::Result<Value> {
        self.begin(name, args, true)
    }

    fn begin(
        self: &Arc<Self>,
        name: &str,
        args: Vec<String>,
        arrives: bool,
    ) -> anyhow::Result<Value> {
        if !is_name(name) {
            bail!("`{name}` is no name of a VM: letters, digits, `_`, `.`, `-`, at most 64");
        }
        let stdout = {
            let mut vms = self.vms.lock();
            if vms.get(name).is_some_and(|vm| vm.end.is_none()) {
                bail!("`{name}` is running");
            }
            if vms.len() >= MAX_VMS && !vms.contains_key(name) {
                bail!("this host has {MAX_VMS} VMs already");
            }
            let (child, stdout) = self.spawn(name, &args, arrives)?;
            let vm = Vm {
                args,
                child,
                ready: Value::Null,
                asked_to_end: false,
                end: None,
            };
            vms.insert(name.into(), vm);
            stdout
        };
        let (send, ready) = channel();
        let (of, known) = (self.clone(), name.to_string());
        // The thread goes on reading, so that a VM that says more never blocks on a full pipe.
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
            let _ = send.send(lines.next().unwrap_or_default());
            for line in lines {
                let ready = line
                    .strip_prefix("READY ")
                    .map(serde_json::from_str::<Value>);
                if let Some(Ok(ready)) = ready {
                    of.arrived(&known, ready);
                }
            }
        });
        let line = ready.recv_timeout(START_LIMIT).unwrap_or_default();
        let parsed = line
            .strip_prefix(if arrives { "WAITING " } else { "READY " })
            .and_then(|text| serde_json::from_str(text).ok());
        let Some(ready): Option<Value> = parsed else {
            let end = self.end(name, libc::SIGKILL, STOP_LIMIT)?;
            bail!("`{name}` did not get ready, its log says why; it ended: {end}");
        };
        if let Some(vm) = self.vms.lock().get_mut(name) {
            vm.ready = ready.clone();
        }
        Ok(ready)
    }

    /// A VM has come from another host.
    fn arrived(&self, name: &str, ready: Value) {
        if let Some(vm) = self.vms.lock().get_mut(name) {
            vm.ready = ready.clone();
        }
        event("arrived", name, &ready);
    }

    /// Moves a running VM to another host, which is given by its control socket.
    fn migrate(&self, name: &str, command: &Value) -> anyhow::Result<Value> {
        let to = command.get("to").and_then(Value::as_str);
        let to = PathBuf::from(to.context("`to` is missing: the other host's control socket")?);
        let args = match self.vms.lock().get(name) {
            Some(vm) if vm.end.is_none() => vm.args.clone(),
            _ => bail!("no VM `{name}` runs here; see `list`"),
        };
        let control = self.args.nbd_dir.join(format!("{name}.control"));
        ask(&control, &json!({"cmd": "migrate-prepare"}))?;
        let there = json!({"cmd": "receive", "vm": name, "args": args});
        let waiting = match ask(&to, &there) {
            Ok(waiting) => waiting,
            Err(error) => {
                ask(&control, &json!({"cmd": "migrate-cancel"}))?;
                return Err(error.context("the other host does not take it"));
            }
        };
        if let Some(vm) = self.vms.lock().get_mut(name) {
            vm.asked_to_end = true;
        }
        let cancel_at = command.get("cancel_at");
        let incoming = waiting.get("incoming");
        let go = json!({"cmd": "migrate-go", "to": incoming, "cancel_at": cancel_at});
        let gone = ask(&control, &go);
        if gone.is_err()
            && let Some(vm) = self.vms.lock().get_mut(name)
        {
            vm.asked_to_end = false;
        }
        if gone.as_ref().is_err_and(|error| error.is::<Refused>()) {
            // It runs here. If it ended without a word it may run there.
            let _ = ask(&to, &json!({"cmd": "withdraw", "vm": name}));
        }
        let mut gone = gone?;
        let end = self.end_of(name, STOP_LIMIT)?;
        if let Some(gone) = gone.as_object_mut() {
            gone.insert("end".into(), end);
            gone.insert("to".into(), json!(to));
        }
        tracing::info!("VM {name} has moved: {gone}");
        Ok(gone)
    }

    /// Ends a process that waits for a VM which does not come.
    fn withdraw(&self, name: &str) -> anyhow::Result<Value> {
        let waits = |vm: &Vm| vm.end.is_none() && vm.ready.get("incoming").is_some();
        let is_waiting = self.vms.lock().get(name).is_some_and(waits);
        match is_waiting {
            true => self.end(name, libc::SIGTERM, STOP_LIMIT),
            false => Ok(json!({"withdrawn": false})),
        }
    }

    /// Waits for an end that is coming; kills what does not end in time.
    fn end_of(&self, name: &str, limit: Duration) -> anyhow::Result<Value> {
        self.end(name, 0, limit)
    }

    /// Sends a signal and waits for the end; kills what does not end in time.
    fn end(&self, name: &str, signal: i32, limit: Duration) -> anyhow::Result<Value> {
        let mut vms = self.vms.lock();
        let deadline = Instant::now() + limit;
        let mut killed = signal == libc::SIGKILL;
        self.signal(&mut vms, name, signal)?;
        loop {
            if let Some(end) = vms.get(name).and_then(|vm| vm.end) {
                return Ok(end.to_json());
            }
            if !killed && Instant::now() > deadline {
                killed = true;
                tracing::warn!("VM {name} does not stop: killed");
                self.signal(&mut vms, name, libc::SIGKILL)?;
            }
            self.ended.wait_for(&mut vms, LOOK_EVERY);
            self.look(&mut vms);
        }
    }

    fn signal(
        &self,
        vms: &mut MutexGuard<'_, BTreeMap<String, Vm>>,
        name: &str,
        signal: i32,
    ) -> anyhow::Result<()> {
        let Some(vm) = vms.get_mut(name) else {
            bail!("there is no VM `{name}`; see `list`");
        };
        if vm.end.is_some() {
            return Ok(());
        }
        vm.asked_to_end = true;
        // SAFETY: a plain call. The process has not been waited for, so its id is still its own.
        unsafe { libc::kill(vm.child.id() as i32, signal) };
        Ok(())
    }

    /// Notes what has ended.
    fn look(&self, vms: &mut MutexGuard<'_, BTreeMap<String, Vm>>) {
        for (name, vm) in vms.iter_mut().filter(|(_, vm)| vm.end.is_none()) {
            if let Ok(Some(status)) = vm.child.try_wait() {
                let end = End {
                    status,
                    asked_for: vm.asked_to_end,
                };
                vm.end = Some(end);
                event("ended", name, &end.to_json());
                self.ended.notify_all();
            }
        }
    }

    fn list(&self) -> Value {
        let vms = self.vms.lock();
        let all: Vec<Value> = vms
            .iter()
            .map(|(name, vm)| {
                json!({
                    "vm": name, "running": vm.end.is_none(), "ready": vm.ready,
                    "end": vm.end.map(End::to_json),
                })
            })
            .collect();
        json!({ "vms": all })
    }

    fn restart(self: &Arc<Self>, name: &str) -> anyhow::Result<Value> {
        self.end(name, libc::SIGKILL, STOP_LIMIT)?;
        let args = self.vms.lock().get(name).map(|vm| vm.args.clone());
        self.start(name, args.unwrap_or_default())
    }

    /// The host crashes and boots again: its VMs are off afterwards.
    fn reboot(&self) -> anyhow::Result<Value> {
        self.end_all(libc::SIGKILL);
        self.boot()?;
        Ok(json!({"rebooted": true}))
    }

    /// As a reboot, and what no flush covered is gone from disks with a volatile cache.
    fn power_cut(&self, keep: f64, seed: Option<u64>) -> anyhow::Result<Value> {
        if !(0.0..=1.0).contains(&keep) {
            bail!("keep {keep} is not within 0 and 1");
        }
        let seed = seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u128() as u64);
        self.end_all(libc::SIGKILL);
        let mut lost = Vec::new();
        for (path, format) in self.disks()? {
            if !undo::journal_path(&path).exists() {
                continue;
            }
            let file = crate::disk::open_file(&path, format)?;
            file.lock()?;
            let undone = undo::power_cut(&path, &file, keep, seed)?;
            lost.push(json!({"disk": path, "writes": undone.writes, "bytes": undone.bytes}));
        }
        self.boot()?;
        Ok(json!({"power_cut": true, "lost": lost, "keep": keep, "seed": seed}))
    }

    /// The disks of all VMs.
    fn disks(&self) -> anyhow::Result<BTreeMap<PathBuf, Format>> {
        let mut disks = BTreeMap::new();
        for vm in self.vms.lock().values() {
            let mut args = vm.args.iter();
            while let Some(arg) = args.next() {
                let disk = match arg.strip_prefix("--disk") {
                    Some("") => args.next().map(String::as_str),
                    Some(rest) => rest.strip_prefix('='),
                    None => None,
                };
                if let Some(disk) = disk {
                    let (_, path, format) = crate::vm::parse_disk(disk)?;
                    let format = format.unwrap_or(Format::of(&path));
                    disks.insert(path, format);
                }
            }
        }
        Ok(disks)
    }

    /// The run folder is empty after a boot, and has another boot id.
    fn boot(&self) -> anyhow::Result<()> {
        let run_dir = &self.args.run_dir;
        for entry in std::fs::read_dir(run_dir)? {
            let path = entry?.path();
            let removed = if path.is_dir() {
                std::fs::remove_dir_all(&path)
            } else {
                std::fs::remove_file(&path)
            };
            removed.with_context(|| format!("cannot remove {}", path.display()))?;
        }
        write_boot_id(run_dir)
    }

    fn end_all(&self, signal: i32) {
        let names: Vec<String> = self.vms.lock().keys().cloned().collect();
        // All at once, then one after the other.
        for name in &names {
            let _ = self.signal(&mut self.vms.lock(), name, signal);
        }
        for name in &names {
            let _ = self.end(name, signal, STOP_LIMIT);
        }
    }

    fn obey(self: &Arc<Self>, command: &Value) -> anyhow::Result<Value> {
        let text = |key: &str| command.get(key).and_then(Value::as_str);
        let name = || text("vm").context("`vm` is missing");
        match text("cmd") {
            Some("start") => {
                let args = command.get("args").and_then(Value::as_array);
                let args = args.context("`args` is missing: a list of `simhost vm` arguments")?;
                let args: Option<Vec<String>> =
                    args.iter().map(|a| a.as_str().map(String::from)).collect();
                self.start(name()?, args.context("`args` are strings")?)
            }
            Some("receive") => {
                let args = command.get("args").cloned().unwrap_or_default();
                let args = serde_json::from_value(args).context("`args` are strings")?;
                self.receive(name()?, args)
            }
            Some("migrate") => self.migrate(name()?, command),
            Some("withdraw") => self.withdraw(name()?),
            Some("stop") => self.end(name()?, libc::SIGTERM, STOP_LIMIT),
            Some("kill") => self.end(name()?, libc::SIGKILL, STOP_LIMIT),
            Some("restart") => self.restart(name()?),
            Some("list") => Ok(self.list()),
            Some("reboot") => self.reboot(),
            Some("power-cut") => {
                let keep = command.get("keep").and_then(Value::as_f64);
                let seed = command.get("seed").and_then(Value::as_u64);
                self.power_cut(keep.unwrap_or(0.0), seed)
            }
            _ => {
                bail!("cmd is one of start, stop, kill, restart, list, reboot, power-cut, migrate")
            }
        }
    }

    fn serve(self: &Arc<Self>, stream: &UnixStream) {
        let mut reader = BufReader::new(stream);
        loop {
            let mut line = String::new();
            let mut limited = std::io::Read::take(&mut reader, MAX_COMMAND_BYTES);
            match limited.read_line(&mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            let answer = match serde_json::from_str(&line) {
                Ok(command) => self.obey(&command),
                Err(error) => Err(anyhow::anyhow!("not a JSON document: {error}")),
            };
            let answer = answer.unwrap_or_else(|error| json!({"error": format!("{error:#}")}));
            if writeln!(&mut &*stream, "{answer}").is_err() {
                return;
            }
        }
    }
}

/// Runs until SIGTERM or SIGINT; then every VM is stopped.
pub fn run(args: &HostArgs) -> anyhow::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGTERM, libc::SIGINT])?;
    let host = Arc::new(Host::new(args.clone())?);
    let socket = Arc::new(UnixSocket::bind(&args.control_socket)?);
    let (of, listener) = (host.clone(), socket.clone());
    let acceptor = std::thread::spawn(move || {
        while let Ok(stream) = listener.accept() {
            let of = of.clone();
            std::thread::spawn(move || of.serve(&stream));
        }
    });
    let of = host.clone();
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(LOOK_EVERY);
            of.look(&mut of.vms.lock());
        }
    });
    let ready = json!({
        "pid": std::process::id(), "control_socket": args.control_socket,
        "run_dir": args.run_dir, "nbd_dir": args.nbd_dir,
    });
    println!("READY {ready}");
    signals.forever().next();
    host.end_all(libc::SIGTERM);
    socket.wake();
    drop(socket);
    let _ = acceptor.join(); // it lets go of the socket, and with that the file goes
    let vms = host.vms.lock();
    let broken = |vm: &&Vm| {
        vm.end
            .is_some_and(|end| end.status.code() == Some(crate::contract::EXIT_VIOLATION))
    };
    match vms.values().filter(broken).count() {
        0 => Ok(()),
        n => bail!("in {n} VMs the filter broke the contract; see the log"),
    }
}
