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
use super::{Link, moid, needed, note, noted, package, package_url, parameters, refused};
use super::{rows, tasks, trust};
use crate::executions::operation::Making;
use crate::executions::{Context, Kind, Operation, StepError};
use crate::inventory::{Cluster, ClusterState};
use crate::packages::{self, Package};
use crate::store::{Actor, Done};
use crate::text::{self, Id, Label, Name, VersionText};
use crate::vcenter::{Connection, Fault, HostInfo, Moid};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

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

/// What the first step found.
#[derive(Serialize, Deserialize)]
struct Plan {
    moid: text::Moid,
    from: Id,
    to: Id,
    esx_version: String,
}

struct Site {
    link: Link,
    moid: Moid,
    plan: Plan,
    from: Package,
    to: Package,
    cluster: Cluster,
}

impl Upgrade {
    fn site(&self, context: &Context) -> Result<Site, StepError> {
        let plan: Plan = needed(context, "plan")?;
        let link = Link::open(context, self.given.vcenter.as_ref())?;
        let moid = moid(&plan.moid)?;
        let (from, to, cluster) = context.store.read(|t| {
            let (from, to) = (packages::get(t, plan.from)?, packages::get(t, plan.to)?);
            Ok((from, to, rows::cluster(t, link.vcenter.id, &moid)?))
        })?;
        let cluster =
            cluster.ok_or_else(|| StepError::failed("the cluster is not in the state any more"))?;
        Ok(Site {
            link,
            moid,
            plan,
            from,
            to,
            cluster,
        })
    }

    fn preflight(&self, context: &Context) -> Result<(), StepError> {
        let link = Link::open(context, self.given.vcenter.as_ref())?;
        let name = self.given.protected_cluster.as_str();
        let info = preflight::cluster_named(&link, name)?;
        let row = context
            .store
            .read(|t| rows::cluster(t, link.vcenter.id, &info.moid))?;
        let enabled = row.filter(|row| row.state == ClusterState::Enabled);
        let Some(from) = enabled.and_then(|row| row.package_id) else {
            return Err(StepError::failed(format!(
                "cluster {name} is not enabled: enable-cluster puts the newest version on it"
            )));
        };
        let asked = self.given.package_version.as_ref();
        let to = package(context, asked.map(VersionText::as_str))?;
        let wanted = Wanted {
            cluster: name,
            package: Some(&to),
            ..Wanted::default()
        };
        let findings = preflight::leave(context, &link, &wanted)?;
        preflight::report(context, &findings)?;
        let seen = verify::Seen::look(context, &link, &info.moid)?;
        let esx_version = verify::common_version(&seen.hosts);
        let plan = Plan {
            moid: text::Moid::from(&info.moid),
            from,
            to: to.id,
            esx_version,
        };
        note(context, "plan", &plan)
    }

    fn upgrade(&self, context: &Context) -> Result<(), StepError> {
        let site = self.site(context)?;
        tasks::settle(context, &site.link, &site.moid, None)?;
        let ended = change(context, &site, &site.to, None)?;
        if let Err(fault) = ended {
            context.log(format!("the upgrade failed: {fault}"))?;
        }
        let mut issues: BTreeMap<String, String> = BTreeMap::new();
        if let Some(filter) = site.link.filter(&site.moid, &site.to)?
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
        let site = self.site(context)?;
        let limit = Some(context.outside.patience.undo);
        tasks::settle(context, &site.link, &site.moid, limit)?;
        let seen = verify::Seen::look(context, &site.link, &site.moid)?;
        let filter = site.link.filter(&site.moid, &site.from)?;
        let is_listed = filter.is_some_and(|filter| filter.version == site.from.version);
        // One that is not reached keeps what it has; it is named when somebody resolves.
        let have = |host: &HostInfo| {
            host.connection != Connection::Connected || verify::has_package(host, &site.from)
        };
        if is_listed && seen.hosts.iter().all(have) {
            return Ok(());
        }
        context.log(format!("putting version {} back", site.from.version))?;
        let ended = change(context, &site, &site.from, limit)?;
        ended.map_err(refused("putting the earlier version back"))
    }

    fn verify(&self, context: &Context) -> Result<(), StepError> {
        let site = self.site(context)?;
        let version = &site.plan.esx_version;
        let seen = verify::hosts(context, &site.link, &site.moid, &site.to, version)?;
        let issues: BTreeMap<String, String> = noted(context, "issues")?.unwrap_or_default();
        let verdicts = verify::with_issues(seen, &issues);
        let hosts = context.store.read(|t| rows::hosts(t, site.cluster.id))?;
        let bad = verify::say(context, &hosts, &verdicts, &site.to)?;
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
        let site = self.site(context)?;
        let verdicts: Verdicts = needed(context, "verdicts")?;
        let now_ms = context.store.now_ms();
        let what = format!("cluster {}", site.cluster.name);
        let detail = format!("{} to {}", site.from.version, site.to.version);
        let revoked = context
            .store
            .change(&Actor::system(), "upgrade cluster", |t| {
                let revoked = rows::settle_hosts(t, site.cluster.id, &verdicts, &site.to, now_ms)?;
                let package = Some(site.to.id);
                rows::set_cluster(t, site.cluster.id, ClusterState::Enabled, package)?;
                Ok(Done::new(revoked, what).with_detail(detail))
            })?;
        if revoked {
            context.outside.revoked();
        }
        context.log(format!(
            "cluster {} has version {}",
            site.cluster.name, site.to.version
        ))
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
