//! The methods of the IoFilterManager.
//!
//! Invariant: what a filter's entry says of a host is the outcome of the last thing that was tried there;
//! an entry goes when its filter is on no host of the cluster any more. Hosts are worked on one after the
//! other, and one that fails keeps nobody else from being done.

use super::tasks::{Work, cancelled};
use super::{State, Vm, World};
use crate::host::{Host, HostError, fetch};
use crate::refusal::{Refusal, reference};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use vcenter::VibTrust;
use vib_packaging::{Limits, Policy, Trust, Vib};

/// A filter of a cluster.
#[derive(Clone, Debug)]
pub(super) struct Filter {
    id: String,
    /// The id of what it replaces, while an upgrade has not come to its end.
    old_id: Option<String>,
    pub(super) name: String,
    vendor: String,
    version: String,
    summary: String,
    release_date: String,
    operation: &'static str,
    url: String,
    trust: VibTrust,
    issues: BTreeMap<String, String>,
}

impl Filter {
    fn has_id(&self, id: &str) -> bool {
        self.id == id || self.old_id.as_deref() == Some(id)
    }

    fn info(&self) -> Value {
        json!({
            "_typeName": "ClusterIoFilterInfo", "id": self.id, "name": self.name,
            "vendor": self.vendor, "version": self.version, "type": "replication",
            "summary": self.summary, "releaseDate": self.release_date, "opType": self.operation,
            "vibUrl": self.url,
        })
    }
}

/// The filter and its properties that a storage policy puts on disks.
pub(super) fn of_policy(spec: &Value) -> Option<super::DiskFilter> {
    let rules = spec.get("constraints")?.get("subProfiles")?.as_array()?;
    let capability = rules.first()?.get("capability")?.as_array()?.first()?;
    let filter = capability.get("id")?.get("namespace")?.as_str()?;
    let constraint = capability.get("constraint")?.as_array()?.first()?;
    let properties = constraint.get("propertyInstance")?.as_array()?;
    let property = |one: &Value| {
        let value = one.get("value")?;
        let value = value.get("_value").unwrap_or(value).as_str()?;
        Some((one.get("id")?.as_str()?.to_owned(), value.to_owned()))
    };
    Some((
        filter.to_owned(),
        properties.iter().filter_map(property).collect(),
    ))
}

/// What a cluster's argument names; a single host is none.
fn cluster_of(argument: &Value) -> Result<String, Refusal> {
    let text = |name: &str| argument.get(name).and_then(Value::as_str);
    match (text("type"), text("value")) {
        (Some("ClusterComputeResource"), Some(id)) => Ok(id.to_owned()),
        (Some(_), Some(id)) => Err(Refusal::argument("compRes", format!("{id} is no cluster"))),
        _ => Err(Refusal::argument("compRes", "it is no reference")),
    }
}

fn trust_of(argument: &Value) -> Result<VibTrust, Refusal> {
    let kind = argument.get("_typeName").and_then(Value::as_str);
    match kind {
        None => Ok(VibTrust::HostAuthorities),
        Some("IoFilterManagerPinnedCertificate") => {
            let pem = argument.get("sslCertificate").and_then(Value::as_str);
            let pem = pem.ok_or_else(|| Refusal::argument("vibSslTrust", "no certificate"))?;
            Ok(VibTrust::Pinned(pem.to_owned()))
        }
        Some("IoFilterManagerUntrustedCertificate") => Ok(VibTrust::Anybody),
        Some(kind) => Err(Refusal::argument(
            "vibSslTrust",
            format!("no trust is a {kind}"),
        )),
    }
}

