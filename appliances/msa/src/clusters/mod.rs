//! What is done with clusters: looked at before, enabled, kept in step, upgraded, disabled.
//!
//! [`preflight`] looks ([`look`]) and changes nothing; [`enable`], [`disable`] and [`upgrade`] are operations in
//! steps; [`verify`] says whether a host is as it should be, [`enrol`]
//! gives it its certificate; [`tasks`] waits for vCenter; [`rows`] is
//! what the state keeps of it; [`watch`] asks for what clusters need when their hosts come and go.
//!
//! Invariant: what an operation must know after a restart is noted before it is needed, and a host's or
//! cluster's final state is written in one transaction, the operation's last step.

pub mod disable;
pub mod enable;
pub mod enrol;
pub mod look;
pub mod preflight;
pub mod rows;
pub mod tasks;
pub mod upgrade;
pub mod verify;
pub mod watch;

use crate::executions::{Context, StepError};
use crate::inventory;
use crate::packages::{self, Package};
use crate::rest::PREFIX;
use crate::service::SERVER_PEM;
use crate::text::Name;
use crate::vcenter::{ClusterFilter, ClusterInfo, Fault, Moid, Vcenter, VibTrust};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;

/// The key under which vCenter knows this product's plug-in.
pub const PLUGIN: &str = "jetdr";

/// What the server's user in vCenter must be allowed: to look, to have filters put on hosts and disks, to empty
/// hosts one by one, and to give a host its token.
pub const PRIVILEGES: [&str; 7] = [
    "Global.CancelTask",
    "Host.Config.AdvancedConfig",
    "Host.Config.Maintenance",
    "Host.Config.Patch",
    "StorageProfile.Update",
    "StorageProfile.View",
    "VirtualMachine.Config.EditDevice",
];

/// A vCenter of the inventory, and a session with it.
pub struct Link {
    /// As the inventory has it.
    pub vcenter: inventory::Vcenter,
    /// The session.
    pub api: Arc<dyn Vcenter>,
}

/// What vCenter refused, as a step's error that says what was asked for.
pub fn refused(what: &str) -> impl Fn(Fault) -> StepError + '_ {
    move |fault| StepError::failed(format!("{what}: {fault}"))
}

/// The vCenter of this name; without one, the only one that there is.
pub fn registered(context: &Context, name: Option<&Name>) -> Result<inventory::Vcenter, StepError> {
    let all = context
        .store
        .read(|t| inventory::list::<inventory::Vcenter>(t, 0, i64::MAX))?;
    let known: Vec<String> = all.iter().map(|one| one.name.to_string()).collect();
    let known = known.join(", ");
    let mut fitting = all.into_iter().filter(|one| {
        name.is_none_or(|name| one.name.as_str().eq_ignore_ascii_case(name.as_str()))
    });
    match (fitting.next(), fitting.next(), name) {
        (Some(one), None, _) => Ok(one),
        (Some(_), Some(_), _) => Err(StepError::failed(format!(
            "several vCenters are registered ({known}): say which by the parameter vcenter"
        ))),
        (None, _, Some(name)) => Err(StepError::failed(format!(
            "no vCenter {name} is registered here: known are [{known}]; correct the name, or register it"
        ))),
        (None, _, None) => Err(StepError::failed(
            "no vCenter is registered here: POST /api/v1/vcenters, then its login",
        )),
    }
}

impl Link {
    /// Logs in.
    pub fn open(context: &Context, name: Option<&Name>) -> Result<Self, StepError> {
        let vcenter = registered(context, name)?;
        let what = format!("vCenter {}", vcenter.name);
        let api = context
            .outside
            .vcenter(&context.data_dir, &vcenter)
            .map_err(refused(&what))?;
        Ok(Self { vcenter, api })
    }

