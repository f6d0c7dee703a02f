//! What happens to a VM's disks while they are open: snapshots, copies, growth.
//!
//! Invariant: the contract's order. The guest is stopped, its I/O is waited for, the filter is stunned; then
//! the event; then the filter is let go, and the guest. What a filter refused has not happened, and those
//! that had agreed are told so. One event at a time (the caller holds the VM's lock of events).

use super::hostdisk::HostDisk;
use super::points::Point;
use crate::abi;
use crate::snapshot::{self, Copy, DiskFiles, Revert};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::ffi::CString;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the guest's I/O may take to end before an event.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

/// A disk's events in a snapshot's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Keep the content as it is.
    Create,
    /// Put it back.
    Revert,
    /// Forget what was kept.
    Consolidate,
}

/// Whether an answer of the filter is one that stops an event; the call may be missing if `optional`.
pub fn agreed(label: &str, call: &str, code: i32, optional: bool) -> anyhow::Result<()> {
    match code {
        0.. => Ok(()),
        abi::JIO_E_NOT_SUPPORTED if optional => Ok(()),
        abi::JIO_E_NOT_SUPPORTED => {
            bail!("disk {label} cannot do that under this filter: it has no `{call}`")
        }
        _ => bail!("disk {label}: the filter refuses {call} (code {code})"),
    }
}

/// Stops the guests and stuns the filters while `act` runs.
pub fn stunned<R>(
    disks: &[Arc<HostDisk>],
    act: impl FnOnce() -> anyhow::Result<R>,
) -> anyhow::Result<R> {
    let deadline = Instant::now() + DRAIN_LIMIT;
    disks.iter().for_each(|disk| disk.stop_guest());
    let result = disks
        .iter()
        .try_for_each(|disk| disk.wait_for_guest(deadline))
        .and_then(|()| between(disks, act));
    disks.iter().for_each(|disk| disk.let_guest_go());
    result
}

fn between<R>(
    disks: &[Arc<HostDisk>],
    act: impl FnOnce() -> anyhow::Result<R>,
) -> anyhow::Result<R> {
    let mut stunned = Vec::new();
    let mut result = Ok(());
    for disk in disks {
        result = disk.stun();
        if result.is_err() {
            break;
        }
        stunned.push(disk);
    }
    let result = result.and_then(|()| act());
    stunned.iter().for_each(|disk| disk.unstun());
    result
}

fn files(disk: &HostDisk) -> DiskFiles<'_> {
    DiskFiles {
        path: &disk.setup.path,
        format: disk.setup.format,
        data: &disk.disk,
    }
}

/// A number that no disk has a snapshot of.
fn next_id(disks: &[Arc<HostDisk>]) -> anyhow::Result<u64> {
    let mut next = 1;
    for disk in disks {
        let known = snapshot::index(&disk.setup.path)?.snapshots;
        next = known.iter().fold(next, |next, one| next.max(one.id + 1));
    }
    Ok(next)
}

fn tell(disk: &HostDisk, event: Event, phase: u32, id: u64) -> i32 {
    let info = abi::jio_snapshot {
        size: size_of::<abi::jio_snapshot>() as u32,
        event: match event {
            Event::Create => abi::JIO_SNAPSHOT_CREATE,
            Event::Revert => abi::JIO_SNAPSHOT_REVERT,
            Event::Consolidate => abi::JIO_SNAPSHOT_CONSOLIDATE,
        },
        phase,
        flags: 0,
        snapshot_id: id,
        reserved: [0; 2],
    };
    match disk.instance() {
        Some(instance) => disk.filter.snapshot(instance, &info),
        None => abi::JIO_E_CLOSED,
    }
}

fn carry_out(disk: &HostDisk, event: Event, id: Option<u64>, number: u64) -> anyhow::Result<()> {
    // What a volatile cache holds is not in the files' order of things.
    crate::disk::Storage::flush(&disk.disk)?;
    match event {
        Event::Create => snapshot::create(files(disk), number),
        Event::Revert => snapshot::revert(files(disk), number, Revert::Open),
        Event::Consolidate => snapshot::consolidate(&disk.setup.path, id),
    }
}

