//! The operation `disable-cluster`: the host component leaves all hosts of one cluster.
//!
//! It is refused while disks are protected, unless their protection is to end (`detach`).
//!
//! Invariant: until the last step, which is one transaction, everything can be taken back: disks get
//! their filter again, hosts the package. A host's certificates end in that last step; if it is taken back,
//! those of hosts that had lost the package by then end too, and only `resolve-cluster` makes them ready.

use super::preflight::{self, Wanted};
use super::{
    Link, Plan, Site, note, noted, package_url, parameters, refused, rows, tasks, trust, verify,
};
use crate::executions::operation::Making;
use crate::executions::{Context, Kind, Operation, StepError};
use crate::inventory::{ClusterState, HostState};
use crate::packages::{self, Package};
use crate::store::Done;
use crate::text::{self, Id, Label, Name};
use crate::vcenter::{Connection, Fault, FilterDisk, FilterSource, Moid};
use serde::Deserialize;
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

/// What is said of hosts of a cluster that is not disabled after all.
const NOT_READY: &str = "it was not ready before disabling was tried: resolve";
const LOST: &str = "it had lost the component when disabling was taken back, and its certificate with it: that is revoked, it needs a new one; resolve";
const AWAY: &str =
    "vCenter did not reach it when disabling was taken back: reconnect it, then resolve";

struct Disable {
    given: Parameters,
}

fn make(making: &Making<'_>) -> Result<Box<dyn Operation>, String> {
    let given = parameters(making)?;
    Ok(Box::new(Disable { given }))
}

/// Disks of machines, by their keys there, with the storage policy that each had.
type Detached = BTreeMap<String, BTreeMap<i32, Option<String>>>;

impl Disable {
    /// Nothing, if there is nothing to do.
    fn site(&self, context: &Context) -> Result<Option<Site>, StepError> {
        match noted::<Plan>(context, "plan")? {
            Some(_) => Site::load(context, self.given.vcenter.as_ref()).map(Some),
            None => Ok(None),
        }
    }

