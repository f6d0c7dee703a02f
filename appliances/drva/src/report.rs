//! What the management server is told of the domains, machine by machine.
//!
//! Invariant: it is what the appliance knows at this moment, and no more: of what it has not heard since it was
//! started it says nothing.

use crate::appliance::Appliance;
use crate::disk::Disk;
use crate::documents::standing_word;
use crate::domain::Domain;
use crate::presence::Standing;
use crate::status;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use uuid::Uuid;

/// What is known of the cuts that hold a disk, since the appliance was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Newest {
    /// When the newest one in the store was taken, in ns since 1970, and its last record of the disk.
    pub cut: Option<(u64, u64)>,
    /// What the disk's host said at the last try of one: whether the stream holds every write.
    pub is_complete: Option<bool>,
}

fn ms(time_ns: u64) -> u64 {
    time_ns / 1_000_000
}

fn disk_document(disk: &Disk) -> Value {
    let (received, _, syncing) = disk.received();
    let (info, presence, newest) = (disk.info.read().clone(), disk.presence(), disk.newest());
    let standing = match presence.standing {
        Standing::LeftOut | Standing::LeftOutClosed => "left-out",
        standing => standing_word(standing),
    };
    json!({
        "uuid": info.uuid.to_string(),
        "label": info.name,
        "capacity_bytes": info.capacity_bytes,
        "host": presence.host_name(),
        "is_connected": disk.is_attached(),
        "is_syncing": syncing,
        "standing": standing,
        "is_complete": newest.is_complete,
        "received_seq": received,
        "cut_at_ms": newest.cut.map(|(time_ns, _)| ms(time_ns)),
        "is_current": newest.cut.is_some_and(|(_, position)| position >= received),
    })
}

fn domain_document(appliance: &Appliance, domain: &Domain) -> Value {
    let mut vms: BTreeMap<Uuid, Vec<Value>> = BTreeMap::new();
    for disk in domain.disks.read().values() {
        let vm = disk.info.read().vm_uuid;
        vms.entry(vm).or_default().push(disk_document(disk));
    }
    let vms = vms
        .into_iter()
        .map(|(uuid, disks)| json!({"uuid": uuid.to_string(), "disks": disks}));
    let (used, max, full, failing) = domain.log.usage();
    let newest = domain
        .cuts
        .lock()
        .newest
        .as_ref()
        .map(|(.., time_ns)| ms(*time_ns));
    json!({
        "name": domain.name,
        "store": appliance.store_of(&domain.name),
        "log": {
            "path": domain.log.dir().display().to_string(),
            "used_bytes": used, "max_bytes": max, "is_full": full, "is_failing": failing,
        },
        "newest_cut_at_ms": newest,
        "alarms": status::alarms(domain),
        "vms": vms.collect::<Vec<Value>>(),
    })
}

/// Everything; `every_s`: how often this is told.
pub fn document(appliance: &Appliance, every_s: u64) -> Value {
    let domains = appliance.domains();
    let domains: Vec<Value> = domains
        .iter()
        .map(|domain| domain_document(appliance, domain))
        .collect();
    json!({"every_s": every_s, "domains": domains})
}
