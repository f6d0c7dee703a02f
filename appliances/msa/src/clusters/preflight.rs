//! The operations `preflight-system`, `preflight-install` and `preflight-uninstall`, and what enabling and
//! disabling look at first.
//!
//! Invariant: nothing is changed, here or in vCenter; everything that is wrong is in the output, each with
//! its name, where it is and what to do, before the execution fails.

use super::look::Look;
pub use super::look::{Finding, FindingKind, Here, Wanted};
use super::{Link, parameters, refused};
use crate::executions::operation::Making;
use crate::executions::{Context, Kind, Operation, StepError};
use crate::packages;
use crate::text::{Label, Name};
use crate::vcenter::ClusterInfo;
use serde::Deserialize;

/// A cluster has at least so many hosts, unless asked otherwise: one goes into maintenance while the
/// others carry its machines.
pub const MIN_HOSTS: usize = 3;
/// The cluster of this name.
pub fn cluster_named(link: &Link, name: &str) -> Result<ClusterInfo, StepError> {
    let all = link
        .api
        .clusters()
        .map_err(refused("asking for clusters"))?;
    let known: Vec<String> = all.iter().map(|cluster| cluster.name.clone()).collect();
    let found = all.into_iter().find(|cluster| cluster.name == name);
    found.ok_or_else(|| {
        StepError::failed(format!(
            "vCenter {} has no cluster `{name}`: it has [{}]; correct the name [{}]",
            link.vcenter.name,
            known.join(", "),
            FindingKind::ClusterUnknown
        ))
    })
}

/// What is wrong with vCenter, and with names that everybody needs.
pub fn system(context: &Context, link: &Link) -> Result<Vec<Finding>, StepError> {
    with_here(context, |here| {
        let mut look = Look {
            here,
            link,
            findings: Vec::new(),
        };
        look.own_names(context)?;
        look.vcenter()?;
        Ok(look.findings)
    })
}

