//! Clusters and hosts in the state, as operations change them.
//!
//! Invariant: what a host's certificates may do ends in the transaction in which the host loses the
//! component; a host that is gone from its cluster leaves nothing behind.

use super::verify::{Verdict, Verdicts};
use crate::alarms::{self, Severity};
use crate::certificates::{self, CertificateRole};
use crate::inventory::{Cluster, ClusterState, Entity, Host, HostState, Vcenter};
use crate::packages::Package;
use crate::store::StoreError;
use crate::text::{self, Address, Id, Label, VersionText};
use crate::vcenter::{ClusterInfo, HostInfo, Moid};
use rusqlite::{OptionalExtension, Transaction, params};

/// The alarm of a host that should have the component and does not work.
pub const HOST_ALARM: &str = "host-not-ready";

/// The cluster with this id in that vCenter.
pub fn cluster(
    t: &Transaction<'_>,
    vcenter: Id,
    moid: &Moid,
) -> Result<Option<Cluster>, StoreError> {
    let sql = "SELECT * FROM clusters WHERE vcenter_id = ?1 AND moid = ?2";
    let found = t
        .prepare(sql)?
        .query_row(params![vcenter, text::Moid::from(moid)], Cluster::from_row);
    Ok(found.optional()?)
}

/// The same; made, if it is not there, and named as vCenter names it now.
pub fn ensure_cluster(
    t: &Transaction<'_>,
    vcenter: &Vcenter,
    info: &ClusterInfo,
    now_ms: i64,
) -> Result<Cluster, StoreError> {
    let name: Label = info.name.parse().map_err(|error| {
        StoreError::conflict(format!(
            "cluster {:?} of vCenter {}: {error}: rename it there",
            info.name, vcenter.name
        ))
    })?;
    t.execute(
        "INSERT INTO clusters (id, vcenter_id, moid, name, created_at_ms) VALUES (?1, ?2, ?3, ?4, ?5) \
         ON CONFLICT (vcenter_id, moid) DO UPDATE SET name = excluded.name",
        params![Id::random(), vcenter.id, text::Moid::from(&info.moid), name, now_ms],
    )?;
    let found = cluster(t, vcenter.id, &info.moid)?;
    found.ok_or_else(|| StoreError::not_found("cluster", &info.moid))
}