/// An event of all disks given. `id`: which snapshot; none only for a new one, and to consolidate all.
pub fn snapshot(disks: &[Arc<HostDisk>], event: Event, id: Option<u64>) -> anyhow::Result<Value> {
    let number = match (event, id) {
        (Event::Create, _) => next_id(disks)?,
        (Event::Consolidate, id) => id.unwrap_or(0),
        (Event::Revert, id) => id.context("`id` is missing: which snapshot")?,
    };
    stunned(disks, || {
        let mut told = Vec::new();
        let mut result = Ok(());
        for disk in disks {
            let code = tell(disk, event, abi::JIO_PHASE_PRE, number);
            result = agreed(&disk.setup.label, "snapshot", code, false);
            if result.is_err() {
                break;
            }
            told.push(disk);
            disk.pass(Point::SnapshotPre);
        }
        let done = result.and_then(|()| {
            let mut all = disks.iter();
            all.try_for_each(|disk| carry_out(disk, event, id, number))
        });
        if let Err(error) = done {
            for disk in told {
                tell(disk, event, abi::JIO_PHASE_CANCEL, number);
            }
            return Err(error);
        }
        for disk in disks {
            disk.pass(Point::SnapshotContent);
            let code = tell(disk, event, abi::JIO_PHASE_POST, number);
            if code < 0 {
                tracing::warn!("disk {}: snapshot(POST) answered {code}", disk.setup.label);
            }
        }
        Ok(json!({"id": number}))
    })
}

/// The snapshots of the disks.
pub fn snapshots(disks: &[Arc<HostDisk>]) -> anyhow::Result<Value> {
    let mut all = Vec::new();
    for disk in disks {
        let index = snapshot::index(&disk.setup.path)?;
        all.push(json!({
            "disk": disk.setup.label, "current": index.current, "snapshots": index.snapshots,
        }));
    }
    Ok(json!({"disks": all}))
}

/// Copies an open disk; the copy is one as of a moment at which no I/O was under way.
pub fn clone_disk(disk: &Arc<HostDisk>, to: &Path) -> anyhow::Result<Value> {
    let instance = disk.instance().context("the disk is closed")?;
    let copy = Copy::begin(to, disk.setup.format, disk.disk.capacity_bytes())?;
    let dest_path = CString::new(to.to_string_lossy().as_ref())?;
    let tell = |phase| {
        let info = abi::jio_clone {
            size: size_of::<abi::jio_clone>() as u32,
            phase,
            flags: 0,
            pad: 0,
            dest_disk_uuid: copy.disk_uuid,
            dest_path: dest_path.as_ptr(),
            reserved: [0; 2],
        };
        disk.filter.clone_disk(instance, &info)
    };
    let code = tell(abi::JIO_PHASE_PRE);
    if let Err(error) = agreed(&disk.setup.label, "clone", code, false) {
        copy.cancel();
        return Err(error);
    }
    let filled = stunned(std::slice::from_ref(disk), || copy.fill(files(disk)));
    if let Err(error) = filled {
        tell(abi::JIO_PHASE_CANCEL);
        copy.cancel();
        return Err(error);
    }
    let code = tell(abi::JIO_PHASE_POST);
    let uuid = uuid::Uuid::from_bytes(copy.disk_uuid);
    Ok(json!({"disk_uuid": uuid.to_string(), "path": to, "code": code}))
}

/// Enlarges a disk and tells the filter. The filter's answer; negative: the disk is as it was.
pub fn grow(disk: &Arc<HostDisk>, capacity_bytes: u64) -> anyhow::Result<i32> {
    if !snapshot::index(&disk.setup.path)?.snapshots.is_empty() {
        bail!("a disk with snapshots cannot grow: consolidate them first");
    }
    stunned(std::slice::from_ref(disk), || {
        let instance = disk.instance().context("the disk is closed")?;
        let old = disk.disk.capacity_bytes();
        disk.disk.grow(capacity_bytes)?;
        let code = disk.filter.grow(instance, capacity_bytes);
        if code < 0 {
            disk.disk.take_back_growth(old)?;
        } else if disk.setup.format == crate::disk::Format::Vmdk {
            crate::disk::vmdk::set_capacity(&disk.setup.path, capacity_bytes)?;
        }
        Ok(code)
    })
}