    /// Looks, and changes nothing.
    fn check(&self, context: &Context) -> Result<(), StepError> {
        let link = Link::open(context, self.given.vcenter.as_ref())?;
        let name = self.given.protected_cluster.as_str();
        let (info, row) = link.find(context, name)?;
        let package = row.as_ref().and_then(|row| row.package_id);
        let (Some(row), Some(package)) = (row, package) else {
            return context.log(format!("cluster {name} is not enabled: nothing to do"));
        };
        let known = context.store.read(|t| rows::hosts(t, row.id))?;
        if info.hosts.is_empty() && !known.is_empty() && !self.given.leave_unreachable {
            let why = rows::NO_HOSTS;
            return Err(StepError::failed(format!("cluster {name}: {why}")));
        }
        let plan = Plan {
            moid: text::Moid::from(&info.moid),
            package,
            from: None,
            esx_version: String::new(),
            was_enabled: row.state == ClusterState::Enabled,
        };
        let findings = preflight::leave(
            context,
            &link,
            &Wanted {
                cluster: info.moid.as_str(),
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
        let cluster = site.cluster()?.id;
        let earlier: Option<BTreeMap<Id, String>> = noted(context, "before")?;
        if earlier.is_none() {
            let hosts = context.store.read(|t| rows::hosts(t, cluster))?;
            let before: BTreeMap<Id, &str> = hosts
                .iter()
                .map(|host| (host.id, host.state.word()))
                .collect();
            note(context, "before", &before)?;
        }
        Ok(context.store.record(|t| {
            let package = Some(site.package.id);
            rows::set_cluster(t, cluster, ClusterState::Disabling, package)?;
            for host in rows::hosts(t, cluster)? {
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
        let cluster = site.cluster()?.id;
        let lost: BTreeMap<String, String> = noted(context, "lost")?.unwrap_or_default();
        let now_ms = context.store.now_ms();
        Ok(context.store.record(|t| {
            // What an earlier operation left half done is enabled to us: the component is on it.
            let package = Some(site.package.id);
            rows::set_cluster(t, cluster, ClusterState::Enabled, package)?;
            for host in rows::hosts(t, cluster)? {
                let was_ready = before.get(&host.id).map(String::as_str) == Some("ready");
                let why = lost.get(host.moid.as_str()).map(String::as_str);
                match why {
                    None if was_ready => rows::set_host(t, host.id, HostState::Ready, None)?,
                    why => rows::fail_host(t, &host, why.unwrap_or(NOT_READY), now_ms)?,
                }
            }
            // What is said of those that have no certificate.
            rows::settle_certificates(t, cluster, now_ms)
        })?)
    }

    /// Takes the filter off all disks, one machine after the other.
    fn detach(&self, context: &Context) -> Result<(), StepError> {
        let Some(site) = self.site(context)? else {
            return Ok(());
        };
        tasks::settle(context, &site.link, &site.moid, None)?;
        let mut detached: Detached = noted(context, "detached")?.unwrap_or_default();
        let now = disks(&site.link, &site.moid, &site.package)?;
        if !now.is_empty() && !self.given.detach {
            return Err(StepError::failed(
                "disks were protected since this began: end their protection first, or give detach",
            ));
        }
        let mut of_vm: BTreeMap<Moid, Vec<i32>> = BTreeMap::new();
        for disk in now {
            context.check()?;
            let policy = site.link.api.disk_policy(&disk);
            let what = format!(
                "asking for the policy of {} disk {}",
                disk.vm, disk.disk_key
            );
            let policy = policy.map_err(refused(&what))?;
            let before = detached.entry(disk.vm.to_string()).or_default();
            // What a try before a restart found is what was before.
            before.entry(disk.disk_key).or_insert(policy);
            of_vm.entry(disk.vm).or_default().push(disk.disk_key);
        }
        // Noted before it is done: what is taken back is whatever may have been done.
        note(context, "detached", &detached)?;
        for (vm, keys) in of_vm {
            context.check()?;
            let what = format!("taking the filter off machine {vm}");
            let task = site.link.api.detach_filters(&vm, &keys);
            let task = task.map_err(refused(&what))?;
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
        for (vm, disks) in detached {
            let vm: Moid = vm
                .parse()
                .map_err(|error| StepError::failed(format!("machine {vm:?}: {error}")))?;
            let mut with: BTreeMap<Option<String>, Vec<i32>> = BTreeMap::new();
            for (key, policy) in disks {
                with.entry(policy).or_default().push(key);
            }
            for (policy, keys) in with {
                attach_again(context, &site, &vm, &keys, policy)?;
            }
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
        let known = site.cluster()?.id;
        let known = context.store.read(|t| rows::hosts(t, known))?;
        let left = verify::left_over(context, &site.link, &site.moid, &site.package, &known)?;
        let mut bad = left.wrong.len();
        if !self.given.leave_unreachable {
            bad += left.away.len();
        }
        let all: Vec<String> = left.wrong.into_iter().chain(left.away).collect();
        for what in &all {
            context.log(format!("host {what}"))?;
        }
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
        note_lost(context, &site)?;
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
        let cluster = site.cluster()?;
        let now_ms = context.store.now_ms();
        context.commit("disable cluster", |t| {
            for host in rows::hosts(t, cluster.id)? {
                rows::clean_host(t, &host, now_ms)?;
            }
            t.execute(
                "UPDATE vms SET domain_id = NULL, state = 'unprotected' WHERE cluster_id = ?1",
                [cluster.id],
            )?;
            rows::set_cluster(t, cluster.id, ClusterState::Disabled, None)?;
            rows::find_cluster(t, cluster, now_ms)?;
            let name = &cluster.name;
            let line = format!("cluster {name} is disabled, its hosts' certificates are revoked");
            Ok(Done::new(vec![line], format!("cluster {name}")))
        })?;
        context.outside.revoked();
        Ok(())
    }
}

/// Gives disks of a machine their filter again: by the policy that they had, else the filter itself.
fn attach_again(
    context: &Context,
    site: &Site,
    vm: &Moid,
    keys: &[i32],
    policy: Option<String>,
) -> Result<(), StepError> {
    let limit = Some(context.outside.patience.undo);
    let cluster = site.cluster()?.id;
    let domain = context.store.read(|t| rows::domain_of(t, cluster, vm))?;
    let alone = FilterSource::Filter {
        name: site.package.name.clone(),
        properties: domain,
    };
    let what = format!("putting the filter on machine {vm} again");
    let asked = match &policy {
        Some(id) => {
            let source = FilterSource::Policy(id.clone());
            match site.link.api.attach_filter(vm, keys, &source) {
                Err(Fault::InvalidArgument(why)) => {
                    context.log(format!(
                        "machine {vm}: its policy {id} cannot be given back ({why}): it gets the filter without one"
                    ))?;
                    site.link.api.attach_filter(vm, keys, &alone)
                }
                asked => asked,
            }
        }
        None => site.link.api.attach_filter(vm, keys, &alone),
    };
    let task = match asked {
        // The machine is gone: nothing is to be given back.
        Err(Fault::NotFound(_)) => return Ok(()),
        asked => asked.map_err(refused(&what))?,
    };
    let ended = tasks::wait_for(context, &site.link, &task, limit, &mut || Ok(()))?;
    ended.map_err(refused(&what))?;
    context.log(format!(
        "machine {vm}: its disks have the filter again, and are synchronised anew"
    ))
}

/// Notes which hosts have lost the component, before it is installed again: afterwards nobody could tell
/// any more that key and certificate went with it. What those certificates may do ends here.
fn note_lost(context: &Context, site: &Site) -> Result<(), StepError> {
    let mut lost: BTreeMap<String, String> = noted(context, "lost")?.unwrap_or_default();
    let seen = verify::Seen::look(context, &site.link, &site.moid)?;
    let cluster = site.cluster()?.id;
    let hosts = context.store.read(|t| rows::hosts(t, cluster))?;
    let mut bare = Vec::new();
    for host in &hosts {
        let seen = seen.hosts.iter();
        let found = seen
            .clone()
            .find(|one| one.moid.as_str() == host.moid.as_str());
        let why = match found {
            Some(found) if !verify::has_filter(found, &site.package) => {
                bare.push(host.id);
                LOST
            }
            Some(found) if found.connection == Connection::Connected => continue,
            // Whether it lost it is seen when it is looked at again.
            _ => AWAY,
        };
        let said = lost.entry(host.moid.to_string()).or_default();
        if said.as_str() != LOST {
            *said = why.into();
        }
    }
    note(context, "lost", &lost)?;
    if bare.is_empty() {
        return Ok(());
    }
    let now_ms = context.store.now_ms();
    context.store.record(|t| {
        let mut bare = bare.iter();
        bare.try_for_each(|host| rows::disenrol(t, *host, now_ms))
    })?;
    context.outside.revoked();
    for host in hosts.iter().filter(|host| bare.contains(&host.id)) {
        context.log(format!("host {}: {LOST}", host.name))?;
    }
    Ok(())
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
