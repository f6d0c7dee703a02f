//! The machines of enabled clusters, as vCenter has them: kept in step with it, by the watch and by the
//! execution `refresh-inventory`.
//!
//! Invariant: a machine is known by its instance UUID. One that is protected is never forgotten because
//! vCenter does not list it; one that is not goes with vCenter's list.

use super::hardware::Hardware;
use crate::alarms::{self, Severity};
use crate::clusters::rows;
use crate::clusters::watch::WatchError;
use crate::clusters::{Link, parameters, refused};
use crate::executions::operation::Making;
use crate::executions::{Context, Kind, Operation, StepError};
use crate::inventory::{self, Cluster, ClusterState, Entity, Vcenter, Vm};
use crate::service::Msa;
use crate::store::StoreError;
use crate::text::{self, Id, Label, Name};
use crate::vcenter::{self, VmInfo};
use rusqlite::{OptionalExtension, Transaction, params};
use serde::Deserialize;
use std::collections::BTreeSet;

/// The alarm of a protected machine that vCenter does not list, or lists as another.
pub const MISSING_ALARM: &str = "vm-missing";

/// The enabled clusters of a vCenter, each with its machines.
pub type Listing = Vec<(Cluster, Vec<VmInfo>)>;

/// What a refresh changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Machines that were not known.
    pub found: usize,
    /// Machines that are forgotten.
    pub gone: usize,
    /// Protected machines that vCenter does not list.
    pub missing: usize,
}

/// The enabled clusters of a vCenter.
pub fn enabled(t: &Transaction<'_>, vcenter: Id) -> Result<Vec<Cluster>, StoreError> {
    let all: Vec<Cluster> = inventory::list(t, 0, i64::MAX)?;
    let is_ours = |one: &Cluster| one.vcenter_id == vcenter && one.state == ClusterState::Enabled;
    Ok(all.into_iter().filter(is_ours).collect())
}

/// Asks a vCenter for the machines of enabled clusters.
pub fn ask(
    api: &dyn vcenter::Vcenter,
    clusters: Vec<Cluster>,
) -> Result<Listing, (String, vcenter::Fault)> {
    let mut listing = Vec::new();
    for cluster in clusters {
        let failed = |fault| (cluster.name.to_string(), fault);
        let moid = vcenter::Moid::try_from(&cluster.moid);
        let moid = moid.map_err(|error| failed(vcenter::Fault::Other(error.to_string())))?;
        let vms = api.vms(&moid).map_err(failed)?;
        listing.push((cluster, vms));
    }
    Ok(listing)
}

/// A machine's name as the state takes it: people name machines freely in vCenter.
fn label(name: &str) -> Result<Label, StoreError> {
    let plain = |c: char| !c.is_control() && !"\"'`<>\\;".contains(c);
    let kept: String = name
        .chars()
        .map(|c| if plain(c) { c } else { '_' })
        .take(80)
        .collect();
    let kept = match kept.trim() {
        "" => "unnamed",
        kept => kept,
    };
    let made: Result<Label, _> = kept.parse();
    made.map_err(|error| StoreError::conflict(format!("machine {name:?}: {error}")))
}

/// Writes what a vCenter listed. The same listing twice changes nothing.
pub fn take(t: &Transaction<'_>, listing: &Listing, now_ms: i64) -> Result<Changed, StoreError> {
    let mut changed = Changed::default();
    let mut listed = BTreeSet::new();
    for (cluster, vms) in listing {
        for vm in vms {
            let uuid = Id(vm.instance_uuid);
            if !listed.insert(uuid.to_string()) {
                let text = format!(
                    "machine {} ({}) of cluster {} has the instance UUID {uuid} of another machine: give it one of its own",
                    vm.name, vm.moid, cluster.name
                );
                raise(t, &format!("{} {}", cluster.name, vm.moid), &text, now_ms)?;
                continue;
            }
            if make_way(t, cluster, vm, now_ms)? {
                changed.found += usize::from(put(t, cluster, vm, now_ms)?);
            }
        }
    }
    for (cluster, _) in listing {
        for vm in of_cluster(t, cluster.id)? {
            if !listed.contains(&vm.uuid.to_string()) {
                leave(t, &vm, now_ms, &mut changed)?;
            }
        }
    }
    Ok(changed)
}

