//! Clusters and hosts in the state, as operations change them.
//!
//! Invariant: what a host's certificates may do ends in the transaction in which the host loses the
//! component, or is found to have lost it; a host that is gone from its cluster leaves nothing behind; and
//! a host is gone only if vCenter was asked twice, at different times, and did not list it.

use super::verify::{Verdict, Verdicts};
use crate::alarms::{self, Severity};
use crate::certificates::{self, CertificateRole};
use crate::clock::SECOND_MS;
use crate::inventory::{Cluster, ClusterState, Entity, Host, HostState, Vcenter};
use crate::packages::Package;
use crate::store::StoreError;
use crate::text::{self, Address, Id, Label, VersionText};
use crate::vcenter::{ClusterInfo, HostInfo, Moid};
use rusqlite::{OptionalExtension, Transaction, params};
use std::collections::BTreeSet;

/// The alarm of a host that should have the component and does not work.
pub const HOST_ALARM: &str = "host-not-ready";
/// The alarm of a host that works, and has no certificate.
pub const CERTIFICATE_ALARM: &str = "host-without-certificate";
/// The alarm of a host that vCenter does not list in its cluster any more.
pub const MISSED_ALARM: &str = "host-not-listed";
/// The alarm of an enabled cluster that vCenter does not list, or lists without any host.
pub const CLUSTER_ALARM: &str = "cluster-not-listed";

/// A host that vCenter does not list for so long, whenever it is asked, has left.
pub const GONE_AFTER_MS: i64 = 20 * SECOND_MS;

/// What is wrong with a cluster that vCenter lists without any host.
pub const NO_HOSTS: &str = "vCenter lists no host in it, and some are known here: nothing of them is changed. Look at vCenter and at the rights of its user; if all of them have left, disable the cluster with leave_unreachable";

/// What is wrong with a host that is as it should be, but for that.
pub const NO_CERTIFICATE: &str = "it has no certificate, so that its daemon sends nothing (unless its own configuration has it send in plain text): make a token for it (POST /api/v1/enrolments) and lay it there";

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

/// Sets a host to failed, with its reason and an alarm.
pub fn fail_host(
    t: &Transaction<'_>,
    host: &Host,
    why: &str,
    now_ms: i64,
) -> Result<(), StoreError> {
    set_host(t, host.id, HostState::Failed, Some(why))?;
    let subject = host.name.as_str();
    alarms::clear(t, CERTIFICATE_ALARM, subject, now_ms)?;
    let text = format!("host {subject}: {why}");
    alarms::raise(t, Severity::Critical, HOST_ALARM, subject, &text, now_ms)
}

/// A host that is to have the component has lost it, and with it its key and certificate: what they may
/// do ends. It is not ready before it is looked at again.
pub fn strip_host(
    t: &Transaction<'_>,
    host: &Host,
    why: &str,
    now_ms: i64,
) -> Result<(), StoreError> {
    disenrol(t, host.id, now_ms)?;
    fail_host(t, host, why, now_ms)
}

/// A host works: it is ready; without a certificate that is said, with an alarm. True: it has one.
fn host_works(t: &Transaction<'_>, host: &Host, now_ms: i64) -> Result<bool, StoreError> {
    let is_enrolled = is_enrolled(t, host.id, now_ms)?;
    let subject = host.name.as_str();
    alarms::clear(t, HOST_ALARM, subject, now_ms)?;
    if is_enrolled {
        set_host(t, host.id, HostState::Ready, None)?;
        alarms::clear(t, CERTIFICATE_ALARM, subject, now_ms)?;
    } else {
        set_host(t, host.id, HostState::Ready, Some(NO_CERTIFICATE))?;
        let text = format!("host {subject}: {NO_CERTIFICATE}");
        let kind = CERTIFICATE_ALARM;
        alarms::raise(t, Severity::Warning, kind, subject, &text, now_ms)?;
    }
    Ok(is_enrolled)
}

/// Hosts of a cluster that got their certificate since they were looked at, or lost it: what is said of
/// them is set right.
pub fn settle_certificates(
    t: &Transaction<'_>,
    cluster: Id,
    now_ms: i64,
) -> Result<(), StoreError> {
    for host in hosts(t, cluster)? {
        let is_said = host.problem.as_deref() == Some(NO_CERTIFICATE);
        let is_ready = host.state == HostState::Ready;
        if is_ready && is_said == is_enrolled(t, host.id, now_ms)? {
            host_works(t, &host, now_ms)?;
        }
    }
    Ok(())
}

/// What came of all hosts of a cluster.
#[derive(Debug, Default)]
pub struct Settled {
    /// Certificates were taken back.
    pub revoked: bool,
    /// So many are ready.
    pub ready: usize,
    /// So many of these have no certificate.
    pub without_certificate: usize,
    /// Lines for the output.
    pub lines: Vec<String>,
}

/// Writes what was seen of all hosts of a cluster: ready, or failed with the reason and an alarm. Of the
/// others those that are `gone` are removed, and the rest stay as they are.
pub fn settle_hosts(
    t: &Transaction<'_>,
    cluster: Id,
    verdicts: &Verdicts,
    gone: &BTreeSet<Id>,
    package: &Package,
    now_ms: i64,
) -> Result<Settled, StoreError> {
    let mut settled = Settled::default();
    for host in hosts(t, cluster)? {
        match verdicts.get(host.moid.as_str()) {
            Some(Verdict::Good) => {
                let is_enrolled = host_works(t, &host, now_ms)?;
                t.execute(
                    "UPDATE hosts SET component_version = ?2 WHERE id = ?1",
                    params![host.id, package.version],
                )?;
                settled.ready += 1;
                settled.without_certificate += usize::from(!is_enrolled);
            }
            Some(Verdict::Bad(why)) => fail_host(t, &host, why, now_ms)?,
            None if gone.contains(&host.id) => {
                remove_host(t, &host, now_ms)?;
                settled.revoked = true;
                settled.lines.push(format!(
                    "host {} left the cluster: its certificates are revoked",
                    host.name
                ));
            }
            None => settled.lines.push(format!(
                "host {}: vCenter does not list it in the cluster; nothing of it is changed before vCenter was asked once more, later",
                host.name
            )),
        }
    }
    Ok(settled)
}