/// A filter as its package tells of it. If nobody can read that, the address's last part is its name: the
/// hosts will say what is wrong.
fn look(url: &str, trust: &VibTrust) -> Filter {
    let file = url.rsplit('/').next().unwrap_or(url);
    let plain: String = file
        .trim_end_matches(".vib")
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || ".-".contains(c) {
                c
            } else {
                '_'
            }
        })
        .take(80)
        .collect();
    let mut filter = Filter {
        id: format!("unknown_{plain}_0"),
        old_id: None,
        name: plain,
        vendor: "unknown".into(),
        version: "0".into(),
        summary: String::new(),
        release_date: "1970-01-01T00:00:00Z".into(),
        operation: "install",
        url: url.to_owned(),
        trust: trust.clone(),
        issues: BTreeMap::new(),
    };
    let policy = Policy {
        trust: Trust::Unchecked,
        limits: Limits::default(),
    };
    // Only its name is asked for; what is in it is for the hosts to believe or not.
    let bytes = fetch(url, &VibTrust::Anybody, &[], None);
    let vib = bytes.map(|bytes| Vib::examine(file, bytes, &policy).0);
    if let Ok(Some(vib)) = vib {
        let about = vib.descriptor();
        filter.id = format!("{}_{}_{}", about.vendor, about.name, about.version);
        filter.name = about.name.clone();
        filter.vendor = about.vendor.clone();
        filter.version = about.version.clone();
        filter.summary = about.summary.clone();
        filter.release_date = about.release_date.clone();
    }
    filter
}

/// What is to be done on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Put,
    TakeOut,
}

impl State {
    fn filter(&self, cluster: &str, id: &str) -> Result<&Filter, Refusal> {
        let found = self
            .cluster(cluster)?
            .filters
            .iter()
            .find(|one| one.has_id(id));
        found.ok_or_else(|| Refusal::new("NotFound", format!("filter {id} on {cluster}")))
    }

    fn filter_named(&mut self, cluster: &str, name: &str) -> Option<&mut Filter> {
        let filters = &mut self.clusters.get_mut(cluster)?.filters;
        filters.iter_mut().find(|one| one.name == name)
    }

    /// Machines of a cluster whose disks have a filter.
    fn vms_with(&self, cluster: &str, filter: &str) -> Vec<(&String, &Vm)> {
        let has = |vm: &Vm| {
            vm.filter.as_ref().is_some_and(|(name, _)| name == filter)
                && self.cluster_of_vm(vm).as_deref() == Some(cluster)
        };
        self.vms.iter().filter(|(_, vm)| has(vm)).collect()
    }

    fn disks_with(&self, cluster: &str, filter: &str) -> Vec<Value> {
        let vms = self.vms_with(cluster, filter);
        let disks = vms.into_iter().flat_map(|(id, vm)| {
            vm.disks.iter().map(move |disk| {
                let vm = reference("VirtualMachine", id);
                json!({"_typeName": "VirtualDiskId", "vm": vm, "diskId": disk.key})
            })
        });
        disks.collect()
    }

    fn hosts_of(&self, cluster: &str) -> Vec<Arc<Host>> {
        let ids = self.clusters.get(cluster).map(|found| found.hosts.clone());
        let hosts = ids.unwrap_or_default().into_iter();
        hosts
            .filter_map(|id| Some(self.hosts.get(&id)?.host.clone()))
            .collect()
    }
}

impl World {
    /// `QueryIoFilterInfo`: nothing, rather than an empty list.
    pub fn filters(&self, cluster: &Value) -> Result<Value, Refusal> {
        let state = self.state.lock();
        let found = &state.cluster(&cluster_of(cluster)?)?.filters;
        match found.is_empty() {
            true => Ok(Value::Null),
            false => Ok(Value::Array(found.iter().map(Filter::info).collect())),
        }
    }

    /// `QueryIoFilterIssues`.
    pub fn filter_issues(&self, cluster: &Value, filter: &str) -> Result<Value, Refusal> {
        let state = self.state.lock();
        let filter = state.filter(&cluster_of(cluster)?, filter)?;
        let issue = |(host, words): (&String, &String)| {
            let issue =
                Refusal::new("PlatformConfigFault", words.clone()).with("text", json!(words));
            json!({
                "_typeName": "IoFilterHostIssue", "host": reference("HostSystem", host),
                "issue": [issue.localized()],
            })
        };
        let hosts: Vec<Value> = filter.issues.iter().map(issue).collect();
        Ok(json!({
            "_typeName": "IoFilterQueryIssueResult", "opType": filter.operation, "hostIssue": hosts,
        }))
    }

