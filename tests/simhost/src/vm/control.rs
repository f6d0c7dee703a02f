//! Commands to a running VM process: one JSON document a line, one answer a line.
//!
//! Invariant: a command that cannot be understood is answered with what was expected; none stops the
//! process.

use super::hostdisk::HostDisk;
use crate::contract::Contract;
use crate::socket::{ListenError, UnixSocket};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// The control socket. Closed when dropped.
pub struct Control {
    socket: Arc<UnixSocket>,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    /// Listens.
    pub fn start(
        path: &Path,
        disks: Vec<Arc<HostDisk>>,
        contract: Arc<Contract>,
    ) -> Result<Self, ListenError> {
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
                        let (disks, contract) = (disks.clone(), contract.clone());
                        let serve = move || serve(&stream, &disks, &contract);
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

fn serve(stream: &UnixStream, disks: &[Arc<HostDisk>], contract: &Contract) {
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { return };
        let answer = match serde_json::from_str(&line) {
            Ok(command) => run(&command, disks, contract),
            Err(error) => json!({"error": format!("not a JSON document: {error}")}),
        };
        if writeln!(&mut &*stream, "{answer}").is_err() {
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

fn status(disks: &[Arc<HostDisk>], contract: &Contract) -> Value {
    let disks: Vec<Value> = disks
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
            })
        })
        .collect();
    let max_ns = contract.deferred_max_ns.load(Ordering::Relaxed); // a figure
    json!({
        "disks": disks,
        "contract_violations": contract.violations(),
        "host_deferred_max_ns": max_ns,
    })
}

fn run(command: &Value, disks: &[Arc<HostDisk>], contract: &Contract) -> Value {
    let number = |key: &str| command.get(key).and_then(Value::as_u64);
    let label = command.get("disk").and_then(Value::as_str);
    let chosen = || {
        disks
            .iter()
            .find(|disk| Some(disk.setup.label.as_str()) == label)
    };
    match command.get("cmd").and_then(Value::as_str) {
        Some("status") => status(disks, contract),
        Some("drain") => {
            let timeout = Duration::from_millis(number("timeout_ms").unwrap_or(10_000));
            let worst = disks
                .iter()
                .map(|disk| disk.drain(timeout))
                .min()
                .unwrap_or(0);
            json!({"drained": worst >= 0, "code": worst})
        }
        Some("grow") => match (chosen(), number("capacity_bytes")) {
            (Some(disk), Some(capacity)) => match disk.grow(capacity) {
                Ok(code) => json!({"code": code}),
                Err(error) => json!({"error": error.to_string()}),
            },
            _ => json!({"error": "grow needs disk and capacity_bytes"}),
        },
        _ => json!({"error": "cmd is one of status, drain, grow"}),
    }
}
