//! Whether a host is as it should be once the component is on it, or off it.
//!
//! Invariant: a host is never called ready for what was asked of it, only for what was seen.

use super::Link;
use crate::executions::{Context, StepError};
use crate::inventory::Host;
use crate::packages::Package;
use crate::vcenter::{Connection, HostInfo, Moid};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Instant;
use vib_packaging::component;

/// Clocks may differ by so much.
pub const MAX_SKEW_MS: i64 = 1000;

/// The name of the daemon's service: that of its init script.
pub fn service() -> String {
    format!("iofilterd-{}", component::NAME)
}

/// What was seen of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// All is as it should be.
    Good,
    /// Something is not; what, and what to do.
    Bad(String),
}

/// Hosts by their id in vCenter, with what was seen of them.
pub type Verdicts = BTreeMap<String, Verdict>;

/// Hosts as vCenter has them, and the time here before and after it was asked.
pub struct Seen {
    /// The hosts.
    pub hosts: Vec<HostInfo>,
    /// Before and after, in ms since 1970.
    pub between_ms: (i64, i64),
}

impl Seen {
    /// Asks vCenter.
    pub fn look(context: &Context, link: &Link, cluster: &Moid) -> Result<Self, StepError> {
        Self::look_by(&|| context.store.now_ms(), link, cluster)
    }

    /// The same by another clock than the state's.
    pub fn look_by(
        now_ms: &dyn Fn() -> i64,
        link: &Link,
        cluster: &Moid,
    ) -> Result<Self, StepError> {
        let before = now_ms();
        let asked = link.api.hosts(cluster);
        let hosts = asked.map_err(super::refused("asking for the cluster's hosts"))?;
        let between_ms = (before, now_ms());
        Ok(Self { hosts, between_ms })
    }

    /// How far a host's clock is from ours, at least: the time that the question took is in its favour.
    pub fn skew_ms(&self, host: &HostInfo) -> Option<i64> {
        let (before, after) = self.between_ms;
        let theirs = host.now_ms?;
        Some((before - theirs).max(theirs - after).max(0))
    }
}

/// Whether a ruleset opens all ports of the product.
fn opens_ports(host: &HostInfo) -> bool {
    let (first, last) = component::PORTS;
    host.rulesets.iter().any(|ruleset| {
        let opens = |port: u16| {
            let mut rules = ruleset.rules.iter();
            rules.any(|rule| (rule.ports.0..=rule.ports.1).contains(&port))
        };
        ruleset.key == component::NAME && ruleset.is_enabled && (first..=last).all(opens)
    })
}

/// Whether a host has this very package.
pub fn has_package(host: &HostInfo, package: &Package) -> bool {
    let mut filters = host.filters.iter();
    filters.any(|filter| filter.name == package.name && filter.version == package.version)
}

/// What is wrong with a host that is to have the component; nothing, if all is well.
fn wrong_with(
    seen: &Seen,
    host: &HostInfo,
    package: &Package,
    esx_version: &str,
) -> Option<String> {
    if host.connection != Connection::Connected {
        return Some("vCenter does not reach it: reconnect it, then resolve".into());
    }
    if host.version.as_str() != esx_version {
        return Some(format!(
            "it has ESXi {}, the cluster {esx_version}: bring all hosts to one version, then resolve",
            host.version
        ));
    }
    let ours = host.filters.iter().find(|found| found.name == package.name);
    match ours {
        None => return Some(format!("package {} is not on it: resolve", package.version)),
        Some(found) if found.version != package.version => {
            return Some(format!(
                "it has package {}, not {}: resolve",
                found.version, package.version
            ));
        }
        Some(found) if !found.is_available => {
            return Some("its filter cannot be used: look at the host's log, then resolve".into());
        }
        Some(_) => {}
    }
    let service = service();
    let daemon = host.services.iter().find(|found| found.key == service);
    if !daemon.is_some_and(|daemon| daemon.is_running) {
        return Some(format!(
            "its daemon does not run: look at /etc/init.d/{service} on the host, then resolve"
        ));
    }
    if !opens_ports(host) {
        let (first, last) = component::PORTS;
        return Some(format!(
            "its firewall does not open ports {first}-{last}: enable the ruleset {}, then resolve",
            component::NAME
        ));
    }
    match seen.skew_ms(host) {
        Some(skew) if skew > MAX_SKEW_MS => Some(format!(
            "its clock is {skew} ms away from this server's: set up NTP on both, then resolve"
        )),
        Some(_) => None,
        None => Some("its clock cannot be asked: look at its connection, then resolve".into()),
    }
}

