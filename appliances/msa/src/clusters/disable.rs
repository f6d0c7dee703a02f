//! The operation `disable-cluster`: the host component leaves all hosts of one cluster.
//!
//! It is refused while disks are protected, unless their protection is to end (`detach`).
//!
//! Invariant: until the last step, which is one transaction, everything can be taken back: disks get
//! their filter again, hosts the package. A host's certificates end in that last step, not before.

use super::preflight::{self, Wanted};
use super::{
    Link, moid, needed, note, noted, package_url, parameters, refused, rows, tasks, trust, verify,
};
use crate::alarms::{self, Severity};
use crate::executions::operation::Making;
use crate::executions::{Context, Kind, Operation, StepError};
use crate::inventory::{Cluster, ClusterState, HostState};
use crate::packages::{self, Package};
use crate::store::{Actor, Done};
use crate::text::{self, Id, Label, Name};
use crate::vcenter::{Connection, Fault, FilterDisk, FilterSource, Moid};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The kind `disable-cluster`.
pub const KIND: Kind = Kind {
    about: "removes the host component from one cluster; refused while disks are protected, unless detach ends that",
    for_admins: false,
    make,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    protected_cluster: Label,
    vcenter: Option<Name>,
    /// End the protection of the disks that have it.
    #[serde(default)]
    detach: bool,
    /// Go on without hosts that vCenter does not reach: they keep the component.
    #[serde(default)]
    leave_unreachable: bool,
}

struct Disable {
    given: Parameters,
}

fn make(making: &Making<'_>) -> Result<Box<dyn Operation>, String> {
    let given = parameters(making)?;
    Ok(Box::new(Disable { given }))
}

/// What the first step found.
#[derive(Serialize, Deserialize)]
struct Plan {
    moid: text::Moid,
    /// None: nothing is on the cluster.
    package: Option<Id>,
    state: String,
}

/// Disks of a machine, by their keys.
type Detached = BTreeMap<String, Vec<i32>>;

struct Site {
    link: Link,
    moid: Moid,
    package: Package,
    cluster: Cluster,
}

impl Disable {
    /// Nothing, if there is nothing to do.
    fn site(&self, context: &Context) -> Result<Option<Site>, StepError> {
        let plan: Plan = needed(context, "plan")?;
        let Some(package) = plan.package else {
            return Ok(None);
        };
        let link = Link::open(context, self.given.vcenter.as_ref())?;
        let moid = moid(&plan.moid)?;
        let (package, cluster) = context.store.read(|t| {
            let package = packages::get(t, package)?;
            Ok((package, rows::cluster(t, link.vcenter.id, &moid)?))
        })?;
        let cluster =
            cluster.ok_or_else(|| StepError::failed("the cluster is not in the state any more"))?;
        Ok(Some(Site {
            link,
            moid,
            package,
            cluster,
        }))
    }

    /// Looks, and changes nothing.
    fn check(&self, context: &Context) -> Result<(), StepError> {
        let link = Link::open(context, self.given.vcenter.as_ref())?;
        let name = self.given.protected_cluster.as_str();
        let info = preflight::cluster_named(&link, name)?;
        let row = context
            .store
            .read(|t| rows::cluster(t, link.vcenter.id, &info.moid))?;
        let package = row.as_ref().and_then(|row| row.package_id);
        let state = row.as_ref().map_or(ClusterState::Disabled, |row| row.state);
        let plan = Plan {
            moid: text::Moid::from(&info.moid),
            package,
            state: state.word().into(),
        };
        let (Some(row), Some(package)) = (row, package) else {
            note(context, "plan", &plan)?;
            return context.log(format!("cluster {name} is not enabled: nothing to do"));
        };
        let findings = preflight::leave(
            context,
            &link,
            &Wanted {
                cluster: name,
                ..Wanted::default()
            },
        )?;
        let hard: Vec<_> = findings
            .into_iter()
            .filter(|finding| self.matters(finding))
            .collect();
        preflight::report(context, &hard)?;
        let package = context.store.read(|t| packages::get(t, package))?;
        let disks = disks(&link, &info.moid, &package)?;
        let machines = context.store.read(|t| rows::protected(t, row.id))?;
        let is_free = disks.is_empty() && machines.is_empty();
        if !self.given.detach && !is_free {
            for disk in &disks {
                context.log(format!(
                    "machine {} disk {} has the filter",
                    disk.vm, disk.disk_key
                ))?;
            }
            return Err(StepError::failed(format!(
                "{} disks of cluster {name} are protected ({}): end their protection first, or give detach, which ends it",
                disks.len(),
                names(&disks, &machines)
            )));
        }
        note(context, "plan", &plan)
    }