/// How the hosts that vCenter lists in a cluster differ from those that are known.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Some are listed that are not known.
    pub has_joined: bool,
    /// These are not listed, and were not when vCenter was asked before, some time ago.
    pub gone: BTreeSet<Id>,
}

fn cluster_subject(cluster: &Cluster) -> String {
    format!("{} ({})", cluster.name, cluster.moid)
}

/// Notes that vCenter does not list an enabled cluster, or lists it without any host: rather than that all
/// hosts left at once, something is wrong with what it lists.
pub fn miss_cluster(
    t: &Transaction<'_>,
    cluster: &Cluster,
    why: &str,
    now_ms: i64,
) -> Result<(), StoreError> {
    let subject = cluster_subject(cluster);
    if alarms::is_open(t, CLUSTER_ALARM, &subject)? {
        return Ok(());
    }
    let text = format!("cluster {subject}: {why}");
    let severity = Severity::Critical;
    alarms::raise(t, severity, CLUSTER_ALARM, &subject, &text, now_ms)
}

/// Nothing is wrong with what vCenter lists, or nobody cares any more.
pub fn find_cluster(t: &Transaction<'_>, cluster: &Cluster, now_ms: i64) -> Result<(), StoreError> {
    alarms::clear(t, CLUSTER_ALARM, &cluster_subject(cluster), now_ms)
}

/// Compares the hosts of a cluster with those that vCenter lists now, and notes since when it does not
/// list one. Nothing, and an alarm: vCenter lists none at all, and some are known.
pub fn compare(
    t: &Transaction<'_>,
    cluster: &Cluster,
    listed: &BTreeSet<String>,
    now_ms: i64,
) -> Result<Option<Difference>, StoreError> {
    let known = hosts(t, cluster.id)?;
    if listed.is_empty() && !known.is_empty() {
        miss_cluster(t, cluster, NO_HOSTS, now_ms)?;
        return Ok(None);
    }
    find_cluster(t, cluster, now_ms)?;
    let mut difference = Difference::default();
    let is_known = |moid: &String| known.iter().any(|host| host.moid.as_str() == moid);
    difference.has_joined = !listed.iter().all(is_known);
    for host in known {
        let sql = "SELECT missed_at_ms FROM hosts WHERE id = ?1";
        let missed: Option<i64> = t.query_row(sql, [host.id], |row| row.get(0))?;
        match (listed.contains(host.moid.as_str()), missed) {
            (true, None) => {}
            (true, Some(_)) => {
                set_missed(t, host.id, None)?;
                alarms::clear(t, MISSED_ALARM, host.name.as_str(), now_ms)?;
            }
            (false, None) => {
                set_missed(t, host.id, Some(now_ms))?;
                let name = host.name.as_str();
                let text = format!(
                    "host {name}: vCenter does not list it in cluster {} any more; if it does not either when it is asked next, the host has left, and its certificates are revoked",
                    cluster.name
                );
                alarms::raise(t, Severity::Warning, MISSED_ALARM, name, &text, now_ms)?;
            }
            (false, Some(since_ms)) if now_ms >= since_ms + GONE_AFTER_MS => {
                difference.gone.insert(host.id);
            }
            (false, Some(_)) => {}
        }
    }
    Ok(Some(difference))
}

fn set_missed(t: &Transaction<'_>, host: Id, at_ms: Option<i64>) -> Result<(), StoreError> {
    t.execute(
        "UPDATE hosts SET missed_at_ms = ?2 WHERE id = ?1",
        params![host, at_ms],
    )?;
    Ok(())
}

/// Takes all that a host may do, and what is known of its component.
pub fn clean_host(t: &Transaction<'_>, host: &Host, now_ms: i64) -> Result<(), StoreError> {
    disenrol(t, host.id, now_ms)?;
    t.execute(
        "UPDATE hosts SET state = 'absent', problem = NULL, component_version = NULL, \
         drva_id = NULL WHERE id = ?1",
        [host.id],
    )?;
    let name = host.name.as_str();
    alarms::clear(t, HOST_ALARM, name, now_ms)?;
    alarms::clear(t, CERTIFICATE_ALARM, name, now_ms)?;
    alarms::clear(t, MISSED_ALARM, name, now_ms)
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

/// The filter's properties for the disks of a machine: those of the domain that it is in, if it is in one.
pub fn domain_of(
    t: &Transaction<'_>,
    cluster: Id,
    vm: &Moid,
) -> Result<Vec<(String, String)>, StoreError> {
    let sql = "SELECT domains.name, domains.ack FROM vms JOIN domains ON domains.id = domain_id \
               WHERE cluster_id = ?1 AND moid = ?2";
    let found = t.query_row(sql, params![cluster, text::Moid::from(vm)], |row| {
        let (name, ack): (String, String) = (row.get(0)?, row.get(1)?);
        Ok(vec![
            ("jetdr.domain".to_owned(), name),
            ("jetdr.ack".to_owned(), ack),
        ])
    });
    Ok(found.optional()?.unwrap_or_default())
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
