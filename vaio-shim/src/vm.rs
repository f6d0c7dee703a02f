//! What the disks of one VM share in this process: the stamp counter.
//!
//! Invariant: stamps of one VM rise over all its disks, and over restarts of its process: the counter
//! begins at the wall clock's nanoseconds, or above the last stamp found in a lane if that is more.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Weak};

/// A VM's stamp counter: the last stamp used.
#[derive(Debug, Default)]
pub struct Stamps(pub AtomicU64);

type Registry = HashMap<[u8; 16], Weak<Stamps>>;
static VMS: LazyLock<Mutex<Registry>> = LazyLock::new(Mutex::default);

/// The counter of a VM, at least at `floor`.
pub fn stamps(vm_uuid: &[u8; 16], floor: u64) -> Arc<Stamps> {
    let mut vms = VMS.lock();
    vms.retain(|_, stamps| stamps.strong_count() > 0);
    let stamps = vms.get(vm_uuid).and_then(Weak::upgrade).unwrap_or_else(|| {
        let fresh = Arc::new(Stamps::default());
        vms.insert(*vm_uuid, Arc::downgrade(&fresh));
        fresh
    });
    stamps.0.fetch_max(floor, Relaxed); // only ever rises; nothing else hangs on it
    stamps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_of_one_vm_share_and_never_fall_back() {
        let one = stamps(&[7; 16], 100);
        assert_eq!(one.0.fetch_add(5, Relaxed), 100);
        let two = stamps(&[7; 16], 50);
        assert_eq!(two.0.load(Relaxed), 105);
        assert!(Arc::ptr_eq(&one, &two));
        assert_eq!(stamps(&[8; 16], 1).0.load(Relaxed), 1);
        drop((one, two));
        assert_eq!(stamps(&[7; 16], 50).0.load(Relaxed), 50);
    }
}
