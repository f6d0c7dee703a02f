//! What happens to an open disk besides I/O: stun, snapshot, clone, migration, growth.
//!
//! Invariant: before the content changes in a way that no write tells, the sidecar says that all of it
//! may differ; what cannot be written down is refused before it happens.

use crate::instance::Replicated;
use crate::{OK, abi, with_disk};
use core::ffi::c_void;
use std::sync::Arc;

/// Stun and unstun: what is to be written down is written as it happens; the host has waited for what
/// is held.
pub unsafe extern "C" fn stun(instance: *mut c_void) -> i32 {
    let body = |disk: &Arc<Replicated>| {
        disk.release_completions();
        OK
    };
    // SAFETY: the contract.
    unsafe { with_disk(instance, body) }
}

/// See the contract. Only a revert changes what the disk holds.
pub unsafe extern "C" fn snapshot(instance: *mut c_void, info: *const abi::jio_snapshot) -> i32 {
    // SAFETY: the contract: NULL or a struct.
    let Some(info) = (unsafe { info.as_ref() }) else {
        return abi::JIO_E_INVALID;
    };
    if info.event != abi::JIO_SNAPSHOT_REVERT {
        return OK;
    }
    let body = |disk: &Arc<Replicated>| match info.phase {
        // Before the content changes the sidecar must say that all of it may differ.
        abi::JIO_PHASE_PRE => {
            disk.core.lock().disk.change_begins();
            if disk.settle_intent() {
                return OK;
            }
            end_change(disk, false);
            abi::JIO_E_IO
        }
        // What was read meanwhile does not count, and the sidecar may be the snapshot's.
        abi::JIO_PHASE_POST => {
            end_change(disk, true);
            match disk.settle_intent() {
                true => OK,
                false => abi::JIO_E_IO,
            }
        }
        _ => {
            end_change(disk, false);
            OK
        }
    };
    // SAFETY: the contract.
    unsafe { with_disk(instance, body) }
}

/// The content has changed, or will not: the sync goes on.
fn end_change(disk: &Arc<Replicated>, has_changed: bool) {
    disk.core.lock().disk.change_ends(has_changed);
    if has_changed {
        disk.sidecar_replaced();
    }
    disk.drive_sync();
}

/// See the contract. The copy is told from the disk by its id: a host that gives it none could open it
/// with the sidecar of this one.
pub unsafe extern "C" fn clone(instance: *mut c_void, info: *const abi::jio_clone) -> i32 {
    // SAFETY: the contract: NULL or a struct.
    let Some(info) = (unsafe { info.as_ref() }) else {
        return abi::JIO_E_INVALID;
    };
    let nameless = info.phase == abi::JIO_PHASE_PRE && info.dest_disk_uuid == [0; 16];
    // SAFETY: the contract.
    unsafe {
        with_disk(instance, |_| {
            if nameless {
                abi::JIO_E_NOT_SUPPORTED
            } else {
                OK
            }
        })
    }
}

/// See the contract. A VM moves; a disk that moves would be a copy with another path, which this filter
/// does not follow while it is open.
pub unsafe extern "C" fn migrate(instance: *mut c_void, info: *const abi::jio_migrate) -> i32 {
    // SAFETY: the contract: NULL or a struct.
    let Some(info) = (unsafe { info.as_ref() }) else {
        return abi::JIO_E_INVALID;
    };
    let body = |disk: &Arc<Replicated>| match info.phase {
        abi::JIO_MIGRATE_PREPARE if info.what & abi::JIO_MIGRATE_STORAGE != 0 => {
            abi::JIO_E_NOT_SUPPORTED
        }
        abi::JIO_MIGRATE_PREPARE => {
            // While the guest runs: a lane that is young, or far behind, would be drained in vain.
            disk.come_close(disk.handoff_limit);
            OK
        }
        abi::JIO_MIGRATE_HANDOFF => {
            disk.drain_for(disk.handoff_limit);
            OK
        }
        _ => OK,
    };
    // SAFETY: the contract.
    unsafe { with_disk(instance, body) }
}

/// See the contract.
pub unsafe extern "C" fn grow(instance: *mut c_void, new_capacity_bytes: u64) -> i32 {
    let body = |disk: &Arc<Replicated>| {
        if !disk.core.lock().disk.grow(new_capacity_bytes) {
            return abi::JIO_E_RANGE;
        }
        disk.drive_intent();
        disk.drive_sync();
        OK
    };
    // SAFETY: the contract.
    unsafe { with_disk(instance, body) }
}
