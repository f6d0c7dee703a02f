//! Looks whether the hosts of enabled clusters are those that are known here, and asks for a
//! `reconcile-cluster` where they are not.
//!
//! Invariant: it asks for nothing while an execution waits or runs, and changes no cluster itself: it only
//! notes which hosts vCenter does not list, and which have no certificate, with an alarm for each. A host
//! is taken for gone only if it was missed in an earlier look too.

use super::rows;
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
        let now_ms = msa.store.now_ms();
        msa.store
            .record(|t| rows::settle_certificates(t, cluster.id, now_ms))?;
        if differs(msa, vcenter, &cluster, now_ms)? {
            let name = cluster.name.to_string();
            ask(msa, vcenter, &cluster)?;
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Whether hosts joined a cluster, or are gone for good.
fn differs(
    msa: &Msa,
    vcenter: &Vcenter,
    cluster: &Cluster,
    now_ms: i64,
) -> Result<bool, WatchError> {
    let failed = |fault| WatchError::Vcenter {
        cluster: cluster.name.to_string(),
        fault,
    };
    let api = msa
        .outside
        .vcenter(msa.data_dir(), vcenter)
        .map_err(failed)?;
    let found = api.clusters().map_err(failed)?;
    let found = found
        .into_iter()
        .find(|one| one.moid.as_str() == cluster.moid.as_str());
    let Some(found) = found else {
        let why = "vCenter does not list it any more: look at vCenter and at the rights of its user; nothing is changed here";
        msa.store
            .record(|t| rows::miss_cluster(t, cluster, why, now_ms))?;
        return Ok(false);
    };
    let listed: BTreeSet<String> = found.hosts.iter().map(ToString::to_string).collect();
    let difference = msa
        .store
        .record(|t| rows::compare(t, cluster, &listed, now_ms))?;
    Ok(difference.is_some_and(|one| one.has_joined || !one.gone.is_empty()))
}

fn ask(msa: &Msa, vcenter: &Vcenter, cluster: &Cluster) -> Result<(), WatchError> {
    let name = format!("reconcile{}", Id::random().0.simple());
    let asked: NewExecution = serde_json::from_value(json!({
        "name": name,
        "kind": "reconcile-cluster",
        "parameters": {"vcenter": vcenter.name, "protected_cluster": cluster.moid},
    }))?;
    msa.engine.submit(&Actor::system(), &asked)?;
    Ok(())
}