    /// What is wrong with hosts need not keep anybody from taking the component off them.
    fn matters(&self, finding: &preflight::Finding) -> bool {
        use preflight::FindingKind::{ClusterUnknown, DrsOff, HostUnreachable, VcenterUnreachable};
        match finding.kind {
            DrsOff | ClusterUnknown | VcenterUnreachable => true,
            HostUnreachable => !self.given.leave_unreachable,
            _ => false,
        }
    }

    fn record(&self, context: &Context) -> Result<(), StepError> {
        let Some(site) = self.site(context)? else {
            return Ok(());
        };
        let earlier: Option<BTreeMap<Id, String>> = noted(context, "before")?;
        if earlier.is_none() {
            let hosts = context.store.read(|t| rows::hosts(t, site.cluster.id))?;
            let before: BTreeMap<Id, &str> = hosts
                .iter()
                .map(|host| (host.id, host.state.word()))
                .collect();
            note(context, "before", &before)?;
        }
        Ok(context.store.record(|t| {
            let package = Some(site.package.id);
            rows::set_cluster(t, site.cluster.id, ClusterState::Disabling, package)?;
            for host in rows::hosts(t, site.cluster.id)? {
                rows::set_host(t, host.id, HostState::Removing, None)?;
            }
            Ok(())
        })?)
    }

    fn undo_record(&self, context: &Context) -> Result<(), StepError> {
        let before: Option<BTreeMap<Id, String>> = noted(context, "before")?;
        let (Some(before), Some(site)) = (before, self.site(context)?) else {
            return Ok(());
        };
        let now_ms = context.store.now_ms();
        Ok(context.store.record(|t| {
            // What an earlier operation left half done is enabled to us: the component is on it.
            let package = Some(site.package.id);
            rows::set_cluster(t, site.cluster.id, ClusterState::Enabled, package)?;
            for host in rows::hosts(t, site.cluster.id)? {
                match before.get(&host.id).map(String::as_str) {
                    Some("ready") => rows::set_host(t, host.id, HostState::Ready, None)?,
                    _ => {
                        let why = "it was not ready before disabling was tried: resolve";
                        rows::set_host(t, host.id, HostState::Failed, Some(why))?;
                        let text = format!("host {}: {why}", host.name);
                        let severity = Severity::Critical;
                        let name = host.name.as_str();
                        alarms::raise(t, severity, rows::HOST_ALARM, name, &text, now_ms)?;
                    }
                }
            }
            Ok(())
        })?)
    }

