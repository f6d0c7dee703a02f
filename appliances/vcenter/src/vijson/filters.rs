//! The client as a [`Vcenter`]: filters, tasks, policies, extensions, maintenance mode.

use super::wire::{Ref, list, needed, number, plain, text, time_ms};
use super::{Client, fault, other};
use crate::api::Vcenter;
use crate::model::{
    About, ClusterFilter, ClusterInfo, Event, Extension, Fault, FilterDisk, FilterIssues,
    FilterOperation, FilterSource, HostInfo, HostIssue, Named, Policy, TaskId, TaskState, VibTrust,
    VmInfo,
};
use crate::text::Moid;
use serde_json::{Value, json};

/// The class of a filter that replicates.
const REPLICATION: &str = "replication";
/// How many events are asked for.
const MAX_EVENTS: i32 = 1000;
/// How long a host may take to go into maintenance mode, and out of it.
const MAINTENANCE_LIMIT_S: i32 = 3600;

fn cluster(id: &Moid) -> Value {
    Ref::new("ClusterComputeResource", id).to_json()
}

fn trust_of(trust: &VibTrust) -> Option<Value> {
    match trust {
        VibTrust::HostAuthorities => None,
        VibTrust::Pinned(pem) => Some(json!({
            "_typeName": "IoFilterManagerPinnedCertificate", "sslCertificate": pem,
        })),
        VibTrust::Anybody => Some(json!({"_typeName": "IoFilterManagerUntrustedCertificate"})),
    }
}

fn with_trust(mut arguments: Value, trust: &VibTrust) -> Value {
    if let (Some(trust), Some(arguments)) = (trust_of(trust), arguments.as_object_mut()) {
        arguments.insert("vibSslTrust".into(), trust);
    }
    arguments
}

fn operation_of(value: &Value) -> Result<FilterOperation, Fault> {
    match text(value, "opType").as_deref() {
        Some("install") => Ok(FilterOperation::Install),
        Some("uninstall") => Ok(FilterOperation::Uninstall),
        Some("upgrade") => Ok(FilterOperation::Upgrade),
        kind => Err(other(format!("`opType` is {kind:?}"))),
    }
}

fn filter_of(value: &Value) -> Result<ClusterFilter, Fault> {
    Ok(ClusterFilter {
        id: needed(value, "id")?,
        name: needed(value, "name")?,
        vendor: needed(value, "vendor")?,
        version: needed(value, "version")?,
        operation: operation_of(value)?,
        vib_url: text(value, "vibUrl"),
    })
}

fn host_issue(value: &Value) -> Result<HostIssue, Fault> {
    let host = Ref::of(plain(value).get("host").unwrap_or(&Value::Null));
    let issues = list(plain(value).get("issue").unwrap_or(&Value::Null)).map_err(other)?;
    Ok(HostIssue {
        host: host.map_err(other)?.id,
        issues: issues
            .iter()
            .map(|one| match text(one, "localizedMessage") {
                // The words alone: whoever asks knows that it is vCenter that says so.
                Some(words) if !words.is_empty() => words,
                _ => fault::localized(one).to_string(),
            })
            .collect(),
    })
}

fn extension_of(value: &Value) -> Result<Extension, Fault> {
    let version = needed(value, "version")?;
    let servers = list(plain(value).get("server").unwrap_or(&Value::Null)).map_err(other)?;
    let label = plain(value)
        .get("description")
        .and_then(|d| text(d, "label"));
    Ok(Extension {
        key: needed(value, "key")?,
        label: label.unwrap_or_default(),
        company: text(value, "company").unwrap_or_default(),
        version: version.parse().map_err(other)?,
        url: servers.first().and_then(|server| text(server, "url")),
    })
}

fn description(label: &str) -> Value {
    json!({"_typeName": "Description", "label": label, "summary": label})
}

impl Client {
    fn filter_manager(&self) -> Result<Ref, Fault> {
        let found = self.roots()?.filter_manager;
        found.ok_or_else(|| other("this server has no IoFilterManager: is it a vCenter?"))
    }

    fn extension_manager(&self) -> Result<Ref, Fault> {
        let found = self.roots()?.extension_manager;
        found.ok_or_else(|| other("this server has no ExtensionManager: is it a vCenter?"))
    }

