//! A VM moves to another host while its guest runs: both sides.
//!
//! ```text
//! source                                            destination
//! migrate(PREPARE)
//! hello ------------------------------------------>  loads the filter, opens nothing
//! clients paused, I/O drained, stun
//! migrate(HANDOFF), close(HANDOFF), locks let go
//! sockets ---------------------------------------->  open with JIO_DISK_MIGRATED
//!                          <---------------- opened
//! go ---------------------------------------------->  migrate(ARRIVED), clients go on
//! ends                     <---------------- running
//! ```
//!
//! A VM without the filter moves in the same steps, without the filter's part in them. If only one side has
//! the filter, the disks come under it, or leave it, on the way: a source that had it closes them for good
//! and, once the other side has them, detaches.
//!
//! Invariant: at most one process has a disk open for writing (its lock). Up to `go` the source can take
//! everything back; a destination that was told `abort` closes its disks. If the source is gone without a
//! word after it handed over, the destination goes on: nobody else can.

use super::Vm;
use super::events::agreed;
use super::hostdisk::HostDisk;
use super::points::Point;
use crate::abi;
use crate::nbd::engine::DiskEngine;
use crate::nbd::handover::{receive, send};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long clients may take to come to the end of a request.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);
/// How long the other side may take for a step.
const STEP_LIMIT: Duration = Duration::from_secs(30);
/// Between two tries to have a disk back.
const AGAIN: Duration = Duration::from_millis(5);

/// Tells one disk's filter a step of the migration.
pub fn tell(disk: &HostDisk, phase: u32) -> i32 {
    let info = abi::jio_migrate {
        size: size_of::<abi::jio_migrate>() as u32,
        phase,
        what: abi::JIO_MIGRATE_VM,
        flags: 0,
        dest_path: c"".as_ptr(),
        reserved: [0; 2],
    };
    match disk.instance() {
        Some(instance) => disk.filter.migrate(instance, &info),
        None => abi::JIO_E_CLOSED,
    }
}

/// Source: asks the filters whether the VM may move.
pub fn prepare(vm: &Vm) -> anyhow::Result<()> {
    for (done, disk) in vm.disks.iter().enumerate() {
        let code = tell(disk, abi::JIO_MIGRATE_PREPARE);
        if let Err(error) = agreed(&disk.setup.label, "migrate", code, false) {
            for disk in vm.disks.iter().take(done) {
                tell(disk, abi::JIO_MIGRATE_CANCEL);
            }
            return Err(error);
        }
    }
    vm.disks
        .iter()
        .for_each(|disk| disk.pass(Point::OutPrepared));
    Ok(())
}

/// Source: it is not to be.
pub fn cancel(vm: &Vm) {
    for disk in &vm.disks {
        tell(disk, abi::JIO_MIGRATE_CANCEL);
    }
}

