//! What a preflight can find, and how it looks for it.
//!
//! Invariant: nothing is changed; everything that is wrong is collected, each with its name, where it is
//! and what to do.

use super::verify::{MAX_SKEW_MS, Seen};
use super::{Link, PLUGIN, refused};
use crate::executions::{Context, StepError};
use crate::packages::Package;
use crate::text::words;
use crate::vcenter::{ClusterInfo, Connection, HostInfo};
use std::collections::BTreeMap;
use std::fmt;

/// The oldest vCenter.
const MIN_VCENTER: &str = "6.7";
/// The oldest hypervisor, unless the package asks for a newer one; and, of that version, the oldest build
/// (6.7 Update 1).
const MIN_ESXI: (&str, u64) = ("6.7.0", 10_302_608);

words! {
    /// What a preflight can find.
    FindingKind {
        /// vCenter cannot be asked.
        VcenterUnreachable = "vcenter-unreachable",
        /// vCenter is older than this product needs.
        VcenterTooOld = "vcenter-too-old",
        /// vCenter's clock and this server's are apart.
        VcenterClock = "vcenter-clock",
        /// A name does not resolve here.
        DnsMissing = "dns-missing",
        /// No cluster of this name.
        ClusterUnknown = "cluster-unknown",
        /// The cluster has too few hosts.
        TooFewHosts = "too-few-hosts",
        /// No datastore of this name on the cluster.
        DatastoreUnknown = "datastore-unknown",
        /// No network of this name on the cluster.
        NetworkUnknown = "network-unknown",
        /// A virtual machine has the server's name.
        VmNameTaken = "vm-name-taken",
        /// vCenter has the plug-in already.
        PluginPresent = "plugin-present",
        /// vCenter does not have the plug-in.
        PluginAbsent = "plugin-absent",
        /// The cluster has the filter already.
        FilterPresent = "filter-present",
        /// DRS is off.
        DrsOff = "drs-off",
        /// vCenter does not reach a host.
        HostUnreachable = "host-unreachable",
        /// A host is older than this product or its package needs.
        HostTooOld = "host-too-old",
        /// A host is newer than its package is for.
        HostTooNew = "host-too-new",
        /// Hosts have different versions.
        VersionsMixed = "versions-mixed",
        /// A host's clock and this server's are apart.
        HostClock = "host-clock",
        /// A host's CIM server does not run.
        CimOff = "cim-off",
    }
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What kind of thing.
    pub kind: FindingKind,
    /// What, where, and what to do.
    pub text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]", self.text, self.kind)
    }
}

/// What is looked at; what is not given is not.
#[derive(Default)]
pub struct Wanted<'a> {
    /// The cluster's name.
    pub cluster: &'a str,
    /// How many hosts it has at least.
    pub min_hosts: usize,
    /// The package that its hosts are to get.
    pub package: Option<&'a Package>,
    /// A datastore of the cluster.
    pub datastore: Option<&'a str>,
    /// A network of the cluster.
    pub network: Option<&'a str>,
    /// A name that no virtual machine may have.
    pub vm_name: Option<&'a str>,
    /// Whether the plug-in must be there, or must not.
    pub plugin: Option<bool>,
}

/// What is looked by: the clock and the names of this machine. There need not be a server yet.
#[derive(Clone, Copy)]
pub struct Here<'a> {
    /// The time, in ms since 1970.
    pub now_ms: &'a dyn Fn() -> i64,
    /// Whether a name resolves.
    pub resolves: &'a dyn Fn(&str) -> bool,
}

/// Collects what is wrong.
pub(super) struct Look<'a> {
    pub(super) here: Here<'a>,
    pub(super) link: &'a Link,
    pub(super) findings: Vec<Finding>,
}

/// The numbers of a version; what follows a hyphen is a build and does not count.
fn numbers(version: &str) -> Vec<u64> {
    let version = version.split('-').next().unwrap_or_default();
    let mut numbers: Vec<u64> = version
        .split('.')
        .map(|part| part.parse().unwrap_or(0))
        .collect();
    while numbers.last() == Some(&0) {
        numbers.pop();
    }
    numbers
}

fn is_older(version: &str, than: &str) -> bool {
    numbers(version) < numbers(than)
}