/// Looks by this server's clock, and by the names that it knows.
fn with_here<T>(context: &Context, look: impl FnOnce(Here<'_>) -> T) -> T {
    let now_ms = || context.store.now_ms();
    look(Here {
        now_ms: &now_ms,
        resolves: &context.outside.resolves,
    })
}

fn all(
    here: Here<'_>,
    link: &Link,
    wanted: &Wanted<'_>,
    also: impl FnOnce(&mut Look<'_>, &ClusterInfo) -> Result<(), StepError>,
) -> Result<Vec<Finding>, StepError> {
    let mut look = Look {
        here,
        link,
        findings: Vec::new(),
    };
    look.vcenter()?;
    let is_silent = |finding: &Finding| finding.kind == FindingKind::VcenterUnreachable;
    if look.findings.iter().any(is_silent) {
        return Ok(look.findings);
    }
    look.entries(wanted)?;
    if let Some(cluster) = look.cluster(wanted)? {
        look.places(wanted, &cluster)?;
        look.hosts(wanted, &cluster)?;
        also(&mut look, &cluster)?;
    }
    Ok(look.findings)
}

/// What stands in the way of enabling a cluster that has nothing.
pub fn enable(
    context: &Context,
    link: &Link,
    wanted: &Wanted<'_>,
) -> Result<Vec<Finding>, StepError> {
    with_here(context, |here| {
        all(here, link, wanted, |look, cluster| match wanted.package {
            Some(package) => look.filter(package, cluster),
            None => Ok(()),
        })
    })
}

/// The same before there is a server: what stands in the way of installing one, `names` being its own. The
/// server's machine is to be on `own_cluster`, whose datastore and network `wanted` names.
pub fn install(
    here: Here<'_>,
    link: &Link,
    names: &[&str],
    wanted: &Wanted<'_>,
    own_cluster: &str,
) -> Result<Vec<Finding>, StepError> {
    let elsewhere = own_cluster != wanted.cluster;
    let protected = Wanted {
        datastore: wanted.datastore.filter(|_| !elsewhere),
        network: wanted.network.filter(|_| !elsewhere),
        ..*wanted
    };
    let mut findings = Vec::new();
    for name in names.iter().filter(|name| !(here.resolves)(name)) {
        findings.push(Finding {
            kind: FindingKind::DnsMissing,
            text: format!("this server: the name `{name}` does not resolve here: enter it in DNS"),
        });
    }
    findings.extend(all(here, link, &protected, |look, cluster| {
        if let Some(package) = wanted.package {
            look.filter(package, cluster)?;
        }
        if !elsewhere {
            return Ok(());
        }
        let own = Wanted {
            cluster: own_cluster,
            datastore: wanted.datastore,
            network: wanted.network,
            ..Wanted::default()
        };
        if let Some(cluster) = look.cluster(&own)? {
            look.places(&own, &cluster)?;
        }
        Ok(())
    })?);
    Ok(findings)
}

/// What stands in the way of removing the component from a cluster, or of replacing it.
pub fn leave(
    context: &Context,
    link: &Link,
    wanted: &Wanted<'_>,
) -> Result<Vec<Finding>, StepError> {
    with_here(context, |here| {
        all(here, link, wanted, |look, cluster| {
            if !cluster.drs_enabled {
                look.find(
                    FindingKind::DrsOff,
                    format!("cluster {}: DRS is off, so that hosts cannot be emptied one by one: switch it on", cluster.name),
                );
            }
            Ok(())
        })
    })
}

/// Writes what was found to the output; an error, if it is anything.
pub fn report(context: &Context, findings: &[Finding]) -> Result<(), StepError> {
    for finding in findings {
        context.log(finding.to_string())?;
    }
    match findings {
        [] => context.log("preflight: nothing found"),
        [only] => Err(StepError::failed(only.to_string())),
        [first, rest @ ..] => Err(StepError::failed(format!(
            "{first}; {} more findings are in the output",
            rest.len()
        ))),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SystemParameters {
    vcenter: Option<Name>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InstallParameters {
    vcenter: Option<Name>,
    /// The cluster whose machines are to be protected.
    protected_cluster: Label,
    /// The cluster on which the server's own machine is to be; without it, the same.
    cluster: Option<Label>,
    /// The network, datastore and name of the server's own machine.
    network: Option<Label>,
    datastore: Option<Label>,
    vm_name: Option<Label>,
    min_hosts: Option<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UninstallParameters {
    vcenter: Option<Name>,
    protected_cluster: Label,
    min_hosts: Option<usize>,
}

enum Preflight {
    System(SystemParameters),
    Install(InstallParameters),
    Uninstall(UninstallParameters),
}

/// The kind `preflight-system`.
pub const SYSTEM: Kind = Kind {
    about: "looks whether vCenter answers, is new enough and in step, and whether names resolve; changes nothing",
    for_admins: false,
    make: |making| Ok(boxed(Preflight::System(parameters(making)?))),
};
/// The kind `preflight-install`.
pub const INSTALL: Kind = Kind {
    about: "looks whether a cluster can be protected from here: names, hosts, versions, clocks, plug-in; changes nothing",
    for_admins: false,
    make: |making: &Making<'_>| Ok(boxed(Preflight::Install(parameters(making)?))),
};
/// The kind `preflight-uninstall`.
pub const UNINSTALL: Kind = Kind {
    about: "looks whether the component can be removed from a cluster: hosts, DRS, plug-in; changes nothing",
    for_admins: false,
    make: |making: &Making<'_>| Ok(boxed(Preflight::Uninstall(parameters(making)?))),
};

fn boxed(preflight: Preflight) -> Box<dyn Operation> {
    Box::new(preflight)
}

impl Preflight {
    fn look(&self, context: &Context) -> Result<Vec<Finding>, StepError> {
        match self {
            Preflight::System(given) => system(context, &open(context, given.vcenter.as_ref())?),
            Preflight::Install(given) => {
                let link = open(context, given.vcenter.as_ref())?;
                let package = context.store.read(packages::newest)?;
                let mut findings = enable(
                    context,
                    &link,
                    &Wanted {
                        cluster: given.protected_cluster.as_str(),
                        min_hosts: given.min_hosts.unwrap_or(MIN_HOSTS),
                        package: package.as_ref(),
                        datastore: given.own(&given.datastore),
                        network: given.own(&given.network),
                        vm_name: given.vm_name.as_ref().map(Label::as_str),
                        plugin: Some(false),
                    },
                )?;
                if let Some(own) = &given.cluster {
                    findings.extend(self.own_cluster(context, &link, own.as_str(), given)?);
                }
                Ok(findings)
            }
            Preflight::Uninstall(given) => leave(
                context,
                &open(context, given.vcenter.as_ref())?,
                &Wanted {
                    cluster: given.protected_cluster.as_str(),
                    min_hosts: given.min_hosts.unwrap_or(MIN_HOSTS),
                    plugin: Some(true),
                    ..Wanted::default()
                },
            ),
        }
    }

    /// The cluster of the server's own machine has its datastore and network.
    fn own_cluster(
        &self,
        context: &Context,
        link: &Link,
        name: &str,
        given: &InstallParameters,
    ) -> Result<Vec<Finding>, StepError> {
        let wanted = Wanted {
            cluster: name,
            datastore: given.datastore.as_ref().map(Label::as_str),
            network: given.network.as_ref().map(Label::as_str),
            ..Wanted::default()
        };
        with_here(context, |here| {
            let mut look = Look {
                here,
                link,
                findings: Vec::new(),
            };
            if let Some(cluster) = look.cluster(&wanted)? {
                look.places(&wanted, &cluster)?;
            }
            Ok(look.findings)
        })
    }
}

impl InstallParameters {
    /// Datastore and network are those of the server's own cluster, if it has one of its own.
    fn own<'a>(&self, label: &'a Option<Label>) -> Option<&'a str> {
        match self.cluster {
            Some(_) => None,
            None => label.as_ref().map(Label::as_str),
        }
    }
}

/// A session with vCenter; none is a finding by itself.
fn open(context: &Context, name: Option<&Name>) -> Result<Link, StepError> {
    Link::open(context, name).map_err(|error| match error {
        StepError::Failed(why) => {
            StepError::failed(format!("{why} [{}]", FindingKind::VcenterUnreachable))
        }
        error => error,
    })
}

impl Operation for Preflight {
    fn steps(&self) -> &'static [&'static str] {
        &["look"]
    }

    fn run(&mut self, _step: usize, context: &Context) -> Result<(), StepError> {
        context.check()?;
        report(context, &self.look(context)?)
    }

    fn undo(&mut self, _step: usize, _context: &Context) -> Result<(), StepError> {
        Ok(())
    }
}
