//! How a domain stands, for people.
//!
//! Invariant: the age of what is known is shown with it.

use super::report::{self, ReportedLog};
use crate::inventory::{self, Domain, Drva, Entity, Vm, VmState};
use crate::store::StoreError;
use crate::text::Id;
use rusqlite::Transaction;
use serde::Serialize;
use utoipa::ToSchema;

/// A machine of a domain.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct VmView {
    /// Its id.
    pub id: Id,
    /// Its instance UUID.
    pub uuid: Id,
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: VmState,
    /// Why.
    pub reason: Option<String>,
    /// Since when.
    pub state_since_ms: Option<i64>,
    /// The newest moment that can be recovered.
    pub recoverable_at_ms: Option<i64>,
    /// How long ago that is: what would be lost if the site was lost now. None: nothing can be recovered.
    pub rpo_ms: Option<i64>,
}

/// A domain.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct DomainView {
    /// Its id.
    pub id: Id,
    /// Its name.
    pub name: String,
    /// Its appliance.
    pub appliance: String,
    /// When the appliance said last how it stands. None: it never has.
    pub reported_at_ms: Option<i64>,
    /// Whether it reports as often as it should.
    pub is_heard: bool,
    /// Where its container is, as the appliance said last.
    pub store: Option<String>,
    /// Its log, as the appliance said last.
    pub log: Option<ReportedLog>,
    /// What the appliance said is wrong.
    pub alarms: Vec<String>,
    /// The newest moment at which all of its machines can be recovered. None: there is none for some.
    pub recoverable_at_ms: Option<i64>,
    /// How long ago that is.
    pub rpo_ms: Option<i64>,
    /// Its machines.
    pub vms: Vec<VmView>,
}

fn vm_view(vm: Vm, now_ms: i64) -> VmView {
    VmView {
        id: vm.id,
        uuid: vm.uuid,
        name: vm.name.to_string(),
        state: vm.state,
        reason: vm.reason,
        state_since_ms: vm.state_since_ms,
        recoverable_at_ms: vm.recoverable_at_ms,
        rpo_ms: vm.recoverable_at_ms.map(|at_ms| (now_ms - at_ms).max(0)),
    }
}

/// How a domain stands now.
pub fn domain(t: &Transaction<'_>, id: Id, now_ms: i64) -> Result<DomainView, StoreError> {
    let domain: Domain = inventory::get(t, id)?;
    let drva: Drva = inventory::get(t, domain.drva_id)?;
    let heard = report::last(t, drva.id)?;
    let said = heard
        .as_ref()
        .and_then(|heard| heard.domain(domain.name.as_str()));
    let mut statement = t.prepare("SELECT * FROM vms WHERE domain_id = ?1 ORDER BY seq")?;
    let vms = statement.query_map([id], Vm::from_row)?;
    let vms: Vec<Vm> = vms.collect::<rusqlite::Result<_>>()?;
    let vms: Vec<VmView> = vms.into_iter().map(|vm| vm_view(vm, now_ms)).collect();
    let all: Option<Vec<i64>> = vms.iter().map(|vm| vm.recoverable_at_ms).collect();
    let recoverable_at_ms = all.and_then(|all| all.into_iter().min());
    Ok(DomainView {
        id,
        name: domain.name.to_string(),
        appliance: drva.name.to_string(),
        reported_at_ms: heard.as_ref().map(|heard| heard.at_ms),
        is_heard: heard
            .as_ref()
            .is_some_and(|heard| now_ms < heard.silent_from_ms()),
        store: said.map(|of| of.store.clone()),
        log: said.map(|of| of.log.clone()),
        alarms: said.map(|of| of.alarms.clone()).unwrap_or_default(),
        recoverable_at_ms,
        rpo_ms: recoverable_at_ms.map(|at_ms| (now_ms - at_ms).max(0)),
        vms,
    })
}