/// Source: moves. `Ok`: the other process has the VM, this one ends. `Err`: it goes on here.
pub fn go(vm: &Vm, to: &Path, cancel_at: Option<&str>) -> anyhow::Result<Value> {
    let stop_at = |step: &str| match cancel_at {
        Some(at) if at == step => bail!("cancelled as asked for, at `{step}`"),
        _ => Ok(()),
    };
    let known = [None, Some("prepared"), Some("stunned"), Some("handoff")];
    let begun = if known.contains(&cancel_at) {
        stop_at("prepared").and_then(|()| greet(vm, to))
    } else {
        Err(anyhow::anyhow!(
            "`cancel_at` is one of prepared, stunned, handoff"
        ))
    };
    let (link, has_filter) = begun.inspect_err(|_| cancel(vm))?;
    // Without it there the disks are not handed over to it but closed for good.
    let leaves = !has_filter && !vm.disks.is_empty();
    if leaves {
        cancel(vm);
    }
    let from = Instant::now();
    if let Err(error) = pause(vm) {
        cancel(vm);
        return Err(error);
    }
    let mut stunned = 0;
    let moving = if leaves { &[] } else { vm.disks.as_slice() };
    let closing = moving
        .iter()
        .try_for_each(|disk| disk.stun().map(|()| stunned += 1))
        .and_then(|()| {
            moving.iter().for_each(|disk| disk.pass(Point::OutStunned));
            stop_at("stunned")?;
            let mut all = moving.iter();
            all.try_for_each(|disk| {
                let code = tell(disk, abi::JIO_MIGRATE_HANDOFF);
                agreed(&disk.setup.label, "migrate(HANDOFF)", code, false)
            })?;
            moving.iter().for_each(|disk| disk.pass(Point::OutHandoff));
            stop_at("handoff")
        });
    if let Err(error) = closing {
        cancel(vm);
        vm.disks.iter().take(stunned).for_each(|disk| disk.unstun());
        vm.resume();
        return Err(error);
    }
    for disk in &vm.disks {
        disk.close(if leaves {
            abi::JIO_CLOSE_CLEAN
        } else {
            abi::JIO_CLOSE_HANDOFF
        });
        disk.pass(Point::OutClosed);
    }
    let closed = vm.plain.iter().try_for_each(|engine| engine.0.closed());
    let given = closed
        .map_err(anyhow::Error::from)
        .and_then(|()| give(vm, &link));
    match given {
        Ok(connections) => {
            if leaves {
                for disk in &vm.disks {
                    // The VM is elsewhere: what stays beside the disk harms nobody.
                    if let Err(error) = disk.detach() {
                        tracing::warn!("{error:#}");
                    }
                }
            }
            // Whoever has the VM now does not depend on this any more.
            let running = receive::<Value>(&link).is_ok();
            Ok(json!({
                "migrated": true, "stun_us": from.elapsed().as_micros() as u64,
                "connections": connections, "confirmed": running,
                "deferred_max_ns": vm.contract.deferred_max_ns.load(Ordering::Relaxed), // a figure
            }))
        }
        Err(error) => {
            // The other side hears it, or its end: it lets go of the disks.
            let _ = send(&link, &json!("abort"));
            let _ = link.shutdown(std::net::Shutdown::Both);
            if let Err(again) = take_back(vm, !leaves) {
                tracing::error!("{error:#}; and the disks cannot be had back: {again:#}");
                // At once: the sockets may be somebody else's.
                std::process::exit(1);
            }
            Err(error.context("the VM goes on here"))
        }
    }
}

/// The link, and whether the other side has the filter.
fn greet(vm: &Vm, to: &Path) -> anyhow::Result<(UnixStream, bool)> {
    let link = UnixStream::connect(to)
        .with_context(|| format!("nobody waits for the VM at {}", to.display()))?;
    link.set_read_timeout(Some(STEP_LIMIT))?;
    link.set_write_timeout(Some(STEP_LIMIT))?;
    let hello = json!({"disks": vm.labels, "filter": !vm.disks.is_empty()});
    send(&link, &hello)?;
    let answer: Value = receive(&link).context("the destination ended")?;
    match answer.get("error").and_then(Value::as_str) {
        Some(error) => bail!("the destination refuses: {error}"),
        None => {
            let has_filter = answer.get("filter").and_then(Value::as_bool);
            Ok((link, has_filter.unwrap_or(true)))
        }
    }
}

/// The clients stand, their I/O has ended.
fn pause(vm: &Vm) -> anyhow::Result<()> {
    let deadline = Instant::now() + PAUSE_LIMIT;
    let mut paused = Ok(());
    if let Some(server) = vm.server.lock().as_mut() {
        paused = server.pause(deadline);
    }
    // If not, nothing has been paused, or it goes on.
    let drained = paused.and_then(|()| {
        let mut all = vm.disks.iter();
        all.try_for_each(|disk| disk.wait_for_guest(deadline))
    });
    if drained.is_err() {
        vm.resume();
    }
    drained
}

