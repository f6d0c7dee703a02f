//! The operations `enable-cluster`, `reconcile-cluster` and `resolve-cluster`: the host component comes
//! to all hosts of one cluster that lack it.
//!
//! Enabling looks first (see [`super::preflight`]) and begins with a cluster that has nothing; the other
//! two begin with one that is enabled: hosts that joined are brought in, those that left are cleaned, and
//! what failed before is tried again.
//!
//! Invariant: a host that was ready before is not touched when the operation is taken back, and one that
//! fails keeps no other from being ready. Hosts and cluster get their final state in the last step, in
//! one transaction.

use super::preflight::{self, Wanted};
use super::verify::{self, Verdict, Verdicts};
use super::{
    Link, Plan, Site, moid, needed, note, noted, package, package_url, parameters, refused, rows,
    tasks, trust,
};
use crate::alarms;
use crate::executions::operation::Making;
use crate::executions::{Context, Kind, Operation, StepError};
use crate::inventory::{Cluster, ClusterState, Host, HostState};
use crate::packages::{self, Package};
use crate::store::Done;
use crate::text::{self, Id, Label, Name, VersionText};
use crate::vcenter::{Connection, Fault, FilterIssues, HostInfo};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The kind `enable-cluster`.
pub const ENABLE: Kind = Kind {
    about: "installs the host component on one cluster: preflight, install, verify and enrol each host, assign appliances",
    for_admins: false,
    make: |making| make(making, Scope::Enable),
};
/// The kind `reconcile-cluster`.
pub const RECONCILE: Kind = Kind {
    about: "brings in hosts that joined an enabled cluster, and cleans those that left",
    for_admins: false,
    make: |making| make(making, Scope::Keep),
};
/// The kind `resolve-cluster`.
pub const RESOLVE: Kind = Kind {
    about: "tries the hosts of an enabled cluster again that failed",
    for_admins: false,
    make: |making| make(making, Scope::Keep),
};

/// What is said of a host that lost the filter behind this server's back.
const STRIPPED: &str =
    "the filter is gone from it, and with it its certificate: that is revoked, it needs a new one";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Scope {
    Enable,
    Keep,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    /// The cluster's name in vCenter, or its id there.
    protected_cluster: Label,
    vcenter: Option<Name>,
    package_version: Option<VersionText>,
    drva: Option<Name>,
    min_hosts: Option<usize>,
    /// Give each host a token by an option of the host. If not, operators lay tokens there.
    #[serde(default = "yes")]
    enrol: bool,
}

fn yes() -> bool {
    true
}

pub(super) struct Enable {
    scope: Scope,
    given: Parameters,
}

fn make(making: &Making<'_>, scope: Scope) -> Result<Box<dyn Operation>, String> {
    let given: Parameters = parameters(making)?;
    if scope == Scope::Keep && (given.package_version.is_some() || given.min_hosts.is_some()) {
        return Err("package_version and min_hosts are for enable-cluster only".into());
    }
    Ok(Box::new(Enable { scope, given }))
}

/// How a host was before.
#[derive(Clone, Serialize, Deserialize)]
struct Before {
    id: Id,
    state: String,
    problem: Option<String>,
    drva_id: Option<Id>,
}

impl Enable {
    pub(super) fn site(&self, context: &Context) -> Result<Site, StepError> {
        Site::load(context, self.given.vcenter.as_ref())
    }

    fn preflight(&self, context: &Context) -> Result<(), StepError> {
        let link = Link::open(context, self.given.vcenter.as_ref())?;
        let name = self.given.protected_cluster.as_str();
        let (known, row) = link.find(context, name)?;
        let was_enabled = row
            .as_ref()
            .is_some_and(|row| row.state == ClusterState::Enabled);
        let package = match (&row, was_enabled) {
            (Some(row), true) => self.enabled_package(context, row)?,
            _ if self.scope == Scope::Keep => {
                return Err(StepError::failed(format!(
                    "cluster {name} is not enabled: enable-cluster does that"
                )));
            }
            _ => package(
                context,
                self.given.package_version.as_ref().map(VersionText::as_str),
            )?,
        };
        if !was_enabled {
            let wanted = Wanted {
                cluster: known.moid.as_str(),
                min_hosts: self.given.min_hosts.unwrap_or(preflight::MIN_HOSTS),
                package: Some(&package),
                ..Wanted::default()
            };
            let findings = preflight::enable(context, &link, &wanted)?;
            preflight::report(context, &findings)?;
        }
        let seen = verify::Seen::look(context, &link, &known.moid)?;
        let esx_version = verify::common_version(&seen.hosts);
        let plan = Plan {
            moid: text::Moid::from(&known.moid),
            package: package.id,
            from: None,
            esx_version,
            was_enabled,
        };
        note(context, "plan", &plan)
    }

