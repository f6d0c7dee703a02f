//! How machines get into a domain, in which state each is there, and how they get out of it.
//!
//! [`machines`] keeps the inventory of machines in step with vCenter ([`hardware`]); [`findings`] is what stands in
//! the way of protecting one; [`protect`], [`unprotect`] and [`pause`] are operations in steps, [`policy`] is
//! what they make in vCenter. [`report`] is what appliances say, [`states`] what follows from it, [`view`] how that is
//! shown, and [`placement`] whether an appliance works where it was told to.
//!
//! Invariant: what a machine's state says was reported by its appliance; what was asked for is not a state.

pub mod findings;
pub mod hardware;
pub mod machines;
pub mod pause;
pub mod placement;
pub mod policy;
pub mod protect;
pub mod report;
pub mod states;
pub mod unprotect;
pub mod view;

use crate::clusters::{Link, moid, refused, tasks};
use crate::executions::{Context, StepError};
use crate::inventory::{self, Domain, Entity, Vm, VmState};
use crate::store::StoreError;
use crate::text::{self, Id, Name};
use crate::vcenter::{Fault, FilterSource};
use rusqlite::{OptionalExtension, Transaction, params};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Machines of one execution, at most.
pub const MAX_VMS: usize = 200;

/// A machine, as an operation noted it in its first step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Noted {
    /// Its id here.
    pub id: Id,
    /// Its id in vCenter.
    pub moid: text::Moid,
    /// Its name, for people.
    pub name: String,
    /// The keys of its disks.
    pub disks: Vec<i32>,
    /// Whether it ran.
    pub is_on: bool,
    /// Whether it was in the domain before.
    pub was_assigned: bool,
}

impl Noted {
    /// Of a machine of the state.
    pub fn of(vm: &Vm) -> Self {
        let hardware = vm.hardware.as_ref();
        let disks = hardware.map(|found| found.disks.iter().map(|disk| disk.key).collect());
        Self {
            id: vm.id,
            moid: vm.moid.clone(),
            name: vm.name.to_string(),
            disks: disks.unwrap_or_default(),
            is_on: hardware.is_some_and(|found| found.is_powered_on),
            was_assigned: vm.domain_id.is_some(),
        }
    }
}

/// The domain of this name.
pub fn domain_named(t: &Transaction<'_>, name: &Name) -> Result<Domain, StoreError> {
    let mut statement = t.prepare("SELECT * FROM domains WHERE name = ?1")?;
    let found = statement.query_row([name], Domain::from_row).optional()?;
    if let Some(domain) = found {
        return Ok(domain);
    }
    let all: Vec<Domain> = inventory::list(t, 0, i64::MAX)?;
    let known: Vec<String> = all.iter().map(|one| one.name.to_string()).collect();
    Err(StoreError::not_found(
        "domain",
        format!("{name} (there are [{}])", known.join(", ")),
    ))
}

/// How a parameter that names machines is wrong.
pub(crate) fn check_count(vms: &[text::Label]) -> Result<(), String> {
    match vms.len() {
        1..=MAX_VMS => Ok(()),
        _ => Err(format!("vms: takes 1 to {MAX_VMS} machines")),
    }
}

/// Puts the filter on all disks of a machine, or takes it off. A machine that vCenter does not know any
/// more is let be: false.
pub(crate) fn change_filter(
    context: &Context,
    link: &Link,
    vm: &Noted,
    to: Option<&FilterSource>,
    limit: Option<Duration>,
) -> Result<bool, StepError> {
    let what = match to {
        Some(_) => format!("putting the filter on machine {}", vm.name),
        None => format!("taking the filter off machine {}", vm.name),
    };
    let moid = moid(&vm.moid)?;
    let asked = match to {
        Some(source) => link.api.attach_filter(&moid, &vm.disks, source),
        None => link.api.detach_filters(&moid, &vm.disks),
    };
    let task = match asked {
        Err(Fault::NotFound(_)) => return Ok(false),
        asked => asked.map_err(refused(&what))?,
    };
    let ended = tasks::wait_for(context, link, &task, limit, &mut || Ok(()))?;
    match ended {
        Err(Fault::NotFound(_)) => Ok(false),
        ended => ended.map_err(refused(&what)).map(|()| true),
    }
}

/// Takes the domain's policy out of vCenter, if no machine of the domain is left there.
pub(crate) fn drop_policy(
    context: &Context,
    link: &Link,
    domain: &Domain,
    except: &[Noted],
) -> Result<(), StepError> {
    let left = context.store.read(|t| {
        let mut statement = t.prepare(
            "SELECT vms.id FROM vms JOIN clusters ON clusters.id = vms.cluster_id \
             WHERE vms.domain_id = ?1 AND clusters.vcenter_id = ?2",
        )?;
        let rows = statement.query_map(params![domain.id, link.vcenter.id], |row| row.get(0))?;
        Ok(rows.collect::<rusqlite::Result<Vec<Id>>>()?)
    })?;
    let stays = |id: &&Id| !except.iter().any(|gone| gone.id == **id);
    if left.iter().any(|id| stays(&id)) {
        return Ok(());
    }
    let name = policy::name(domain);
    match policy::remove(link, domain)? {
        policy::Removed::Gone => {
            context.log(format!("storage policy {name} is not needed any more"))
        }
        policy::Removed::InUse => context.log(format!(
            "storage policy {name} stays: disks have it still, look in vCenter which"
        )),
    }
}

/// How long an appliance may take to report what it was told: it asks from time to time, as hosts do.
pub(crate) fn report_limit(context: &Context) -> Duration {
    3 * context.outside.patience.settle
}

/// Waits until the state of each of these machines is as wanted; else who is not, and why.
pub(crate) fn wait_for_states(
    context: &Context,
    vms: &[Noted],
    limit: Duration,
    is_wanted: &dyn Fn(&Vm) -> bool,
) -> Result<Vec<Vm>, StepError> {
    let since = std::time::Instant::now();
    loop {
        let found = context.store.read(|t| {
            let all = vms.iter().map(|vm| inventory::get::<Vm>(t, vm.id));
            all.collect::<Result<Vec<Vm>, StoreError>>()
        })?;
        if found.iter().all(is_wanted) {
            return Ok(found);
        }
        if since.elapsed() >= limit {
            let late = found.iter().filter(|vm| !is_wanted(vm)).map(|vm| {
                let why = vm.reason.as_deref().unwrap_or("nothing was reported of it");
                format!("machine {} is {}: {why}", vm.name, vm.state)
            });
            let late: Vec<String> = late.collect();
            return Err(StepError::failed(format!(
                "not reported within {} s: {}",
                limit.as_secs(),
                late.join("; ")
            )));
        }
        context.wait(context.outside.patience.poll)?;
    }
}

/// Whether an appliance has a machine's disks: it is at least being sent.
pub(crate) fn is_sent(vm: &Vm) -> bool {
    matches!(
        vm.state,
        VmState::InitialSync | VmState::Recoverable | VmState::Degraded
    )
}