/// Hands the sockets over; back when the other side has the disks open and was told to go on.
fn give(vm: &Vm, link: &UnixStream) -> anyhow::Result<usize> {
    let connections = match vm.server.lock().as_ref() {
        Some(server) => server.hand_over(link)?,
        None => 0,
    };
    vm.disks.iter().for_each(|disk| disk.pass(Point::OutSent));
    let answer: Value = receive(link).context("the destination ended before it had the disks")?;
    if let Some(error) = answer.get("error").and_then(Value::as_str) {
        bail!("the destination cannot open the disks: {error}");
    }
    vm.disks.iter().for_each(|disk| disk.pass(Point::OutGo));
    send(link, &json!("go")).context("the destination ended before it could go on")?;
    Ok(connections)
}

/// The VM goes on at the source: its disks as after a migration to here.
fn take_back(vm: &Vm, migrated: bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + STEP_LIMIT;
    let until_free = |open: &dyn Fn() -> anyhow::Result<()>| {
        loop {
            match open() {
                Ok(()) => return Ok(()),
                // The other process is about to let go, or to end.
                Err(_) if Instant::now() < deadline => std::thread::sleep(AGAIN),
                Err(error) => return Err(error),
            }
        }
    };
    for disk in &vm.disks {
        until_free(&|| disk.open_again(migrated))?;
        if migrated {
            tell(disk, abi::JIO_MIGRATE_ARRIVED);
        }
    }
    for engine in &vm.plain {
        until_free(&|| Ok(engine.0.open_again()?))?;
    }
    vm.resume();
    Ok(())
}

/// Destination: the link on which the VM comes, once somebody has greeted. Whether it comes with the filter.
pub fn welcome(
    link: &UnixStream,
    labels: &[String],
    has_filter: bool,
    faults: &super::Faults,
) -> anyhow::Result<bool> {
    link.set_read_timeout(Some(STEP_LIMIT))?;
    link.set_write_timeout(Some(STEP_LIMIT))?;
    let hello: Value = receive(link)?;
    if hello.get("disks") != Some(&json!(labels)) {
        let error = format!("the VM has other disks here: {labels:?}");
        send(link, &json!({"error": error}))?;
        bail!(error);
    }
    send(link, &json!({"waiting": true, "filter": has_filter}))?;
    faults.pass(Point::InWaiting, "");
    let had_filter = hello.get("filter").and_then(Value::as_bool);
    Ok(had_filter.unwrap_or(true))
}

/// What a destination has opened.
pub struct Arrived {
    /// Under the filter.
    pub disks: Vec<Arc<HostDisk>>,
    /// Without it.
    pub plain: Vec<Arc<DiskEngine>>,
    /// The disks were under the filter at the source too.
    pub migrated: bool,
}

/// Destination: tells the source how the opening went. `false`: it takes the VM back.
pub fn opened(link: &UnixStream, opened: &anyhow::Result<Arrived>) -> bool {
    let arrived = match opened {
        Ok(arrived) => arrived,
        Err(error) => {
            let _ = send(link, &json!({"error": format!("{error:#}")}));
            return false;
        }
    };
    let disks = &arrived.disks;
    disks.iter().for_each(|disk| disk.pass(Point::InOpened));
    // No answer: the source has ended, and nobody but this process has the VM.
    let _ = send(link, &json!({"opened": true}));
    let answer: Value = receive(link).unwrap_or_else(|_| json!("go"));
    if answer != json!("go") {
        tracing::warn!("the source takes the VM back");
        let how = match arrived.migrated {
            true => abi::JIO_CLOSE_HANDOFF,
            false => abi::JIO_CLOSE_CLEAN,
        };
        disks.iter().for_each(|disk| disk.close(how));
        for engine in &arrived.plain {
            if let Err(error) = engine.0.closed() {
                tracing::warn!("{error}"); // the next opening takes it for an unclean end
            }
        }
        return false;
    }
    for disk in disks {
        if arrived.migrated {
            let code = tell(disk, abi::JIO_MIGRATE_ARRIVED);
            if let Err(error) = agreed(&disk.setup.label, "migrate(ARRIVED)", code, false) {
                tracing::warn!("{error}");
            }
        }
        disk.pass(Point::InArrived);
    }
    true
}
