//! What stands in the way of protecting machines, all of it at once, each with its name.
//!
//! Invariant: nothing is changed by looking; a machine that is found fit here was seen in vCenter just now.

use super::hardware::Hardware;
use super::{machines, report};
use crate::executions::{Context, StepError};
use crate::inventory::{self, Cluster, ClusterState, Domain, Drva, Host, HostState, Vm};
use crate::store::StoreError;
use crate::text::{Id, Label, words};
use crate::vcenter::VmInfo;
use rusqlite::{Transaction, params};
use std::fmt;
use vib_packaging::component;

words! {
    /// What kind of thing is in the way.
    FindingKind {
        /// vCenter has no such machine.
        VmUnknown = "vm-unknown",
        /// Several machines have the name.
        VmAmbiguous = "vm-ambiguous",
        /// Its cluster is not enabled.
        ClusterNotEnabled = "cluster-not-enabled",
        /// Its host does not have the component, or it does not work.
        HostNotReady = "host-not-ready",
        /// Its host sends to another appliance than the domain's, or to none.
        HostAppliance = "host-appliance",
        /// It is protected in another domain.
        AlreadyProtected = "already-protected",
        /// It has no disks.
        NoDisks = "no-disks",
        /// Other machines may write a disk of it too.
        SharedDisk = "shared-disk",
        /// A disk is a physical-mode raw device mapping.
        PhysicalRdm = "physical-rdm",
        /// It has snapshots.
        HasSnapshots = "has-snapshots",
        /// A disk has the filter already, and not from here.
        FilterPresent = "filter-present",
        /// The domain's appliance has no certificate in force.
        ApplianceNotEnrolled = "appliance-not-enrolled",
        /// The domain's appliance does not report.
        ApplianceSilent = "appliance-silent",
    }
}

/// Something that stands in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What kind of thing.
    pub kind: FindingKind,
    /// What, where, and what to do.
    pub text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]", self.text, self.kind)
    }
}

/// Writes what was found to the output; an error with all of it, if it is anything.
pub fn report_all(context: &Context, findings: &[Finding]) -> Result<(), StepError> {
    for finding in findings {
        context.log(finding.to_string())?;
    }
    match findings {
        [] => Ok(()),
        all => {
            let all: Vec<String> = all.iter().map(Finding::to_string).collect();
            Err(StepError::failed(all.join("; ")))
        }
    }
}

/// A machine that was asked for, as vCenter and the state have it.
pub struct Chosen {
    /// As the state has it, in step with vCenter.
    pub vm: Vm,
    /// As vCenter lists it.
    pub info: VmInfo,
}

/// Whether a machine is meant by this word: its instance UUID, its id in vCenter, or its name.
fn is_meant(vm: &VmInfo, word: &str) -> bool {
    let by_uuid = uuid::Uuid::try_parse(word).is_ok_and(|uuid| uuid == vm.instance_uuid);
    by_uuid || vm.moid.as_str() == word || vm.name == word
}

/// Finds the machines that are asked for among those of enabled clusters. `elsewhere`: those of other
/// clusters, by their cluster's name.
pub fn choose(
    context: &Context,
    listing: &machines::Listing,
    elsewhere: &[(String, Vec<VmInfo>)],
    asked: &[Label],
    findings: &mut Vec<Finding>,
) -> Result<Vec<Chosen>, StepError> {
    let mut chosen: Vec<Chosen> = Vec::new();
    for word in asked {
        let word = word.as_str();
        let all = listing.iter().flat_map(|(_, vms)| vms);
        let found: Vec<&VmInfo> = all.filter(|vm| is_meant(vm, word)).collect();
        match found.as_slice() {
            [info] => {
                let row = context
                    .store
                    .read(|t| machines::by_uuid(t, Id(info.instance_uuid)))?;
                // An alarm says why it could not be written.
                let vm = row.ok_or_else(|| {
                    StepError::failed(format!(
                        "machine {word} could not be taken into the inventory: see the alarms of kind {}",
                        machines::MISSING_ALARM
                    ))
                })?;
                if !chosen.iter().any(|one| one.vm.id == vm.id) {
                    let info = (*info).clone();
                    chosen.push(Chosen { vm, info });
                }
            }
            [] => findings.push(nowhere(word, elsewhere)),
            several => {
                let uuids: Vec<String> = several
                    .iter()
                    .map(|vm| format!("{} ({})", vm.instance_uuid, vm.moid))
                    .collect();
                findings.push(Finding {
                    kind: FindingKind::VmAmbiguous,
                    text: format!(
                        "machine {word}: {} machines are called so: name one by its instance UUID: {}",
                        several.len(),
                        uuids.join(", ")
                    ),
                });
            }
        }
    }
    Ok(chosen)
}

fn nowhere(word: &str, elsewhere: &[(String, Vec<VmInfo>)]) -> Finding {
    let in_cluster = elsewhere
        .iter()
        .find(|(_, vms)| vms.iter().any(|vm| is_meant(vm, word)));
    match in_cluster {
        Some((cluster, _)) => Finding {
            kind: FindingKind::ClusterNotEnabled,
            text: format!(
                "machine {word}: its cluster {cluster} is not enabled: enable-cluster first"
            ),
        },
        None => Finding {
            kind: FindingKind::VmUnknown,
            text: format!(
                "machine {word}: vCenter has no machine of this name, instance UUID or id: correct it"
            ),
        },
    }
}

