//! The JSON documents of the log: descriptions of disks, closed cuts.
//!
//! Invariant: what is written here can be read back here; unknown members are passed over.

use crate::disk::Described;
use crate::domain::ClosedCut;
use crate::presence::{Presence, Standing};
use filter_core::mapping::{hex, parse_id};
use filter_core::session::Attach;
use recovery_store::DiskInfo;
use std::collections::BTreeMap;
use uuid::Uuid;

const STANDINGS: [(Standing, &str); 5] = [
    (Standing::Open, "open"),
    (Standing::Closed, "closed"),
    (Standing::SetAside, "set-aside"),
    (Standing::LeftOut, "left-out"),
    (Standing::LeftOutClosed, "left-out-closed"),
];

/// The word for how a disk stands.
pub fn standing_word(standing: Standing) -> &'static str {
    let found = STANDINGS.iter().find(|(known, _)| *known == standing);
    found.map_or("open", |(_, word)| word)
}

/// A disk's description, with the newest opening that was presented of it, and where it is.
pub fn describe(info: &DiskInfo, known: &Described) -> String {
    let (presented, presence) = (&known.presented, &known.presence);
    let hosts = presence.hosts.iter();
    let hosts: BTreeMap<String, &String> = hosts.map(|(id, name)| (hex(id), name)).collect();
    serde_json::json!({
        "standing": standing_word(presence.standing),
        "host": hex(&presence.host),
        "hosts": hosts,
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
) -> Result<(DiskInfo, Attach, Presence), serde_json::Error> {
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
    let standing = STANDINGS
        .iter()
        .find(|(_, word)| *word == string("standing"));
    let hosts = value.get("hosts").and_then(|hosts| hosts.as_object());
    let host = |(id, name): (&String, &serde_json::Value)| {
        Some((parse_id(id)?, name.as_str().unwrap_or_default().into()))
    };
    let presence = Presence {
        standing: standing.map_or(Standing::Open, |(standing, _)| *standing),
        host: parse_id(string("host")).unwrap_or_default(),
        hosts: hosts.into_iter().flatten().filter_map(host).collect(),
    };
    Ok((info, presented, presence))
}

/// A closed cut.
pub fn cut_out(cut: &ClosedCut) -> String {
    let positions: BTreeMap<String, u64> = cut
        .positions
        .iter()
        .map(|(disk, seq)| (disk.to_string(), *seq))
        .collect();
    let left_out: Vec<String> = cut.left_out.iter().map(Uuid::to_string).collect();
    serde_json::json!({
        "time_ns": cut.time_ns, "name": cut.name, "positions": positions, "left_out": left_out,
    })
    .to_string()
}

/// And back; `None`: it is not one.
pub fn cut_back(epoch: u32, text: &[u8]) -> Option<ClosedCut> {
    let value: serde_json::Value = serde_json::from_slice(text).ok()?;
    let mut positions = BTreeMap::new();
    for (disk, seq) in value.get("positions")?.as_object()? {
        positions.insert(Uuid::parse_str(disk).ok()?, seq.as_u64()?);
    }
    let left_out = value.get("left_out").and_then(|v| v.as_array());
    let uuid = |v: &serde_json::Value| Uuid::parse_str(v.as_str()?).ok();
    Some(ClosedCut {
        left_out: left_out.into_iter().flatten().filter_map(uuid).collect(),
        epoch,
        time_ns: value.get("time_ns")?.as_u64()?,
        name: value.get("name").and_then(|v| v.as_str()).map(String::from),
        positions,
    })
}
