//! Which host sends to which appliance, and for which virtual machines a host may speak.
//!
//! Invariant: an appliance is told of its own domains only, and of each machine only by the hosts of its
//! cluster. A machine is in one domain at most.

use crate::inventory::{self, Domain, Drva, Host, Vm};
use crate::store::StoreError;
use crate::text::Id;
use rusqlite::{Row, Transaction, params};
use serde::Serialize;
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// A cluster's hosts, each of which may run any of its machines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct AssignedCluster {
    /// Its id.
    pub id: Id,
    /// Its hosts.
    pub hosts: Vec<Id>,
}

/// A machine that is protected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct AssignedVm {
    /// Its instance UUID.
    pub uuid: Id,
    /// Its cluster, whose hosts may speak for it.
    pub cluster: Id,
    /// Its protection is paused: nobody may speak for it now, and cuts are made without it.
    pub paused: bool,
}

/// A domain that the appliance replicates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct AssignedDomain {
    /// Its name.
    pub name: String,
    /// Its machines.
    pub vms: Vec<AssignedVm>,
}

/// What an appliance takes, and from whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Assignments {
    /// The clusters of those machines.
    pub clusters: Vec<AssignedCluster>,
    /// Its domains.
    pub domains: Vec<AssignedDomain>,
}

/// Rows of two texts and an id, or the like, in the order asked for.
fn rows<T>(
    t: &Transaction<'_>,
    sql: &str,
    of: Id,
    take: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
) -> Result<Vec<T>, StoreError> {
    let mut statement = t.prepare(sql)?;
    let found = statement.query_map([of], take)?;
    Ok(found.collect::<rusqlite::Result<_>>()?)
}

/// What this appliance takes, and from whom. The same state gives the same document.
pub fn of_appliance(t: &Transaction<'_>, drva: Id) -> Result<Assignments, StoreError> {
    let named = "SELECT name FROM domains WHERE drva_id = ?1 ORDER BY seq";
    let names: Vec<String> = rows(t, named, drva, |row| row.get(0))?;
    let mut vms: BTreeMap<String, Vec<AssignedVm>> = BTreeMap::new();
    let assigned = "SELECT d.name, v.uuid, v.cluster_id, v.is_paused FROM vms v \
                    JOIN domains d ON d.id = v.domain_id WHERE d.drva_id = ?1 ORDER BY v.seq";
    for (name, vm) in rows(t, assigned, drva, |row| {
        let vm = AssignedVm {
            uuid: row.get(1)?,
            cluster: row.get(2)?,
            paused: row.get(3)?,
        };
        Ok((row.get(0)?, vm))
    })? {
        vms.entry(name).or_default().push(vm);
    }
    let hosts = "SELECT c.id, h.id FROM clusters c LEFT JOIN hosts h ON h.cluster_id = c.id \
                 WHERE c.id IN (SELECT v.cluster_id FROM vms v JOIN domains d ON d.id = v.domain_id \
                                WHERE d.drva_id = ?1) ORDER BY c.seq, h.seq";
    let mut clusters: Vec<AssignedCluster> = Vec::new();
    for (id, host) in rows(t, hosts, drva, |row| {
        Ok((row.get::<_, Id>(0)?, row.get::<_, Option<Id>>(1)?))
    })? {
        if clusters.last().is_none_or(|last| last.id != id) {
            let hosts = Vec::new();
            clusters.push(AssignedCluster { id, hosts });
        }
        if let Some(last) = clusters.last_mut() {
            last.hosts.extend(host);
        }
    }
    let domains = names.into_iter().map(|name| {
        let vms = vms.remove(&name).unwrap_or_default();
        AssignedDomain { name, vms }
    });
    Ok(Assignments {
        clusters,
        domains: domains.collect(),
    })
}

/// The appliance that a host sends to.
pub fn of_host(t: &Transaction<'_>, host: Id) -> Result<Drva, StoreError> {
    let host: Host = inventory::get(t, host)?;
    let drva = host
        .drva_id
        .ok_or_else(|| StoreError::not_found("appliance of host", &host.name))?;
    inventory::get(t, drva)
}

/// Gives a host its appliance, or none.
pub fn set_appliance(t: &Transaction<'_>, host: Id, drva: Option<Id>) -> Result<Host, StoreError> {
    inventory::get::<Host>(t, host)?;
    if let Some(drva) = drva {
        inventory::get::<Drva>(t, drva)?;
    }
    t.execute(
        "UPDATE hosts SET drva_id = ?2 WHERE id = ?1",
        params![host, drva],
    )?;
    inventory::get(t, host)
}

/// Puts a machine into a domain, or into none.
pub fn set_domain(
    t: &Transaction<'_>,
    vm: Id,
    domain: Option<Id>,
    now_ms: i64,
) -> Result<Vm, StoreError> {
    let known: Vm = inventory::get(t, vm)?;
    if known.domain_id == domain {
        return Ok(known);
    }
    if let (Some(_), Some(before)) = (domain, known.domain_id) {
        let before: Domain = inventory::get(t, before)?;
        return Err(StoreError::conflict(format!(
            "{} is in domain {} already: take it out of that first",
            known.name, before.name
        )));
    }
    if let Some(domain) = domain {
        inventory::get::<Domain>(t, domain)?;
    }
    let state = if domain.is_some() {
        "initializing"
    } else {
        "unprotected"
    };
    t.execute(
        "UPDATE vms SET domain_id = ?2, state = ?3, state_since_ms = ?4 WHERE id = ?1",
        params![vm, domain, state, now_ms],
    )?;
    inventory::get(t, vm)
}