/// The hosts of a cluster.
pub fn hosts(t: &Transaction<'_>, cluster: Id) -> Result<Vec<Host>, StoreError> {
    let mut statement = t.prepare("SELECT * FROM hosts WHERE cluster_id = ?1 ORDER BY seq")?;
    let rows = statement.query_map([cluster], Host::from_row)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// A host of a cluster; made, if it is not there.
pub fn ensure_host(
    t: &Transaction<'_>,
    cluster: &Cluster,
    info: &HostInfo,
    now_ms: i64,
) -> Result<(), StoreError> {
    let name: Address = info.name.parse().map_err(|error| {
        StoreError::conflict(format!(
            "host {:?} of cluster {}: {error}",
            info.name, cluster.name
        ))
    })?;
    let moid = text::Moid::from(&info.moid);
    let version = VersionText::from(&info.version);
    let elsewhere: Option<String> = t
        .query_row(
            "SELECT clusters.name FROM hosts JOIN clusters ON clusters.id = hosts.cluster_id \
             WHERE hosts.name = ?1 AND NOT (hosts.cluster_id = ?2 AND hosts.moid = ?3)",
            params![name, cluster.id, moid],
            |row| row.get(0),
        )
        .optional()?;
    if let Some(other) = elsewhere {
        return Err(StoreError::conflict(format!(
            "host {name} is known here as a host of cluster {other}: reconcile that cluster, or remove the host there, first"
        )));
    }
    t.execute(
        "INSERT INTO hosts (id, cluster_id, moid, name, version, created_at_ms) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6) \
         ON CONFLICT (cluster_id, moid) DO UPDATE SET name = excluded.name, version = excluded.version",
        params![Id::random(), cluster.id, moid, name, version, now_ms],
    )?;
    Ok(())
}

/// Sets whether the component is on a cluster.
pub fn set_cluster(
    t: &Transaction<'_>,
    cluster: Id,
    state: ClusterState,
    package: Option<Id>,
) -> Result<(), StoreError> {
    t.execute(
        "UPDATE clusters SET state = ?2, package_id = ?3 WHERE id = ?1",
        params![cluster, state, package],
    )?;
    Ok(())
}

/// Sets whether the component is on a host, and what is wrong with it.
pub fn set_host(
    t: &Transaction<'_>,
    host: Id,
    state: HostState,
    problem: Option<&str>,
) -> Result<(), StoreError> {
    t.execute(
        "UPDATE hosts SET state = ?2, problem = ?3 WHERE id = ?1",
        params![host, state, problem],
    )?;
    Ok(())
}

/// Writes what was seen of a host: ready, or failed with its reason and an alarm.
pub fn settle_host(
    t: &Transaction<'_>,
    host: &Host,
    verdict: &Verdict,
    package: &Package,
    now_ms: i64,
) -> Result<(), StoreError> {
    let subject = host.name.to_string();
    match verdict {
        Verdict::Good => {
            set_host(t, host.id, HostState::Ready, None)?;
            t.execute(
                "UPDATE hosts SET component_version = ?2 WHERE id = ?1",
                params![host.id, package.version],
            )?;
            alarms::clear(t, HOST_ALARM, &subject, now_ms)
        }
        Verdict::Bad(why) => {
            set_host(t, host.id, HostState::Failed, Some(why))?;
            let text = format!("host {subject}: {why}");
            alarms::raise(t, Severity::Critical, HOST_ALARM, &subject, &text, now_ms)
        }
    }
}

/// Writes what was seen of all hosts of a cluster. One that nothing was seen of has left the cluster.
/// True: certificates were taken back.
pub fn settle_hosts(
    t: &Transaction<'_>,
    cluster: Id,
    verdicts: &Verdicts,
    package: &Package,
    now_ms: i64,
) -> Result<bool, StoreError> {
    let mut revoked = false;
    for host in hosts(t, cluster)? {
        match verdicts.get(host.moid.as_str()) {
            Some(verdict) => settle_host(t, &host, verdict, package, now_ms)?,
            None => {
                remove_host(t, &host, now_ms)?;
                revoked = true;
            }
        }
    }
    Ok(revoked)
}

/// Takes all that a host may do, and what is known of its component.
pub fn clean_host(t: &Transaction<'_>, host: &Host, now_ms: i64) -> Result<(), StoreError> {
    disenrol(t, host.id, now_ms)?;
    t.execute(
        "UPDATE hosts SET state = 'absent', problem = NULL, component_version = NULL, \
         drva_id = NULL WHERE id = ?1",
        [host.id],
    )?;
    alarms::clear(t, HOST_ALARM, host.name.as_str(), now_ms)
}

/// Takes back a host's certificates and the tokens by which it could get one.
pub fn disenrol(t: &Transaction<'_>, host: Id, now_ms: i64) -> Result<(), StoreError> {
    certificates::revoke_all(t, CertificateRole::Host, host, now_ms)?;
    t.execute("DELETE FROM enrolments WHERE entity_id = ?1", [host])?;
    Ok(())
}

/// A host left its cluster.
pub fn remove_host(t: &Transaction<'_>, host: &Host, now_ms: i64) -> Result<(), StoreError> {
    clean_host(t, host, now_ms)?;
    t.execute(
        "UPDATE vms SET host_id = NULL WHERE host_id = ?1",
        [host.id],
    )?;
    t.execute("DELETE FROM hosts WHERE id = ?1", [host.id])?;
    let text = "it left its cluster: its certificates are revoked";
    alarms::event(t, "host-left", host.name.as_str(), text, now_ms)
}

/// Virtual machines of a cluster that are protected, by name.
pub fn protected(t: &Transaction<'_>, cluster: Id) -> Result<Vec<String>, StoreError> {
    let sql = "SELECT name FROM vms WHERE cluster_id = ?1 AND domain_id IS NOT NULL ORDER BY name";
    let mut statement = t.prepare(sql)?;
    let rows = statement.query_map([cluster], |row| row.get(0))?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Whether a host has a certificate that is in force.
pub fn is_enrolled(t: &Transaction<'_>, host: Id, now_ms: i64) -> Result<bool, StoreError> {
    let found: i64 = t.query_row(
        "SELECT count(*) FROM certificates WHERE role = 'host' AND entity_id = ?1 \
         AND revoked_at_ms IS NULL AND expires_at_ms > ?2",
        params![host, now_ms],
        |row| row.get(0),
    )?;
    Ok(found > 0)
}

/// The appliance that a host without one gets: the one named, else the one with the fewest hosts.
pub fn appliance_for(
    t: &Transaction<'_>,
    asked: Option<&str>,
) -> Result<Option<(Id, String)>, StoreError> {
    let sql = "SELECT id, name FROM drvas WHERE ?1 IS NULL OR name = ?1 \
               ORDER BY (SELECT count(*) FROM hosts WHERE drva_id = drvas.id), seq LIMIT 1";
    let found = t.query_row(sql, [asked], |row| Ok((row.get(0)?, row.get(1)?)));
    let found = found.optional()?;
    match (asked, &found) {
        (Some(name), None) => Err(StoreError::not_found("appliance", name)),
        _ => Ok(found),
    }
}

/// Assigns an appliance to a host.
pub fn assign(t: &Transaction<'_>, host: Id, drva: Id) -> Result<(), StoreError> {
    t.execute(
        "UPDATE hosts SET drva_id = ?2 WHERE id = ?1",
        params![host, drva],
    )?;
    Ok(())
}

/// Takes an assignment back, to what it was; the version of a component that goes is forgotten too.
pub fn unassign(t: &Transaction<'_>, host: Id, was: Option<Id>) -> Result<(), StoreError> {
    t.execute(
        "UPDATE hosts SET drva_id = ?2, component_version = NULL WHERE id = ?1",
        params![host, was],
    )?;
    Ok(())
}