    fn enabled_package(&self, context: &Context, row: &Cluster) -> Result<Package, StepError> {
        let id = row.package_id.ok_or_else(|| {
            StepError::failed(format!(
                "cluster {} is enabled with no package that is known here: disable it",
                row.name
            ))
        })?;
        let package = context.store.read(|t| packages::get(t, id))?;
        match &self.given.package_version {
            Some(asked) if asked.as_str() != package.version => Err(StepError::failed(format!(
                "cluster {} has version {}: upgrade-cluster changes it",
                row.name, package.version
            ))),
            _ => Ok(package),
        }
    }

    /// From here on the state says that something is being done.
    fn record(&self, context: &Context) -> Result<(), StepError> {
        let site = self.site(context)?;
        let info = site.link.cluster(&site.moid)?;
        let found = site
            .link
            .api
            .hosts(&site.moid)
            .map_err(refused("asking for the cluster's hosts"))?;
        let listed: BTreeSet<String> = found.iter().map(|host| host.moid.to_string()).collect();
        let now_ms = context.store.now_ms();
        let earlier: Option<BTreeMap<String, Before>> = noted(context, "before")?;
        let (before, difference) = context.store.record(|t| {
            let cluster = rows::ensure_cluster(t, &site.link.vcenter, &info, now_ms)?;
            for host in &found {
                rows::ensure_host(t, &cluster, host, now_ms)?;
            }
            let hosts = rows::hosts(t, cluster.id)?;
            // What a first try noted is what was before.
            let before = earlier.unwrap_or_else(|| hosts.iter().map(before).collect());
            Ok((before, rows::compare(t, &cluster, &listed, now_ms)?))
        })?;
        let Some(difference) = difference else {
            return Err(StepError::failed(format!(
                "cluster {}: {}",
                info.name,
                rows::NO_HOSTS
            )));
        };
        note(context, "before", &before)?;
        note(context, "gone", &difference.gone)?;
        context.store.record(|t| {
            let cluster = rows::ensure_cluster(t, &site.link.vcenter, &info, now_ms)?;
            if !site.plan.was_enabled {
                rows::set_cluster(t, cluster.id, ClusterState::Enabling, Some(site.package.id))?;
            }
            for host in rows::hosts(t, cluster.id)? {
                if host.state != HostState::Ready && listed.contains(host.moid.as_str()) {
                    rows::set_host(t, host.id, HostState::Installing, None)?;
                }
            }
            Ok(())
        })?;
        context.log(format!(
            "cluster {}: {} hosts, package {}",
            info.name,
            found.len(),
            site.package.version
        ))
    }

    fn undo_record(&self, context: &Context) -> Result<(), StepError> {
        let before: Option<BTreeMap<String, Before>> = noted(context, "before")?;
        let (Some(before), Some(plan)) = (before, noted::<Plan>(context, "plan")?) else {
            return Ok(());
        };
        let vcenter = super::registered(context, self.given.vcenter.as_ref())?;
        let cluster_moid = moid(&plan.moid)?;
        let now_ms = context.store.now_ms();
        Ok(context.store.record(|t| {
            let Some(cluster) = rows::cluster(t, vcenter.id, &cluster_moid)? else {
                return Ok(());
            };
            if !plan.was_enabled {
                rows::set_cluster(t, cluster.id, ClusterState::Disabled, None)?;
            }
            for host in rows::hosts(t, cluster.id)? {
                match before.get(host.moid.as_str()) {
                    Some(was) if was.state == HostState::Ready.word() => {}
                    Some(was) if was.state == HostState::Failed.word() => {
                        rows::set_host(t, host.id, HostState::Failed, was.problem.as_deref())?;
                        rows::unassign(t, host.id, was.drva_id)?;
                    }
                    was => {
                        rows::set_host(t, host.id, HostState::Absent, None)?;
                        rows::unassign(t, host.id, was.and_then(|was| was.drva_id))?;
                        alarms::clear(t, rows::HOST_ALARM, host.name.as_str(), now_ms)?;
                    }
                }
            }
            Ok(())
        })?)
    }

    fn install(&self, context: &Context) -> Result<(), StepError> {
        let site = self.site(context)?;
        let moid = &site.moid;
        tasks::settle(context, &site.link, moid, None)?;
        let filter = site.link.filter(moid, &site.package)?;
        match filter {
            Some(filter) if filter.version != site.package.version => {
                return Err(StepError::failed(format!(
                    "version {} of the filter is on the cluster: upgrade-cluster, or remove it in vCenter",
                    filter.version
                )));
            }
            Some(filter) => self.complete(context, &site, &filter.id)?,
            None => {
                let url = package_url(context, &site.package)?;
                context.log(format!("asking vCenter to install {url}"))?;
                match site.link.api.install_filter(moid, &url, &trust(context)?) {
                    Ok(task) => {
                        let ended =
                            tasks::wait_for(context, &site.link, &task, None, &mut || Ok(()))?;
                        if let Err(fault) = ended {
                            context.log(format!("the installation failed: {fault}"))?;
                        }
                    }
                    // Somebody asked for the same meanwhile.
                    Err(Fault::AlreadyExists) => tasks::settle(context, &site.link, moid, None)?,
                    Err(fault) => return Err(refused("installing the filter")(fault)),
                }
            }
        }
        self.note_issues(context, &site)
    }

