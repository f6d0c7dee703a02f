//! The operation `upgrade-cluster`: another version of the host component comes to all hosts of one
//! enabled cluster, host by host, while machines run on.
//!
//! vCenter empties each host, replaces the filter there and lets machines return; this waits and names
//! each host as it changes.
//!
//! Invariant: if no host could be upgraded, or somebody cancels it, the earlier version is put back. Hosts
//! and cluster get their final state in the last step, in one transaction.

use super::preflight::{self, Wanted};
use super::verify::{self, Verdict, Verdicts};
use super::{Link, Plan, Site, needed, note, noted, package, package_url, parameters, refused};
use super::{rows, tasks, trust};
use crate::executions::operation::Making;
use crate::executions::{Context, Kind, Operation, StepError};
use crate::inventory::ClusterState;
use crate::packages::{self, Package};
use crate::store::Done;
use crate::text::{self, Label, Name, VersionText};
use crate::vcenter::{Connection, Fault, HostInfo};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// The kind `upgrade-cluster`.
pub const KIND: Kind = Kind {
    about: "puts another version of the host component on one enabled cluster, host by host, while machines run on",
    for_admins: false,
    make,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    protected_cluster: Label,
    vcenter: Option<Name>,
    /// The version; without it, the package that came last.
    package_version: Option<VersionText>,
}

struct Upgrade {
    given: Parameters,
}

fn make(making: &Making<'_>) -> Result<Box<dyn Operation>, String> {
    let given = parameters(making)?;
    Ok(Box::new(Upgrade { given }))
}

/// Where it works, and the package that hosts had.
struct Work {
    site: Site,
    from: Package,
}

impl Upgrade {
    fn work(&self, context: &Context) -> Result<Work, StepError> {
        let site = Site::load(context, self.given.vcenter.as_ref())?;
        let from = site.plan.from.unwrap_or(site.plan.package);
        let from = context.store.read(|t| packages::get(t, from))?;
        Ok(Work { site, from })
    }

    fn preflight(&self, context: &Context) -> Result<(), StepError> {
        let link = Link::open(context, self.given.vcenter.as_ref())?;
        let name = self.given.protected_cluster.as_str();
        let (info, row) = link.find(context, name)?;
        let enabled = row.filter(|row| row.state == ClusterState::Enabled);
        let Some(from) = enabled.and_then(|row| row.package_id) else {
            return Err(StepError::failed(format!(
                "cluster {name} is not enabled: enable-cluster puts the newest version on it"
            )));
        };
        let asked = self.given.package_version.as_ref();
        let to = package(context, asked.map(VersionText::as_str))?;
        let wanted = Wanted {
            cluster: info.moid.as_str(),
            package: Some(&to),
            ..Wanted::default()
        };
        let findings = preflight::leave(context, &link, &wanted)?;
        preflight::report(context, &findings)?;
        let seen = verify::Seen::look(context, &link, &info.moid)?;
        let esx_version = verify::common_version(&seen.hosts);
        let plan = Plan {
            moid: text::Moid::from(&info.moid),
            package: to.id,
            from: Some(from),
            esx_version,
            was_enabled: true,
        };
        note(context, "plan", &plan)
    }

    fn upgrade(&self, context: &Context) -> Result<(), StepError> {
        let site = self.work(context)?.site;
        tasks::settle(context, &site.link, &site.moid, None)?;
        let ended = change(context, &site, &site.package, None)?;
        if let Err(fault) = ended {
            context.log(format!("the upgrade failed: {fault}"))?;
        }
        let mut issues: BTreeMap<String, String> = BTreeMap::new();
        if let Some(filter) = site.link.filter(&site.moid, &site.package)?
            && let Ok(found) = site.link.api.filter_issues(&site.moid, &filter.id)
        {
            for host in found
                .hosts
                .into_iter()
                .filter(|host| !host.issues.is_empty())
            {
                issues.insert(host.host.to_string(), host.issues.join("; "));
            }
        }
        note(context, "issues", &issues)
    }

    /// Whatever of the new version came anywhere goes again.
    fn undo_upgrade(&self, context: &Context) -> Result<(), StepError> {
        let Work { site, from } = self.work(context)?;
        let limit = Some(context.outside.patience.undo);
        tasks::settle(context, &site.link, &site.moid, limit)?;
        let seen = verify::Seen::look(context, &site.link, &site.moid)?;
        let filter = site.link.filter(&site.moid, &from)?;
        let is_listed = filter.is_some_and(|filter| filter.version == from.version);
        // One that is not reached keeps what it has; it is named when somebody resolves.
        let have = |host: &HostInfo| {
            host.connection != Connection::Connected || verify::has_package(host, &from)
        };
        if is_listed && seen.hosts.iter().all(have) {
            return Ok(());
        }
        context.log(format!("putting version {} back", from.version))?;
        let ended = change(context, &site, &from, limit)?;
        ended.map_err(refused("putting the earlier version back"))
    }