    /// Takes the filter off all disks, one machine after the other.
    fn detach(&self, context: &Context) -> Result<(), StepError> {
        let Some(site) = self.site(context)? else {
            return Ok(());
        };
        tasks::settle(context, &site.link, &site.moid, None)?;
        let mut detached: Detached = noted(context, "detached")?.unwrap_or_default();
        let mut now: Detached = Detached::new();
        for disk in disks(&site.link, &site.moid, &site.package)? {
            now.entry(disk.vm.to_string())
                .or_default()
                .push(disk.disk_key);
        }
        if !now.is_empty() && !self.given.detach {
            return Err(StepError::failed(
                "disks were protected since this began: end their protection first, or give detach",
            ));
        }
        for (vm, keys) in now {
            context.check()?;
            let moid: Moid = vm
                .parse()
                .map_err(|error| StepError::failed(format!("machine {vm:?}: {error}")))?;
            // Noted before it is done: what is taken back is whatever may have been done.
            detached.insert(vm.clone(), keys.clone());
            note(context, "detached", &detached)?;
            let what = format!("taking the filter off machine {vm}");
            let task = site
                .link
                .api
                .detach_filters(&moid, &keys)
                .map_err(refused(&what))?;
            let ended = tasks::wait_for(context, &site.link, &task, None, &mut || Ok(()))?;
            ended.map_err(refused(&what))?;
            context.log(format!(
                "machine {vm}: {} disks are not protected any more",
                keys.len()
            ))?;
        }
        Ok(())
    }

    fn undo_detach(&self, context: &Context) -> Result<(), StepError> {
        let detached: Detached = noted(context, "detached")?.unwrap_or_default();
        let Some(site) = self.site(context)? else {
            return Ok(());
        };
        let limit = Some(context.outside.patience.undo);
        let source = FilterSource::Filter {
            name: site.package.name.clone(),
            properties: Vec::new(),
        };
        for (vm, keys) in detached {
            let moid: Moid = vm
                .parse()
                .map_err(|error| StepError::failed(format!("machine {vm:?}: {error}")))?;
            let what = format!("putting the filter on machine {vm} again");
            let asked = site.link.api.attach_filter(&moid, &keys, &source);
            let task = match asked {
                // The machine is gone: nothing is to be given back.
                Err(Fault::NotFound(_)) => continue,
                asked => asked.map_err(refused(&what))?,
            };
            let ended = tasks::wait_for(context, &site.link, &task, limit, &mut || Ok(()))?;
            ended.map_err(refused(&what))?;
            context.log(format!(
                "machine {vm}: its disks have the filter again, and are synchronised anew"
            ))?;
        }
        Ok(())
    }

    fn uninstall(&self, context: &Context) -> Result<(), StepError> {
        let Some(site) = self.site(context)? else {
            return Ok(());
        };
        let moid = &site.moid;
        tasks::settle(context, &site.link, moid, None)?;
        if let Some(filter) = site.link.filter(moid, &site.package)? {
            context.log(format!("asking vCenter to remove {}", filter.id))?;
            match site.link.api.uninstall_filter(moid, &filter.id) {
                Ok(task) => {
                    let ended = tasks::wait_for(context, &site.link, &task, None, &mut || Ok(()))?;
                    if let Err(fault) = ended {
                        context.log(format!("the removal failed: {fault}"))?;
                    }
                }
                Err(Fault::NotFound(_)) => {}
                Err(Fault::FilterInUse(disks)) => {
                    return Err(StepError::failed(format!(
                        "disks still use the filter ({}): end their protection, or give detach",
                        names(&disks, &[])
                    )));
                }
                Err(fault) => return Err(refused("removing the filter")(fault)),
            }
        }
        self.look_for_rest(context, &site)
    }

    fn look_for_rest(&self, context: &Context, site: &Site) -> Result<(), StepError> {
        let left = verify::left_over(context, &site.link, &site.moid, &site.package)?;
        let (away, wrong): (Vec<_>, Vec<_>) = left
            .into_iter()
            .partition(|(host, _)| host.connection != Connection::Connected);
        for (host, what) in wrong.iter().chain(&away) {
            context.log(format!("host {}: {what}", host.name))?;
        }
        let mut bad = wrong.len();
        if !self.given.leave_unreachable {
            bad += away.len();
        }
        let all: Vec<String> = wrong
            .iter()
            .chain(&away)
            .map(|(host, what)| format!("{}: {what}", host.name))
            .collect();
        match bad {
            0 => context.log("all hosts are free of the component; its ports are closed"),
            _ => Err(StepError::failed(format!(
                "the component could not be removed from {bad} hosts ({}): mend them, or take them out of the cluster, and disable it again",
                all.join("; ")
            ))),
        }
    }