    /// The filter is on the cluster: hosts that lack it get it.
    fn complete(&self, context: &Context, site: &Site, filter: &str) -> Result<(), StepError> {
        let hosts = site
            .link
            .api
            .hosts(&site.moid)
            .map_err(refused("asking for the cluster's hosts"))?;
        for host in hosts {
            if verify::has_package(&host, &site.package) {
                continue;
            }
            strip(context, site, &host)?;
            context.log(format!("host {}: asking vCenter to try again", host.name))?;
            match site.link.api.resolve_on_host(&host.moid, filter) {
                Ok(task) => {
                    let ended = tasks::wait_for(context, &site.link, &task, None, &mut || Ok(()))?;
                    if let Err(fault) = ended {
                        context.log(format!("host {}: {fault}", host.name))?;
                    }
                }
                Err(fault) => context.log(format!("host {}: {fault}", host.name))?,
            }
        }
        Ok(())
    }

    fn note_issues(&self, context: &Context, site: &Site) -> Result<(), StepError> {
        let issues = issues(context, site)?;
        for (host, issue) in &issues {
            context.log(format!("vCenter says of {host}: {issue}"))?;
        }
        note(context, "issues", &issues)
    }

    fn undo_install(&self, context: &Context) -> Result<(), StepError> {
        let plan: Plan = needed(context, "plan")?;
        if plan.was_enabled {
            return Ok(()); // it was there before
        }
        let site = self.site(context)?;
        let limit = Some(context.outside.patience.undo);
        tasks::settle(context, &site.link, &site.moid, limit)?;
        let Some(filter) = site.link.filter(&site.moid, &site.package)? else {
            return Ok(());
        };
        context.log(format!("asking vCenter to remove {}", filter.id))?;
        let task = match site.link.api.uninstall_filter(&site.moid, &filter.id) {
            Err(Fault::NotFound(_)) => return Ok(()),
            asked => asked.map_err(refused("removing the filter"))?,
        };
        let ended = tasks::wait_for(context, &site.link, &task, limit, &mut || Ok(()))?;
        ended.map_err(refused("removing the filter"))
    }

    fn verify(&self, context: &Context) -> Result<(), StepError> {
        let site = self.site(context)?;
        let seen = verify::hosts(
            context,
            &site.link,
            &site.moid,
            &site.package,
            &site.plan.esx_version,
        )?;
        let issues: BTreeMap<String, String> = noted(context, "issues")?.unwrap_or_default();
        let verdicts = verify::with_issues(seen, &issues);
        self.judge(context, &site, &verdicts)
    }

    /// Says each host's verdict. With no good host at all there is nothing to go on with.
    fn judge(&self, context: &Context, site: &Site, verdicts: &Verdicts) -> Result<(), StepError> {
        let cluster = site.cluster()?;
        if verdicts.is_empty() {
            let (name, why) = (&cluster.name, rows::NO_HOSTS);
            return Err(StepError::failed(format!("cluster {name}: {why}")));
        }
        let hosts = context.store.read(|t| rows::hosts(t, cluster.id))?;
        let bad = verify::say(context, &hosts, verdicts, &site.package)?;
        note(context, "verdicts", verdicts)?;
        let is_any_good = verdicts.values().any(|verdict| *verdict == Verdict::Good);
        match bad {
            Some(why) if !is_any_good && !site.plan.was_enabled => Err(StepError::failed(format!(
                "no host could be made ready; the first is {why}"
            ))),
            _ => Ok(()),
        }
    }

    pub(super) fn good_hosts(
        &self,
        context: &Context,
        site: &Site,
    ) -> Result<Vec<Host>, StepError> {
        let verdicts: Verdicts = needed(context, "verdicts")?;
        let cluster = site.cluster()?.id;
        let hosts = context.store.read(|t| rows::hosts(t, cluster))?;
        let good = |host: &Host| verdicts.get(host.moid.as_str()) == Some(&Verdict::Good);
        Ok(hosts.into_iter().filter(good).collect())
    }