    /// `QueryDisksUsingFilter`.
    pub fn disks_using(&self, cluster: &Value, filter: &str) -> Result<Value, Refusal> {
        let state = self.state.lock();
        let cluster = cluster_of(cluster)?;
        let name = state.filter(&cluster, filter)?.name.clone();
        Ok(Value::Array(state.disks_with(&cluster, &name)))
    }

    /// `InstallIoFilter_Task`.
    pub fn install_filter(
        self: &Arc<Self>,
        cluster: &Value,
        url: &str,
        trust: &Value,
    ) -> Result<Value, Refusal> {
        let (cluster, trust) = (cluster_of(cluster)?, trust_of(trust)?);
        self.state.lock().cluster(&cluster)?;
        let filter = look(url, &trust);
        let work = {
            let mut state = self.state.lock();
            let hosts = state.hosts_of(&cluster);
            let found = state.cluster_mut(&cluster)?;
            let is_there = found.filters.iter().any(|one| one.name == filter.name)
                && hosts
                    .iter()
                    .any(|host| host.package(&filter.name).is_some());
            if is_there {
                let words = format!("the filter {} is on the cluster", filter.name);
                return Err(Refusal::new("AlreadyExists", words).with("name", json!(filter.name)));
            }
            // What could be installed nowhere the last time is no filter of the cluster.
            found.filters.retain(|one| one.name != filter.name);
            found.filters.push(filter.clone());
            found.work.clone()
        };
        self.filter_task(
            "InstallIoFilter",
            &cluster,
            work,
            filter.name,
            Step::Put,
            None,
        )
    }

    /// `UninstallIoFilter_Task`.
    pub fn uninstall_filter(
        self: &Arc<Self>,
        cluster: &Value,
        filter: &str,
    ) -> Result<Value, Refusal> {
        let cluster = cluster_of(cluster)?;
        let (name, work) = {
            let mut state = self.state.lock();
            let name = state.filter(&cluster, filter)?.name.clone();
            let disks = state.disks_with(&cluster, &name);
            if !disks.is_empty() {
                let words = format!("{} disks have the filter", disks.len());
                return Err(Refusal::new("FilterInUse", words).with("disk", Value::Array(disks)));
            }
            let found = state.cluster(&cluster)?;
            if !found.is_drs_on {
                return Err(Refusal::state("DRS is off: hosts cannot be evacuated"));
            }
            let work = found.work.clone();
            if let Some(entry) = state.filter_named(&cluster, &name) {
                entry.operation = "uninstall";
                entry.issues.clear();
            }
            (name, work)
        };
        self.filter_task(
            "UninstallIoFilter",
            &cluster,
            work,
            name,
            Step::TakeOut,
            None,
        )
    }

    /// `UpgradeIoFilter_Task`.
    pub fn upgrade_filter(
        self: &Arc<Self>,
        cluster: &Value,
        filter: &str,
        url: &str,
        trust: &Value,
    ) -> Result<Value, Refusal> {
        let (cluster, trust) = (cluster_of(cluster)?, trust_of(trust)?);
        self.state.lock().filter(&cluster, filter)?;
        let new = look(url, &trust);
        let work = {
            let mut state = self.state.lock();
            let old = state.filter(&cluster, filter)?.clone();
            let found = state.cluster(&cluster)?;
            if !found.is_drs_on {
                return Err(Refusal::state("DRS is off: hosts cannot be evacuated"));
            }
            let work = found.work.clone();
            if new.vendor != "unknown" && new.name != old.name {
                let words = format!("the VIB is of {}, not of {}", new.name, old.name);
                return Err(Refusal::argument("vibUrl", words));
            }
            if let Some(entry) = state.filter_named(&cluster, &old.name) {
                entry.operation = "upgrade";
                entry.url = new.url;
                entry.trust = trust;
                entry.issues.clear();
                if new.vendor != "unknown" {
                    entry.old_id = Some(old.id);
                    entry.id = new.id;
                    entry.version = new.version;
                    entry.summary = new.summary;
                    entry.release_date = new.release_date;
                }
            }
            (old.name, work)
        };
        self.filter_task("UpgradeIoFilter", &cluster, work.1, work.0, Step::Put, None)
    }