/// Looks at hosts until all are well, or as long as a daemon may take to be up.
/// `esx_version`: what all are to have.
pub fn hosts(
    context: &Context,
    link: &Link,
    cluster: &Moid,
    package: &Package,
    esx_version: &str,
) -> Result<Verdicts, StepError> {
    let since = Instant::now();
    loop {
        let seen = Seen::look(context, link, cluster)?;
        let mut verdicts = Verdicts::new();
        for host in &seen.hosts {
            let verdict = match wrong_with(&seen, host, package, esx_version) {
                None => Verdict::Good,
                Some(why) => Verdict::Bad(why),
            };
            verdicts.insert(host.moid.to_string(), verdict);
        }
        let is_well = verdicts.values().all(|verdict| *verdict == Verdict::Good);
        if is_well || since.elapsed() >= context.outside.patience.settle {
            return Ok(verdicts);
        }
        context.wait(context.outside.patience.poll)?;
    }
}

/// The same, with what vCenter says of hosts that it could not do: that says more than that nothing is
/// there.
pub fn with_issues(seen: Verdicts, issues: &BTreeMap<String, String>) -> Verdicts {
    let explained = |(host, verdict)| match (verdict, issues.get(&host)) {
        (Verdict::Bad(why), Some(issue)) => {
            (host, Verdict::Bad(format!("vCenter: {issue}; {why}")))
        }
        (verdict, _) => (host, verdict),
    };
    seen.into_iter().map(explained).collect()
}

/// Writes each host's verdict to the output; gives the first that is bad.
pub fn say(
    context: &Context,
    hosts: &[Host],
    verdicts: &Verdicts,
    package: &Package,
) -> Result<Option<String>, StepError> {
    let mut first = None;
    for host in hosts {
        match verdicts.get(host.moid.as_str()) {
            Some(Verdict::Good) => context.log(format!(
                "host {}: package {}, daemon up, ports open, clock in step",
                host.name, package.version
            ))?,
            Some(Verdict::Bad(why)) => {
                context.log(format!("host {} FAILED: {why}", host.name))?;
                first.get_or_insert_with(|| format!("host {}: {why}", host.name));
            }
            None => context.log(format!("host {} left the cluster", host.name))?,
        }
    }
    Ok(first)
}

/// The version of the hypervisor that most hosts have; of several, the one that sorts last.
pub fn common_version(hosts: &[HostInfo]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for host in hosts {
        *counts.entry(host.version.as_str()).or_default() += 1;
    }
    let most = counts
        .into_iter()
        .max_by_key(|(version, count)| (*count, *version));
    most.map_or_else(String::new, |(version, _)| version.to_owned())
}

/// What is left of the component on hosts that were to lose it: host and what, or why it cannot be seen.
pub fn left_over(
    context: &Context,
    link: &Link,
    cluster: &Moid,
    package: &Package,
) -> Result<Vec<(HostInfo, String)>, StepError> {
    let since = Instant::now();
    loop {
        let hosts = link
            .api
            .hosts(cluster)
            .map_err(super::refused("asking for the cluster's hosts"))?;
        let mut left = Vec::new();
        for host in hosts {
            if let Some(what) = left_on(&host, package) {
                left.push((host, what));
            }
        }
        if left.is_empty() || since.elapsed() >= context.outside.patience.settle {
            return Ok(left);
        }
        context.wait(context.outside.patience.poll)?;
    }
}

fn left_on(host: &HostInfo, package: &Package) -> Option<String> {
    if host.connection != Connection::Connected {
        return Some("vCenter does not reach it".into());
    }
    let mut left = Vec::new();
    if host.filters.iter().any(|found| found.name == package.name) {
        left.push("the filter");
    }
    if host.services.iter().any(|found| found.key == service()) {
        left.push("the daemon's service");
    }
    if host
        .rulesets
        .iter()
        .any(|found| found.key == component::NAME)
    {
        left.push("the firewall ruleset");
    }
    match left.is_empty() {
        true => None,
        false => Some(format!("{} is still there", left.join(", "))),
    }
}