    /// The cluster with this id.
    pub fn cluster(&self, moid: &Moid) -> Result<ClusterInfo, StepError> {
        let all = self
            .api
            .clusters()
            .map_err(refused("asking for clusters"))?;
        let found = all.into_iter().find(|cluster| &cluster.moid == moid);
        found.ok_or_else(|| {
            StepError::failed(format!(
                "vCenter {} has no cluster {moid} any more: remove it here too",
                self.vcenter.name
            ))
        })
    }

    /// This product's filter on a cluster, of whatever version.
    pub fn filter(
        &self,
        cluster: &Moid,
        package: &Package,
    ) -> Result<Option<ClusterFilter>, StepError> {
        let filters = self
            .api
            .filters(cluster)
            .map_err(refused("asking for the filters of the cluster"))?;
        let ours =
            |filter: &ClusterFilter| filter.name == package.name && filter.vendor == package.vendor;
        Ok(filters.into_iter().find(ours))
    }
}

/// By what hosts know this server when they fetch a package: just its own certificate.
pub fn trust(context: &Context) -> Result<VibTrust, StepError> {
    let path = context.data_dir.join(SERVER_PEM);
    let failed = |error: &dyn std::fmt::Display| {
        StepError::failed(format!(
            "cannot read the certificate in {}: {error}",
            path.display()
        ))
    };
    let text = std::fs::read_to_string(&path).map_err(|error| failed(&error))?;
    // The file begins with the key, which goes nowhere.
    let begin = "-----BEGIN CERTIFICATE-----";
    let at = text.find(begin).ok_or_else(|| failed(&"there is none"))?;
    let pem = text.get(at..).unwrap_or_default();
    Ok(VibTrust::Pinned(pem.to_owned()))
}

/// Where hosts get a package.
pub fn package_url(context: &Context, package: &Package) -> Result<String, StepError> {
    let base = context.outside.base_url().ok_or_else(|| {
        StepError::failed("this server does not know yet at which address hosts reach it")
    })?;
    Ok(format!("{base}{PREFIX}{}", package.path()))
}

/// The package of this version; without one, the one that came last.
pub fn package(context: &Context, version: Option<&str>) -> Result<Package, StepError> {
    let found = context.store.read(|t| match version {
        Some(version) => packages::of_version(t, version),
        None => packages::newest(t),
    })?;
    found.ok_or_else(|| {
        StepError::failed(match version {
            Some(version) => {
                format!("this server has no package of version {version}: upload it (POST /api/v1/packages)")
            }
            None => "this server has no package for hosts: upload one (POST /api/v1/packages)".into(),
        })
    })
}

/// Notes a value that is needed after a restart.
pub(crate) fn note<T: Serialize>(context: &Context, key: &str, value: &T) -> Result<(), StepError> {
    let text = serde_json::to_string(value)
        .map_err(|error| StepError::failed(format!("cannot note {key}: {error}")))?;
    context.note(key, &text)
}

/// A value that was noted.
pub(crate) fn noted<T: DeserializeOwned>(
    context: &Context,
    key: &str,
) -> Result<Option<T>, StepError> {
    let Some(text) = context.noted(key)? else {
        return Ok(None);
    };
    let read = serde_json::from_str(&text);
    read.map(Some)
        .map_err(|error| StepError::failed(format!("the note {key} is damaged: {error}")))
}

/// A value that an earlier step noted.
pub(crate) fn needed<T: DeserializeOwned>(context: &Context, key: &str) -> Result<T, StepError> {
    let found = noted(context, key)?;
    found.ok_or_else(|| StepError::failed(format!("the journal has no note {key}")))
}

/// The parameters of an execution, as the type that its kind takes.
pub(crate) fn parameters<T: DeserializeOwned>(
    making: &crate::executions::operation::Making<'_>,
) -> Result<T, String> {
    serde_json::from_value(making.parameters.clone()).map_err(|error| error.to_string())
}

/// An id of the state, as vCenter takes it.
pub(crate) fn moid(id: &crate::text::Moid) -> Result<Moid, StepError> {
    Moid::try_from(id).map_err(|error| StepError::failed(error.to_string()))
}
