//! Managed objects as VI-JSON documents.
//!
//! Invariant: what a host's document says is read from the host when it is asked; of a host that is not
//! reached only what vCenter itself knows is told.

use super::{Cluster, Disk, HostEntry, State, Vm, World, tasks};
use crate::host::Host;
use crate::refusal::{Refusal, reference};
use serde_json::{Value, json};
use std::sync::Arc;
use vib_packaging::{Direction, Ruleset};

/// The network of all hosts.
pub(super) const NETWORK: &str = "network-6";
/// Before the id of the cluster whose pool it is.
pub(super) const POOL: &str = "resgroup-";

fn references<'a>(kind: &str, ids: impl IntoIterator<Item = &'a String>) -> Value {
    let all = ids.into_iter().map(|id| reference(kind, id));
    Value::Array(all.collect())
}

fn folder(name: &str, children: Value) -> Value {
    let parent = reference("Datacenter", "datacenter-2");
    json!({"name": name, "childEntity": children, "parent": parent})
}

fn ruleset(ruleset: &Ruleset) -> Value {
    let rule = |rule: &vib_packaging::FirewallRule| {
        let is_inbound = rule.direction == Direction::Inbound;
        json!({
            "_typeName": "HostFirewallRule", "port": rule.ports.0, "endPort": rule.ports.1,
            "direction": if is_inbound { "inbound" } else { "outbound" },
            "portType": if rule.source_ports { "src" } else { "dst" },
            "protocol": if rule.udp { "udp" } else { "tcp" },
        })
    };
    let rules: Vec<Value> = ruleset.rules.iter().map(rule).collect();
    json!({
        "_typeName": "HostFirewallRuleset", "key": ruleset.id, "label": ruleset.id,
        "required": ruleset.required, "enabled": ruleset.enabled, "rule": rules,
    })
}

/// What a host says of itself.
fn host_config(entry: &HostEntry) -> Value {
    let host = &entry.host;
    let settings = host.settings();
    let service = |(key, is_running): &(String, bool)| {
        json!({
            "_typeName": "HostService", "key": key, "label": key, "required": false,
            "uninstallable": false, "running": is_running, "policy": "on",
        })
    };
    let filter = |package: &crate::host::Package| {
        json!({
            "_typeName": "HostIoFilterInfo", "id": package.filter_id(), "name": package.name,
            "vendor": package.vendor, "version": package.version, "type": "replication",
            "summary": package.summary, "releaseDate": package.release_date,
            "available": host.library(&package.name).is_some(),
        })
    };
    let services: Vec<Value> = host.services().iter().map(service).collect();
    let rulesets: Vec<Value> = host.rulesets().iter().map(ruleset).collect();
    let filters: Vec<Value> = host.packages().iter().map(filter).collect();
    json!({
        "_typeName": "HostConfigInfo",
        "network": {"_typeName": "HostNetworkInfo", "dnsConfig": {
            "_typeName": "HostDnsConfig", "dhcp": false, "hostName": host.name, "domainName": "",
            "address": settings.dns_servers,
        }},
        "service": {"_typeName": "HostServiceInfo", "service": services},
        "firewall": {"_typeName": "HostFirewallInfo", "ruleset": rulesets},
        "ioFilterInfo": filters,
    })
}

fn host(state: &State, id: &str, entry: &HostEntry) -> Value {
    let settings = entry.host.settings();
    let connection = match (entry.is_disconnected, settings.is_reachable) {
        (true, _) => "disconnected",
        (false, true) => "connected",
        (false, false) => "notResponding",
    };
    let vms = state
        .vms
        .iter()
        .filter(|(_, vm)| vm.host == id)
        .map(|(id, _)| id);
    let parent = match &entry.cluster {
        Some(cluster) => reference("ClusterComputeResource", cluster),
        None => reference("ComputeResource", &format!("alone-{id}")),
    };
    let product = json!({
        "_typeName": "AboutInfo", "name": "Simulated ESXi", "version": settings.version,
        "build": settings.build.to_string(), "productLineId": "embeddedEsx",
    });
    let mut document = json!({
        "name": entry.host.name, "parent": parent, "vm": references("VirtualMachine", vms),
        "datastore": references("Datastore", state.datastores.keys()),
        "runtime": {
            "_typeName": "HostRuntimeInfo", "connectionState": connection,
            "inMaintenanceMode": entry.is_in_maintenance, "powerState": "poweredOn",
        },
        "summary": {"_typeName": "HostListSummary", "config": {
            "_typeName": "HostConfigSummary", "name": entry.host.name, "product": product,
        }},
    });
    if connection == "connected"
        && let Some(document) = document.as_object_mut()
    {
        document.insert("config".into(), host_config(entry));
        let time = reference("HostDateTimeSystem", &format!("dateTimeSystem-{id}"));
        let options = reference("OptionManager", &format!("advancedOption-{id}"));
        let managers = json!({"dateTimeSystem": time, "advancedOption": options});
        document.insert("configManager".into(), managers);
    }
    document
}