    /// `ResolveInstallationErrorsOnCluster_Task`, and `...OnHost_Task` if a host is given.
    pub fn resolve(
        self: &Arc<Self>,
        cluster: Option<&Value>,
        host: Option<&str>,
        filter: &str,
    ) -> Result<Value, Refusal> {
        let state = self.state.lock();
        let cluster = match (cluster, host) {
            (Some(cluster), _) => cluster_of(cluster)?,
            (None, Some(host)) => {
                let of = state.host(host)?.cluster.clone();
                of.ok_or_else(|| Refusal::new("NotFound", format!("{host} is in no cluster")))?
            }
            (None, None) => return Err(Refusal::argument("cluster", "it is missing")),
        };
        let entry = state.filter(&cluster, filter)?;
        let mut wanted: Vec<String> = entry.issues.keys().cloned().collect();
        if let Some(host) = host {
            wanted.retain(|one| one == host);
        }
        let step = match entry.operation {
            "uninstall" => Step::TakeOut,
            _ => Step::Put,
        };
        let (name, work) = (entry.name.clone(), state.cluster(&cluster)?.work.clone());
        drop(state);
        let task = match host {
            Some(_) => "ResolveInstallationErrorsOnHost",
            None => "ResolveInstallationErrorsOnCluster",
        };
        self.filter_task(task, &cluster, work, name, step, Some(wanted))
    }

    /// Works on the hosts of a cluster, or on some of them.
    fn filter_task(
        self: &Arc<Self>,
        task: &str,
        cluster: &str,
        work: Arc<Mutex<()>>,
        filter: String,
        step: Step,
        only: Option<Vec<String>>,
    ) -> Result<Value, Refusal> {
        let (world, of) = (self.clone(), cluster.to_owned());
        let entity = reference("ClusterComputeResource", cluster);
        let job = move |work: &Work| world.work_on_hosts(work, &of, &filter, step, only.as_deref());
        Ok(self.start(
            &format!("com.vmware.iofilter.{task}"),
            entity,
            vec![work],
            job,
        ))
    }

    fn work_on_hosts(
        self: &Arc<Self>,
        work: &Work,
        cluster: &str,
        filter: &str,
        step: Step,
        only: Option<&[String]>,
    ) -> Result<Value, Refusal> {
        let mut hosts = self.state.lock().hosts_of(cluster);
        hosts.retain(|host| only.is_none_or(|only| only.contains(&host.id)));
        for (done, host) in hosts.iter().enumerate() {
            work.progress(done, hosts.len());
            if work.is_cancelled() {
                self.leave_out(cluster, filter, hosts.iter().skip(done));
                return Err(cancelled());
            }
            self.work_on(cluster, host, filter, step);
        }
        let mut state = self.state.lock();
        let count = state.hosts_of(cluster).len();
        let Some(entry) = state.filter_named(cluster, filter) else {
            return Ok(Value::Null);
        };
        if !entry.issues.is_empty() {
            let first = entry.issues.values().next().cloned().unwrap_or_default();
            let words = format!(
                "{} of the filter {filter} failed on {} of {count} hosts; QueryIoFilterIssues says why; the first: {first}",
                entry.operation,
                entry.issues.len()
            );
            return Err(
                Refusal::new("PlatformConfigFault", words.clone()).with("text", json!(words))
            );
        }
        entry.old_id = None;
        let info = entry.info();
        if step == Step::TakeOut {
            state
                .cluster_mut(cluster)?
                .filters
                .retain(|one| one.name != filter);
            return Ok(Value::Null);
        }
        Ok(info)
    }

