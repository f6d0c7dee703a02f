//! Clusters, hosts and virtual machines, found from the root folder.
//!
//! Invariant: folders are walked once each and at most so deep, whatever a vCenter answers.

use super::objects::{Object, disk_of, ruleset_of};
use super::wire::{Ref, flag, list, needed, plain, refs, text, time_ms};
use super::{Client, other};
use crate::model::{
    About, ClusterInfo, Connection, Fault, HostFilter, HostInfo, HostService, VmInfo,
};
use crate::text::Moid;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Folders in folders.
const MAX_DEPTH: usize = 32;

const CLUSTER: &str = "ClusterComputeResource";
const CLUSTER_PATHS: [&str; 4] = [
    "name",
    "host",
    "datastore",
    "configuration.drsConfig.enabled",
];
const HOST_PATHS: [&str; 10] = [
    "name",
    "runtime.connectionState",
    "runtime.inMaintenanceMode",
    "summary.config.product.version",
    "summary.config.product.build",
    "config.network.dnsConfig.address",
    "config.service.service",
    "config.firewall.ruleset",
    "config.ioFilterInfo",
    "configManager.dateTimeSystem",
];
const VM_PATHS: [&str; 6] = [
    "name",
    "config.instanceUuid",
    "runtime.host",
    "runtime.powerState",
    "snapshot",
    "config.hardware.device",
];

impl Client {
    pub(super) fn read_about(&self) -> Result<About, Fault> {
        let about = self.roots()?.about;
        let version = needed(&about, "version")?;
        let uuid = needed(&about, "instanceUuid")?;
        let instance = Ref {
            kind: "ServiceInstance".into(),
            id: "ServiceInstance".parse().map_err(other)?,
        };
        let now = self.call(&instance, "CurrentTime", &json!({}))?;
        Ok(About {
            version: version.parse().map_err(other)?,
            build: text(&about, "build").unwrap_or_default(),
            instance_uuid: uuid.parse().map_err(other)?,
            now_ms: time_ms(&now).ok_or_else(|| other("CurrentTime is no time"))?,
        })
    }

    /// The objects of some types below folders, which lie in `of_datacenter` of each datacenter.
    fn below(&self, kinds: &[&str], of_datacenter: &str) -> Result<Vec<Ref>, Fault> {
        let mut found = Vec::new();
        let mut seen = BTreeSet::new();
        let mut level = vec![self.roots()?.root_folder];
        for _ in 0..MAX_DEPTH {
            level.retain(|one| seen.insert(one.clone()));
            let (centers, rest): (Vec<Ref>, Vec<Ref>) =
                level.into_iter().partition(|one| one.kind == "Datacenter");
            let (folders, rest): (Vec<Ref>, Vec<Ref>) =
                rest.into_iter().partition(|one| one.kind == "Folder");
            found.extend(
                rest.into_iter()
                    .filter(|one| kinds.contains(&one.kind.as_str())),
            );
            level = Vec::new();
            for object in self.objects("Datacenter", &centers, &[of_datacenter])? {
                let folder = Ref::of(object.get(of_datacenter));
                level.push(folder.map_err(|error| object.bad(of_datacenter, error))?);
            }
            for object in self.objects("Folder", &folders, &["childEntity"])? {
                let children = refs(object.get("childEntity"));
                level.extend(children.map_err(|error| object.bad("childEntity", error))?);
            }
            if level.is_empty() {
                return Ok(found);
            }
        }
        Err(other(format!("folders lie more than {MAX_DEPTH} deep")))
    }

    pub(super) fn read_clusters(&self) -> Result<Vec<ClusterInfo>, Fault> {
        let found = self.below(&[CLUSTER], "hostFolder")?;
        let objects = self.objects(CLUSTER, &found, &CLUSTER_PATHS)?;
        objects.iter().map(cluster_of).collect()
    }

    fn hosts_of(&self, cluster: &Moid) -> Result<Vec<Ref>, Fault> {
        let hosts = self.get(&Ref::new(CLUSTER, cluster), "host")?;
        refs(&hosts).map_err(|error| other(format!("{cluster}: host: {error}")))
    }

    pub(super) fn read_hosts(&self, cluster: &Moid) -> Result<Vec<HostInfo>, Fault> {
        let hosts = self.hosts_of(cluster)?;
        let objects = self.objects("HostSystem", &hosts, &HOST_PATHS)?;
        objects.iter().map(|object| self.host_of(object)).collect()
    }

