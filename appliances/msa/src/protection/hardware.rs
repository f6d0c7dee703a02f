//! What vCenter says of a machine, kept with it as one document.
//!
//! Invariant: it is what vCenter said last, as a whole; nothing of it is typed in by people.

use crate::vcenter::{DiskInfo, VmInfo};
use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A virtual disk of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmDisk {
    /// Its key in the machine.
    pub key: i32,
    /// What people see: `Hard disk 1`.
    pub label: String,
    /// Its capacity.
    pub capacity_bytes: u64,
    /// Whether other machines may write it too.
    pub is_shared: bool,
    /// Whether it is a physical-mode raw device mapping.
    pub is_physical_rdm: bool,
    /// Filters on it, by name.
    pub filters: Vec<String>,
    /// Where its content lies.
    pub path: String,
}

/// What vCenter says of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Hardware {
    /// Whether it runs.
    pub is_powered_on: bool,
    /// Whether it has snapshots: its disks' policy cannot change then.
    pub has_snapshots: bool,
    /// Its disks.
    pub disks: Vec<VmDisk>,
}

impl From<&DiskInfo> for VmDisk {
    fn from(disk: &DiskInfo) -> Self {
        Self {
            key: disk.key,
            label: disk.label.clone(),
            capacity_bytes: disk.capacity_bytes,
            is_shared: disk.is_shared,
            is_physical_rdm: disk.is_physical_rdm,
            filters: disk.filters.clone(),
            path: disk.path.clone(),
        }
    }
}

impl From<&VmInfo> for Hardware {
    fn from(vm: &VmInfo) -> Self {
        Self {
            is_powered_on: vm.is_powered_on,
            has_snapshots: vm.has_snapshots,
            disks: vm.disks.iter().map(VmDisk::from).collect(),
        }
    }
}

impl ToSql for Hardware {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        let text = serde_json::to_string(self);
        let text =
            text.map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))?;
        Ok(text.into())
    }
}

impl FromSql for Hardware {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        serde_json::from_str(value.as_str()?).map_err(FromSqlError::other)
    }
}