    fn undo_uninstall(&self, context: &Context) -> Result<(), StepError> {
        let Some(site) = self.site(context)? else {
            return Ok(());
        };
        let moid = &site.moid;
        let limit = Some(context.outside.patience.undo);
        tasks::settle(context, &site.link, moid, limit)?;
        let task = match site.link.filter(moid, &site.package)? {
            Some(filter) => site.link.api.resolve_on_cluster(moid, &filter.id),
            None => {
                let url = package_url(context, &site.package)?;
                context.log(format!("asking vCenter to install {url} again"))?;
                site.link.api.install_filter(moid, &url, &trust(context)?)
            }
        };
        let task = task.map_err(refused("installing the filter again"))?;
        let ended = tasks::wait_for(context, &site.link, &task, limit, &mut || Ok(()))?;
        match ended {
            Ok(()) => Ok(()),
            // Each host's state is looked at when somebody resolves; what is enabled stays enabled.
            Err(fault) => context.log(format!(
                "not all hosts have it again: {fault}: resolve-cluster"
            )),
        }
    }

    /// All of it at once: certificates, hosts, machines, the cluster.
    fn finish(&self, context: &Context) -> Result<(), StepError> {
        let Some(site) = self.site(context)? else {
            return Ok(());
        };
        let now_ms = context.store.now_ms();
        let what = format!("cluster {}", site.cluster.name);
        context
            .store
            .change(&Actor::system(), "disable cluster", |t| {
                for host in rows::hosts(t, site.cluster.id)? {
                    rows::clean_host(t, &host, now_ms)?;
                }
                t.execute(
                    "UPDATE vms SET domain_id = NULL, state = 'unprotected' WHERE cluster_id = ?1",
                    [site.cluster.id],
                )?;
                rows::set_cluster(t, site.cluster.id, ClusterState::Disabled, None)?;
                Ok(Done::new((), what))
            })?;
        context.outside.revoked();
        context.log(format!(
            "cluster {} is disabled, its hosts' certificates are revoked",
            site.cluster.name
        ))
    }
}

/// The disks that use the filter.
fn disks(link: &Link, cluster: &Moid, package: &Package) -> Result<Vec<FilterDisk>, StepError> {
    let Some(filter) = link.filter(cluster, package)? else {
        return Ok(Vec::new());
    };
    match link.api.disks_using(cluster, &filter.id) {
        Ok(disks) => Ok(disks),
        Err(Fault::NotFound(_)) => Ok(Vec::new()),
        Err(fault) => Err(refused("asking which disks use the filter")(fault)),
    }
}

fn names(disks: &[FilterDisk], machines: &[String]) -> String {
    let disks = disks
        .iter()
        .map(|disk| format!("{} disk {}", disk.vm, disk.disk_key));
    let all: Vec<String> = machines.iter().cloned().chain(disks).collect();
    all.join(", ")
}

impl Operation for Disable {
    fn steps(&self) -> &'static [&'static str] {
        &["check", "record", "detach", "uninstall", "finish"]
    }

    fn run(&mut self, step: usize, context: &Context) -> Result<(), StepError> {
        match step {
            0 => self.check(context),
            1 => self.record(context),
            2 => self.detach(context),
            3 => self.uninstall(context),
            _ => self.finish(context),
        }
    }

    fn undo(&mut self, step: usize, context: &Context) -> Result<(), StepError> {
        match step {
            1 => self.undo_record(context),
            2 => self.undo_detach(context),
            3 => self.undo_uninstall(context),
            // One looks only; the last is one transaction.
            _ => Ok(()),
        }
    }

    fn is_final(&self, step: usize) -> bool {
        step == 4
    }
}