    fn host_of(&self, object: &Object) -> Result<HostInfo, Fault> {
        let connection = match object.text("runtime.connectionState").as_deref() {
            Some("connected") => Connection::Connected,
            Some("disconnected") => Connection::Disconnected,
            _ => Connection::NotResponding,
        };
        let version = object.needed("summary.config.product.version")?;
        let build = object
            .text("summary.config.product.build")
            .unwrap_or_default();
        let all = |path: &str| list(object.get(path)).map_err(|error| object.bad(path, error));
        let service = |one: &Value| {
            let key = text(one, "key")?;
            let is_running = flag(one, "running");
            Some(HostService { key, is_running })
        };
        let filter = |one: &Value| {
            Some(HostFilter {
                id: text(one, "id")?,
                name: text(one, "name")?,
                version: text(one, "version")?,
                is_available: flag(one, "available"),
            })
        };
        let dns = all("config.network.dnsConfig.address")?;
        let dns_servers = dns
            .iter()
            .filter_map(|one| Some(plain(one).as_str()?.into()));
        let services = all("config.service.service")?;
        let rulesets = all("config.firewall.ruleset")?;
        let filters = all("config.ioFilterInfo")?;
        Ok(HostInfo {
            moid: object.of.id.clone(),
            name: object.needed("name")?,
            connection,
            in_maintenance: object.flag("runtime.inMaintenanceMode"),
            version: version
                .parse()
                .map_err(|error| object.bad("summary.config.product.version", error))?,
            build: build.parse().unwrap_or(0),
            now_ms: match connection {
                Connection::Connected => self.time_of(object)?,
                Connection::Disconnected | Connection::NotResponding => None,
            },
            dns_servers: dns_servers.collect(),
            services: services.iter().filter_map(service).collect(),
            rulesets: rulesets.iter().filter_map(ruleset_of).collect(),
            filters: filters.iter().filter_map(filter).collect(),
        })
    }

    /// A host's own time. None, if the host went meanwhile.
    fn time_of(&self, host: &Object) -> Result<Option<i64>, Fault> {
        let path = "configManager.dateTimeSystem";
        let Ok(system) = Ref::of(host.get(path)) else {
            return Ok(None);
        };
        match self.call(&system, "QueryDateTime", &json!({})) {
            Ok(time) => Ok(time_ms(&time)),
            Err(Fault::NotAuthenticated) => Err(Fault::NotAuthenticated),
            // It was reached when it was listed and is not any more: as if it had not been.
            Err(_) => Ok(None),
        }
    }

    pub(super) fn read_vms(&self, cluster: &Moid) -> Result<Vec<VmInfo>, Fault> {
        let hosts = self.hosts_of(cluster)?;
        let mut machines = BTreeSet::new();
        for host in self.objects("HostSystem", &hosts, &["vm"])? {
            machines.extend(refs(host.get("vm")).map_err(|error| host.bad("vm", error))?);
        }
        let machines: Vec<Ref> = machines.into_iter().collect();
        let objects = self.objects("VirtualMachine", &machines, &VM_PATHS)?;
        objects.iter().map(vm_of).collect()
    }

    pub(super) fn find_vms(&self, name: &str) -> Result<Vec<Moid>, Fault> {
        let found = self.below(&["VirtualMachine"], "vmFolder")?;
        let objects = self.objects("VirtualMachine", &found, &["name"])?;
        let has_name = |object: &Object| object.text("name").as_deref() == Some(name);
        let named = objects.into_iter().filter(has_name);
        Ok(named.map(|object| object.of.id).collect())
    }
}

fn cluster_of(object: &Object) -> Result<ClusterInfo, Fault> {
    let ids = |path: &str| {
        let all = refs(object.get(path)).map_err(|error| object.bad(path, error))?;
        Ok(all.into_iter().map(|one| one.id).collect())
    };
    Ok(ClusterInfo {
        moid: object.of.id.clone(),
        name: object.needed("name")?,
        drs_enabled: object.flag("configuration.drsConfig.enabled"),
        hosts: ids("host")?,
        datastores: ids("datastore")?,
    })
}

fn vm_of(object: &Object) -> Result<VmInfo, Fault> {
    let uuid = object.needed("config.instanceUuid")?;
    let devices = "config.hardware.device";
    let disks = list(object.get(devices)).map_err(|error| object.bad(devices, error))?;
    Ok(VmInfo {
        moid: object.of.id.clone(),
        name: object.needed("name")?,
        instance_uuid: uuid
            .parse()
            .map_err(|error| object.bad("config.instanceUuid", error))?,
        host: Ref::of(object.get("runtime.host")).ok().map(|host| host.id),
        is_powered_on: object.text("runtime.powerState").as_deref() == Some("poweredOn"),
        has_snapshots: !object.get("snapshot").is_null(),
        disks: disks.iter().filter_map(disk_of).collect(),
    })
}