    /// Changes the filters of disks of a machine.
    fn reconfigure(&self, vm: &Moid, disk_keys: &[i32], change: &Value) -> Result<TaskId, Fault> {
        let vm = Ref::new("VirtualMachine", vm);
        let devices = self.get(&vm, "config")?;
        let devices = plain(&devices)
            .get("hardware")
            .and_then(|h| plain(h).get("device"));
        let devices = list(devices.unwrap_or(&Value::Null)).map_err(other)?;
        let mut changes = Vec::new();
        for key in disk_keys {
            let is_it = |device: &&Value| number(device, "key") == Some(i64::from(*key));
            let Some(device) = devices.iter().find(is_it) else {
                return Err(Fault::InvalidArgument(format!(
                    "{} has no disk {key}",
                    vm.id
                )));
            };
            let mut spec = json!({
                "_typeName": "VirtualDeviceConfigSpec", "operation": "edit", "device": device,
            });
            if let (Some(spec), Some(change)) = (spec.as_object_mut(), change.as_object()) {
                spec.extend(change.clone());
            }
            changes.push(spec);
        }
        let spec = json!({"_typeName": "VirtualMachineConfigSpec", "deviceChange": changes});
        self.start(&vm, "ReconfigVM_Task", &json!({"spec": spec}))
    }
}

impl Vcenter for Client {
    fn about(&self) -> Result<About, Fault> {
        self.read_about()
    }

    fn clusters(&self) -> Result<Vec<ClusterInfo>, Fault> {
        self.read_clusters()
    }

    fn hosts(&self, cluster: &Moid) -> Result<Vec<HostInfo>, Fault> {
        self.read_hosts(cluster)
    }

    fn vms(&self, cluster: &Moid) -> Result<Vec<VmInfo>, Fault> {
        self.read_vms(cluster)
    }

    fn vms_named(&self, name: &str) -> Result<Vec<Moid>, Fault> {
        self.find_vms(name)
    }

    fn task(&self, task: &TaskId) -> Result<TaskState, Fault> {
        let info = self.get(&Ref::new("Task", &task.0), "info")?;
        match text(&info, "state").as_deref() {
            Some("queued") => Ok(TaskState::Queued),
            Some("running") => {
                let percent = number(&info, "progress");
                let percent = percent.and_then(|percent| u8::try_from(percent).ok());
                Ok(TaskState::Running(percent))
            }
            Some("success") => Ok(TaskState::Success),
            Some("error") => {
                let error = plain(&info).get("error").unwrap_or(&Value::Null);
                Ok(TaskState::Error(fault::localized(error)))
            }
            state => Err(other(format!("{task}: its state is {state:?}"))),
        }
    }

    fn cancel_task(&self, task: &TaskId) -> Result<(), Fault> {
        let task = Ref::new("Task", &task.0);
        self.call(&task, "CancelTask", &json!({})).map(drop)
    }

    fn events(&self) -> Result<Vec<Event>, Fault> {
        let manager = self.roots()?.event_manager;
        let manager = manager.ok_or_else(|| other("this server has no EventManager"))?;
        let filter = json!({"_typeName": "EventFilterSpec", "maxCount": MAX_EVENTS});
        let events = self.call(&manager, "QueryEvents", &json!({"filter": filter}))?;
        let event = |value: &Value| {
            let at = plain(value).get("createdTime").and_then(time_ms);
            Ok(Event {
                key: number(value, "key").ok_or_else(|| other("an event without a key"))?,
                kind: needed(value, "_typeName")?,
                at_ms: at.ok_or_else(|| other("an event without a time"))?,
                message: text(value, "fullFormattedMessage").unwrap_or_default(),
            })
        };
        let events: Result<Vec<Event>, Fault> =
            list(&events).map_err(other)?.iter().map(event).collect();
        let mut events = events?;
        events.sort_by_key(|event| event.key);
        Ok(events)
    }

    fn install_filter(&self, of: &Moid, vib_url: &str, trust: &VibTrust) -> Result<TaskId, Fault> {
        let arguments = json!({"vibUrl": vib_url, "compRes": cluster(of)});
        let manager = self.filter_manager()?;
        self.start(
            &manager,
            "InstallIoFilter_Task",
            &with_trust(arguments, trust),
        )
    }

    fn uninstall_filter(&self, of: &Moid, filter: &str) -> Result<TaskId, Fault> {
        let arguments = json!({"filterId": filter, "compRes": cluster(of)});
        self.start(
            &self.filter_manager()?,
            "UninstallIoFilter_Task",
            &arguments,
        )
    }

    fn upgrade_filter(
        &self,
        of: &Moid,
        filter: &str,
        vib_url: &str,
        trust: &VibTrust,
    ) -> Result<TaskId, Fault> {
        let arguments = json!({"filterId": filter, "compRes": cluster(of), "vibUrl": vib_url});
        let manager = self.filter_manager()?;
        self.start(
            &manager,
            "UpgradeIoFilter_Task",
            &with_trust(arguments, trust),
        )
    }