/// What is wrong with a machine for this domain.
pub fn of_machine(
    t: &Transaction<'_>,
    chosen: &Chosen,
    domain: &Domain,
    findings: &mut Vec<Finding>,
) -> Result<(), StoreError> {
    let vm = &chosen.vm;
    let mut find = |kind, text: String| {
        let text = format!("machine {}: {text}", vm.name);
        findings.push(Finding { kind, text });
    };
    let cluster: Cluster = inventory::get(t, vm.cluster_id)?;
    if cluster.state != ClusterState::Enabled {
        let state = cluster.state;
        let text = format!(
            "its cluster {} is {state}: enable-cluster first",
            cluster.name
        );
        find(FindingKind::ClusterNotEnabled, text);
    }
    match vm.domain_id {
        Some(other) if other != domain.id => {
            let other: Domain = inventory::get(t, other)?;
            let text = format!(
                "it is protected in domain {} already: unprotect-vm it first",
                other.name
            );
            find(FindingKind::AlreadyProtected, text);
        }
        _ => {}
    }
    of_host(t, chosen, domain, &mut find)?;
    of_disks(chosen, vm.domain_id.is_some(), &mut find);
    Ok(())
}

fn of_host(
    t: &Transaction<'_>,
    chosen: &Chosen,
    domain: &Domain,
    find: &mut impl FnMut(FindingKind, String),
) -> Result<(), StoreError> {
    let Some(host) = chosen.vm.host_id else {
        let on = chosen.info.host.as_ref();
        let on = on.map_or_else(|| "none".to_owned(), ToString::to_string);
        let text = format!("its host ({on}) is not known here: resolve-cluster");
        find(FindingKind::HostNotReady, text);
        return Ok(());
    };
    let host: Host = inventory::get(t, host)?;
    if host.state != HostState::Ready {
        let why = host.problem.as_deref().unwrap_or("resolve-cluster");
        let text = format!("its host {} is {}: {why}", host.name, host.state);
        find(FindingKind::HostNotReady, text);
    }
    if host.drva_id != Some(domain.drva_id) {
        let wanted: Drva = inventory::get(t, domain.drva_id)?;
        let now = match host.drva_id {
            Some(other) => inventory::get::<Drva>(t, other)?.name.to_string(),
            None => "none".into(),
        };
        let text = format!(
            "its host {} sends to appliance {now}, domain {} is of {}: PUT /hosts/{}/appliance, or choose a domain of that appliance",
            host.name, domain.name, wanted.name, host.id
        );
        find(FindingKind::HostAppliance, text);
    }
    Ok(())
}

fn of_disks(chosen: &Chosen, is_protected: bool, find: &mut impl FnMut(FindingKind, String)) {
    let hardware = Hardware::from(&chosen.info);
    if hardware.disks.is_empty() {
        find(FindingKind::NoDisks, "it has no disks".into());
    }
    if hardware.has_snapshots {
        let text =
            "it has snapshots: vCenter does not change its disks' policy then; delete them".into();
        find(FindingKind::HasSnapshots, text);
    }
    for disk in &hardware.disks {
        if disk.is_shared {
            let text = format!(
                "{} is shared with other machines: shared disks cannot be protected",
                disk.label
            );
            find(FindingKind::SharedDisk, text);
        }
        if disk.is_physical_rdm {
            let text = format!(
                "{} is a physical-mode raw device mapping: its writes do not pass the filter; make it a virtual disk",
                disk.label
            );
            find(FindingKind::PhysicalRdm, text);
        }
        let has_filter = disk.filters.iter().any(|name| name == component::NAME);
        if has_filter && !is_protected {
            let text = format!(
                "{} has the filter already, and not from this server: take it off in vCenter",
                disk.label
            );
            find(FindingKind::FilterPresent, text);
        }
    }
}

/// What is wrong with the domain's appliance.
pub fn of_appliance(
    t: &Transaction<'_>,
    domain: &Domain,
    now_ms: i64,
    findings: &mut Vec<Finding>,
) -> Result<(), StoreError> {
    let drva: Drva = inventory::get(t, domain.drva_id)?;
    let mut find = |kind, text: String| {
        let text = format!("domain {}: its appliance {} {text}", domain.name, drva.name);
        findings.push(Finding { kind, text });
    };
    let certificates: i64 = t.query_row(
        "SELECT count(*) FROM certificates WHERE role = 'drva' AND entity_id = ?1 \
         AND revoked_at_ms IS NULL AND expires_at_ms > ?2",
        params![drva.id, now_ms],
        |row| row.get(0),
    )?;
    if certificates == 0 {
        let text = "has no certificate in force: enrol it (POST /enrolments, then jetdr enrol)";
        find(FindingKind::ApplianceNotEnrolled, text.into());
        return Ok(());
    }
    let heard = report::last(t, drva.id)?;
    match heard {
        Some(heard) if now_ms < heard.silent_from_ms() => {}
        Some(heard) => {
            let text = format!(
                "was not heard of for {} s: start it, or mend its way to this server",
                (now_ms - heard.at_ms) / 1000
            );
            find(FindingKind::ApplianceSilent, text);
        }
        None => {
            let text = "has never reported: start it (jetdr drva --msa ...)";
            find(FindingKind::ApplianceSilent, text.into());
        }
    }
    Ok(())
}
