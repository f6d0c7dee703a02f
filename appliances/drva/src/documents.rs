//! The JSON documents of the log: descriptions of disks, closed cuts.
//!
//! Invariant: what is written here can be read back here; unknown members are passed over.

use crate::domain::ClosedCut;
use filter_core::session::Attach;
use recovery_store::DiskInfo;
use std::collections::BTreeMap;
use uuid::Uuid;

/// A disk's description, with the newest opening that was presented of it.
pub fn describe(info: &DiskInfo, presented: Attach) -> String {
    serde_json::json!({
        "presented_epoch": presented.epoch,
        "presented_id": presented.id,
        "presented_generation": presented.generation,
        "vm_uuid": info.vm_uuid.to_string(),
        "vm_name": info.vm_name,
        "name": info.name,
        "capacity_bytes": info.capacity_bytes,
    })
    .to_string()
}

/// And back.
pub fn describe_back(
    disk_id: [u8; 16],
    text: &[u8],
) -> Result<(DiskInfo, Attach), serde_json::Error> {
    let value: serde_json::Value = serde_json::from_slice(text)?;
    let string = |key: &str| value.get(key).and_then(|v| v.as_str()).unwrap_or_default();
    let number = |key: &str| value.get(key).and_then(|v| v.as_u64()).unwrap_or(0);
    let info = DiskInfo {
        uuid: Uuid::from_bytes(disk_id),
        vm_uuid: Uuid::parse_str(string("vm_uuid")).unwrap_or_default(),
        vm_name: string("vm_name").into(),
        name: string("name").into(),
        capacity_bytes: number("capacity_bytes"),
    };
    let presented = Attach {
        epoch: u32::try_from(number("presented_epoch")).unwrap_or(0),
        id: number("presented_id"),
        generation: number("presented_generation"),
    };
    Ok((info, presented))
}

/// A closed cut.
pub fn cut_out(cut: &ClosedCut) -> String {
    let positions: BTreeMap<String, u64> = cut
        .positions
        .iter()
        .map(|(disk, seq)| (disk.to_string(), *seq))
        .collect();
    serde_json::json!({"time_ns": cut.time_ns, "name": cut.name, "positions": positions})
        .to_string()
}

/// And back; `None`: it is not one.
pub fn cut_back(epoch: u32, text: &[u8]) -> Option<ClosedCut> {
    let value: serde_json::Value = serde_json::from_slice(text).ok()?;
    let mut positions = BTreeMap::new();
    for (disk, seq) in value.get("positions")?.as_object()? {
        positions.insert(Uuid::parse_str(disk).ok()?, seq.as_u64()?);
    }
    Some(ClosedCut {
        epoch,
        time_ns: value.get("time_ns")?.as_u64()?,
        name: value.get("name").and_then(|v| v.as_str()).map(String::from),
        positions,
    })
}
