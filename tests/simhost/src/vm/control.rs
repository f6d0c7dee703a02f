//! Commands to a running VM process: one JSON document a line, one answer a line.
//!
//! Invariant: a command that cannot be understood is answered with what was expected; none stops the
//! process.

use super::Vm;
use super::events::{self, Event};
use super::handoff;
use crate::contract::EXIT_VIOLATION;
use crate::socket::{ListenError, UnixSocket};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// What the VM is told of next.
#[derive(Debug, Default)]
pub struct Doing {
    /// The filters agreed to a migration.
    migrating: bool,
}

/// The control socket. Closed when dropped.
pub struct Control {
    socket: Arc<UnixSocket>,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    /// Listens.
    pub fn start(path: &Path, vm: Arc<Vm>) -> Result<Self, ListenError> {
        let socket = Arc::new(UnixSocket::bind(path)?);
        let stopping = Arc::new(AtomicBool::new(false));
        let (of, stop) = (socket.clone(), stopping.clone());
        let run = move || {
            loop {
                let accepted = of.accept();
                if stop.load(Ordering::Acquire) {
                    break; // pairs with the store in drop
                }
                match accepted {
                    Ok(stream) => {
                        let vm = vm.clone();
                        let file = of.clone();
                        let serve = move || serve(&stream, &vm, &file);
                        let name = std::thread::Builder::new().name("command".into());
                        if let Err(error) = name.spawn(serve) {
                            tracing::warn!("control: cannot serve a connection: {error}");
                        }
                    }
                    Err(error) => {
                        tracing::warn!("control: cannot accept a connection: {error}");
                        std::thread::sleep(Duration::from_millis(50));
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("control".into());
        let thread = thread.spawn(run).map_err(ListenError::io(path.display()))?;
        Ok(Self {
            socket,
            stopping,
            thread: Some(thread),
        })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release); // pairs with the loop's load
        self.socket.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(stream: &UnixStream, vm: &Vm, socket: &UnixSocket) {
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { return };
        let answer = match serde_json::from_str(&line) {
            Ok(command) => run(&command, vm),
            Err(error) => Err(anyhow::anyhow!("not a JSON document: {error}")),
        };
        let answer = answer.unwrap_or_else(|error| json!({"error": format!("{error:#}")}));
        let written = writeln!(&mut &*stream, "{answer}");
        if answer.get("migrated").is_some() {
            // At once: nothing of the sockets and disks is this process's any more.
            let _ = std::fs::remove_file(socket.path());
            tracing::info!("the VM has moved: {answer}");
            let is_clean = vm.contract.violations() == 0;
            std::process::exit(if is_clean { 0 } else { EXIT_VIOLATION });
        }
        if written.is_err() {
            return;
        }
    }
}

fn state_name(state: u32) -> &'static str {
    use crate::abi;
    match state {
        abi::JIO_STATE_IDLE => "idle",
        abi::JIO_STATE_STREAMING => "streaming",
        abi::JIO_STATE_TRACKING => "tracking",
        abi::JIO_STATE_SYNCING => "syncing",
        abi::JIO_STATE_FAILED => "failed",
        _ => "unknown",
    }
}

fn status(vm: &Vm) -> Value {
    let disks: Vec<Value> = vm
        .disks
        .iter()
        .map(|disk| {
            let status = disk.status();
            let figure = |f: fn(&crate::abi::jio_filter_status) -> u64| status.as_ref().map(f);
            json!({
                "label": disk.setup.label,
                "path": disk.setup.path,
                "capacity_bytes": disk.disk.capacity_bytes(),
                "state": status.as_ref().map_or("closed", |s| state_name(s.state)),
                "alarms": figure(|s| s.alarms.into()),
                "epoch": figure(|s| s.epoch),
                "published_seq": figure(|s| s.published_seq),
                "durable_seq": figure(|s| s.durable_seq),
                "lane_used_bytes": figure(|s| s.lane_used_bytes),
                "dirty_bytes": figure(|s| s.dirty_bytes),
                "deferred_count": figure(|s| s.deferred_count),
                "deferred_ns_max": figure(|s| s.deferred_ns_max),
                "held_count": figure(|s| s.held_count),
                "tracking_count": figure(|s| s.tracking_count),
                "intent_bytes": figure(|s| s.intent_bytes),
                "intent_late_count": figure(|s| s.intent_late_count),
                "synced_bytes": figure(|s| s.synced_bytes),
                "held_bytes": figure(|s| s.held_bytes),
            })
        })
        .collect();
    let max_ns = vm.contract.deferred_max_ns.load(Ordering::Relaxed); // a figure
    json!({
        "disks": disks,
        "contract_violations": vm.contract.violations(),
        "host_deferred_max_ns": max_ns,
    })
}

/// What the commands are, for whoever asks for another.
const COMMANDS: &str = "status, drain, grow, snapshot, revert, consolidate, snapshots, clone, \
     migrate-prepare, migrate-go, migrate-cancel, fault, faults, heal, kill-at, hold-at";

fn run(command: &Value, vm: &Vm) -> anyhow::Result<Value> {
    let number = |key: &str| command.get(key).and_then(Value::as_u64);
    let text = |key: &str| command.get(key).and_then(Value::as_str);
    let chosen = || {
        let label = text("disk").context("`disk` is missing: a disk's label")?;
        let found = vm.disks.iter().find(|disk| disk.setup.label == label);
        found.with_context(|| format!("no disk under the filter is labelled `{label}`"))
    };
    // All disks of the VM, or the one that is named.
    let some = || match text("disk") {
        None => Ok(vm.disks.clone()),
        Some(_) => chosen().map(|disk| vec![disk.clone()]),
    };
    let event = |event| {
        let disks = some()?;
        if disks.is_empty() {
            bail!("this VM has no disk under a filter");
        }
        events::snapshot(&disks, event, number("id"))
    };
    let is_event = [
        "drain",
        "grow",
        "snapshot",
        "revert",
        "consolidate",
        "clone",
        "migrate-prepare",
        "migrate-go",
        "migrate-cancel",
    ];
    let is_event = text("cmd").is_some_and(|cmd| is_event.contains(&cmd));
    // The filter is told of one thing at a time.
    let mut doing = is_event.then(|| vm.events.lock());
    if let Some(doing) = doing.as_mut() {
        let is_step = matches!(text("cmd"), Some("migrate-go" | "migrate-cancel"));
        match (doing.migrating, is_step) {
            (true, false) if text("cmd") != Some("drain") => {
                bail!("a migration is under way; migrate-cancel ends it")
            }
            (false, true) => bail!("no migration is under way"),
            _ => {}
        }
        if is_step {
            doing.migrating = false;
        }
        if text("cmd") == Some("migrate-prepare") {
            handoff::prepare(vm)?;
            doing.migrating = true;
        }
    }
    match text("cmd") {
        Some("snapshot") => event(Event::Create),
        Some("revert") => event(Event::Revert),
        Some("consolidate") => event(Event::Consolidate),
        Some("snapshots") => events::snapshots(&some()?),
        Some("clone") => {
            let to = text("to").context("`to` is missing: the copy's path")?;
            events::clone_disk(chosen()?, Path::new(to))
        }
        Some("migrate-prepare") => Ok(json!({"prepared": true})),
        Some("migrate-cancel") => {
            handoff::cancel(vm);
            Ok(json!({"cancelled": true}))
        }
        Some("migrate-go") => {
            let to = text("to").context("`to` is missing: where the VM is waited for")?;
            let answer = handoff::go(vm, Path::new(to), text("cancel_at"))?;
            // Nobody begins anything with what is not here any more.
            std::mem::forget(doing);
            Ok(answer)
        }
        Some("status") => Ok(status(vm)),
        Some("drain") => {
            let timeout = Duration::from_millis(number("timeout_ms").unwrap_or(10_000));
            let drained = vm.disks.iter().map(|disk| disk.drain(timeout));
            let worst = drained.min().unwrap_or(0);
            Ok(json!({"drained": worst >= 0, "code": worst}))
        }
        Some("grow") => {
            let capacity = number("capacity_bytes").context("`capacity_bytes` is missing")?;
            Ok(json!({"code": events::grow(chosen()?, capacity)?}))
        }
        Some("fault") => {
            let mut asked = command.clone();
            if let Some(asked) = asked.as_object_mut() {
                asked.remove("cmd");
            }
            Ok(json!({"id": vm.faults.add(asked)?}))
        }
        Some("faults") => Ok(vm.faults.list()),
        Some("heal") => Ok(json!({"healed": vm.faults.heal(number("id"))})),
        Some(stop @ ("kill-at" | "hold-at")) => {
            let point = text("point").context("`point` is missing")?;
            let point = match number("nth") {
                Some(nth) => format!("{point}:{nth}"),
                None => point.into(),
            };
            let disk = text("disk").map(String::from);
            if stop == "kill-at" {
                vm.faults.kill_at(&point, disk)?;
            } else {
                let socket = text("socket").context("`socket` is missing: where it waits")?;
                vm.faults.hold_at(&point, disk, socket)?;
            }
            Ok(json!({"armed": point}))
        }
        _ => bail!("cmd is one of {COMMANDS}"),
    }
}