fn cluster(state: &State, id: &str, cluster: &Cluster) -> Value {
    json!({
        "network": [reference("Network", NETWORK)],
        "recentTask": references("Task", state.recent_tasks(id)),
        "name": cluster.name, "host": references("HostSystem", &cluster.hosts),
        "datastore": references("Datastore", state.datastores.keys()),
        "parent": reference("Folder", "group-h4"),
        "resourcePool": reference("ResourcePool", &format!("{POOL}{id}")),
        "configuration": {
            "_typeName": "ClusterConfigInfo",
            "drsConfig": {"_typeName": "ClusterDrsConfigInfo", "enabled": cluster.is_drs_on},
        },
    })
}

fn device(vm: &Vm, disk: &Disk) -> Value {
    let file = disk.path.file_name().unwrap_or_default().to_string_lossy();
    let mut device = json!({
        "_typeName": "VirtualDisk", "key": disk.key,
        "deviceInfo": {"_typeName": "Description", "label": disk.label, "summary": ""},
        "capacityInKB": disk.capacity_bytes / 1024, "capacityInBytes": disk.capacity_bytes,
        "backing": {
            "_typeName": match disk.is_physical_rdm {
                true => "VirtualDiskRawDiskMappingVer1BackingInfo",
                false => "VirtualDiskFlatVer2BackingInfo",
            },
            "fileName": format!("[datastore1] {}/{file}", vm.name),
            "diskMode": "persistent",
            "sharing": if disk.is_shared { "sharingMultiWriter" } else { "sharingNone" },
        },
    });
    if disk.is_physical_rdm {
        device["backing"]["compatibilityMode"] = json!("physicalMode");
    }
    if let Some((filter, _)) = &vm.filter {
        device["iofilter"] = json!([filter]);
    }
    device
}

fn vm(state: &State, id: &str, vm: &Vm) -> Value {
    let power = match state.is_running(vm) {
        true => "poweredOn",
        false => "poweredOff",
    };
    let devices: Vec<Value> = vm.disks.iter().map(|disk| device(vm, disk)).collect();
    let mut document = json!({
        "name": vm.name, "parent": reference("Folder", "group-v3"),
        "config": {
            "_typeName": "VirtualMachineConfigInfo", "name": vm.name, "annotation": vm.annotation,
            "instanceUuid": vm.uuid.to_string(), "uuid": vm.uuid.to_string(),
            "hardware": {"_typeName": "VirtualHardware", "device": devices},
        },
        "runtime": {
            "_typeName": "VirtualMachineRuntimeInfo", "powerState": power,
            "connectionState": "connected", "host": reference("HostSystem", &vm.host),
        },
        "datastore": references("Datastore", state.datastores.keys()),
        "network": references("Network", &vm.networks),
    });
    if vm.has_snapshots {
        let one = reference("VirtualMachineSnapshot", &format!("snapshot-{id}"));
        document["snapshot"] = json!({
            "_typeName": "VirtualMachineSnapshotInfo", "currentSnapshot": one, "rootSnapshotList": [],
        });
    }
    document
}