fn raise(t: &Transaction<'_>, subject: &str, text: &str, now_ms: i64) -> Result<(), StoreError> {
    let sql = "SELECT count(*) FROM alarms WHERE kind = ?1 AND subject = ?2 AND text = ?3 \
               AND cleared_at_ms IS NULL";
    let known: i64 = t.query_row(sql, params![MISSING_ALARM, subject, text], |row| row.get(0))?;
    match known {
        0 => alarms::raise(t, Severity::Critical, MISSING_ALARM, subject, text, now_ms),
        _ => Ok(()), // said already: not at every look
    }
}

/// The machines of a cluster, as the state has them.
pub fn of_cluster(t: &Transaction<'_>, cluster: Id) -> Result<Vec<Vm>, StoreError> {
    let mut statement = t.prepare("SELECT * FROM vms WHERE cluster_id = ?1 ORDER BY seq")?;
    let rows = statement.query_map([cluster], Vm::from_row)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// The machine of this instance UUID.
pub fn by_uuid(t: &Transaction<'_>, uuid: Id) -> Result<Option<Vm>, StoreError> {
    let mut statement = t.prepare("SELECT * FROM vms WHERE uuid = ?1")?;
    Ok(statement.query_row([uuid], Vm::from_row).optional()?)
}

/// Whoever had a listed machine's id in its cluster before it, and is another machine, goes. False: it
/// is protected, and must be looked at by somebody.
fn make_way(
    t: &Transaction<'_>,
    cluster: &Cluster,
    vm: &VmInfo,
    now_ms: i64,
) -> Result<bool, StoreError> {
    let sql = "SELECT * FROM vms WHERE cluster_id = ?1 AND moid = ?2 AND uuid <> ?3";
    let mut statement = t.prepare(sql)?;
    let before = statement.query_row(
        params![cluster.id, text::Moid::from(&vm.moid), Id(vm.instance_uuid)],
        Vm::from_row,
    );
    let Some(before) = before.optional()? else {
        return Ok(true);
    };
    if before.domain_id.is_none() {
        t.execute("DELETE FROM vms WHERE id = ?1", [before.id])?;
        return Ok(true);
    }
    let text = format!(
        "machine {} is protected as {}, and vCenter calls it {} now: end its protection, and protect it anew",
        before.name, before.uuid, vm.instance_uuid
    );
    raise(t, &before.uuid.to_string(), &text, now_ms)?;
    Ok(false)
}

/// Writes a machine; true: it was not known.
fn put(
    t: &Transaction<'_>,
    cluster: &Cluster,
    vm: &VmInfo,
    now_ms: i64,
) -> Result<bool, StoreError> {
    let host: Option<Id> = match &vm.host {
        None => None,
        Some(moid) => t
            .query_row(
                "SELECT id FROM hosts WHERE cluster_id = ?1 AND moid = ?2",
                params![cluster.id, text::Moid::from(moid)],
                |row| row.get(0),
            )
            .optional()?,
    };
    let (moid, name) = (text::Moid::from(&vm.moid), label(&vm.name)?);
    let hardware = Hardware::from(vm);
    let Some(known) = by_uuid(t, Id(vm.instance_uuid))? else {
        t.execute(
            "INSERT INTO vms (id, cluster_id, host_id, moid, name, uuid, hardware, created_at_ms) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            params![
                Id::random(),
                cluster.id,
                host,
                moid,
                name,
                Id(vm.instance_uuid),
                hardware,
                now_ms
            ],
        )?;
        return Ok(true);
    };
    let is_same = known.cluster_id == cluster.id
        && known.host_id == host
        && known.moid == moid
        && known.name == name
        && !known.is_missing
        && known.hardware.as_ref() == Some(&hardware);
    if is_same {
        return Ok(false);
    }
    t.execute(
        "UPDATE vms SET cluster_id = ?2, host_id = ?3, moid = ?4, name = ?5, hardware = ?6, \
         is_missing = 0 WHERE id = ?1",
        params![known.id, cluster.id, host, moid, name, hardware],
    )?;
    alarms::clear(t, MISSING_ALARM, &known.uuid.to_string(), now_ms)?;
    Ok(false)
}