    /// All of it at once: appliances, hosts, those that left, the cluster.
    fn assign(&self, context: &Context) -> Result<(), StepError> {
        let site = self.site(context)?;
        let cluster = site.cluster()?;
        let verdicts: Verdicts = needed(context, "verdicts")?;
        let asked = self.given.drva.as_ref().map(Name::as_str);
        let now_ms = context.store.now_ms();
        let what = format!("cluster {}", cluster.name);
        let gone: BTreeSet<Id> = noted(context, "gone")?.unwrap_or_default();
        let package = &site.package;
        let mut revoked = false;
        context.commit("enable cluster", |t| {
            let mut settled =
                rows::settle_hosts(t, cluster.id, &verdicts, &gone, package, now_ms)?;
            for host in rows::hosts(t, cluster.id)? {
                if host.state != HostState::Ready || host.drva_id.is_some() {
                    continue;
                }
                settled.lines.push(match rows::appliance_for(t, asked)? {
                    Some((drva, name)) => {
                        rows::assign(t, host.id, drva)?;
                        format!("host {} sends to appliance {name}", host.name)
                    }
                    None => format!(
                        "host {} sends to no appliance: none is registered yet; reconcile-cluster assigns one",
                        host.name
                    ),
                });
            }
            rows::set_cluster(t, cluster.id, ClusterState::Enabled, Some(package.id))?;
            settled.lines.push(ready_line(&settled, verdicts.len()));
            revoked = settled.revoked;
            Ok(Done::new(settled.lines, what))
        })?;
        if revoked {
            context.outside.revoked();
        }
        Ok(())
    }
}

/// How many of so many hosts are ready, and what they lack all the same.
fn ready_line(settled: &rows::Settled, hosts: usize) -> String {
    let ready = format!("{} of {hosts} hosts are ready", settled.ready);
    match settled.without_certificate {
        0 => ready,
        lacking => format!("{ready}; {lacking} of these without a certificate: they send nothing"),
    }
}

/// A host that vCenter reaches and that lacks the filter altogether has lost whatever it had: what it gets
/// now has no key and no certificate.
fn strip(context: &Context, site: &Site, host: &HostInfo) -> Result<(), StepError> {
    if host.connection != Connection::Connected || verify::has_filter(host, &site.package) {
        return Ok(());
    }
    let cluster = site.cluster()?.id;
    let now_ms = context.store.now_ms();
    let stripped = context.store.record(|t| {
        let known = rows::hosts(t, cluster)?;
        let known = known
            .iter()
            .find(|one| one.moid.as_str() == host.moid.as_str());
        match known {
            Some(known) if rows::is_enrolled(t, known.id, now_ms)? => {
                rows::strip_host(t, known, STRIPPED, now_ms).map(|()| true)
            }
            _ => Ok(false),
        }
    })?;
    if stripped {
        context.log(format!("host {}: {STRIPPED}", host.name))?;
        context.outside.revoked();
    }
    Ok(())
}

/// How a host is before the operation.
fn before(host: &Host) -> (String, Before) {
    let was = Before {
        id: host.id,
        state: host.state.word().into(),
        problem: host.problem.clone(),
        drva_id: host.drva_id,
    };
    (host.moid.to_string(), was)
}

/// What vCenter says is wrong, by host; nothing, if it does not know the filter.
fn issues(context: &Context, site: &Site) -> Result<BTreeMap<String, String>, StepError> {
    let moid = &site.moid;
    let Some(filter) = site.link.filter(moid, &site.package)? else {
        return Ok(BTreeMap::new());
    };
    let found: FilterIssues = match site.link.api.filter_issues(moid, &filter.id) {
        Ok(found) => found,
        Err(Fault::NotFound(_)) => return Ok(BTreeMap::new()),
        Err(fault) => {
            context.log(format!("what is wrong with hosts cannot be asked: {fault}"))?;
            return Ok(BTreeMap::new());
        }
    };
    let named = found
        .hosts
        .into_iter()
        .filter(|host| !host.issues.is_empty());
    Ok(named
        .map(|host| (host.host.to_string(), host.issues.join("; ")))
        .collect())
}

impl Operation for Enable {
    fn steps(&self) -> &'static [&'static str] {
        &[
            "preflight",
            "record",
            "install",
            "verify",
            "enrol",
            "assign",
        ]
    }

    fn run(&mut self, step: usize, context: &Context) -> Result<(), StepError> {
        match step {
            0 => self.preflight(context),
            1 => self.record(context),
            2 => self.install(context),
            3 => self.verify(context),
            4 if !self.given.enrol => context
                .log("hosts get their certificates by hand: POST /api/v1/enrolments for each"),
            4 => self.enrol(context),
            _ => self.assign(context),
        }
    }

    fn undo(&mut self, step: usize, context: &Context) -> Result<(), StepError> {
        match step {
            1 => self.undo_record(context),
            2 => self.undo_install(context),
            4 => self.undo_enrol(context),
            // One looks only; the last is one transaction, after which nothing is taken back.
            _ => Ok(()),
        }
    }

    fn is_final(&self, step: usize) -> bool {
        step == 5
    }
}