impl Look<'_> {
    pub(super) fn find(&mut self, kind: FindingKind, text: String) {
        self.findings.push(Finding { kind, text });
    }

    fn name(&mut self, whose: &str, name: &str) {
        if !(self.here.resolves)(name) {
            self.find(
                FindingKind::DnsMissing,
                format!("{whose}: the name `{name}` does not resolve here: enter it in DNS, or register the address"),
            );
        }
    }

    pub(super) fn vcenter(&mut self) -> Result<(), StepError> {
        let (name, address) = (&self.link.vcenter.name, self.link.vcenter.address.clone());
        let whose = format!("vCenter {name}");
        self.name(&whose, address.as_str());
        let before = (self.here.now_ms)();
        let about = match self.link.api.about() {
            Ok(about) => about,
            Err(fault) => {
                self.find(
                    FindingKind::VcenterUnreachable,
                    format!(
                        "{whose}: {fault}: check its address, and the login that is kept for it"
                    ),
                );
                return Ok(());
            }
        };
        let after = (self.here.now_ms)();
        if is_older(about.version.as_str(), MIN_VCENTER) {
            self.find(
                FindingKind::VcenterTooOld,
                format!(
                    "{whose} has version {}: {MIN_VCENTER} or later is needed; upgrade it",
                    about.version
                ),
            );
        }
        let skew = (before - about.now_ms).max(about.now_ms - after).max(0);
        if skew > MAX_SKEW_MS {
            self.find(
                FindingKind::VcenterClock,
                format!(
                    "{whose}: its clock is {skew} ms away from this server's: set up NTP on both"
                ),
            );
        }
        Ok(())
    }

    pub(super) fn own_names(&mut self, context: &Context) -> Result<(), StepError> {
        let names: Option<String> = context.store.read(|t| {
            use rusqlite::OptionalExtension;
            let sql = "SELECT value FROM meta WHERE key = 'server_names'";
            Ok(t.query_row(sql, [], |row| row.get(0)).optional()?)
        })?;
        for name in names
            .unwrap_or_default()
            .split(',')
            .filter(|name| !name.is_empty())
        {
            self.name("this server", name);
        }
        Ok(())
    }

    pub(super) fn cluster(
        &mut self,
        wanted: &Wanted<'_>,
    ) -> Result<Option<ClusterInfo>, StepError> {
        let all = self
            .link
            .api
            .clusters()
            .map_err(refused("asking for clusters"))?;
        let known: Vec<&str> = all.iter().map(|cluster| cluster.name.as_str()).collect();
        let Some(cluster) = all.iter().find(|cluster| cluster.name == wanted.cluster) else {
            self.find(
                FindingKind::ClusterUnknown,
                format!(
                    "vCenter {} has no cluster `{}`: it has [{}]; correct the name, a single host is no cluster",
                    self.link.vcenter.name,
                    wanted.cluster,
                    known.join(", ")
                ),
            );
            return Ok(None);
        };
        let count = cluster.hosts.len();
        if count < wanted.min_hosts {
            self.find(
                FindingKind::TooFewHosts,
                format!(
                    "cluster {} has {count} hosts: at least {} are needed; add hosts, or lower min_hosts knowingly",
                    cluster.name, wanted.min_hosts
                ),
            );
        }
        Ok(Some(cluster.clone()))
    }

    pub(super) fn places(
        &mut self,
        wanted: &Wanted<'_>,
        cluster: &ClusterInfo,
    ) -> Result<(), StepError> {
        if let Some(name) = wanted.datastore {
            let all = self
                .link
                .api
                .datastores(&cluster.moid)
                .map_err(refused("asking for datastores"))?;
            if !all.iter().any(|one| one.name == name) {
                let known: Vec<&str> = all.iter().map(|one| one.name.as_str()).collect();
                self.find(
                    FindingKind::DatastoreUnknown,
                    format!(
                        "cluster {} has no datastore `{name}`: it has [{}]; correct the name",
                        cluster.name,
                        known.join(", ")
                    ),
                );
            }
        }
        if let Some(name) = wanted.network {
            let all = self
                .link
                .api
                .networks(&cluster.moid)
                .map_err(refused("asking for networks"))?;
            if !all.iter().any(|one| one.name == name) {
                let known: Vec<&str> = all.iter().map(|one| one.name.as_str()).collect();
                self.find(
                    FindingKind::NetworkUnknown,
                    format!(
                        "cluster {} has no network `{name}`: it has [{}]; correct the name",
                        cluster.name,
                        known.join(", ")
                    ),
                );
            }
        }
        Ok(())
    }

    pub(super) fn entries(&mut self, wanted: &Wanted<'_>) -> Result<(), StepError> {
        if let Some(name) = wanted.vm_name {
            let found = self
                .link
                .api
                .vms_named(name)
                .map_err(refused("asking for a virtual machine"))?;
            if let Some(moid) = found.first() {
                self.find(
                    FindingKind::VmNameTaken,
                    format!("a virtual machine ({moid}) is named `{name}`: choose another name for the server, or rename that machine"),
                );
            }
        }
        let Some(must_be) = wanted.plugin else {
            return Ok(());
        };
        let found = self
            .link
            .api
            .extension(PLUGIN)
            .map_err(refused("asking for plug-ins"))?;
        let vcenter = self.link.vcenter.name.clone();
        match (found, must_be) {
            (Some(found), false) => self.find(
                FindingKind::PluginPresent,
                format!(
                    "vCenter {vcenter} has the plug-in {PLUGIN} already (version {}, at {}): uninstall that server, or remove the entry if the server is gone",
                    found.version,
                    found.url.as_deref().unwrap_or("an unknown address")
                ),
            ),
            (None, true) => self.find(
                FindingKind::PluginAbsent,
                format!("vCenter {vcenter} has no plug-in {PLUGIN}: it is not registered with this server; there is nothing to uninstall"),
            ),
            _ => {}
        }
        Ok(())
    }

    pub(super) fn filter(
        &mut self,
        package: &Package,
        cluster: &ClusterInfo,
    ) -> Result<(), StepError> {
        if let Some(filter) = self.link.filter(&cluster.moid, package)? {
            self.find(
                FindingKind::FilterPresent,
                format!(
                    "cluster {} has the filter {} already, and not from this server: disable it where it was enabled, or remove it in vCenter",
                    cluster.name, filter.id
                ),
            );
        }
        Ok(())
    }

    pub(super) fn hosts(
        &mut self,
        wanted: &Wanted<'_>,
        cluster: &ClusterInfo,
    ) -> Result<(), StepError> {
        let seen = Seen::look_by(self.here.now_ms, self.link, &cluster.moid)?;
        let mut versions: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for host in &seen.hosts {
            versions
                .entry(host.version.to_string())
                .or_default()
                .push(&host.name);
            self.host_version(host, wanted.package);
            self.host(&seen, host);
        }
        if versions.len() > 1 {
            let all: Vec<String> = versions
                .iter()
                .map(|(version, names)| format!("{version}: {}", names.join(", ")))
                .collect();
            self.find(
                FindingKind::VersionsMixed,
                format!(
                    "the hosts of cluster {} have different versions ({}): bring all to one",
                    cluster.name,
                    all.join("; ")
                ),
            );
        }
        Ok(())
    }

    fn host_version(&mut self, host: &HostInfo, package: Option<&Package>) {
        let (name, version) = (&host.name, host.version.as_str());
        let (oldest, build) = MIN_ESXI;
        let is_too_old = is_older(version, oldest)
            || (numbers(version) == numbers(oldest) && host.build < build);
        let from = package.and_then(|package| package.host_from.as_deref());
        if is_too_old {
            self.find(
                FindingKind::HostTooOld,
                format!("host {name} has ESXi {version} build {}: {oldest} build {build} or later is needed; upgrade it", host.build),
            );
        } else if let Some(from) = from.filter(|from| is_older(version, from)) {
            self.find(
                FindingKind::HostTooOld,
                format!("host {name} has ESXi {version}: the package is for {from} or later; upgrade the host"),
            );
        }
        let below = package.and_then(|package| package.host_below.as_deref());
        if let Some(below) = below.filter(|below| !is_older(version, below)) {
            self.find(
                FindingKind::HostTooNew,
                format!("host {name} has ESXi {version}: the package is for versions below {below}; upload a newer package"),
            );
        }
    }

    fn host(&mut self, seen: &Seen, host: &HostInfo) {
        let name = host.name.clone();
        self.name(&format!("host {name}"), &name);
        if host.connection != Connection::Connected {
            let text = format!(
                "host {name}: vCenter does not reach it: reconnect it there, or take it out of the cluster"
            );
            return self.find(FindingKind::HostUnreachable, text);
        }
        if host.dns_servers.is_empty() {
            self.find(
                FindingKind::DnsMissing,
                format!("host {name} has no name server, so that it cannot find vCenter or this server: set up DNS on it"),
            );
        }
        if !host.is_cim_running() {
            self.find(
                FindingKind::CimOff,
                format!("host {name}: its CIM server does not run: start sfcbd-watchdog"),
            );
        }
        match seen.skew_ms(host) {
            Some(skew) if skew > MAX_SKEW_MS => self.find(
                FindingKind::HostClock,
                format!("host {name}: its clock is {skew} ms away from this server's: set up NTP on both"),
            ),
            Some(_) => {}
            None => self.find(
                FindingKind::HostClock,
                format!("host {name}: its clock cannot be asked: look at its connection in vCenter"),
            ),
        }
    }
}