/// A machine that its vCenter does not list in any enabled cluster.
fn leave(
    t: &Transaction<'_>,
    vm: &Vm,
    now_ms: i64,
    changed: &mut Changed,
) -> Result<(), StoreError> {
    if vm.domain_id.is_none() {
        t.execute("DELETE FROM vms WHERE id = ?1", [vm.id])?;
        changed.gone += 1;
        return Ok(());
    }
    changed.missing += 1;
    if vm.is_missing {
        return Ok(());
    }
    t.execute(
        "UPDATE vms SET host_id = NULL, is_missing = 1 WHERE id = ?1",
        [vm.id],
    )?;
    let text = format!(
        "machine {} is protected, and vCenter lists it in no enabled cluster: bring it back there, or end its protection",
        vm.name
    );
    raise(t, &vm.uuid.to_string(), &text, now_ms)
}

/// Looks at all vCenters that have enabled clusters, and writes what changed.
pub fn look(msa: &Msa) -> Result<(), WatchError> {
    let vcenters: Vec<Vcenter> = msa.store.read(|t| inventory::list(t, 0, i64::MAX))?;
    for vcenter in vcenters {
        let clusters = msa.store.read(|t| enabled(t, vcenter.id))?;
        let Some(first) = clusters.first() else {
            continue;
        };
        let failed = |cluster: String, fault| WatchError::Vcenter { cluster, fault };
        let api = msa.outside.vcenter(msa.data_dir(), &vcenter);
        let api = api.map_err(|fault| failed(first.name.to_string(), fault))?;
        let listing = ask(&*api, clusters).map_err(|(cluster, fault)| failed(cluster, fault))?;
        let now_ms = msa.store.now_ms();
        msa.store.record(|t| {
            // A cluster that was disabled while vCenter answered is none of ours any more.
            let now: BTreeSet<String> = enabled(t, vcenter.id)?
                .into_iter()
                .map(|cluster| cluster.id.to_string())
                .collect();
            let still = |(cluster, _): &&(Cluster, _)| now.contains(&cluster.id.to_string());
            let listing: Listing = listing.iter().filter(still).cloned().collect();
            take(t, &listing, now_ms).map(drop)
        })?;
    }
    Ok(())
}

/// The same for one vCenter, in an operation; what vCenter listed.
pub fn refresh(context: &Context, link: &Link) -> Result<Listing, StepError> {
    let clusters = context.store.read(|t| enabled(t, link.vcenter.id))?;
    let listing = ask(&*link.api, clusters).map_err(|(cluster, fault)| {
        refused(&format!("asking for the machines of cluster {cluster}"))(fault)
    })?;
    let now_ms = context.store.now_ms();
    let changed = context.store.record(|t| take(t, &listing, now_ms))?;
    let count: usize = listing.iter().map(|(_, vms)| vms.len()).sum();
    context.log(format!(
        "vCenter {}: {count} machines in {} enabled clusters; {} are new, {} are gone, {} protected ones are missing",
        link.vcenter.name,
        listing.len(),
        changed.found,
        changed.gone,
        changed.missing
    ))?;
    Ok(listing)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    vcenter: Option<Name>,
}

struct Refresh(Parameters);

fn make(making: &Making<'_>) -> Result<Box<dyn Operation>, String> {
    Ok(Box::new(Refresh(parameters(making)?)))
}

/// The kind `refresh-inventory`.
pub const KIND: Kind = Kind {
    about: "brings the machines of enabled clusters, with their disks, in step with vCenter; the server does so by itself from time to time",
    for_admins: false,
    make,
};

impl Operation for Refresh {
    fn steps(&self) -> &'static [&'static str] {
        &["refresh"]
    }

    fn run(&mut self, _step: usize, context: &Context) -> Result<(), StepError> {
        context.check()?;
        let link = Link::open(context, self.0.vcenter.as_ref())?;
        for (cluster, vms) in refresh(context, &link)? {
            let ready = context.store.read(|t| rows::hosts(t, cluster.id))?.len();
            context.log(format!(
                "cluster {}: {} machines, {ready} hosts",
                cluster.name,
                vms.len()
            ))?;
        }
        Ok(())
    }

    fn undo(&mut self, _step: usize, _context: &Context) -> Result<(), StepError> {
        Ok(()) // it is as vCenter has it
    }
}