impl World {
    /// A managed object's properties.
    pub fn document(&self, kind: &str, id: &str) -> Result<Value, Refusal> {
        let state = self.state.lock();
        let none = || Refusal::no_object(kind, id);
        match (kind, id) {
            ("ServiceInstance", "ServiceInstance") => Ok(json!({"content": self.content()})),
            ("Folder", "group-d1") => {
                let center = reference("Datacenter", "datacenter-2");
                Ok(json!({"name": "Datacenters", "childEntity": [center]}))
            }
            ("Datacenter", "datacenter-2") => Ok(json!({
                "name": "Simulated", "parent": reference("Folder", "group-d1"), "vmFolder": reference("Folder", "group-v3"),
                "hostFolder": reference("Folder", "group-h4"),
                "datastore": references("Datastore", state.datastores.keys()),
            })),
            ("Folder", "group-v3") => {
                Ok(folder("vm", references("VirtualMachine", state.vms.keys())))
            }
            ("Folder", "group-h4") => {
                let clusters = state.clusters.keys();
                let clusters = clusters.map(|id| reference("ClusterComputeResource", id));
                let alone = state
                    .hosts
                    .iter()
                    .filter(|(_, host)| host.cluster.is_none());
                let alone =
                    alone.map(|(id, _)| reference("ComputeResource", &format!("alone-{id}")));
                Ok(folder(
                    "host",
                    Value::Array(clusters.chain(alone).collect()),
                ))
            }
            ("ClusterComputeResource", id) => Ok(cluster(&state, id, state.cluster(id)?)),
            ("AuthorizationManager", "AuthorizationManager") => {
                drop(state);
                Ok(json!({"roleList": self.roles()}))
            }
            ("Network", NETWORK) => Ok(json!({"name": "VM Network"})),
            ("ComputeResource", id) => {
                let of = id.strip_prefix("alone-").ok_or_else(none)?;
                let entry = state.hosts.get(of).ok_or_else(none)?;
                let hosts = json!([reference("HostSystem", of)]);
                Ok(json!({"name": entry.host.name, "host": hosts}))
            }
            ("HostSystem", id) => Ok(host(&state, id, state.host(id)?)),
            ("VirtualMachine", id) => Ok(vm(&state, id, state.vm(id)?)),
            ("Datastore", id) => {
                let (name, _) = state.datastores.get(id).ok_or_else(none)?;
                let summary = json!({
                    "_typeName": "DatastoreSummary", "name": name, "accessible": true,
                    "capacity": 1_u64 << 40, "freeSpace": 1_u64 << 39, "type": "VMFS",
                });
                Ok(json!({"name": name, "summary": summary}))
            }
            ("Task", id) => {
                let task = state.tasks.get(id).ok_or_else(none)?;
                Ok(json!({"info": tasks::info(id, task)}))
            }
            _ => Err(none()),
        }
    }

    /// `UpdateOptions` of a host's advanced options.
    pub fn update_options(&self, manager: &str, changes: &Value) -> Result<(), Refusal> {
        let host = self.host_of_manager("advancedOption-", manager)?;
        let wrong = |words: &str| Refusal::argument("changedValue", words);
        let changes = changes.as_array().ok_or_else(|| wrong("it is no list"))?;
        for change in changes {
            let key = change.get("key").and_then(Value::as_str);
            let value = change.get("value").unwrap_or(&Value::Null);
            let value = value.get("_value").unwrap_or(value).as_str();
            let (Some(key), Some(value)) = (key, value) else {
                return Err(wrong("an option has a key and a text"));
            };
            if !host.options().contains_key(key) {
                let words = format!("no option {}", key.escape_default());
                return Err(Refusal::new("InvalidName", words));
            }
            host.set_option(key, value)
                .map_err(|error| wrong(&format!("{error:#}")))?;
        }
        Ok(())
    }

    /// `QueryOptions`.
    pub fn options(&self, manager: &str, name: Option<&str>) -> Result<Value, Refusal> {
        let host = self.host_of_manager("advancedOption-", manager)?;
        let mut options = host.options();
        options.retain(|key, _| name.is_none_or(|name| key == name));
        if let (Some(name), true) = (name, options.is_empty()) {
            return Err(Refusal::new("InvalidName", format!("no option {name}")));
        }
        let option = |(key, value): (String, String)| {
            let value = json!({"_typeName": "string", "_value": value});
            json!({"_typeName": "OptionValue", "key": key, "value": value})
        };
        Ok(options.into_iter().map(option).collect())
    }

    /// The host of one of its managers, which must be reached.
    fn host_of_manager(&self, prefix: &str, manager: &str) -> Result<Arc<Host>, Refusal> {
        let id = manager.strip_prefix(prefix).unwrap_or(manager);
        let state = self.state.lock();
        let entry = state.host(id)?;
        match entry.host.settings().is_reachable && !entry.is_disconnected {
            true => Ok(entry.host.clone()),
            false => Err(Refusal::new(
                "HostNotReachable",
                "the host does not respond",
            )),
        }
    }

    /// A host's own time: `QueryDateTime`.
    pub fn time_of(&self, system: &str) -> Result<Value, Refusal> {
        let settings = self.host_of_manager("dateTimeSystem-", system)?.settings();
        let now = jiff::Timestamp::now().as_millisecond() + settings.clock_ahead_ms;
        let now = jiff::Timestamp::from_millisecond(now);
        let now = now.map_err(|error| Refusal::new("SystemError", error.to_string()))?;
        Ok(json!(now.to_string()))
    }
}
