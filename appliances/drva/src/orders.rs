//! What an operator orders about disks and hosts that are not to be waited for.
//!
//! Invariant: an order is durable when it is answered, or answered with an error that says what to do;
//! a host that is there is never forgotten.

use crate::appliance::Appliance;
use crate::disk::Disk;
use crate::domain::Domain;
use filter_core::mapping::{hex, parse_id};
use serde_json::{Value, json};
use std::sync::Arc;

/// The domain that a command names.
pub fn domain_of(appliance: &Appliance, command: &Value) -> Result<Arc<Domain>, String> {
    let of = command.get("domain").and_then(Value::as_str);
    let of = of.ok_or("the command needs a domain")?;
    let domains = appliance.domains();
    let found = domains.into_iter().find(|domain| domain.name == of);
    found.ok_or_else(|| format!("there is no domain `{of}`"))
}

/// The disks that a command names: by `disk`, an id, or by `vm`, a name.
fn disks_of(domain: &Domain, command: &Value) -> Result<Vec<Arc<Disk>>, String> {
    let text = |key: &str| command.get(key).and_then(Value::as_str);
    let all = domain.disks.read();
    let found: Vec<Arc<Disk>> = match (text("disk"), text("vm")) {
        (Some(disk), None) => {
            let id = parse_id(disk).ok_or_else(|| format!("`{disk}` is not a disk's id"))?;
            all.get(&id).cloned().into_iter().collect()
        }
        (None, Some(vm)) => {
            let of_vm = |disk: &&Arc<Disk>| disk.info.read().vm_name == vm;
            all.values().filter(of_vm).cloned().collect()
        }
        _ => return Err("name a disk by its id, or a vm by its name".into()),
    };
    if found.is_empty() {
        return Err(format!(
            "domain `{}` has no such disk: see status",
            domain.name
        ));
    }
    Ok(found)
}

/// Leaves disks out of cuts until they are opened again (`aside`), or takes that back.
pub fn set_aside(appliance: &Appliance, command: &Value, aside: bool) -> Result<Value, String> {
    let domain = domain_of(appliance, command)?;
    let disks = disks_of(&domain, command)?;
    let done = domain.set_aside(&disks, aside);
    done.map_err(|error| format!("the order cannot be written down: {error}"))?;
    let labels: Vec<String> = disks.iter().map(|disk| disk.label()).collect();
    tracing::warn!("domain {}: {labels:?} set aside: {aside}", domain.name);
    Ok(json!({"disks": labels, "set_aside": aside}))
}

/// Forgets a host that has left for good: no disk can be opened there any more.
pub fn forget_host(appliance: &Appliance, command: &Value) -> Result<Value, String> {
    let domain = domain_of(appliance, command)?;
    let wanted = command.get("host").and_then(Value::as_str);
    let wanted = wanted.ok_or("forget-host needs a host: its id, or its name")?;
    let hosts = domain.hosts();
    let by_id = parse_id(wanted).filter(|id| hosts.contains_key(id));
    let mut by_name = hosts.iter().filter(|(_, name)| *name == wanted);
    let id = match (by_id, by_name.next(), by_name.next()) {
        (Some(id), ..) | (None, Some((&id, _)), None) => id,
        (None, Some(_), Some(_)) => {
            return Err(format!(
                "several hosts are called `{wanted}`: name one by its id"
            ));
        }
        (None, None, _) => {
            let name = &domain.name;
            return Err(format!(
                "no host `{wanted}` ever had a disk of domain `{name}`"
            ));
        }
    };
    if appliance.connected_hosts().contains_key(&id) {
        return Err(format!(
            "host `{wanted}` is connected: it cannot be forgotten"
        ));
    }
    let done = domain.forget_host(&id);
    done.map_err(|error| format!("the order cannot be written down: {error}"))?;
    tracing::warn!("domain {}: host {wanted} is forgotten", domain.name);
    Ok(json!({"forgotten": hex(&id)}))
}