    /// Hosts whose turn did not come: they can be resolved later.
    fn leave_out<'h>(
        &self,
        cluster: &str,
        filter: &str,
        hosts: impl Iterator<Item = &'h Arc<Host>>,
    ) {
        let mut state = self.state.lock();
        if let Some(entry) = state.filter_named(cluster, filter) {
            let words = "the task was cancelled before the host's turn";
            let issues = hosts.map(|host| (host.id.clone(), words.to_owned()));
            entry.issues.extend(issues);
        }
    }

    /// Does one step on one host, with maintenance mode around it if the host asks for that.
    fn work_on(self: &Arc<Self>, cluster: &str, host: &Arc<Host>, filter: &str, step: Step) {
        let source = {
            let mut state = self.state.lock();
            let entry = state.filter_named(cluster, filter);
            entry.map(|entry| (entry.url.clone(), entry.trust.clone()))
        };
        let Some((url, trust)) = source else { return };
        let act = |in_maintenance: bool| match step {
            Step::Put => host.install(&url, &trust, in_maintenance).map(drop),
            Step::TakeOut => host.uninstall(filter, in_maintenance),
        };
        let was = self
            .state
            .lock()
            .host(&host.id)
            .is_ok_and(|h| h.is_in_maintenance);
        let mut done = act(was);
        if matches!(done, Err(HostError::MaintenanceNeeded)) {
            done = self
                .enter_maintenance_now(&host.id)
                .map_err(|refusal| HostError::NotEvacuated(refusal.words().to_owned()))
                .and_then(|()| {
                    let done = act(true);
                    self.exit_maintenance_now(&host.id);
                    done
                });
        }
        let mut state = self.state.lock();
        let name = &host.name;
        let verb = if step == Step::Put {
            "installed on"
        } else {
            "removed from"
        };
        match &done {
            Ok(()) => state.happened("EventEx", format!("the filter {filter} is {verb} {name}")),
            Err(error) => state.happened(
                "EventEx",
                format!("the filter {filter} cannot be {verb} {name}: {error}"),
            ),
        }
        if let Some(entry) = state.filter_named(cluster, filter) {
            match done {
                Ok(()) => entry.issues.remove(&host.id),
                Err(error) => entry.issues.insert(host.id.clone(), error.to_string()),
            };
        }
    }

    /// A host has come into a cluster, or has lost what it had: it gets the cluster's filters.
    pub(super) fn bring_in(self: &Arc<Self>, cluster: &str, host: &Arc<Host>) -> Value {
        let work = self
            .state
            .lock()
            .clusters
            .get(cluster)
            .map(|c| c.work.clone());
        let (world, of, host) = (self.clone(), cluster.to_owned(), host.clone());
        let entity = reference("HostSystem", &host.id);
        let job = move |_: &Work| {
            let state = world.state.lock();
            let filters = state.cluster(&of)?.filters.clone();
            drop(state);
            for filter in filters.iter().filter(|one| one.operation != "uninstall") {
                world.work_on(&of, &host, &filter.name, Step::Put);
            }
            Ok(Value::Null)
        };
        self.start(
            "com.vmware.iofilter.hostAdded",
            entity,
            work.into_iter().collect(),
            job,
        )
    }

    /// A host has left its cluster: it loses the filters.
    pub(super) fn clean(self: &Arc<Self>, host: &Arc<Host>, in_maintenance: bool) -> Value {
        let work = self
            .state
            .lock()
            .hosts
            .get(&host.id)
            .map(|h| h.work.clone());
        let entity = reference("HostSystem", &host.id);
        let (world, host) = (self.clone(), host.clone());
        let job = move |_: &Work| {
            for package in host.packages() {
                if let Err(error) = host.uninstall(&package.name, in_maintenance) {
                    let words = format!("{}: {}: {error}", host.name, package.name);
                    world.state.lock().happened("EventEx", words.clone());
                    return Err(Refusal::new("PlatformConfigFault", words));
                }
            }
            Ok(Value::Null)
        };
        self.start(
            "com.vmware.iofilter.hostRemoved",
            entity,
            work.into_iter().collect(),
            job,
        )
    }
}