    fn verify(&self, context: &Context) -> Result<(), StepError> {
        let site = self.work(context)?.site;
        let version = &site.plan.esx_version;
        let seen = verify::hosts(context, &site.link, &site.moid, &site.package, version)?;
        let issues: BTreeMap<String, String> = noted(context, "issues")?.unwrap_or_default();
        let verdicts = verify::with_issues(seen, &issues);
        let cluster = site.cluster()?.id;
        let hosts = context.store.read(|t| rows::hosts(t, cluster))?;
        let bad = verify::say(context, &hosts, &verdicts, &site.package)?;
        note(context, "verdicts", &verdicts)?;
        match bad {
            Some(why) if !verdicts.values().any(|verdict| *verdict == Verdict::Good) => Err(
                StepError::failed(format!("no host could be upgraded; the first is {why}")),
            ),
            _ => Ok(()),
        }
    }

    /// All of it at once: hosts and cluster.
    fn finish(&self, context: &Context) -> Result<(), StepError> {
        let Work { site, from } = self.work(context)?;
        let (cluster, to) = (site.cluster()?, &site.package);
        let verdicts: Verdicts = needed(context, "verdicts")?;
        let now_ms = context.store.now_ms();
        context.commit("upgrade cluster", |t| {
            // Which hosts have left is not its business.
            let gone = BTreeSet::new();
            let mut settled = rows::settle_hosts(t, cluster.id, &verdicts, &gone, to, now_ms)?;
            rows::set_cluster(t, cluster.id, ClusterState::Enabled, Some(to.id))?;
            let name = &cluster.name;
            let line = format!("cluster {name} has version {}", to.version);
            settled.lines.push(line);
            let detail = format!("{} to {}", from.version, to.version);
            Ok(Done::new(settled.lines, format!("cluster {name}")).with_detail(detail))
        })
    }
}

/// Asks vCenter to put a version on the cluster, and names each host as it gets it.
fn change(
    context: &Context,
    site: &Site,
    to: &Package,
    limit: Option<std::time::Duration>,
) -> Result<tasks::Ended, StepError> {
    let Some(filter) = site.link.filter(&site.moid, to)? else {
        return Err(StepError::failed(
            "the filter is not on the cluster any more: somebody removed it in vCenter; disable the cluster",
        ));
    };
    let task = if filter.version == to.version {
        site.link.api.resolve_on_cluster(&site.moid, &filter.id)
    } else {
        let url = package_url(context, to)?;
        context.log(format!("asking vCenter to replace {} by {url}", filter.id))?;
        site.link
            .api
            .upgrade_filter(&site.moid, &filter.id, &url, &trust(context)?)
    };
    let task = match task {
        Err(Fault::NotFound(_)) => {
            return Err(StepError::failed(
                "vCenter does not know the filter any more",
            ));
        }
        asked => asked.map_err(refused("replacing the filter"))?,
    };
    let mut named = BTreeMap::new();
    tasks::wait_for(context, &site.link, &task, limit, &mut || {
        let Ok(hosts) = site.link.api.hosts(&site.moid) else {
            return Ok(()); // it is looked at again
        };
        for host in hosts {
            let filter = host.filters.iter().find(|filter| filter.name == to.name);
            let what = match filter {
                _ if host.in_maintenance => "in maintenance mode".to_owned(),
                Some(filter) => format!("has version {}", filter.version),
                None => "has none".to_owned(),
            };
            if named.get(&host.moid) != Some(&what) {
                context.log(format!("host {}: {what}", host.name))?;
                named.insert(host.moid, what);
            }
        }
        Ok(())
    })
}

impl Operation for Upgrade {
    fn steps(&self) -> &'static [&'static str] {
        &["preflight", "upgrade", "verify", "finish"]
    }

    fn run(&mut self, step: usize, context: &Context) -> Result<(), StepError> {
        match step {
            0 => self.preflight(context),
            1 => self.upgrade(context),
            2 => self.verify(context),
            _ => self.finish(context),
        }
    }

    fn undo(&mut self, step: usize, context: &Context) -> Result<(), StepError> {
        match step {
            1 => self.undo_upgrade(context),
            _ => Ok(()),
        }
    }

    fn is_final(&self, step: usize) -> bool {
        step == 3
    }
}