    fn filters(&self, of: &Moid) -> Result<Vec<ClusterFilter>, Fault> {
        let arguments = json!({"compRes": cluster(of)});
        let found = self.call(&self.filter_manager()?, "QueryIoFilterInfo", &arguments)?;
        list(&found).map_err(other)?.iter().map(filter_of).collect()
    }

    fn filter_issues(&self, of: &Moid, filter: &str) -> Result<FilterIssues, Fault> {
        let arguments = json!({"filterId": filter, "compRes": cluster(of)});
        let found = self.call(&self.filter_manager()?, "QueryIoFilterIssues", &arguments)?;
        let hosts = list(plain(&found).get("hostIssue").unwrap_or(&Value::Null));
        let hosts: Result<Vec<HostIssue>, Fault> =
            hosts.map_err(other)?.iter().map(host_issue).collect();
        Ok(FilterIssues {
            operation: operation_of(&found)?,
            hosts: hosts?,
        })
    }

    fn disks_using(&self, of: &Moid, filter: &str) -> Result<Vec<FilterDisk>, Fault> {
        let arguments = json!({"filterId": filter, "compRes": cluster(of)});
        let found = self.call(&self.filter_manager()?, "QueryDisksUsingFilter", &arguments)?;
        list(&found).map_err(other)?;
        Ok(fault::disks(&found))
    }

    fn resolve_on_cluster(&self, of: &Moid, filter: &str) -> Result<TaskId, Fault> {
        let arguments = json!({"filterId": filter, "cluster": cluster(of)});
        let method = "ResolveInstallationErrorsOnCluster_Task";
        self.start(&self.filter_manager()?, method, &arguments)
    }

    fn resolve_on_host(&self, host: &Moid, filter: &str) -> Result<TaskId, Fault> {
        let host = Ref::new("HostSystem", host).to_json();
        let arguments = json!({"filterId": filter, "host": host});
        let method = "ResolveInstallationErrorsOnHost_Task";
        self.start(&self.filter_manager()?, method, &arguments)
    }

    fn attach_filter(
        &self,
        vm: &Moid,
        disk_keys: &[i32],
        filter: &FilterSource,
    ) -> Result<TaskId, Fault> {
        let change = match filter {
            FilterSource::Policy(id) => json!({"profile": [{
                "_typeName": "VirtualMachineDefinedProfileSpec", "profileId": id,
            }]}),
            FilterSource::Filter { name, properties } => {
                let pair = |(key, value): &(String, String)| json!({"_typeName": "KeyValue", "key": key, "value": value});
                let properties: Vec<Value> = properties.iter().map(pair).collect();
                json!({"filterSpec": [{
                    "_typeName": "VirtualMachineIndependentFilterSpec", "filterName": name,
                    "filterClass": REPLICATION, "filterCapabilities": properties,
                }]})
            }
        };
        self.reconfigure(vm, disk_keys, &change)
    }

    fn detach_filters(&self, vm: &Moid, disk_keys: &[i32]) -> Result<TaskId, Fault> {
        let change = json!({
            "profile": [{"_typeName": "VirtualMachineEmptyProfileSpec"}],
            "filterSpec": [{"_typeName": "VirtualMachineEmptyIndependentFilterSpec"}],
        });
        self.reconfigure(vm, disk_keys, &change)
    }

    fn policies(&self) -> Result<Vec<Policy>, Fault> {
        let kind = json!({"_typeName": "PbmProfileResourceType", "resourceType": "STORAGE"});
        let ids = self.call_policies("PbmQueryProfile", &json!({"resourceType": kind}))?;
        let ids = list(&ids).map_err(other)?;
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let found = self.call_policies("PbmRetrieveContent", &json!({"profileIds": ids}))?;
        let policy = |value: &Value| {
            let id = plain(value).get("profileId").unwrap_or(&Value::Null);
            Ok(Policy {
                id: needed(id, "uniqueId")?,
                name: needed(value, "name")?,
            })
        };
        list(&found).map_err(other)?.iter().map(policy).collect()
    }

    fn disk_policy(&self, disk: &FilterDisk) -> Result<Option<String>, Fault> {
        let entity = json!({
            "_typeName": "PbmServerObjectRef", "objectType": "virtualDiskId",
            "key": format!("{}:{}", disk.vm, disk.disk_key),
        });
        let method = "PbmQueryAssociatedProfile";
        let found = self.call_policies(method, &json!({"entity": entity}))?;
        let first = list(&found).map_err(other)?.first();
        first.map(|id| needed(id, "uniqueId")).transpose()
    }

