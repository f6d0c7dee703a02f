//! What is done with clusters: looked at before, enabled, kept in step, upgraded, disabled.
//!
//! [`preflight`] looks ([`look`]) and changes nothing; [`enable`], [`disable`] and [`upgrade`] are operations in
//! steps; [`verify`] says whether a host is as it should be, [`enrol`]
//! gives it its certificate; [`site`] is where they work; [`tasks`] waits for vCenter; [`rows`] is
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
pub mod site;
pub mod tasks;
pub mod upgrade;
pub mod verify;
pub mod watch;

use crate::authority;
use crate::executions::{Context, StepError};
use crate::packages::{self, Package};
use crate::rest::PREFIX;
use crate::service::SERVER_PEM;
use crate::vcenter::{Fault, Moid, VibTrust};
use serde::Serialize;
use serde::de::DeserializeOwned;
pub use site::{Link, Plan, Site, registered};

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

/// What vCenter refused, as a step's error that says what was asked for.
pub fn refused(what: &str) -> impl Fn(Fault) -> StepError + '_ {
    move |fault| StepError::failed(format!("{what}: {fault}"))
}

/// By what hosts know this server when they fetch a package: just its own certificate. The file holds
/// the key too, which goes nowhere: what is sent is made anew from the certificate that was read.
pub fn trust(context: &Context) -> Result<VibTrust, StepError> {
    let path = context.data_dir.join(SERVER_PEM);
    let read = tls::files::certificates(&path);
    let all = read.map_err(|error| StepError::failed(error.to_string()))?;
    let own = all.first().map(authority::certificate_pem);
    let own = own.ok_or_else(|| StepError::failed("the server has no certificate of its own"))?;
    Ok(VibTrust::Pinned(own))
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
