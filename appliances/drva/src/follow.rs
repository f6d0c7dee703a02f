//! A domain's disks follow the assignments.
//!
//! Invariant: a disk whose machine is not taken is in no cut from then on, also after a restart; it comes back
//! as it stood.

use crate::disk::Disk;
use crate::domain::Domain;
use crate::log::LogError;
use std::sync::Arc;

impl Domain {
    /// Brings the disks in step with the assignments: of a machine that is not taken now cuts are made
    /// without it. `takes`: whether a machine is taken.
    pub fn follow(&self, takes: &dyn Fn(&[u8; 16]) -> bool) -> Result<(), LogError> {
        let disks: Vec<Arc<Disk>> = self.disks.read().values().cloned().collect();
        for disk in disks {
            let takes = takes(disk.info.read().vm_uuid.as_bytes());
            let changed = disk.change_presence(|presence| {
                presence.standing = presence.standing.assigned(takes);
            });
            if changed {
                let word = if takes { "taken in again" } else { "left out" };
                tracing::warn!("domain {}: disk {} is {word}", self.name, disk.label());
                self.write_down(&disk, &|| self.is_stopping())?;
            }
        }
        Ok(())
    }
}
