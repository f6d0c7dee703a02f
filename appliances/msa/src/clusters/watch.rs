//! Looks whether the hosts of enabled clusters are those that are known here, and asks for a
//! `reconcile-cluster` where they are not.
//!
//! Invariant: it changes nothing itself, and asks for nothing while an execution waits or runs.

use crate::executions::table::{self, NewExecution};
use crate::inventory::{self, Cluster, ClusterState, Vcenter};
use crate::service::Msa;
use crate::store::{Actor, StoreError};
use crate::text::Id;
use crate::vcenter::Fault;
use serde_json::json;
use std::collections::BTreeSet;

/// What a look came to.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The state.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A vCenter.
    #[error("looking at cluster {cluster}: {fault}")]
    Vcenter {
        /// The cluster's name.
        cluster: String,
        /// Why.
        fault: Fault,
    },
    /// Nothing can be asked for.
    #[error("asking for a reconciliation: {0}")]
    Ask(#[from] serde_json::Error),
}

/// Looks at all enabled clusters; asks for at most one reconciliation, and gives its cluster's name.
pub fn look(msa: &Msa) -> Result<Option<String>, WatchError> {
    if msa.store.read(table::due)?.is_some() {
        return Ok(None);
    }
    let (vcenters, clusters) = msa.store.read(|t| {
        let vcenters: Vec<Vcenter> = inventory::list(t, 0, i64::MAX)?;
        let clusters: Vec<Cluster> = inventory::list(t, 0, i64::MAX)?;
        Ok((vcenters, clusters))
    })?;
    for cluster in clusters {
        let vcenter = vcenters.iter().find(|one| one.id == cluster.vcenter_id);
        let Some(vcenter) = vcenter.filter(|_| cluster.state == ClusterState::Enabled) else {
            continue;
        };
        if differs(msa, vcenter, &cluster)? {
            let name = cluster.name.to_string();
            ask(msa, vcenter, &cluster)?;
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Whether vCenter has other hosts in a cluster than are known here.
fn differs(msa: &Msa, vcenter: &Vcenter, cluster: &Cluster) -> Result<bool, WatchError> {
    let failed = |fault| WatchError::Vcenter {
        cluster: cluster.name.to_string(),
        fault,
    };
    let api = msa
        .outside
        .vcenter(msa.data_dir(), vcenter)
        .map_err(failed)?;
    let found = api.clusters().map_err(failed)?;
    let Some(found) = found
        .into_iter()
        .find(|one| one.moid.as_str() == cluster.moid.as_str())
    else {
        return Ok(false); // nothing can be done about a cluster that is gone but remove it here
    };
    let theirs: BTreeSet<String> = found.hosts.iter().map(ToString::to_string).collect();
    let ours = msa.store.read(|t| super::rows::hosts(t, cluster.id))?;
    let ours: BTreeSet<String> = ours.iter().map(|host| host.moid.to_string()).collect();
    Ok(ours != theirs)
}

fn ask(msa: &Msa, vcenter: &Vcenter, cluster: &Cluster) -> Result<(), WatchError> {
    let name = format!("reconcile{}", Id::random().0.simple());
    let asked: NewExecution = serde_json::from_value(json!({
        "name": name,
        "kind": "reconcile-cluster",
        "parameters": {"vcenter": vcenter.name, "protected_cluster": cluster.name},
    }))?;
    msa.engine.submit(&Actor::system(), &asked)?;
    Ok(())
}
