//! Where an operation works: a vCenter, a session with it, and one cluster there and in the state.
//!
//! Invariant: a cluster is looked up by what an operator wrote once, in the first step; from then on by
//! its id, so that one that is renamed meanwhile, or another one of its name, is not mistaken for it.

use super::{look, moid, needed, refused, rows};
use crate::executions::{Context, StepError};
use crate::inventory::{self, Cluster};
use crate::packages::{self, Package};
use crate::text::{self, Id, Name};
use crate::vcenter::{ClusterFilter, ClusterInfo, Moid, Vcenter};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A vCenter of the inventory, and a session with it.
pub struct Link {
    /// As the inventory has it.
    pub vcenter: inventory::Vcenter,
    /// The session.
    pub api: Arc<dyn Vcenter>,
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

    /// The cluster that an operator means by a name or an id, and what the state has of it.
    pub fn find(
        &self,
        context: &Context,
        wanted: &str,
    ) -> Result<(ClusterInfo, Option<Cluster>), StepError> {
        let all = self
            .api
            .clusters()
            .map_err(refused("asking for clusters"))?;
        let found = look::pick(&self.vcenter.name, &all, wanted);
        let info = found.map_err(|finding| StepError::failed(finding.to_string()))?;
        let row = context
            .store
            .read(|t| rows::cluster(t, self.vcenter.id, &info.moid))?;
        Ok((info.clone(), row))
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

/// What the first step of an operation found, for the others: its note `plan`.
#[derive(Serialize, Deserialize)]
pub struct Plan {
    /// The cluster.
    pub moid: text::Moid,
    /// The package that its hosts are to have, or to lose.
    #[serde(alias = "to")]
    pub package: Id,
    /// The package that they had before, if that is another one.
    #[serde(default)]
    pub from: Option<Id>,
    /// The version of the hypervisor that its hosts have.
    #[serde(default)]
    pub esx_version: String,
    /// The component was on the cluster before.
    #[serde(default)]
    pub was_enabled: bool,
}

/// What the steps after the first work on.
pub struct Site {
    /// The vCenter.
    pub link: Link,
    /// The cluster there.
    pub moid: Moid,
    /// What the first step found.
    pub plan: Plan,
    /// The package that hosts are to have, or to lose.
    pub package: Package,
    row: Option<Cluster>,
}

impl Site {
    /// Logs in, and looks up what the first step found.
    pub fn load(context: &Context, vcenter: Option<&Name>) -> Result<Self, StepError> {
        let plan: Plan = needed(context, "plan")?;
        let link = Link::open(context, vcenter)?;
        let moid = moid(&plan.moid)?;
        let (package, row) = context.store.read(|t| {
            let package = packages::get(t, plan.package)?;
            Ok((package, rows::cluster(t, link.vcenter.id, &moid)?))
        })?;
        Ok(Self {
            link,
            moid,
            plan,
            package,
            row,
        })
    }

    /// The cluster in the state, if it is there.
    pub fn row(&self) -> Option<&Cluster> {
        self.row.as_ref()
    }

    /// The cluster in the state.
    pub fn cluster(&self) -> Result<&Cluster, StepError> {
        let found = self.row();
        found.ok_or_else(|| StepError::failed("the cluster is not in the state any more"))
    }
}