    fn create_policy(
        &self,
        name: &str,
        filter: &str,
        properties: &[(String, String)],
    ) -> Result<Policy, Fault> {
        let property = |(key, value): &(String, String)| {
            let value = json!({"_typeName": "string", "_value": value});
            json!({"_typeName": "PbmCapabilityPropertyInstance", "id": key, "value": value})
        };
        let properties: Vec<Value> = properties.iter().map(property).collect();
        let constraint = json!({
            "_typeName": "PbmCapabilityConstraintInstance", "propertyInstance": properties,
        });
        let id = json!({
            "_typeName": "PbmCapabilityMetadataUniqueId", "namespace": filter, "id": REPLICATION,
        });
        let capability = json!({
            "_typeName": "PbmCapabilityInstance", "id": id, "constraint": [constraint],
        });
        let rules = json!({
            "_typeName": "PbmCapabilitySubProfile", "name": filter, "capability": [capability],
        });
        let spec = json!({
            "_typeName": "PbmCapabilityProfileCreateSpec", "name": name,
            "resourceType": {"_typeName": "PbmProfileResourceType", "resourceType": "STORAGE"},
            "constraints": {
                "_typeName": "PbmCapabilitySubProfileConstraints", "subProfiles": [rules],
            },
        });
        let made = self.call_policies("PbmCreate", &json!({"createSpec": spec}))?;
        Ok(Policy {
            id: needed(&made, "uniqueId")?,
            name: name.to_owned(),
        })
    }

    fn delete_policy(&self, id: &str) -> Result<(), Fault> {
        let id = json!([{"_typeName": "PbmProfileId", "uniqueId": id}]);
        let outcomes = self.call_policies("PbmDelete", &json!({"profileId": id}))?;
        for outcome in list(&outcomes).map_err(other)? {
            match plain(outcome).get("fault") {
                None | Some(Value::Null) => {}
                Some(found) => return Err(fault::of(found)),
            }
        }
        Ok(())
    }

    fn enter_maintenance(&self, host: &Moid) -> Result<TaskId, Fault> {
        let arguments = json!({"timeout": MAINTENANCE_LIMIT_S, "evacuatePoweredOffVms": false});
        let host = Ref::new("HostSystem", host);
        self.start(&host, "EnterMaintenanceMode_Task", &arguments)
    }

    fn exit_maintenance(&self, host: &Moid) -> Result<TaskId, Fault> {
        let arguments = json!({"timeout": MAINTENANCE_LIMIT_S});
        let host = Ref::new("HostSystem", host);
        self.start(&host, "ExitMaintenanceMode_Task", &arguments)
    }

    fn extension(&self, key: &str) -> Result<Option<Extension>, Fault> {
        let manager = self.extension_manager()?;
        match self.call(&manager, "FindExtension", &json!({"extensionKey": key}))? {
            Value::Null => Ok(None),
            found => extension_of(&found).map(Some),
        }
    }

    fn register_extension(&self, extension: &Extension) -> Result<(), Fault> {
        let server = extension.url.iter().map(|url| {
            json!({
                "_typeName": "ExtensionServerInfo", "url": url, "type": "HTTPS",
                "company": extension.company, "adminEmail": [],
                "description": description(&extension.label),
            })
        });
        let server: Vec<Value> = server.collect();
        let now = jiff::Timestamp::now().to_string();
        let document = json!({
            "_typeName": "Extension", "key": extension.key, "company": extension.company,
            "description": description(&extension.label), "version": extension.version.as_str(),
            "server": server, "lastHeartbeatTime": now,
        });
        let manager = self.extension_manager()?;
        self.call(
            &manager,
            "RegisterExtension",
            &json!({"extension": document}),
        )
        .map(drop)
    }

    fn unregister_extension(&self, key: &str) -> Result<(), Fault> {
        let manager = self.extension_manager()?;
        self.call(
            &manager,
            "UnregisterExtension",
            &json!({"extensionKey": key}),
        )
        .map(drop)
    }

    fn datastores(&self, cluster: &Moid) -> Result<Vec<Named>, Fault> {
        self.read_named(cluster, "datastore")
    }

    fn networks(&self, cluster: &Moid) -> Result<Vec<Named>, Fault> {
        self.read_named(cluster, "network")
    }

    fn cluster_tasks(&self, cluster: &Moid) -> Result<Vec<TaskId>, Fault> {
        self.read_open_tasks(cluster)
    }

    fn set_host_option(&self, host: &Moid, key: &str, value: &str) -> Result<(), Fault> {
        self.update_option(host, key, value)
            .map_err(|fault| match fault {
                Fault::Other(words) if words.starts_with("InvalidName") => {
                    Fault::NotFound(format!("the host has no option {key}"))
                }
                fault => fault,
            })
    }
}
